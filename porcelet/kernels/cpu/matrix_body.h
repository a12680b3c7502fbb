// What the float32 matrix drivers (linear_float.cpp, experts.cpp, heads.cpp) and their bodies (matrix_body.cpp, compiled once for
// each instruction set) agree on.
//
// Every output is one chain of fused multiply-adds a vector lane, summed at the end in one order, both fixed by the reduced
// dimension alone. So a token's result has the same bits whatever tokens, threads or outputs are beside it; instruction sets differ
// in the last bits, for they have different numbers of lanes.
#pragma once

#include <algorithm>
#include <cstddef>

#include "isa.h"

namespace porcelet {

constexpr size_t TILE_ROWS = 4;   // weight rows that `dot` keeps in registers; the threads' ranges begin at multiples of it
constexpr size_t MAX_TOKENS = 6;  // of any body

// Float rows `stride` apart.
struct Matrix {
    const float* first;
    size_t stride;

    Matrix from(size_t row) const { return {first + row * stride, stride}; }
};

// One instruction set's body. `x` and `out` hold one address a token; the functions for n tokens stand at [n - 1].
//   tokens      how many tokens fit its registers, at most MAX_TOKENS
//   dot         out[t][r] = sum over k of weight[r][k] * x[t][k]    for `rows` rows of K values
//   mix         out[t][c] = sum over r of x[t][r] * weight[r][c]    for `rows` rows of `columns` values
//   add_scaled  out += scale * values
struct MatrixBody {
    size_t tokens;
    void (*dot[MAX_TOKENS])(Matrix weight, size_t rows, size_t K, const float* const* x, float* const* out);
    void (*mix[MAX_TOKENS])(Matrix weight, size_t rows, size_t columns, const float* const* x, float* const* out);
    void (*add_scaled)(float* out, float scale, const float* values, size_t count);
};

extern const MatrixBody matrix_scalar, matrix_avx2, matrix_avx512;

const MatrixBody& matrix_body(Isa isa);

// How many weight rows of K floats meet all tokens before the next ones do: they stay in the second-level cache meanwhile.
inline size_t piece_rows(size_t K) {
    constexpr size_t piece_floats = 1 << 16;
    return std::max<size_t>(1, piece_floats / (K * TILE_ROWS + 1)) * TILE_ROWS;
}

// Calls visit(first, count) for blocks of tokens, as few and as equal as `largest` allows.
template <class Visit>
void each_block(size_t tokens, size_t largest, Visit visit) {
    const size_t blocks = (tokens + largest - 1) / largest;
    for (size_t block = 0; block < blocks; ++block) {
        const size_t first = tokens * block / blocks;
        visit(first, tokens * (block + 1) / blocks - first);
    }
}

// `kernel` (a body's dot or mix) over all tokens, block by block: token t is read at x_of(t) and written at out_of(t).
template <class Kernel, class XOf, class OutOf>
void each_token(const MatrixBody& body, const Kernel& kernel, Matrix weight, size_t rows, size_t width, size_t tokens, XOf x_of,
                OutOf out_of) {
    each_block(tokens, body.tokens, [&](size_t first, size_t count) {
        const float* x[MAX_TOKENS];
        float* out[MAX_TOKENS];
        for (size_t t = 0; t < count; ++t) {
            x[t] = x_of(first + t);
            out[t] = out_of(first + t);
        }
        kernel[count - 1](weight, rows, width, x, out);
    });
}

}  // namespace porcelet
