// What the drivers of the backward passes (gradients.cpp) and their bodies (gradient_body.cpp, compiled once for each instruction
// set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace porcelet {

// One instruction set's body. `grad` is the gradient of the output; every function does one row or one head.
//   rms_norm        dx, and adds the row's part to dweight [width]
//   rope            grad turned back; `grad` is half-split, dx is interleaved or half-split as the input was
//   silu_mul        dgate and dup of silu(gate) * up
//   activate        out = scale * silu(gate) * up
//   unactivate      the same again into `hidden`, dgate and dup; returns the gradient of `scale`. `hidden` may be `grad`
//   log_sum_exp     log of the sum of exp(logits)
//   cross_entropy   out = -grad * exp(logits - log_sum): what grad * (target's logit - log_sum) gives every logit by log_sum
struct GradientBody {
    void (*rms_norm)(const float* x, const float* weight, const float* grad, float* dx, float* dweight, size_t width, float eps);
    void (*rope)(const float* grad, const float* cosine, const float* sine, float* dx, size_t half, bool interleaved);
    void (*silu_mul)(const float* gate, const float* up, const float* grad, float* dgate, float* dup, size_t count);
    void (*activate)(const float* gate, const float* up, float scale, float* out, size_t count);
    float (*unactivate)(const float* gate, const float* up, float scale, const float* grad, float* dgate, float* dup, float* hidden,
                        size_t count);
    float (*log_sum_exp)(const float* logits, size_t count);
    void (*cross_entropy)(const float* logits, float log_sum, float grad, float* out, size_t count);
};

extern const GradientBody gradient_scalar, gradient_avx2, gradient_avx512;

}  // namespace porcelet
