// One matrix a head: what takes queries into the latent space and attended latents out of it in the absorbed form of MLA
// (DeepSeek-V2 paper, section 2.1.2). The weights are slices of kv_b_proj, inputs and outputs may be slices of wider rows.
#pragma once

#include "linear.h"
#include "matrix_body.h"
#include "team.h"

namespace porcelet {

struct HeadsArgs {
    Isa isa;
    const float* x;  // [T, H, inputs]
    size_t x_token_stride, x_head_stride;
    Matrix weight;  // [H, outputs, inputs], or [H, inputs, outputs] if mixed
    size_t weight_head_stride;
    float* out;  // [T, H, outputs]
    size_t out_token_stride, out_head_stride;
    size_t heads, inputs, outputs;
    bool mixed;
};

// Head by head, out = x times the transposed weight ("thc,hvc->thv"); if mixed, times the weight ("thn,hnc->thc").
void heads_linear(const HeadsArgs& args, size_t rows, const Team& team);

// The same with packed weights: out [T, heads, N] from records [T, heads, groups].
struct HeadsPackedArgs {
    const LinearBody* body;
    PackedMatrix weight;  // the first head's
    size_t head_bytes;    // from one head's to the next
    size_t heads;
    const std::byte* records;
    float* out;
};

void heads_packed(const HeadsPackedArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
