// How the float32 matrix drivers walk weights and tokens: threads share rows, rows go in pieces, tokens in blocks that fit the
// registers of a body.
#pragma once

#include <algorithm>
#include <utility>

#include "matrix_body.h"
#include "team.h"

namespace porcelet {

// A thread's range [first, last) of a weight's rows: whole tiles, but for the weight's last.
inline std::pair<size_t, size_t> share_rows(size_t rows, const Team& team) {
    const auto [first, last] = team.share((rows + TILE_ROWS - 1) / TILE_ROWS);
    return {std::min(rows, first * TILE_ROWS), std::min(rows, last * TILE_ROWS)};
}

// How many weight rows of K floats meet all tokens before the next ones do: they stay in the second-level cache meanwhile.
inline size_t piece_rows(size_t K) {
    constexpr size_t piece_floats = 1 << 16;
    return std::max<size_t>(1, piece_floats / (K * TILE_ROWS + 1)) * TILE_ROWS;
}

// Calls visit(block, blocks, first, count) for blocks of tokens, as few and as equal as `largest` allows.
template <class Visit>
void each_block(size_t tokens, size_t largest, Visit visit) {
    const size_t blocks = (tokens + largest - 1) / largest;
    for (size_t block = 0; block < blocks; ++block) {
        const size_t first = tokens * block / blocks;
        visit(block, blocks, first, tokens * (block + 1) / blocks - first);
    }
}

// Calls visit(block, blocks, count, x, out) with the addresses x_of(t) and out_of(t) of each block's tokens.
template <class XOf, class OutOf, class Visit>
void each_block_of(size_t tokens, size_t largest, XOf x_of, OutOf out_of, Visit visit) {
    each_block(tokens, largest, [&](size_t block, size_t blocks, size_t first, size_t count) {
        const float* x[MAX_TOKENS];
        float* out[MAX_TOKENS];
        for (size_t t = 0; t < count; ++t) {
            x[t] = x_of(first + t);
            out[t] = out_of(first + t);
        }
        visit(block, blocks, count, x, out);
    });
}

// A body's `dot` over all tokens, block by block. A lone block waits for memory, and asks for the next tile; of several each
// asks for its part of the next piece, of as many rows. One Cascade Lake core, 1536 rows of 576, 16 tokens: 80 GFLOP/s, and 68
// where all blocks ask for all of the next tile (2026-11-22).
template <class XOf, class OutOf>
void dot_tokens(const MatrixBody& body, Matrix weight, size_t rows, size_t K, size_t tokens, XOf x_of, OutOf out_of) {
    const auto multiply = [&](size_t block, size_t blocks, size_t count, const float** x, float** out) {
        const size_t distance = (blocks == 1 ? TILE_ROWS : rows) * weight.stride;
        const Ahead ahead = {distance, TILE_ROWS * block / blocks, TILE_ROWS * (block + 1) / blocks};
        body.dot[count - 1](weight, rows, K, x, out, ahead);
    };
    each_block_of(tokens, body.tokens, x_of, out_of, multiply);
}

// A body's `mix` over all tokens.
template <class XOf, class OutOf>
void mix_tokens(const MatrixBody& body, Matrix weight, size_t rows, size_t columns, size_t tokens, XOf x_of, OutOf out_of) {
    each_block_of(tokens, body.tokens, x_of, out_of, [&](size_t, size_t, size_t count, const float** x, float** out) {
        body.mix[count - 1](weight, rows, columns, x, out, 0);
    });
}

}  // namespace porcelet
