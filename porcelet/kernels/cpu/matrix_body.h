// What the float32 matrix drivers (linear_float.cpp, experts.cpp, heads.cpp) and their bodies (matrix_body.cpp, compiled once for
// each instruction set) agree on.
//
// Every output is one chain of fused multiply-adds a vector lane, and the lanes are summed in one order; the reduced dimension
// alone fixes both. So a token's result has the same bits whatever tokens, threads or outputs are beside it. Instruction sets
// differ in the last bits, for they have different numbers of lanes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

constexpr size_t TILE_ROWS = 4;   // weight rows that `dot` keeps in registers; the threads' ranges begin at multiples of it
constexpr size_t MAX_TOKENS = 6;  // of any body

// Rows of floats, or of uint16_t that are half-precision numbers, `stride` values apart.
template <class T>
struct MatrixOf {
    const T* first;
    size_t stride;

    MatrixOf from(size_t row) const { return {first + row * stride, stride}; }
};

using Matrix = MatrixOf<float>;

// What `dot` asks memory for while it computes a tile: rows [first, last) of the one that lies `distance` values on. Backwards too:
// distances are added modulo 2^64.
struct Ahead {
    size_t distance, first, last;
};

// One instruction set's products with matrices of T. `x` and `out` hold one address a token; the functions for n tokens stand at [n - 1].
//   dot         out[t][r] = sum over k of weight[r][k] * x[t][k]    for `rows` rows of K values
//   mix         out[t][c] = sum over r of x[t][r] * weight[r][c]    for `rows` rows of `columns` values
//   mix_on      the same, begun with what `out` holds; for few tokens both ask memory for what lies `ahead` values on from a row
template <class T>
struct Products {
    void (*dot[MAX_TOKENS])(MatrixOf<T> weight, size_t rows, size_t K, const float* const* x, float* const* out, Ahead ahead);
    using Mix = void (*)(MatrixOf<T> weight, size_t rows, size_t columns, const float* const* x, float* const* out, size_t ahead);
    Mix mix[MAX_TOKENS], mix_on[MAX_TOKENS];
};

// One instruction set's body.
//   tokens      how many tokens fit its registers, at most MAX_TOKENS
//   add_scaled  out += scale * values
struct MatrixBody : Products<float> {
    Products<uint16_t> with_halves;
    size_t tokens;
    void (*add_scaled)(float* out, float scale, const float* values, size_t count);

    const Products<float>& with(const float*) const { return *this; }
    const Products<uint16_t>& with(const uint16_t*) const { return with_halves; }
};

extern const MatrixBody matrix_scalar, matrix_avx2, matrix_avx512;

const MatrixBody& matrix_body(Isa isa);

}  // namespace porcelet
