// The int8 linear layer with AVX-512, with VNNI (which multiplies and accumulates at once) and without; otherwise as
// linear_avx2.cpp does it. Compiled twice: PORCELET_VNNI says for which of the two.
#include <immintrin.h>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Avx512 {
    static constexpr size_t lanes = 16;
    using Ints = __m512i;
    using Floats = __m512;
    struct Weights {
        __m512i even, odd;  // columns 0 and 2, columns 1 and 3
    };

    static constexpr size_t place(size_t column) { return column / 2 + column % 2 * 2; }
    static Weights weights(const uint8_t* p) {
        const __m512i bytes = _mm512_loadu_si512(p);
        return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
    }
    static __m512i dot(__m512i sum, const Weights& w, const int16_t* x) {
        return add_products(add_products(sum, w.even, pair(x)), w.odd, pair(x + 2));
    }
    static __m512 halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static __m512 broadcast(float s) { return _mm512_set1_ps(s); }
    static __m512 to_float(__m512i i) { return _mm512_cvtepi32_ps(i); }
    static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
    static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }

    static __m512i pair(const int16_t* x) {
        int32_t both;
        std::memcpy(&both, x, sizeof both);
        return _mm512_set1_epi32(both);
    }
    static __m512i add_products(__m512i sum, __m512i a, __m512i b) {
#ifdef PORCELET_VNNI
        return _mm512_dpwssd_epi32(sum, a, b);
#else
        return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
    }
};

}  // namespace

#ifdef PORCELET_VNNI
constexpr LinearBody linear_avx512vnni = make_body<Avx512>();
#else
constexpr LinearBody linear_avx512 = make_body<Avx512>();
#endif

}  // namespace porcelet
