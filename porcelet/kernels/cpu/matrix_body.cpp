// Register-blocked float32 products, once for all instruction sets: PORCELET_BODY names the table to define. Everything else has
// internal linkage: each set is compiled for another processor, and the linker must not merge their code.
#include "matrix_body.h"

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace porcelet {
namespace {

template <class T>
constexpr size_t A_LINE = 64 / sizeof(T);  // values in a line of the cache

static_assert(TILE_ROWS == 4, "store_sums takes the sums of one tile");

// Loops over registers are unrolled early, by pragmas: otherwise GCC 12 also stores the sums to memory at each turn, though nothing reads
// them there. And `= {}` becomes a call that clears memory.
template <size_t NT, size_t N>
void clear(Floats (&sums)[NT][N]) {
#pragma GCC unroll 6
    for (size_t t = 0; t < NT; ++t)
#pragma GCC unroll 8
        for (size_t n = 0; n < N; ++n) sums[t][n] = Set::broadcast(0.0f);
}

// Up to four rows. A missing row is computed as the last one once more, and not stored: the sums of the others stay as they are.
template <class T, size_t NT, bool TAIL>
void dot_tile(MatrixOf<T> weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead, size_t first_row) {
    const T* w[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; ++r) w[r] = weight.first + (first_row + std::min(r, rows - 1)) * weight.stride;
    const T* const ahead_first = w[0] + ahead.distance + ahead.first * weight.stride;
    const T* const ahead_end = w[0] + ahead.distance + ahead.last * weight.stride;
    Floats sums[NT][TILE_ROWS];
    clear(sums);
    const auto step = [&](size_t k, auto load) {
        Floats tokens[NT];
#pragma GCC unroll 6
        for (size_t t = 0; t < NT; ++t) tokens[t] = load(x[t] + k);
#pragma GCC unroll 4
        for (size_t r = 0; r < TILE_ROWS; ++r) {
            const Floats values = load(w[r] + k);
#pragma GCC unroll 6
            for (size_t t = 0; t < NT; ++t) sums[t][r] = Set::fma(values, tokens[t], sums[t][r]);
        }
    };
    size_t k = 0;
    for (; k + Set::lanes <= K; k += Set::lanes) {
        if (k % A_LINE<T> == 0)
            for (const T* p = ahead_first + k; p < ahead_end; p += weight.stride) __builtin_prefetch(p, 0, 2);  // to level two
        step(k, [](const auto* p) { return Set::load(p); });
    }
    if constexpr (TAIL) step(k, [=](const auto* p) { return Set::load(p, K - k); });
#pragma GCC unroll 6
    for (size_t t = 0; t < NT; ++t) Set::store_sums(out[t] + first_row, sums[t], rows);
}

template <class T, size_t NT>
void dot(MatrixOf<T> weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead) {
    const auto tile = K % Set::lanes ? dot_tile<T, NT, true> : dot_tile<T, NT, false>;
    for (size_t row = 0; row < rows; row += TILE_ROWS) tile(weight, std::min(TILE_ROWS, rows - row), K, x, out, ahead, row);
}

// NV vectors of columns; the last holds `count` of them.
template <class T, size_t NT, size_t NV, bool ON>
void mix_tile(MatrixOf<T> weight, size_t rows, const float* const* x, float* const* out, size_t ahead, size_t column, size_t count) {
    Floats sums[NT][NV];
    clear(sums);
#pragma GCC unroll 6
    for (size_t t = 0; ON && t < NT; ++t) {
#pragma GCC unroll 8
        for (size_t v = 0; v + 1 < NV; ++v) sums[t][v] = Set::load(out[t] + column + v * Set::lanes);
        sums[t][NV - 1] = Set::load(out[t] + column + (NV - 1) * Set::lanes, count);
    }
    for (size_t row = 0; row < rows; ++row) {
        const T* w = weight.first + row * weight.stride + column;
        for (size_t i = 0; NT <= 3 && i < NV * Set::lanes; i += A_LINE<T>) __builtin_prefetch(w + ahead + i, 0, 2);
        Floats values[NV];
#pragma GCC unroll 8
        for (size_t v = 0; v + 1 < NV; ++v) values[v] = Set::load(w + v * Set::lanes);
        values[NV - 1] = Set::load(w + (NV - 1) * Set::lanes, count);
#pragma GCC unroll 6
        for (size_t t = 0; t < NT; ++t) {
            const Floats factor = Set::broadcast(x[t][row]);
#pragma GCC unroll 8
            for (size_t v = 0; v < NV; ++v) sums[t][v] = Set::fma(factor, values[v], sums[t][v]);
        }
    }
#pragma GCC unroll 6
    for (size_t t = 0; t < NT; ++t) {
#pragma GCC unroll 8
        for (size_t v = 0; v + 1 < NV; ++v) Set::store(out[t] + column + v * Set::lanes, sums[t][v]);
        Set::store(out[t] + column + (NV - 1) * Set::lanes, sums[t][NV - 1], count);
    }
}

template <class T, size_t NT, bool ON>
void mix(MatrixOf<T> weight, size_t rows, size_t columns, const float* const* x, float* const* out, size_t ahead) {
    constexpr size_t most = Set::sums / NT >= 8 ? 8 : 4, wide = most * Set::lanes, narrow = 4 * Set::lanes;
    size_t column = 0;
    for (; column + wide <= columns; column += wide) mix_tile<T, NT, most, ON>(weight, rows, x, out, ahead, column, Set::lanes);
    for (; column + narrow <= columns; column += narrow) mix_tile<T, NT, 4, ON>(weight, rows, x, out, ahead, column, Set::lanes);
    for (; column < columns; column += Set::lanes)
        mix_tile<T, NT, 1, ON>(weight, rows, x, out, ahead, column, std::min(Set::lanes, columns - column));
}

void add_scaled(float* out, float scale, const float* values, size_t count) {
    const Floats factor = Set::broadcast(scale);
    size_t i = 0;
    for (; i + Set::lanes <= count; i += Set::lanes)
        Set::store(out + i, Set::fma(factor, Set::load(values + i), Set::load(out + i)));
    const size_t rest = count - i;
    if (rest) Set::store(out + i, Set::fma(factor, Set::load(values + i, rest), Set::load(out + i, rest)), rest);
}

template <class T, size_t... I>
constexpr Products<T> products(std::index_sequence<I...>) {
    return {{dot<T, I + 1>...}, {mix<T, I + 1, false>...}, {mix<T, I + 1, true>...}};
}

template <class T>
constexpr Products<T> products() {
    return products<T>(std::make_index_sequence<Set::tokens>());
}

}  // namespace

constexpr MatrixBody PORCELET_BODY = {products<float>(), products<uint16_t>(), Set::tokens, add_scaled};

}  // namespace porcelet
