// RMSNorm, rotary embedding, SwiGLU's gate and sums. Row t of an input begins t times its stride, in floats; outputs are
// contiguous.
#pragma once

#include "float_body.h"
#include "team.h"

namespace porcelet {

// out [rows, heads, width] from x: each head is normed by itself.
struct RmsNormArgs {
    const FloatBody* body;
    const float* x;
    size_t x_stride, head_stride;
    const float* weight;
    float* out;
    size_t heads, width;
    float eps;

    size_t row_values() const { return heads * width; }
};

// out [rows, heads, 2 half] from x; cosine and sine are [rows, half].
struct RopeArgs {
    const FloatBody* body;
    const float* x;
    size_t x_stride, head_stride;
    const float *cosine, *sine;
    float* out;
    size_t heads, half;
    bool interleaved;

    size_t row_values() const { return heads * 2 * half; }
};

// out [rows, width] from two operands; a stride of 0 adds the same row to all.
struct PairArgs {
    const FloatBody* body;
    const float* first;
    size_t first_stride;
    const float* second;
    size_t second_stride;
    float* out;
    size_t width;

    size_t row_values() const { return width; }
};

// out [rows, heads, first_width + second_width]: the second's head behind the first's.
struct ConcatArgs {
    const float* first;
    size_t first_stride, first_head_stride;
    const float* second;
    size_t second_stride, second_head_stride;
    float* out;
    size_t heads, first_width, second_width;

    size_t row_values() const { return heads * (first_width + second_width); }
};

void rms_norm(const RmsNormArgs& args, size_t rows, const Team& team);
void rope(const RopeArgs& args, size_t rows, const Team& team);
void silu_mul(const PairArgs& args, size_t rows, const Team& team);
void add(const PairArgs& args, size_t rows, const Team& team);
void concat(const ConcatArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
