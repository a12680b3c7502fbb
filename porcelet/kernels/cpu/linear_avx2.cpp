// Packed linear layers with AVX2, FMA and F16C: 8 rows a vector. With AVX-VNNI, four products a lane of bytes at once; without, bytes 0
// and 2, then 1 and 3, of each row are widened to 16 bits in place, by a mask and a shift, and vpmaddwd sums their products with two
// activations exactly. Compiled twice: PORCELET_VNNI says for which of the two.
#include <immintrin.h>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Avx2 {
    static constexpr size_t lanes = 8;
    using Ints = __m256i;
    using Floats = __m256;

    static __m256i integers(int32_t i) { return _mm256_set1_epi32(i); }
    static __m256i plus(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
    static __m256i bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static __m256i low_bytes(const uint8_t* p) { return _mm256_and_si256(bytes(p), _mm256_set1_epi8(15)); }
    static __m256i high_bytes(const uint8_t* p) {
        return _mm256_and_si256(_mm256_srli_epi16(bytes(p), 4), _mm256_set1_epi8(15));
    }
    static void spread(const uint8_t* p, uint8_t add, uint8_t* low, uint8_t* high) {
        const __m256i all = _mm256_set1_epi8(static_cast<char>(add));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm256_add_epi8(low_bytes(p), all));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm256_add_epi8(high_bytes(p), all));
    }
    static __m256i times_16(__m256i i) { return _mm256_slli_epi32(i, 4); }
    static __m256i times_256(__m256i i) { return _mm256_slli_epi32(i, 8); }
    static __m256 halves(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static __m256 broadcast(float s) { return _mm256_set1_ps(s); }
    static __m256 to_float(__m256i i) { return _mm256_cvtepi32_ps(i); }
    static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
    static __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
    static __m256i four_bytes(const void* x) {
        int32_t all;
        std::memcpy(&all, x, sizeof all);
        return _mm256_set1_epi32(all);
    }
};

#ifdef PORCELET_VNNI
struct AvxVnni : Avx2 {
    static constexpr size_t vectors = 2, tokens = 3;  // of 16 registers: 6 integer sums, 6 float sums, 2 weights, 1 activation
    static constexpr bool has_limbs = true;
    using Record = ByteRecord;
    using Quad = __m256i;

    static Quad whole(const uint8_t* p) { return bytes(p); }
    static Quad low(const uint8_t* p) { return low_bytes(p); }
    static Quad high(const uint8_t* p) { return high_bytes(p); }
    static __m256i values(const Record& x, size_t quad) { return four_bytes(x.q + 4 * quad); }
    static __m256i low_values(const Record& x, size_t quad) { return four_bytes(x.low + 4 * quad); }
    static __m256i dot(__m256i sum, Quad w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
};
#else
struct Avx2Words : Avx2 {
    static constexpr size_t vectors = 1, tokens = 4;
    static constexpr bool has_limbs = false;
    using Record = WordRecord<0, 2, 1, 3>;
    struct Quad {
        __m256i even, odd;  // columns 0 and 2, columns 1 and 3
    };

    static Quad words(__m256i bytes) { return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)}; }
    static Quad whole(const uint8_t* p) { return words(bytes(p)); }
    static Quad low(const uint8_t* p) { return words(low_bytes(p)); }
    static Quad high(const uint8_t* p) { return words(high_bytes(p)); }
    static Quad values(const Record& x, size_t quad) { return {four_bytes(x.q + 4 * quad), four_bytes(x.q + 4 * quad + 2)}; }
    static __m256i dot(__m256i sum, const Quad& w, const Quad& x) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w.even, x.even));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(w.odd, x.odd));
    }
};
#endif

}  // namespace

#ifdef PORCELET_VNNI
constexpr LinearBody linear_avxvnni = make_body<AvxVnni>();
#else
constexpr LinearBody linear_avx2 = make_body<Avx2Words>();
#endif

}  // namespace porcelet
