#include "gradients.h"

#include <algorithm>
#include <cassert>
#include <cmath>

namespace porcelet {
namespace {

// Calls compute(row, head) for this thread's heads.
template <class Compute>
void each_head(size_t rows, size_t heads, const Team& team, Compute compute) {
    const auto [begin, end] = team.share(rows * heads);
    for (size_t i = begin; i < end; ++i) compute(i / heads, i % heads);
}

template <class Compute>
void each_row(size_t rows, const Team& team, Compute compute) {
    const auto [begin, end] = team.share(rows);
    for (size_t row = begin; row < end; ++row) compute(row);
}

// out [width] = the sum of `count` rows, each thread its columns.
void add_up(const float* partial, size_t count, size_t width, float* out, const Team& team) {
    const auto [begin, end] = team.share(width);
    std::fill(out + begin, out + end, 0.0f);
    for (size_t row = 0; row < count; ++row)
        for (size_t i = begin; i < end; ++i) out[i] += partial[row * width + i];
}

void softmax(const float* logits, size_t size, float* scores) {
    const float largest = *std::max_element(logits, logits + size);
    float sum = 0;
    for (size_t i = 0; i < size; ++i) sum += scores[i] = std::exp(logits[i] - largest);
    for (size_t i = 0; i < size; ++i) scores[i] /= sum;
}

}  // namespace

const GradientBody& gradient_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2:
        case Isa::avxvnni: return gradient_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return gradient_avx512;
#endif
        default: return gradient_scalar;
    }
}

void rms_norm_backward(const RmsNormBackwardArgs& args, size_t rows, const Team& team) {
    const size_t count = rows * args.heads, blocks = (count + args.block - 1) / args.block, width = args.width;
    each_row(blocks, team, [&](size_t block) {
        float* partial = args.partial + block * width;
        std::fill(partial, partial + width, 0.0f);
        for (size_t i = block * args.block; i < std::min(count, (block + 1) * args.block); ++i) {
            const size_t row = i / args.heads, head = i % args.heads;
            args.body->rms_norm(args.x + row * args.x_stride + head * args.x_head_stride, args.weight,
                                args.grad + row * args.grad_stride + head * args.grad_head_stride, args.dx + i * width, partial, width,
                                args.eps);
        }
    });
    team.meet();
    add_up(args.partial, blocks, width, args.dweight, team);
}

void rope_backward(const RopeBackwardArgs& args, size_t rows, const Team& team) {
    each_head(rows, args.heads, team, [&](size_t row, size_t head) {
        args.body->rope(args.grad + row * args.grad_stride + head * args.grad_head_stride, args.cosine + row * args.half,
                        args.sine + row * args.half, args.dx + (row * args.heads + head) * 2 * args.half, args.half, args.interleaved);
    });
}

void silu_mul_backward(const SiluMulBackwardArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        args.body->silu_mul(args.gate + row * args.gate_stride, args.up + row * args.up_stride, args.grad + row * args.grad_stride,
                            args.dgate + row * args.width, args.dup + row * args.width, args.width);
    });
}

void sort_experts(const SortExpertsArgs& args, size_t rows, const Team& team) {
    if (team.index) return;
    int64_t* const starts = args.starts;
    std::fill(starts, starts + args.E + 1, 0);
    for (size_t i = 0; i < rows * args.A; ++i) ++starts[args.indices[i] + 1];
    for (size_t e = 0; e < args.E; ++e) starts[e + 1] += starts[e];
    for (size_t i = 0; i < rows * args.A; ++i) {
        const int64_t place = starts[args.indices[i]]++;
        args.order[place] = static_cast<int64_t>(i);
        args.tokens[place] = static_cast<int64_t>(i / args.A);
        args.place[i] = place;
    }
    for (size_t e = args.E; e > 0; --e) starts[e] = starts[e - 1];  // each had moved to the next one's
    starts[0] = 0;
}

void sum_rows(const SumRowsArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        float* out = args.out + row * args.width;
        const int64_t* place = args.place + row * args.A;
        const float* first = args.from + static_cast<size_t>(place[0]) * args.width;
        std::copy(first, first + args.width, out);
        for (size_t a = 1; a < args.A; ++a) {
            const float* from = args.from + static_cast<size_t>(place[a]) * args.width;
            for (size_t i = 0; i < args.width; ++i) out[i] += from[i];
        }
    });
}

void activate(const ActivateArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        const float* gate = args.gate_up + row * 2 * args.F;
        args.body->activate(gate, gate + args.F, args.weights[args.order[row]], args.hidden + row * args.F, args.F);
    });
}

void activate_backward(const ActivateArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        const float* gate = args.gate_up + row * 2 * args.F;
        float *dgate = args.dgate_up + row * 2 * args.F, *hidden = args.hidden + row * args.F;
        const int64_t assignment = args.order[row];
        args.dweights[assignment] = args.body->unactivate(gate, gate + args.F, args.weights[assignment], hidden, dgate, dgate + args.F,
                                                          hidden, args.F);
    });
}

void route_backward(const RouteBackwardArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        const float *logits = args.logits + row * args.E, *weights = args.weights + row * args.A, *grad = args.grad + row * args.A;
        const int64_t* indices = args.indices + row * args.A;
        float *dlogits = args.dlogits + row * args.E, along = 0;
        for (size_t a = 0; a < args.A; ++a) along += grad[a] * weights[a];
        if (args.softmax) {
            softmax(logits, args.E, dlogits);
            for (size_t e = 0; e < args.E; ++e) dlogits[e] *= -along;
            for (size_t a = 0; a < args.A; ++a) dlogits[indices[a]] += grad[a] * weights[a];
        } else {
            std::fill(dlogits, dlogits + args.E, 0.0f);
            const float pull = args.normalize ? along / args.scale : 0.0f;
            for (size_t a = 0; a < args.A; ++a)  // 1 / (1 + exp(logit)) is 1 - score
                dlogits[indices[a]] = weights[a] * (grad[a] - pull) / (1.0f + std::exp(logits[indices[a]]));
        }
    });
}

void logprobs(const LogprobsArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        const float* logits = args.logits + row * args.V;
        args.log_sums[row] = args.body->log_sum_exp(logits, args.V);
        args.logprobs[row] = logits[args.targets[row]] - args.log_sums[row];
    });
}

void logprobs_backward(const LogprobsBackwardArgs& args, size_t rows, const Team& team) {
    each_row(rows, team, [&](size_t row) {
        float* dlogits = args.dlogits + row * args.V;
        args.body->cross_entropy(args.logits + row * args.V, args.log_sums[row], args.grad[row], dlogits, args.V);
        dlogits[args.targets[row]] += args.grad[row];
    });
}

}  // namespace porcelet
