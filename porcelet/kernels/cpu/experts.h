// The routed experts of DeepSeekMoE on the CPU with float32 weights, as kernels/experts.py defines them.
#pragma once

#include <cstdint>

#include "matrix_body.h"
#include "team.h"

namespace porcelet {

struct ExpertsArgs {
    Isa isa;
    Matrix x;               // [T, D]
    const float* gate_up;   // [E, 2F, D], contiguous
    const float* down;      // [E, D, F], contiguous
    const int64_t* indices;  // [T, A], all of them within [0, E)
    const float* weights;   // [T, A]
    float* out;             // [T, D]
    size_t out_stride;
    size_t D, F, E, A;
    // Scratch for as many tokens as there may be:
    size_t* starts;  // [E + 1]
    size_t* order;   // [T * A]
    float* hidden;   // [T * A, F]
};

// out[t] = sum over the token's experts, ascending, of weight * down(silu(gate(x)) * up(x)).
void experts_float(const ExpertsArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
