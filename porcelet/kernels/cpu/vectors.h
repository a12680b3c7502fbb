// The vectors of one instruction set: of the one that the including file is compiled for.
//
// `Set` gives vectors of Set::lanes floats; its partial loads fill up with zeros and its partial stores touch `count` floats:
//
//   load(p), load(p, count)       of floats, or of halves that are widened
//   broadcast(s), fma(a, b, c), store(p, v), store(p, v, count)
//   store_sums(p, sums, count)    the sums of four vectors, the first `count` of them
//   larger(a, b), smaller(a, b)   lane by lane, b if either is NaN
//   power_of_two(n)               of whole numbers from -126 to 127, to which 1.5 * 2^23 was added: they stand in the low bits
//   sum(v), largest(v)            over the lanes
//
// Operators + - * / work on vectors, too.
//
// All has internal linkage: the linker must not merge what is compiled for different processors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "half.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace porcelet {
namespace {

#if defined(__AVX512F__)
struct Set {
    static constexpr size_t lanes = 16, tokens = 6, sums = 24;  // of 32 registers: 24 sums, 6 tokens, a weight
    using Floats = __m512;

    static __mmask16 mask(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    static Floats load(const float* p, size_t count) { return _mm512_maskz_loadu_ps(mask(count), p); }
    static Floats load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Floats load(const uint16_t* p, size_t count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(count), p)); }
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
    static Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    static Floats power_of_two(Floats n) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(127)), 23));
    }
    static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
    static float largest(Floats v) { return _mm512_reduce_max_ps(v); }
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
    static Floats load(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Floats load(const uint16_t* p, size_t count) {
        uint16_t halves[lanes] = {};
        for (size_t i = 0; i < count; ++i) halves[i] = p[i];
        return load(halves);
    }
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
    static Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    static Floats power_of_two(Floats n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(127)), 23));
    }
    static float sum(Floats v) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static float largest(Floats v) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
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
    static Floats load(const uint16_t* p) { return load(p, lanes); }
    static Floats load(const uint16_t* p, size_t count) {
        Floats v = {};
        for (size_t i = 0; i < count; ++i) v[i] = from_half(p[i]);
        return v;
    }
    static Floats broadcast(float s) { return Floats{s, s, s, s}; }
    static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // two roundings where there is no such instruction
    static void store(float* p, Floats v) { store(p, v, lanes); }
    static void store(float* p, Floats v, size_t count) {
        for (size_t i = 0; i < count; ++i) p[i] = v[i];
    }
    static void store_sums(float* p, const Floats* v, size_t count) {
        for (size_t i = 0; i < count; ++i) p[i] = sum(v[i]);
    }
    static Floats larger(Floats a, Floats b) { return a > b ? a : b; }
    static Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
    static Floats power_of_two(Floats n) {
        typedef unsigned Ints __attribute__((vector_size(16)));
        return reinterpret_cast<Floats>((reinterpret_cast<Ints>(n) + 127) << 23);
    }
    static float sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    static float largest(Floats v) {
        const float even = v[0] > v[2] ? v[0] : v[2], odd = v[1] > v[3] ? v[1] : v[3];
        return even > odd ? even : odd;
    }
};
#endif

using Floats = Set::Floats;

// As exponential.h has it, lane by lane; NaN of NaN.
inline Floats exponential_of(Floats x) {
    x = Set::larger(Set::broadcast(-87.0f), x);
    x = Set::smaller(Set::broadcast(87.0f), x);
    const Floats shift = Set::broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = Set::fma(x, Set::broadcast(1.44269504f), shift), n = shifted - shift;
    Floats r = Set::fma(n, Set::broadcast(-0.693359375f), x);
    r = Set::fma(n, Set::broadcast(2.12194440e-4f), r);
    Floats p = Set::broadcast(1.9875691500e-4f);
    p = Set::fma(p, r, Set::broadcast(1.3981999507e-3f));
    p = Set::fma(p, r, Set::broadcast(8.3334519073e-3f));
    p = Set::fma(p, r, Set::broadcast(4.1665795894e-2f));
    p = Set::fma(p, r, Set::broadcast(1.6666665459e-1f));
    p = Set::fma(p, r, Set::broadcast(5.0000001201e-1f));
    p = Set::fma(p, r * r, r) + Set::broadcast(1.0f);
    return p * Set::power_of_two(shifted);
}

// The largest of `count` values, whole vectors of them; NaN may be passed over.
inline float largest_of(const float* values, size_t count) {
    Floats best = Set::load(values);
    for (size_t i = Set::lanes; i < count; i += Set::lanes) best = Set::larger(best, Set::load(values + i));
    return Set::largest(best);
}

// Values become exp(scale * value - shift), whole vectors of them; their sum.
inline float soften_all(float* values, size_t count, float scale, float shift) {
    const Floats factor = Set::broadcast(scale), minus = Set::broadcast(-shift);
    Floats sums = Set::broadcast(0.0f);
    for (size_t i = 0; i < count; i += Set::lanes) {
        const Floats weights = exponential_of(Set::fma(Set::load(values + i), factor, minus));
        Set::store(values + i, weights);
        sums = sums + weights;
    }
    return Set::sum(sums);
}

}  // namespace
}  // namespace porcelet
