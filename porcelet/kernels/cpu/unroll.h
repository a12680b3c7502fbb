// Loops over registers. Arrays of vectors stay in registers if every index is a constant when the compiler first looks at them: GCC 12
// unrolls ordinary loops too late for that, and then stores the arrays to memory at each turn, though nothing reads them there.
#pragma once

#include <cstddef>
#include <utility>

// Behind a lambda's parameters.
#define PORCELET_INLINE __attribute__((always_inline))

namespace porcelet {
namespace {

template <size_t... I, class Visit>
PORCELET_INLINE inline void repeat(std::index_sequence<I...>, [[maybe_unused]] Visit visit) {
    (visit(I), ...);
}

// Calls visit(0) to visit(N - 1), one behind the other.
template <size_t N, class Visit>
PORCELET_INLINE inline void repeat(Visit visit) {
    repeat(std::make_index_sequence<N>(), visit);
}

}  // namespace
}  // namespace porcelet
