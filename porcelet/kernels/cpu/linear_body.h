// The arithmetic of packed linear layers, once for all instruction sets. A set `V` gives vectors of V::lanes output rows, of which it
// holds V::vectors for V::tokens tokens in registers:
//
//   Record, put(values, is_wide)              how it keeps a group of activations
//   Quad                                      four columns of `lanes` rows, as `dot` wants them
//   whole(p), low(p), high(p)                 a Quad from bytes, from the low and from the high halves of bytes
//   spread(p, add, low, high)                 the bytes of a Quad cut into their halves, and something added to each
//   values(record, quad)                      four activations, as `dot` wants them
//   integers(i)                               i in all lanes
//   dot(sum, w, x)                            sum + the four products a lane, exactly
//   has_limbs, low_values(record, quad)       of activations in two bytes: the lower ones
//   plus(i, j), times_16(i), times_256(i), halves(p), broadcast(s), to_float(i), multiply(a, b), fma(a, b, c), store(p, v)
//
// Integer sums are exact and every output meets the same float operations in the same order (groups ascend, one fused
// multiply-add for the scale, one for the minimum). So all sets agree bit for bit, and a token's result is the same
// whatever tokens are beside it.
//
// Everything here has internal linkage: each including file is compiled for another processor, and the linker must not
// merge their code.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "half.h"
#include "linear.h"
#include "unroll.h"

namespace porcelet {
namespace {

// The largest quantised activation, and that of a wide group: 127 * 256, of which both bytes fit.
constexpr float LARGEST = 127, LARGEST_WIDE = 32512;
// Activations in one byte, in wide groups in two. A group that holds NaN or infinity has scale and sum NaN: they make every
// output of its token NaN.
struct ByteRecord {
    int8_t q[GROUP], low[GROUP];  // in a wide group a value is 256 * q + low
    float scale;                  // largest magnitude / largest quantised one
    float sum;                    // scale * the sum of the values, what the weights' minimum is multiplied with
    int32_t centre, low_centre;   // what four bits' centre makes of q and low: -8 times their sum
    uint32_t is_wide;

    void put(const int32_t* values, int32_t total, bool wide) {  // `low` stays as it was where the group is not wide
        if (!wide) {
            for (size_t i = 0; i < GROUP; ++i) q[i] = static_cast<int8_t>(values[i]);
            centre = -8 * total;
            return;
        }
        int32_t high_total = 0;
        for (size_t i = 0; i < GROUP; ++i) {
            const int32_t high = (values[i] + 128) >> 8;
            q[i] = static_cast<int8_t>(high);
            low[i] = static_cast<int8_t>(values[i] - high * 256);
            high_total += high;
        }
        centre = -8 * high_total;
        low_centre = -8 * (total - 256 * high_total);
    }
};

// The same values, two bytes each, in the order in which even and odd columns of a quad are multiplied.
template <size_t... PLACES>
struct WordRecord {
    int16_t q[GROUP];
    float scale, sum;
    int32_t centre;
    uint32_t is_wide;

    void put(const int32_t* values, int32_t total, bool) {
        centre = -8 * total;
        constexpr size_t places[] = {PLACES...};
        for (size_t i = 0; i < GROUP; ++i) q[i / 4 * 4 + places[i % 4]] = static_cast<int16_t>(values[i]);
    }
};

// Magnitudes are compared as integers, whose order is the same but for NaN: it is larger than all and not lost.
inline float largest_of(const float* x) {
    uint32_t largest = 0;
    for (size_t i = 0; i < GROUP; ++i) {
        const uint32_t magnitude = bits_of<uint32_t>(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return bits_of<float>(largest);
}

template <class Record>
void quantize_group(const float* x, float largest, bool wide, Record& record) {
    // Smaller groups count as zero: their reciprocal would overflow. 2^15 times the smallest normal number.
    constexpr float smallest = 32768 * std::numeric_limits<float>::min();
    if (!(largest <= std::numeric_limits<float>::max()) || largest < smallest) {
        record = {};
        if (!(largest < smallest)) record.scale = record.sum = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float top = wide ? LARGEST_WIDE : LARGEST, reciprocal = top / largest;
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits: std::nearbyint, but the compiler vectorises it.
    constexpr float shift = 12582912.0f;
    constexpr int32_t shift_bits = 0x4b400000;
    int32_t q[GROUP], total = 0;
    for (size_t i = 0; i < GROUP; ++i) q[i] = bits_of<int32_t>(x[i] * reciprocal + shift) - shift_bits;
    for (size_t i = 0; i < GROUP; ++i) total += q[i];
    record.put(q, total, wide);
    record.scale = largest / top;
    record.sum = record.scale * static_cast<float>(total);
    record.is_wide = wide;
}

template <class V>
void quantize(const float* x, size_t groups, size_t first, size_t last, float wide_from, std::byte* out) {
    float total = 0.0f;
    for (size_t group = 0; group < groups; ++group) total += largest_of(x + group * GROUP);
    const float bound = wide_from * (total / static_cast<float>(groups));
    auto* const records = reinterpret_cast<typename V::Record*>(out);
    for (size_t group = first; group < last; ++group) {
        const float largest = largest_of(x + group * GROUP);
        quantize_group(x + group * GROUP, largest, largest > bound, records[group]);
    }
}

// Calls visit(quad, load) for the eight quads of a block; load(block) gives the quad's weights for `lanes` rows.
template <class V, Format F, class Visit>
PORCELET_INLINE inline void each_quad(Visit visit) {
    repeat<lines(F)>([&](size_t line) PORCELET_INLINE {
        if constexpr (!is_int4(F)) {
            visit(line, [=](const uint8_t* block) PORCELET_INLINE { return V::whole(block + line * LINE); });
        } else {
            visit(line, [=](const uint8_t* block) PORCELET_INLINE { return V::low(block + line * LINE); });
            visit(line + lines(F), [=](const uint8_t* block) PORCELET_INLINE { return V::high(block + line * LINE); });
        }
    });
}

// Where a group's integer sum begins, so that q counts from its centre.
template <class V, Format F>
PORCELET_INLINE inline typename V::Ints from_centre(int32_t centre) {
    if constexpr (!is_symmetric(F)) return V::integers(0);
    if constexpr (F == Format::int4_symmetric) return V::integers(centre);
    return V::times_16(V::integers(centre));
}

// R vectors of rows, the first of them number `vector` of these tiles, times NT tokens.
template <class V, Format F, size_t R, size_t NT>
void multiply_rows(const uint8_t* packed, size_t groups, const std::byte* const* records, float* const* out, size_t vector,
                   size_t columns) {
    constexpr size_t vectors_a_tile = TILE / V::lanes, block = block_bytes(F), ahead = 8 * block;
    using Record = typename V::Record;
    const uint8_t* rows[R];
    size_t half_offset[R];  // from a vector's first byte in a block to its scales
    repeat<R>([&](size_t r) PORCELET_INLINE {
        const size_t tile = (vector + r) / vectors_a_tile, place = (vector + r) % vectors_a_tile;
        rows[r] = packed + tile * groups * block + place * V::lanes * 4;
        half_offset[r] = lines(F) * LINE - place * V::lanes * 2;
    });
    const Record* x[NT];
    repeat<NT>([&](size_t t) PORCELET_INLINE { x[t] = reinterpret_cast<const Record*>(records[t]); });
    typename V::Floats sums[NT][R];
    const auto each_sum = [&](auto visit) PORCELET_INLINE {
        repeat<NT>([&](size_t t) PORCELET_INLINE { repeat<R>([&](size_t r) PORCELET_INLINE { visit(t, r); }); });
    };
    each_sum([&](size_t t, size_t r) PORCELET_INLINE { sums[t][r] = V::broadcast(0.0f); });
    for (size_t group = 0; group < groups; ++group) {
        if constexpr (NT == 1)  // the weights come from memory and set the pace
            for (size_t line = 0; line < block; line += LINE) __builtin_prefetch(rows[0] + ahead + line);
        typename V::Ints dots[NT][R];
        each_sum([&](size_t t, size_t r) PORCELET_INLINE { dots[t][r] = from_centre<V, F>(x[t][group].centre); });
        each_quad<V, F>([&](size_t quad, auto load) PORCELET_INLINE {
            typename V::Quad w[R];
            repeat<R>([&](size_t r) PORCELET_INLINE { w[r] = load(rows[r]); });
            repeat<NT>([&](size_t t) PORCELET_INLINE {
                const auto values = V::values(x[t][group], quad);
                repeat<R>([&](size_t r) PORCELET_INLINE { dots[t][r] = V::dot(dots[t][r], w[r], values); });
            });
        });
        if constexpr (V::has_limbs)
            repeat<NT>([&](size_t t) PORCELET_INLINE {
                if (!x[t][group].is_wide) return;
                asm volatile("" ::: "memory");  // or the weights above are kept for this, and push the sums out of the registers
                repeat<R>([&](size_t r) PORCELET_INLINE { dots[t][r] = V::times_256(dots[t][r]); });
                if constexpr (is_symmetric(F))
                    repeat<R>([&](size_t r) PORCELET_INLINE {
                        dots[t][r] = V::plus(dots[t][r], from_centre<V, F>(x[t][group].low_centre));
                    });
                each_quad<V, F>([&](size_t quad, auto load) PORCELET_INLINE {
                    const auto values = V::low_values(x[t][group], quad);
                    repeat<R>([&](size_t r) PORCELET_INLINE { dots[t][r] = V::dot(dots[t][r], load(rows[r]), values); });
                });
            });
        repeat<R>([&](size_t r) PORCELET_INLINE {
            const uint8_t* const halves = rows[r] + half_offset[r];
            const auto scale = V::halves(halves);
            repeat<NT>([&](size_t t) PORCELET_INLINE {
                const auto factor = V::multiply(scale, V::broadcast(x[t][group].scale));
                sums[t][r] = V::fma(factor, V::to_float(dots[t][r]), sums[t][r]);
            });
            if constexpr (!is_symmetric(F)) {
                const auto minimum = V::halves(halves + TILE * 2);
                repeat<NT>([&](size_t t) PORCELET_INLINE { sums[t][r] = V::fma(minimum, V::broadcast(x[t][group].sum), sums[t][r]); });
            }
            rows[r] += block;
        });
    }
    each_sum([&](size_t t, size_t r) PORCELET_INLINE {
        const size_t column = (vector + r) * V::lanes;
        if (column + V::lanes <= columns) return V::store(out[t] + column, sums[t][r]);
        if (column >= columns) return;
        float values[V::lanes];
        V::store(values, sums[t][r]);
        std::memcpy(out[t] + column, values, (columns - column) * sizeof(float));
    });
}

template <class V, Format F, size_t NT>
void multiply(const uint8_t* packed, size_t groups, const std::byte* const* records, float* const* out, size_t columns) {
    constexpr size_t R = V::vectors, vectors_a_tile = TILE / V::lanes;
    const size_t vectors = (columns + TILE - 1) / TILE * vectors_a_tile;
    size_t vector = 0;
    for (; vector + R <= vectors; vector += R) multiply_rows<V, F, R, NT>(packed, groups, records, out, vector, columns);
    for (; vector < vectors; ++vector) multiply_rows<V, F, 1, NT>(packed, groups, records, out, vector, columns);
}

template <class V>
void spread(Format format, const uint8_t* from, size_t blocks, uint8_t* to) {
    constexpr size_t bytes = lines(Format::int4) * LINE;
    const uint8_t moved = is_symmetric(format) ? 128 - 8 : 0;  // from one centre to the other
    for (size_t block = 0; block < blocks; ++block) {
        for (size_t i = 0; i < bytes; i += V::lanes * 4) V::spread(from + i, moved, to + i, to + bytes + i);
        std::memcpy(to + 2 * bytes, from + bytes, halves_bytes(format));
        from += block_bytes(format);
        to += block_bytes(in_bytes(format));
    }
}

template <class V, size_t... I>
constexpr LinearBody make_body(std::index_sequence<I...>) {
    return {sizeof(typename V::Record),
            (V::vectors * V::lanes + TILE - 1) / TILE,
            V::tokens,
            quantize<V>,
            {{multiply<V, Format::int8, I + 1>...},
             {multiply<V, Format::int4, I + 1>...},
             {multiply<V, Format::int8_symmetric, I + 1>...},
             {multiply<V, Format::int4_symmetric, I + 1>...}},
            spread<V>};
}

template <class V>
constexpr LinearBody make_body() {
    return make_body<V>(std::make_index_sequence<V::tokens>());
}

}  // namespace
}  // namespace porcelet
