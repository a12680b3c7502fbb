// Weights in FP8 on the CPU: e4m3 bytes with a float32 scale for each block of 128 by 128, as kernels/linear.py describes them.
//
// Every product is that of the float32 weight value * scale, rounded once, in the order of matrix_body.h: a token has the same bits
// whatever is beside it, and those that it has with the expanded weight. Few tokens meet the bytes, widened in registers; for more, a
// thread widens some rows into the second-level cache, once for all tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix.h"
#include "matrix_body.h"
#include "team.h"

namespace porcelet {

constexpr size_t FP8_BLOCK = 128;  // rows, and columns, that share one scale

// Rows of K bytes, one behind the other.
struct Fp8Matrix {
    const uint8_t* values;
    const float* scales;  // of block (r, c) at r * blocks() + c
    size_t K;

    size_t blocks() const { return (K + FP8_BLOCK - 1) / FP8_BLOCK; }
    const uint8_t* row(size_t number) const { return values + number * K; }
    const float* scales_of(size_t row) const { return scales + row / FP8_BLOCK * blocks(); }
};

// One instruction set's body, for the weight rows [first, first + rows); `first` is a multiple of TILE_ROWS.
//   dot    [tokens - 1]: out[t][r] = sum over k of weight[first + r][k] * x[t][k]
//   widen  the rows in float32, one behind the other
struct Fp8Body {
    using Dot = void (*)(const Fp8Matrix& weight, size_t first, size_t rows, const float* const* x, float* const* out);
    Dot dot[MAX_TOKENS];
    void (*widen)(const Fp8Matrix& weight, size_t first, size_t rows, float* out);
};

extern const Fp8Body fp8_scalar, fp8_avx2, fp8_avx512;

const Fp8Body& fp8_body(Isa isa);

// Some rows of a weight, ready to meet `tokens` tokens: as bytes, or as float32 in this thread's scratch number `slot`. There are two
// slots; what is in one stays until the next rows go there.
class Fp8Rows {
  public:
    Fp8Rows(Isa isa, const Fp8Matrix& weight, size_t first, size_t rows, size_t tokens, size_t slot);

    // out_of(t)[r] = row r times x_of(t), for each of the tokens.
    template <class XOf, class OutOf>
    void dot(size_t tokens, XOf x_of, OutOf out_of) const {
        if (widened_) return dot_tokens(matrix_, {widened_, weight_.K}, rows_, weight_.K, tokens, x_of, out_of);
        each_block_of(tokens, matrix_.tokens, x_of, out_of, [&](size_t, size_t, size_t count, const float** x, float** out) {
            body_.dot[count - 1](weight_, first_, rows_, x, out);
        });
    }

  private:
    const MatrixBody& matrix_;
    const Fp8Body& body_;
    const Fp8Matrix weight_;
    const size_t first_, rows_;
    const float* widened_ = nullptr;
};

struct LinearFp8Args {
    Isa isa;
    Matrix x;  // [T, K]
    Fp8Matrix weight;
    float* out;  // [T, N]
    size_t N;
};

// out = x times the transposed weight.
void linear_fp8(const LinearFp8Args& args, size_t rows, const Team& team);

}  // namespace porcelet
