// Products with FP8 weights, once for all instruction sets: PORCELET_BODY names the table to define. Everything else has internal
// linkage, as in matrix_body.cpp, whose order of sums this is.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "fp8.h"
#include "unroll.h"
#include "vectors.h"

namespace porcelet {
namespace {

// `widened(p)` gives Set::lanes values over 256. As half precision a byte's bits are that exactly, subnormals too, once they stand where
// a half has its last bits of exponent and its first of fraction; NaN, whose bits are all ones, needs the half's first bit of exponent.
#if defined(__AVX512F__)
inline Floats widened(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
    const __m256i carry = _mm256_and_si256(_mm256_add_epi16(halves, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
    return _mm512_cvtph_ps(_mm256_or_si256(halves, carry));
}
#elif defined(__AVX2__)
inline Floats widened(const uint8_t* p) {
    const __m128i bytes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i halves = _mm_and_si128(_mm_slli_epi16(bytes, 7), _mm_set1_epi16(static_cast<short>(0xbfff)));
    const __m128i carry = _mm_and_si128(_mm_add_epi16(halves, _mm_set1_epi16(0x80)), _mm_set1_epi16(0x4000));
    return _mm256_cvtph_ps(_mm_or_si128(halves, carry));
}
#else
// All 256 of them.
struct Table {
    float values[256];

    Table() {
        for (int byte = 0; byte < 256; ++byte) {
            const int exponent = byte >> 3 & 15, fraction = byte & 7;
            const float magnitude = exponent ? std::ldexp(8.0f + fraction, exponent - 18) : std::ldexp(1.0f * fraction, -17);
            values[byte] = std::copysign((byte & 127) == 127 ? NAN : magnitude, byte & 128 ? -1.0f : 1.0f);
        }
    }
};

inline Floats widened(const uint8_t* p) {
    static const Table table;
    return Floats{table.values[p[0]], table.values[p[1]], table.values[p[2]], table.values[p[3]]};
}
#endif

inline Floats widened(const uint8_t* p, size_t count) {
    uint8_t bytes[Set::lanes] = {};
    std::memcpy(bytes, p, std::min(count, Set::lanes));
    return widened(bytes);
}

// Calls full(k, scale) for every vector of a row's columns, and part(k, scale, count) for what is left of it.
template <class Full, class Part>
PORCELET_INLINE inline void each_vector(const float* scales, size_t K, Full full, Part part) {
    for (size_t start = 0; start < K; start += FP8_BLOCK) {
        const Floats scale = Set::broadcast(256.0f * *scales++);
        const size_t end = std::min(K, start + FP8_BLOCK);
        size_t k = start;
        for (; k + Set::lanes <= end; k += Set::lanes) full(k, scale);
        if (k < end) part(k, scale, end - k);
    }
}

// Up to four rows. A missing row is computed as the last one once more, and not stored. The next tile is asked for meanwhile.
template <size_t NT>
void dot_tile(const Fp8Matrix& weight, size_t first, size_t rows, const float* const* x, float* const* out, size_t place) {
    const uint8_t* w[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; ++r) w[r] = weight.row(first + std::min(r, rows - 1));
    const size_t ahead = TILE_ROWS * weight.K;
    Floats sums[NT][TILE_ROWS];
    repeat<NT>([&](size_t t) PORCELET_INLINE { repeat<TILE_ROWS>([&](size_t r) PORCELET_INLINE { sums[t][r] = Set::broadcast(0.0f); }); });
    const auto full = [&](size_t k, Floats scale) PORCELET_INLINE {
        Floats tokens[NT];
        repeat<NT>([&](size_t t) PORCELET_INLINE { tokens[t] = Set::load(x[t] + k); });
        repeat<TILE_ROWS>([&](size_t r) PORCELET_INLINE {
            if (k % 64 == 0) __builtin_prefetch(w[r] + ahead + k, 0, 2);
            const Floats values = widened(w[r] + k) * scale;
            repeat<NT>([&](size_t t) PORCELET_INLINE { sums[t][r] = Set::fma(values, tokens[t], sums[t][r]); });
        });
    };
    const auto part = [&](size_t k, Floats scale, size_t count) PORCELET_INLINE {
        repeat<TILE_ROWS>([&](size_t r) PORCELET_INLINE {
            const Floats values = widened(w[r] + k, count) * scale;
            repeat<NT>([&](size_t t) PORCELET_INLINE { sums[t][r] = Set::fma(values, Set::load(x[t] + k, count), sums[t][r]); });
        });
    };
    each_vector(weight.scales_of(first), weight.K, full, part);
    repeat<NT>([&](size_t t) PORCELET_INLINE { Set::store_sums(out[t] + place, sums[t], rows); });
}

template <size_t NT>
void dot(const Fp8Matrix& weight, size_t first, size_t rows, const float* const* x, float* const* out) {
    for (size_t row = 0; row < rows; row += TILE_ROWS)
        dot_tile<NT>(weight, first + row, std::min(TILE_ROWS, rows - row), x, out, row);
}

void widen(const Fp8Matrix& weight, size_t first, size_t rows, float* out) {
    for (size_t row = first; row < first + rows; ++row, out += weight.K) {
        const uint8_t* const w = weight.row(row);
        const auto full = [&](size_t k, Floats scale) { Set::store(out + k, widened(w + k) * scale); };
        const auto part = [&](size_t k, Floats scale, size_t count) { Set::store(out + k, widened(w + k, count) * scale, count); };
        each_vector(weight.scales_of(row), weight.K, full, part);
    }
}

template <size_t... I>
constexpr Fp8Body body(std::index_sequence<I...>) {
    return {{dot<I + 1>...}, widen};
}

}  // namespace

constexpr Fp8Body PORCELET_BODY = body(std::make_index_sequence<Set::tokens>());

}  // namespace porcelet
