// The vectors of one instruction set: of the one that the including file is compiled for.
//
// `Set` gives vectors of Set::lanes floats; its partial loads fill up with zeros and its partial stores touch `count` floats:
//
//   load(p), load(p, count), broadcast(s), fma(a, b, c), store(p, v), store(p, v, count)
//   store_sums(p, sums, count)    the sums of four vectors, the first `count` of them
//
// All has internal linkage: the linker must not merge what is compiled for different processors.
#pragma once

#include <cstddef>

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

}  // namespace
}  // namespace porcelet
