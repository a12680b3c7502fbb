// What the driver (linear.cpp) and the bodies for one instruction set (linear_*.cpp) agree on.
//
// The packed weight is laid out as kernels/linear.py describes: tiles of 16 output rows; in a tile one block a group of
// 32 input columns: 512 bytes q [8 quads, 16 rows, 4 columns], 16 half scales, 16 half minima.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "team.h"

namespace porcelet {

constexpr size_t TILE = 16;         // output rows, one a vector lane
constexpr size_t GROUP = 32;        // input columns that share a scale
constexpr size_t BLOCK_BYTES = 576;  // one group of one tile
constexpr size_t TOKENS = 8;        // tokens one pass over a tile serves from registers

// One instruction set's body.
//   quantize  turns 32 activations into a record of `record_bytes`: signed 16-bit values, their scale, scale times their sum
//   multiply  [tokens - 1] gives `columns` <= 16 outputs a token, `out_stride` floats apart, from one tile and the
//             records [groups, tokens]
struct LinearBody {
    size_t record_bytes;
    void (*quantize)(const float* x, void* record);
    void (*multiply[TOKENS])(const uint8_t* tile, size_t groups, const void* records, float* out, size_t out_stride, size_t columns);
};

extern const LinearBody linear_scalar, linear_avx2, linear_avx512, linear_avx512vnni;

// out [rows, N] = x [rows, K] times the transposed packed weight [N, K]; K is a multiple of 32. Rows of x lie `x_stride` floats apart;
// `records` has room for rows * record_bytes(K) bytes.
struct LinearInt8Args {
    const LinearBody* body;
    const float* x;
    size_t x_stride;
    const uint8_t* packed;
    std::byte* records;
    float* out;
    size_t K, N;
};

void linear_int8(const LinearInt8Args& args, size_t rows, const Team& team);

const LinearBody& linear_body(Isa isa);  // `isa` must be supported

}  // namespace porcelet
