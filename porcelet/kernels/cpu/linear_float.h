// Linear layers on the CPU with float32 weights, read as the parameter lies: nothing is packed, training and serving share them.
#pragma once

#include "matrix_body.h"
#include "team.h"

namespace porcelet {

struct LinearFloatArgs {
    Isa isa;
    Matrix x;           // [T, K]
    Matrix weight;      // [N, K]
    const float* bias;  // [N] or null
    float* out;         // [T, N]
    size_t out_stride, K, N;
};

// out = x times the transposed weight, plus the bias.
void linear_float(const LinearFloatArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
