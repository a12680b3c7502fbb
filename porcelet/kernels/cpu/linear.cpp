// Linear layers on the CPU: int8 weights in the packed layout of kernels/linear.py, float32 activations.
//
// Activations are quantised to 16 bits a token and group, so that the products are integers:
//
//   out[t, n] = sum over groups g of   scale[n, g] * x_scale[t, g] * (q[n, g] . x_q[t, g])  +  minimum[n, g] * x_sum[t, g]
//
// All threads quantise, meet, then each takes an unbroken range of tiles, which it streams from memory once for up to 32 tokens: a
// tile is 10 to 27 KB for the default model and stays in cache over the token blocks.
#include "linear.h"

#include <algorithm>
#include <cassert>

namespace porcelet {
namespace {

// Tokens that meet all tiles before the next ones do: their records stay in the second-level cache, their outputs in few pages.
// 512 tokens, K 576, N 1536 on one Cascade Lake core, with 8-bit activations: 248 GOP/s, and 217 without (2026-11-21).
constexpr size_t CHUNK = 32;

}  // namespace

const LinearBody& linear_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2: return linear_avx2;
        case Isa::avx512: return linear_avx512;
        case Isa::avx512vnni: return linear_avx512vnni;
#endif
        default: return linear_scalar;
    }
}

void linear_int8(const LinearInt8Args& args, size_t rows, const Team& team) {
    const LinearBody& body = *args.body;
    const size_t groups = args.K / GROUP, tiles = (args.N + TILE - 1) / TILE;
    // Records lie as `multiply` reads them: [token blocks, groups, tokens of the block].
    const auto block_tokens = [=](size_t first) { return std::min(TOKENS, rows - first); };
    const auto record = [&](size_t first, size_t group, size_t t) {
        return args.records + (first * groups + group * block_tokens(first) + t) * body.record_bytes;
    };
    const auto [first_piece, last_piece] = team.share(rows * groups);
    for (size_t piece = first_piece; piece < last_piece; ++piece) {
        const size_t token = piece / groups, group = piece % groups, first = token / TOKENS * TOKENS;
        body.quantize(args.x + token * args.x_stride + group * GROUP, record(first, group, token - first));
    }
    team.meet();
    const auto [first_tile, last_tile] = team.share(tiles);
    for (size_t chunk = 0; chunk < rows; chunk += CHUNK)
        for (size_t tile = first_tile; tile < last_tile; ++tile)
            for (size_t first = chunk; first < std::min(rows, chunk + CHUNK); first += TOKENS) {
                const size_t column = tile * TILE;
                body.multiply[block_tokens(first) - 1](args.packed + tile * groups * BLOCK_BYTES, groups, record(first, 0, 0),
                                                       args.out + first * args.N + column, args.N, std::min(TILE, args.N - column));
            }
}

}  // namespace porcelet
