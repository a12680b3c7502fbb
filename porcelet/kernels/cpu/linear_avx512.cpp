// Packed linear layers with AVX-512: with VNNI (bytes, four products a lane at once) and without (words, as linear_avx2.cpp does it).
// Compiled twice: PORCELET_VNNI says for which of the two.
#include <immintrin.h>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Avx512 {
    static constexpr size_t lanes = 16;
    using Ints = __m512i;
    using Floats = __m512;

    static __m512i integers(int32_t i) { return _mm512_set1_epi32(i); }
    static __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
    static __m512i bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static __m512i low_bytes(const uint8_t* p) { return _mm512_and_si512(bytes(p), _mm512_set1_epi8(15)); }
    static __m512i high_bytes(const uint8_t* p) {
        return _mm512_and_si512(_mm512_srli_epi16(bytes(p), 4), _mm512_set1_epi8(15));
    }
    static void spread(const uint8_t* p, uint8_t add, uint8_t* low, uint8_t* high) {
        const __m512i all = _mm512_set1_epi8(static_cast<char>(add));
        _mm512_storeu_si512(low, _mm512_add_epi8(low_bytes(p), all));
        _mm512_storeu_si512(high, _mm512_add_epi8(high_bytes(p), all));
    }
    static __m512i times_16(__m512i i) { return _mm512_slli_epi32(i, 4); }
    static __m512i times_256(__m512i i) { return _mm512_slli_epi32(i, 8); }
    static __m512 halves(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static __m512 broadcast(float s) { return _mm512_set1_ps(s); }
    static __m512 to_float(__m512i i) { return _mm512_cvtepi32_ps(i); }
    static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
    static __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
    static __m512i four_bytes(const void* x) {
        int32_t all;
        std::memcpy(&all, x, sizeof all);
        return _mm512_set1_epi32(all);
    }
};

#ifdef PORCELET_VNNI
struct Avx512Vnni : Avx512 {
    static constexpr size_t vectors = 3, tokens = 4;  // of 32 registers: 12 integer sums, 12 float sums, 3 weights, 4 activations
    static constexpr bool has_limbs = true;
    using Record = ByteRecord;
    using Quad = __m512i;

    static Quad whole(const uint8_t* p) { return bytes(p); }
    static Quad low(const uint8_t* p) { return low_bytes(p); }
    static Quad high(const uint8_t* p) { return high_bytes(p); }
    static __m512i values(const Record& x, size_t quad) { return four_bytes(x.q + 4 * quad); }
    static __m512i low_values(const Record& x, size_t quad) { return four_bytes(x.low + 4 * quad); }
    static __m512i dot(__m512i sum, Quad w, __m512i x) { return _mm512_dpbusd_epi32(sum, w, x); }
};
#else
struct Avx512Words : Avx512 {
    static constexpr size_t vectors = 2, tokens = 4;
    static constexpr bool has_limbs = false;
    using Record = WordRecord<0, 2, 1, 3>;
    struct Quad {
        __m512i even, odd;  // columns 0 and 2, columns 1 and 3
    };

    static Quad words(__m512i bytes) { return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)}; }
    static Quad whole(const uint8_t* p) { return words(bytes(p)); }
    static Quad low(const uint8_t* p) { return words(low_bytes(p)); }
    static Quad high(const uint8_t* p) { return words(high_bytes(p)); }
    static Quad values(const Record& x, size_t quad) { return {four_bytes(x.q + 4 * quad), four_bytes(x.q + 4 * quad + 2)}; }
    static __m512i dot(__m512i sum, const Quad& w, const Quad& x) {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(w.odd, x.odd));
    }
};
#endif

}  // namespace

#ifdef PORCELET_VNNI
constexpr LinearBody linear_avx512vnni = make_body<Avx512Vnni>();
#else
constexpr LinearBody linear_avx512 = make_body<Avx512Words>();
#endif

}  // namespace porcelet
