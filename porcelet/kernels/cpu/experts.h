// The routed experts of DeepSeekMoE on the CPU with float32, FP8 or packed weights, as kernels/experts.py defines them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "float_body.h"
#include "fp8.h"
#include "jobs.h"
#include "linear.h"
#include "matrix_body.h"
#include "residency.h"
#include "team.h"

namespace porcelet {

// Which experts a token goes to. An assignment (token t, choice a) has the number t * A + a.
struct Assignments {
    const int64_t* indices;  // [T, A], all of them within [0, E)
    const float* weights;    // [T, A]
    size_t E, A;
    // Scratch for as many tokens as there may be: the assignments of expert e become order[starts[e] .. starts[e + 1]), ascending.
    size_t* starts;  // [E + 1]
    size_t* order;   // [T * A]
};

struct ExpertsArgs {
    Isa isa;
    Matrix x;              // [T, D]
    const float* gate_up;  // [E, 2F, D], contiguous
    const float* down;     // [E, D, F], contiguous
    Assignments chosen;
    float* out;  // [T, D]
    size_t out_stride;
    size_t D, F;
    float* hidden;  // scratch [T * A, F]
};

// out[t] = sum over the token's experts, ascending, of weight * down(silu(gate(x)) * up(x)).
void experts_float(const ExpertsArgs& args, size_t rows, const Team& team);

struct Fp8ExpertsArgs {
    Isa isa;
    Matrix x;                                       // [T, D]
    Fp8Matrix gate, up, down;                       // the first expert's
    size_t gate_up_stride, gate_up_scales_stride;   // bytes, and scales, from one expert to the next
    size_t down_stride, down_scales_stride;
    Assignments chosen;
    float* out;  // [T, D]
    size_t D, F;
    float* hidden;  // scratch [T * A, F]
};

// The same with weights in FP8, for any number of tokens.
void experts_fp8(const Fp8ExpertsArgs& args, size_t rows, const Team& team);

// What a team shares while it computes packed experts.
struct PackedWork {
    static constexpr size_t MOST = 32;  // tokens a block
    struct Block {
        size_t expert, first, count;  // sorted assignments [first, first + count), all to this expert
    };
    std::vector<Block> blocks;
    std::vector<std::atomic<size_t>> pieces_left;  // of each block's hidden rows, not computed yet
    size_t hidden_piece, out_piece;  // tiles a job
    Jobs hidden, out;
};

struct PackedExpertsArgs {
    const LinearBody* body;
    const FloatBody* floats;
    PackedMatrix gate, up, down;          // the first expert's
    size_t gate_up_stride, down_stride;  // bytes from one expert to the next
    const std::byte* records;            // of x, [T, D / 32]
    Assignments chosen;
    float* out;                 // [T, D]
    float* hidden;              // scratch [T * A, F]
    float wide_from;
    std::byte* hidden_records;  // scratch [T * A, F / 32]
    Residency* residency;       // of experts that stay on disk, with the layer's number there; else null
    size_t layer;
    std::shared_ptr<PackedWork> work = std::make_shared<PackedWork>();
};

// The same with packed weights; what down is multiplied with is rounded as x is.
void experts_packed(const PackedExpertsArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
