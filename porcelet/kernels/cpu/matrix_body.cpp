// Register-blocked float32 products, once for all instruction sets: PORCELET_BODY names the table to define. Everything else has
// internal linkage: each set is compiled for another processor, and the linker must not merge their code.
#include "matrix_body.h"

#include <algorithm>
#include <utility>

#include "unroll.h"
#include "vectors.h"

namespace porcelet {
namespace {

template <class T>
constexpr size_t A_LINE = 64 / sizeof(T);  // values in a line of the cache

static_assert(TILE_ROWS == 4, "store_sums takes the sums of one tile");

template <size_t NT, size_t N>
PORCELET_INLINE inline void clear(Floats (&sums)[NT][N]) {
    repeat<NT>([&](size_t t) PORCELET_INLINE { repeat<N>([&](size_t n) PORCELET_INLINE { sums[t][n] = Set::broadcast(0.0f); }); });
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
    const auto step = [&](size_t k, auto load) PORCELET_INLINE {
        Floats tokens[NT];
        repeat<NT>([&](size_t t) PORCELET_INLINE { tokens[t] = load(x[t] + k); });
        repeat<TILE_ROWS>([&](size_t r) PORCELET_INLINE {
            const Floats values = load(w[r] + k);
            repeat<NT>([&](size_t t) PORCELET_INLINE { sums[t][r] = Set::fma(values, tokens[t], sums[t][r]); });
        });
    };
    size_t k = 0;
    for (; k + Set::lanes <= K; k += Set::lanes) {
        if (k % A_LINE<T> == 0)
            for (const T* p = ahead_first + k; p < ahead_end; p += weight.stride) __builtin_prefetch(p, 0, 3);
        step(k, [](const auto* p) PORCELET_INLINE { return Set::load(p); });
    }
    if constexpr (TAIL) step(k, [=](const auto* p) PORCELET_INLINE { return Set::load(p, K - k); });
    repeat<NT>([&](size_t t) PORCELET_INLINE { Set::store_sums(out[t] + first_row, sums[t], rows); });
}

template <class T, size_t NT>
void dot(MatrixOf<T> weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead) {
    const auto tile = K % Set::lanes ? dot_tile<T, NT, true> : dot_tile<T, NT, false>;
    for (size_t row = 0; row < rows; row += TILE_ROWS) tile(weight, std::min(TILE_ROWS, rows - row), K, x, out, ahead, row);
}

// NV vectors of columns; the last holds `count` of them.
template <class T, size_t NT, size_t NV, bool ON>
void mix_tile(MatrixOf<T> weight, size_t rows, const float* const* x, float* const* out, size_t ahead, size_t column, size_t count) {
    // Calls visit(v, load, store) for each vector.
    const auto each_vector = [&](auto visit) PORCELET_INLINE {
        repeat<NV - 1>([&](size_t v) PORCELET_INLINE {
            visit(v, [](const auto* p) PORCELET_INLINE { return Set::load(p); }, [](float* p, Floats x) PORCELET_INLINE { Set::store(p, x); });
        });
        visit(NV - 1, [=](const auto* p) PORCELET_INLINE { return Set::load(p, count); },
              [=](float* p, Floats x) PORCELET_INLINE { Set::store(p, x, count); });
    };
    Floats sums[NT][NV];
    clear(sums);
    if constexpr (ON)
        repeat<NT>([&](size_t t) PORCELET_INLINE {
            each_vector([&](size_t v, auto load, auto) PORCELET_INLINE { sums[t][v] = load(out[t] + column + v * Set::lanes); });
        });
    for (size_t row = 0; row < rows; ++row) {
        const T* w = weight.first + row * weight.stride + column;
        for (size_t i = 0; NT <= 3 && i < NV * Set::lanes; i += A_LINE<T>) __builtin_prefetch(w + ahead + i, 0, 3);
        Floats values[NV];
        each_vector([&](size_t v, auto load, auto) PORCELET_INLINE { values[v] = load(w + v * Set::lanes); });
        repeat<NT>([&](size_t t) PORCELET_INLINE {
            const Floats factor = Set::broadcast(x[t][row]);
            repeat<NV>([&](size_t v) PORCELET_INLINE { sums[t][v] = Set::fma(factor, values[v], sums[t][v]); });
        });
    }
    repeat<NT>([&](size_t t) PORCELET_INLINE {
        each_vector([&](size_t v, auto, auto store) PORCELET_INLINE { store(out[t] + column + v * Set::lanes, sums[t][v]); });
    });
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
