// What the thread sanitizer cannot see in GNU's OpenMP runtime, which is built without it: a parallel region's threads begin after
// all that came before the region, and what follows the region comes after all they did. The linker puts this in the place of
// GOMP_parallel, in a build for the thread sanitizer alone (CMakeLists.txt, PORCELET_SANITIZE).

extern "C" {

void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

}

namespace {

struct Region {
    void (*body)(void*);
    void* data;
};

void enter(void* address) {
    const auto [body, data] = *static_cast<Region*>(address);
    __tsan_acquire(address);
    body(data);
    __tsan_release(address);
}

}  // namespace

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
    Region region = {body, data};
    __tsan_release(&region);
    __real_GOMP_parallel(enter, &region, threads, flags);
    __tsan_acquire(&region);
}
