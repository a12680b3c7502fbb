// Linear layers on the CPU: packed weights in the layouts of kernels/linear.py, activations rounded a token and group of 32.
//
//   out[t, n] = sum over groups g of   scale[n, g] * x_scale[t, g] * (q[n, g] . x_q[t, g])  +  minimum[n, g] * x_sum[t, g]
//
// In symmetric formats q less its centre takes the place of q, and there is no minimum.
//
// Each thread takes an unbroken range of tiles, which it streams from memory once a chunk of tokens. Where several blocks of tokens
// meet a tile of four bits, it is spread out to bytes once before.
#include "linear.h"

#include <algorithm>
#include <cassert>
#include <vector>

namespace porcelet {
namespace {

// Tokens that meet all tiles before the next ones do: their records stay in the second-level cache, their outputs in few pages.
constexpr size_t CHUNK = 64;

// Room of the calling thread, kept for its next call.
uint8_t* scratch(size_t count) {
    thread_local std::vector<uint8_t> memory;
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

}  // namespace

const LinearBody& linear_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2: return linear_avx2;
        case Isa::avxvnni: return linear_avxvnni;
        case Isa::avx512: return linear_avx512;
        case Isa::avx512vnni: return linear_avx512vnni;
#endif
        default: return linear_scalar;
    }
}

void quantize(const QuantizeArgs& args, size_t rows, const Team& team) {
    const auto [begin, end] = team.share(rows, args.heads * args.groups);
    for (size_t piece = begin; piece < end;) {
        const size_t item = piece / args.groups, first = piece % args.groups, last = std::min(args.groups, first + end - piece);
        args.body->quantize(args.x + item / args.heads * args.x_stride + item % args.heads * args.head_stride, args.groups, first, last,
                            args.wide_from, args.records + item * args.groups * args.body->record_bytes);
        piece += last - first;
    }
}

void multiply_tiles(const LinearBody& body, const PackedMatrix& weight, size_t first, size_t last, size_t tokens,
                    const std::byte* const* records, float* const* out) {
    const size_t blocks = (tokens + body.tokens - 1) / body.tokens, tile_bytes = weight.groups * block_bytes(in_bytes(weight.format));
    const bool spreads = is_int4(weight.format) && blocks > 4;
    const Format format = spreads ? in_bytes(weight.format) : weight.format;
    for (size_t tile = first; tile < last; tile += body.tiles) {
        const size_t count = std::min(body.tiles, last - tile), column = tile * TILE;
        const uint8_t* packed = weight.tile(tile);
        if (spreads) {
            uint8_t* const bytes = scratch(body.tiles * tile_bytes);
            body.spread(weight.format, packed, weight.groups * count, bytes);
            packed = bytes;
        }
        for (size_t block = 0; block < blocks; ++block) {
            const size_t begin = tokens * block / blocks, end = tokens * (block + 1) / blocks;
            float* places[MOST_TOKENS];
            for (size_t t = begin; t < end; ++t) places[t - begin] = out[t] + column;
            body.multiply[static_cast<size_t>(format)][end - begin - 1](packed, weight.groups, records + begin, places,
                                                                        std::min(count * TILE, weight.N - column));
        }
    }
}

void linear_packed(const LinearArgs& args, size_t rows, const Team& team) {
    const auto [first, last] = team.share(args.weight.tiles());
    const size_t row_bytes = args.weight.groups * args.body->record_bytes;
    for (size_t chunk = 0; chunk < rows; chunk += CHUNK) {
        const size_t tokens = std::min(CHUNK, rows - chunk);
        const std::byte* records[CHUNK];
        float* out[CHUNK];
        for (size_t t = 0; t < tokens; ++t) {
            records[t] = args.records + (chunk + t) * row_bytes;
            out[t] = args.out + (chunk + t) * args.weight.N;
        }
        multiply_tiles(*args.body, args.weight, first, last, tokens, records, out);
    }
}

}  // namespace porcelet
