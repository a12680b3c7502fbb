// Rows that become columns: neighbouring lanes are then neighbouring keys. Internal linkage: it is compiled for several processors.
#pragma once

#include <cstddef>
#include <cstring>

namespace porcelet {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int FourIndices __attribute__((vector_size(16)));

inline Four load_four(const float* p) {
    Four four;
    std::memcpy(&four, p, sizeof four);
    return four;
}

inline void turn_four(const float* from, size_t row_stride, float* to, size_t to_stride) {
    constexpr FourIndices low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    const Four a = load_four(from), b = load_four(from + row_stride);
    const Four c = load_four(from + 2 * row_stride), d = load_four(from + 3 * row_stride);
    const Four ab_low = __builtin_shuffle(a, b, low), ab_high = __builtin_shuffle(a, b, high);
    const Four cd_low = __builtin_shuffle(c, d, low), cd_high = __builtin_shuffle(c, d, high);
    const Four columns[4] = {__builtin_shuffle(ab_low, cd_low, first), __builtin_shuffle(ab_low, cd_low, second),
                             __builtin_shuffle(ab_high, cd_high, first), __builtin_shuffle(ab_high, cd_high, second)};
    for (size_t i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &columns[i], sizeof(Four));
}

// turned [width, stride] from `count` rows of `width` values, a cache line after the other.
inline void turn(const float* rows, size_t row_stride, size_t count, size_t width, float* turned, size_t stride) {
    constexpr size_t line = 16;
    for (size_t first = 0; first < count; first += line)
        for (size_t i = 0; i < width; i += 4) {
            const size_t end = first + line < count ? first + line : count, columns = width - i < 4 ? width - i : 4;
            size_t row = first;
            for (; columns == 4 && row + 4 <= end; row += 4)
                turn_four(rows + row * row_stride + i, row_stride, turned + i * stride + row, stride);
            for (; row < end; ++row)
                for (size_t j = i; j < i + columns; ++j) turned[j * stride + row] = rows[row * row_stride + j];
        }
}

}  // namespace
}  // namespace porcelet
