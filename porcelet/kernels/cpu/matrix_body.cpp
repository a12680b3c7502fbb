// Register-blocked float32 products, once for all instruction sets: PORCELET_BODY names the table to define.
//
// A set `V` gives vectors of V::lanes floats; its partial loads fill up with zeros and its partial stores touch `count` floats:
//
//   load(p), load(p, count), broadcast(s), fma(a, b, c), store(p, v), store(p, v, count)
//   store_sums(p, sums, count)    the sums of four vectors, the first `count` of them
//
// Everything but the table has internal linkage: each set is compiled for another processor, and the linker must not merge their
// code.
#include "matrix_body.h"

#include <algorithm>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace porcelet {
namespace {

static_assert(TILE_ROWS == 4, "store_sums takes the sums of one tile");

#if defined(__AVX512F__)
struct Set {
    static constexpr size_t lanes = 16, tokens = 6, sums = 24;  // of 32 registers: 24 sums, 6 tokens, a weight
    using Floats = __m512;

    static __mmask16 mask(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load(const float* p, size_t count) { return _mm512_maskz_loadu_ps(mask(count), p); }
    static Floats broadcast(float s) { return _mm512_set1_ps(s); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
    static void store(float* p, Floats v, size_t count) { _mm512_mask_storeu_ps(p, mask(count), v); }
    static void store_sums(float* p, const Floats* v, size_t count) {
        const Floats ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        const Floats cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        const Floats quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
        _mm_mask_storeu_ps(p, static_cast<__mmask8>((1u << count) - 1), sums);
    }
};
#elif defined(__AVX2__)
struct Set {
    static constexpr size_t lanes = 8, tokens = 3, sums = 12;  // of 16 registers: 12 sums, 3 tokens, a weight
    using Floats = __m256;

    static __m256i mask(size_t count) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
    }
    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static Floats load(const float* p, size_t count) { return _mm256_maskload_ps(p, mask(count)); }
    static Floats broadcast(float s) { return _mm256_set1_ps(s); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static void store(float* p, Floats v, size_t count) { _mm256_maskstore_ps(p, mask(count), v); }
    static void store_sums(float* p, const Floats* v, size_t count) {
        const Floats ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
        const Floats cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
        const Floats halves = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
        const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
        _mm_maskstore_ps(p, _mm256_castsi256_si128(mask(count)), sums);
    }
};
#else
struct Set {
    static constexpr size_t lanes = 4, tokens = 3, sums = 12;
    typedef float Floats __attribute__((vector_size(16)));  // the compiler's own: as narrow as the processor needs

    static Floats load(const float* p) { return Floats{p[0], p[1], p[2], p[3]}; }
    static Floats load(const float* p, size_t count) {
        Floats v = {};
        for (size_t i = 0; i < count; ++i) v[i] = p[i];
        return v;
    }
    static Floats broadcast(float s) { return Floats{s, s, s, s}; }
    static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // two roundings where there is no such instruction
    static void store(float* p, Floats v) { store(p, v, lanes); }
    static void store(float* p, Floats v, size_t count) {
        for (size_t i = 0; i < count; ++i) p[i] = v[i];
    }
    static void store_sums(float* p, const Floats* v, size_t count) {
        for (size_t i = 0; i < count; ++i) p[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    }
};
#endif

using Floats = Set::Floats;

// Up to four rows. A missing row is computed as the last one once more, and not stored: the sums of the others stay as they are.
template <size_t NT, bool TAIL>
void dot_tile(Matrix weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead, size_t first_row) {
    const float* w[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; ++r) w[r] = weight.first + (first_row + std::min(r, rows - 1)) * weight.stride;
    const float* const ahead_first = w[0] + ahead.distance + ahead.first * weight.stride;
    const float* const ahead_end = w[0] + ahead.distance + ahead.last * weight.stride;
    Floats sums[NT][TILE_ROWS] = {};
    const auto step = [&](size_t k, auto load) {
        Floats tokens[NT];
        for (size_t t = 0; t < NT; ++t) tokens[t] = load(x[t] + k);
        for (size_t r = 0; r < TILE_ROWS; ++r) {
            const Floats values = load(w[r] + k);
            for (size_t t = 0; t < NT; ++t) sums[t][r] = Set::fma(values, tokens[t], sums[t][r]);
        }
    };
    size_t k = 0;
    for (; k + Set::lanes <= K; k += Set::lanes) {
        for (const float* p = ahead_first + k; p < ahead_end; p += weight.stride) __builtin_prefetch(p, 0, 2);  // to level two
        step(k, [](const float* p) { return Set::load(p); });
    }
    if constexpr (TAIL) step(k, [=](const float* p) { return Set::load(p, K - k); });
    for (size_t t = 0; t < NT; ++t) Set::store_sums(out[t] + first_row, sums[t], rows);
}

template <size_t NT>
void dot(Matrix weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead) {
    const auto tile = K % Set::lanes ? dot_tile<NT, true> : dot_tile<NT, false>;
    for (size_t row = 0; row < rows; row += TILE_ROWS) tile(weight, std::min(TILE_ROWS, rows - row), K, x, out, ahead, row);
}

// NV vectors of columns; the last holds `count` of them.
template <size_t NT, size_t NV>
void mix_tile(Matrix weight, size_t rows, const float* const* x, float* const* out, size_t column, size_t count) {
    Floats sums[NT][NV] = {};
    for (size_t row = 0; row < rows; ++row) {
        const float* w = weight.first + row * weight.stride + column;
        Floats values[NV];
        for (size_t v = 0; v + 1 < NV; ++v) values[v] = Set::load(w + v * Set::lanes);
        values[NV - 1] = Set::load(w + (NV - 1) * Set::lanes, count);
        for (size_t t = 0; t < NT; ++t)
            for (size_t v = 0; v < NV; ++v) sums[t][v] = Set::fma(Set::broadcast(x[t][row]), values[v], sums[t][v]);
    }
    for (size_t t = 0; t < NT; ++t) {
        for (size_t v = 0; v + 1 < NV; ++v) Set::store(out[t] + column + v * Set::lanes, sums[t][v]);
        Set::store(out[t] + column + (NV - 1) * Set::lanes, sums[t][NV - 1], count);
    }
}

template <size_t NT>
void mix(Matrix weight, size_t rows, size_t columns, const float* const* x, float* const* out) {
    constexpr size_t vectors = Set::sums / NT >= 8 ? 8 : 4, width = vectors * Set::lanes;
    size_t column = 0;
    for (; column + width <= columns; column += width) mix_tile<NT, vectors>(weight, rows, x, out, column, Set::lanes);
    for (; column < columns; column += Set::lanes)
        mix_tile<NT, 1>(weight, rows, x, out, column, std::min(Set::lanes, columns - column));
}

void add_scaled(float* out, float scale, const float* values, size_t count) {
    const Floats factor = Set::broadcast(scale);
    size_t i = 0;
    for (; i + Set::lanes <= count; i += Set::lanes)
        Set::store(out + i, Set::fma(factor, Set::load(values + i), Set::load(out + i)));
    const size_t rest = count - i;
    if (rest) Set::store(out + i, Set::fma(factor, Set::load(values + i, rest), Set::load(out + i, rest)), rest);
}

template <size_t... I>
constexpr MatrixBody body(std::index_sequence<I...>) {
    return {Set::tokens, {dot<I + 1>...}, {mix<I + 1>...}, add_scaled};
}

}  // namespace

constexpr MatrixBody PORCELET_BODY = body(std::make_index_sequence<Set::tokens>());

}  // namespace porcelet
