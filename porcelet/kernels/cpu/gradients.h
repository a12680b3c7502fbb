// Backward passes of what training repeats, and the forward passes that only training needs: gates, norms, rotations, rows of
// routed experts, log-probabilities. Matrix products are torch's. Row t of an input begins t times its stride, in floats; outputs
// are contiguous. Every sum has an order that the shapes fix, so results do not depend on the number of threads.
#pragma once

#include "gradient_body.h"
#include "isa.h"
#include "team.h"

namespace porcelet {

// dx [rows, heads, width], dweight [width]. `partial` [blocks, width]: the part of `block` heads each in the weight's gradient.
struct RmsNormBackwardArgs {
    const GradientBody* body;
    const float* x;
    size_t x_stride, x_head_stride;
    const float* grad;
    size_t grad_stride, grad_head_stride;
    const float* weight;
    float *dx, *dweight, *partial;
    size_t heads, width, block;
    float eps;
};

// dx [rows, heads, 2 half]; cosine and sine are [rows, half].
struct RopeBackwardArgs {
    const GradientBody* body;
    const float* grad;
    size_t grad_stride, grad_head_stride;
    const float *cosine, *sine;
    float* dx;
    size_t heads, half;
    bool interleaved;
};

// dgate, dup [rows, width].
struct SiluMulBackwardArgs {
    const GradientBody* body;
    const float* gate;
    size_t gate_stride;
    const float* up;
    size_t up_stride;
    const float* grad;
    size_t grad_stride;
    float *dgate, *dup;
    size_t width;
};

// Assignments (token t, choice a), numbered t * A + a, sorted by expert: those of expert e are order[starts[e] .. starts[e + 1]),
// ascending. `tokens` is order / A, and place the inverse of order.
struct SortExpertsArgs {
    const int64_t* indices;
    size_t E, A;
    int64_t *starts, *order, *tokens, *place;
};

// out [rows, width]: the sum of rows place[t * A .. t * A + A) of `from`.
struct SumRowsArgs {
    const float* from;
    const int64_t* place;
    float* out;
    size_t A, width;
};

// SwiGLU of sorted assignments from gate_up [rows, 2 F]; a row's scale is weights[order[row]]. Forward fills hidden [rows, F].
// Backward reads the gradient of `hidden` from there, leaves hidden itself in its place, and fills dgate_up [rows, 2 F] and
// dweights [rows], the latter in the order of `weights`.
struct ActivateArgs {
    const GradientBody* body;
    const float* gate_up;
    const float* weights;
    const int64_t* order;
    float* hidden;
    float *dgate_up, *dweights;
    size_t F;
};

// dlogits [rows, E] of the gates of route.h, from the weights that they gave. With s a score, w a weight, g its gradient:
//   softmax          w = scale s               dlogit = s (scale g - sum of g w), g = 0 where not chosen
//   else             w = scale s               dlogit = w g (1 - s)
//   if `normalize`   w = scale s / sum of s    dlogit = w (g - sum of g w / scale) (1 - s)
struct RouteBackwardArgs {
    const float* logits;
    const int64_t* indices;
    const float *weights, *grad;
    float* dlogits;
    size_t E, A;
    bool softmax, normalize;
    float scale;
};

// logprobs [rows] = logits[target] - log_sums from logits [rows, V].
struct LogprobsArgs {
    const GradientBody* body;
    const float* logits;
    const int64_t* targets;
    float *log_sums, *logprobs;
    size_t V;
};

// dlogits [rows, V] from grad [rows]; it may be `logits`.
struct LogprobsBackwardArgs {
    const GradientBody* body;
    const float* logits;
    const int64_t* targets;
    const float *log_sums, *grad;
    float* dlogits;
    size_t V;
};

const GradientBody& gradient_body(Isa isa);

void rms_norm_backward(const RmsNormBackwardArgs& args, size_t rows, const Team& team);
void rope_backward(const RopeBackwardArgs& args, size_t rows, const Team& team);
void silu_mul_backward(const SiluMulBackwardArgs& args, size_t rows, const Team& team);
void sort_experts(const SortExpertsArgs& args, size_t rows, const Team& team);
void sum_rows(const SumRowsArgs& args, size_t rows, const Team& team);
void activate(const ActivateArgs& args, size_t rows, const Team& team);
void activate_backward(const ActivateArgs& args, size_t rows, const Team& team);
void route_backward(const RouteBackwardArgs& args, size_t rows, const Team& team);
void logprobs(const LogprobsArgs& args, size_t rows, const Team& team);
void logprobs_backward(const LogprobsBackwardArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
