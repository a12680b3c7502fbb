// The arithmetic of the int8 linear layer, once for all instruction sets. A set `V` gives vectors of V::lanes output rows:
//
//   place(column)                        where in its quad of four columns a quantised activation is stored
//   weights(p), dot(sum, w, x)           a quad of `lanes` rows; sum + the four products a lane with the quad x, exactly
//   halves(p), broadcast(s), to_float(i)
//   multiply(a, b), fma(a, b, c), store(p, v)
//
// Integer sums are exact and every output meets the same float operations in the same order (groups ascend, one fused
// multiply-add for the scale, one for the minimum). So all sets agree bit for bit, and a token's result is the same
// whatever tokens are beside it.
//
// Everything here has internal linkage: each including file is compiled for another processor, and the linker must not
// merge their code.
#pragma once

#include <cstring>
#include <limits>
#include <utility>

#include "half.h"
#include "linear.h"

namespace porcelet {
namespace {

// The largest quantised activation. Below 2^15, so that sums of 32 products with a byte stay below 2^28.
constexpr float LARGEST = 32512;

// A group of one token. A group that holds NaN or infinity has scale and sum NaN: they make every output of its token NaN.
struct Record {
    int16_t q[GROUP];
    float scale;  // largest magnitude / LARGEST
    float sum;    // scale * (q[0] + ... + q[31]), what the weights' minimum is multiplied with
};

template <class V>
void quantize(const float* x, void* out) {
    constexpr uint32_t infinity_bits = 0x7f800000;
    // Smaller groups count as zero: their reciprocal would overflow. 2^15 times the smallest normal number.
    constexpr float smallest = 32768 * std::numeric_limits<float>::min();
    Record& record = *static_cast<Record*>(out);
    // Magnitudes are compared as integers, whose order is the same but for NaN: it is larger than all and not lost.
    uint32_t largest_bits = 0;
    for (size_t i = 0; i < GROUP; ++i) {
        const uint32_t magnitude = bits_of<uint32_t>(x[i]) & 0x7fffffff;
        largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    const float largest = bits_of<float>(largest_bits);
    if (largest_bits >= infinity_bits || largest < smallest) {
        std::memset(record.q, 0, sizeof record.q);
        record.scale = record.sum = largest_bits >= infinity_bits ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
        return;
    }
    const float reciprocal = LARGEST / largest;
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits: std::nearbyint, but the compiler vectorises it.
    constexpr float shift = 12582912.0f;
    constexpr int32_t shift_bits = 0x4b400000;
    int32_t q[GROUP], total = 0;
    for (size_t i = 0; i < GROUP; ++i) q[i] = bits_of<int32_t>(x[i] * reciprocal + shift) - shift_bits;
    for (size_t i = 0; i < GROUP; ++i) total += q[i];
    for (size_t quad = 0; quad < GROUP; quad += 4)
        for (size_t i = 0; i < 4; ++i) record.q[quad + V::place(i)] = static_cast<int16_t>(q[quad + i]);
    record.scale = largest / LARGEST;
    record.sum = record.scale * static_cast<float>(total);
}

// V::lanes rows of a tile times NT tokens; `out` [NT, TILE]. The loop over quads is left to the compiler: unrolled by force, AVX2
// loses a quarter of its speed to spilled registers (GCC 12).
template <class V, size_t NT>
void multiply_rows(const uint8_t* block, size_t first_row, size_t groups, const Record* x, float* out) {
    constexpr size_t ahead = 8 * BLOCK_BYTES;
    typename V::Floats sum[NT] = {};
    for (size_t group = 0; group < groups; ++group, block += BLOCK_BYTES, x += NT) {
        if constexpr (NT <= TOKENS / 2)  // few tokens: the weights come from memory and set the pace
            for (size_t line = 0; line < BLOCK_BYTES; line += 64) __builtin_prefetch(block + ahead + line);
        typename V::Ints dot[NT] = {};
        for (size_t quad = 0; quad < GROUP; quad += 4) {
            const auto w = V::weights(block + quad * TILE + first_row * 4);
            for (size_t t = 0; t < NT; ++t) dot[t] = V::dot(dot[t], w, x[t].q + quad);
        }
        const auto scale = V::halves(block + TILE * GROUP + first_row * 2);
        const auto minimum = V::halves(block + TILE * GROUP + TILE * 2 + first_row * 2);
        for (size_t t = 0; t < NT; ++t) {
            sum[t] = V::fma(V::multiply(scale, V::broadcast(x[t].scale)), V::to_float(dot[t]), sum[t]);
            sum[t] = V::fma(minimum, V::broadcast(x[t].sum), sum[t]);
        }
    }
    for (size_t t = 0; t < NT; ++t) V::store(out + t * TILE + first_row, sum[t]);
}

template <class V, size_t NT>
void multiply(const uint8_t* tile, size_t groups, const void* records, float* out, size_t out_stride, size_t columns) {
    float rows[NT * TILE];
    for (size_t first_row = 0; first_row < TILE; first_row += V::lanes)
        multiply_rows<V, NT>(tile, first_row, groups, static_cast<const Record*>(records), rows);
    for (size_t t = 0; t < NT; ++t) std::memcpy(out + t * out_stride, rows + t * TILE, columns * sizeof(float));
}

template <class V, size_t... I>
constexpr LinearBody make_body(std::index_sequence<I...>) {
    return {sizeof(Record), quantize<V>, {multiply<V, I + 1>...}};
}

template <class V>
constexpr LinearBody make_body() {
    return make_body<V>(std::make_index_sequence<TOKENS>());
}

}  // namespace
}  // namespace porcelet
