#include "memory.h"

#include <cstdlib>  // says whose C library it is

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace porcelet {

bool keep_freed_memory() {
#ifdef __GLIBC__
    // Before 2.35 the C library took no threshold above 32 MiB.
    const bool from_heap = mallopt(M_MMAP_THRESHOLD, 1 << 30) || mallopt(M_MMAP_MAX, 0);
    return from_heap && mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_TOP_PAD, 1 << 26);
#else
    return false;
#endif
}

void return_freed_memory() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace porcelet
