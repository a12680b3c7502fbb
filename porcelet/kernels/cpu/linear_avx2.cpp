// The int8 linear layer with AVX2, FMA and F16C: 8 rows a vector.
//
// Bytes 0 and 2, then 1 and 3, of each row are widened to 16 bits in place, by a mask and a shift; vpmaddwd sums their
// products with two activations exactly.
#include <immintrin.h>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Avx2 {
    static constexpr size_t lanes = 8;
    using Ints = __m256i;
    using Floats = __m256;
    struct Weights {
        __m256i even, odd;  // columns 0 and 2, columns 1 and 3
    };

    static constexpr size_t place(size_t column) { return column / 2 + column % 2 * 2; }
    static Weights weights(const uint8_t* p) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
    }
    static __m256i dot(__m256i sum, const Weights& w, const int16_t* x) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, pair(x)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, pair(x + 2)));
    }
    static __m256 halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static __m256 broadcast(float s) { return _mm256_set1_ps(s); }
    static __m256 to_float(__m256i i) { return _mm256_cvtepi32_ps(i); }
    static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
    static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }

    static __m256i pair(const int16_t* x) {
        int32_t both;
        std::memcpy(&both, x, sizeof both);
        return _mm256_set1_epi32(both);
    }
};

}  // namespace

constexpr LinearBody linear_avx2 = make_body<Avx2>();

}  // namespace porcelet
