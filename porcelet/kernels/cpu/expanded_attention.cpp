#include "expanded_attention.h"

#include <algorithm>
#include <cstring>

#include "half.h"
#include "prompt_block.h"
#include "turn.h"

namespace porcelet {
namespace {

constexpr size_t BLOCK_TOKENS = 512;  // new tokens for which a page is expanded once: as many as a step has by default

// The new tokens [first, last) of a sequence, with one head.
struct Part {
    size_t sequence, head, first, last;
};

// turned [columns, whole tiles of rows] of a packed weight; the values of PackedWeight.dequantize, for q * scale is exact.
void unpack_turned(const PackedMatrix& weight, float* turned) {
    const bool nibbles = is_int4(weight.format), symmetric = is_symmetric(weight.format);
    const uint32_t mask = nibbles ? 15 : 255;
    const float centre = nibbles ? 8 : 128;
    const size_t stride = weight.tiles() * TILE, blocks = weight.tiles() * weight.groups, halves = lines(weight.format) * LINE;
    for (size_t i = 0; i < blocks; ++i) {
        const size_t tile = i / weight.groups, group = i % weight.groups;
        const uint8_t* const block = weight.tile(tile) + group * block_bytes(weight.format);
        uint16_t stored[2 * TILE] = {};
        std::memcpy(stored, block + halves, halves_bytes(weight.format));
        float scales[TILE], minima[TILE];
        for (size_t lane = 0; lane < TILE; ++lane) {
            scales[lane] = from_half(stored[lane]);
            minima[lane] = symmetric ? -centre * scales[lane] : from_half(stored[TILE + lane]);
        }
        for (size_t column = 0; column < GROUP; ++column) {
            const size_t quad = column / 4, line = quad % lines(weight.format);
            const size_t shift = column % 4 * 8 + (nibbles && quad != line ? 4 : 0);
            uint32_t quads[TILE];  // as words, so that the compiler has vectors of them
            std::memcpy(quads, block + line * LINE, sizeof quads);
            float* const out = turned + (group * GROUP + column) * stride + tile * TILE;
            for (size_t lane = 0; lane < TILE; ++lane)
                out[lane] = static_cast<float>(static_cast<int32_t>(quads[lane] >> shift & mask)) * scales[lane] + minima[lane];
        }
    }
}

PackedMatrix packed_of(const HeadsMatrix& matrix, size_t head) {
    PackedMatrix packed = matrix.packed;
    packed.first += head * matrix.head_bytes;
    return packed;
}

// A head's W_UK [nope, latent].
Matrix keys_matrix(const ExpandedArgs& args, size_t head) {
    if (!args.w_uk.packed.first) return {args.w_uk.floats.first + head * args.w_uk.head_stride, args.w_uk.floats.stride};
    thread_local Room room;
    const PackedMatrix packed = packed_of(args.w_uk, head);
    const size_t stride = packed.tiles() * TILE;
    float* const turned = room.sized(args.nope * stride);
    unpack_turned(packed, turned);
    return {turned, stride};
}

// A head's W_UV [value, latent].
Matrix values_matrix(const ExpandedArgs& args, size_t head) {
    if (!args.w_uv.packed.first) return {args.w_uv.floats.first + head * args.w_uv.head_stride, args.w_uv.floats.stride};
    thread_local Room turned_room, room;
    const PackedMatrix packed = packed_of(args.w_uv, head);
    const size_t stride = packed.tiles() * TILE;
    float *const turned = turned_room.sized(args.latent * stride), *const rows = room.sized(args.value * args.latent);
    unpack_turned(packed, turned);
    turn(turned, stride, args.latent, args.value, rows, args.latent);
    return {rows, args.latent};
}

void attend_part(const ExpandedArgs& args, const Part& part) {
    const size_t page_size = args.page_size, width = args.latent + args.rope;
    const size_t begin = static_cast<size_t>(args.offsets[part.sequence]), end = static_cast<size_t>(args.offsets[part.sequence + 1]);
    const size_t before = static_cast<size_t>(args.lengths[part.sequence]) - (end - begin), first = begin + part.first;
    const MatrixBody& matrices = *args.matrices;
    const Matrix w_uk = keys_matrix(args, part.head), w_uv = values_matrix(args, part.head);
    thread_local Room keys_room, values_room, widened_room;
    float* const keys = keys_room.sized((args.nope + args.rope) * page_size);  // turned over
    float* const values = values_room.sized(page_size * args.value);
    float* const widened = widened_room.sized(page_size * width);
    const Matrix nope_keys = {keys, page_size}, rope_keys = nope_keys.from(args.nope);
    PromptBlock block(*args.body, matrices, part.last - part.first, 1, before + part.first + 1, page_size, args.value, args.scale);
    for (size_t token = 0; token < block.length(); token += page_size) {
        const size_t count = std::min(page_size, block.length() - token);
        const size_t page = static_cast<size_t>(args.tables[part.sequence * args.max_pages + token / page_size]);
        const Matrix latents = args.cache.floats(*args.body, page, 0, count, width, widened);
        // Rows of W_UK as tokens and latents as the weight: the keys come out turned over.
        each_rows(
            matrices, args.nope, [&](size_t row) { return w_uk.from(row).first; }, [&](size_t row) { return keys + row * page_size; },
            [&](size_t n, const float** x, float** out) { matrices.dot[n - 1](latents, count, args.latent, x, out, {0, 0, 0}); });
        turn(latents.first + args.latent, latents.stride, count, args.rope, keys + args.nope * page_size, page_size);
        each_rows(
            matrices, count, [&](size_t row) { return latents.from(row).first; }, [&](size_t row) { return values + row * args.value; },
            [&](size_t n, const float** x, float** out) { matrices.dot[n - 1](w_uv, args.value, args.latent, x, out, {0, 0, 0}); });
        block.go_over(
            token, count,
            [&](size_t row, size_t n, float** out) {
                const float *nope[MAX_TOKENS], *rope[MAX_TOKENS];
                for (size_t i = 0; i < n; ++i) {
                    nope[i] = args.q_nope.at(first + row + i, part.head);
                    rope[i] = args.q_rope.at(first + row + i, part.head);
                }
                matrices.mix[n - 1](nope_keys, args.nope, count, nope, out, 0);
                matrices.mix_on[n - 1](rope_keys, args.rope, count, rope, out, 0);
            },
            [&] { return Matrix{values, args.value}; });
    }
    block.finish([&](size_t row) { return args.out + ((first + row) * args.heads + part.head) * args.value; });
}

}  // namespace

void attention_expanded(const ExpandedArgs& args, size_t rows, const Team& team) {
    size_t number = 0;  // parts go round: neighbours are about equally long
    for (size_t b = 0; static_cast<size_t>(args.offsets[b]) < rows; ++b) {
        if (args.offsets[b] < *args.first) continue;
        const size_t count = static_cast<size_t>(args.offsets[b + 1] - args.offsets[b]);
        for (size_t first = 0; first < count; first += BLOCK_TOKENS)
            for (size_t head = 0; head < args.heads; ++head)
                if (number++ % team.size == team.index) attend_part(args, {b, head, first, std::min(count, first + BLOCK_TOKENS)});
    }
}

}  // namespace porcelet
