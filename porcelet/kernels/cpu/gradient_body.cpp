// The rows of a training step's forward and backward passes, in plain loops that the compiler vectorises. Compiled once for each
// instruction set; PORCELET_BODY names the table to define. Sums run in an order fixed by the width alone. No templates of the
// standard library here but min and max: the linker keeps one copy of each, and it might be one that this processor cannot run.
#include "gradient_body.h"

#include <cmath>

#include "exponential.h"

namespace porcelet {
namespace {

constexpr size_t BLOCK = 1024;  // summands added up in float; the blocks' sums are added up in double

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// y_i = x_i r w_i with r = (mean(x^2) + eps)^-1/2, so dx_i = r w_i g_i - x_i r^3 mean(g w x).
void rms_norm(const float* x, const float* weight, const float* grad, float* dx, float* dweight, size_t width, float eps) {
    float squares = 0, along = 0;
#pragma omp simd reduction(+ : squares, along)
    for (size_t i = 0; i < width; ++i) {
        squares += x[i] * x[i];
        along += grad[i] * weight[i] * x[i];
    }
    const float count = static_cast<float>(width), r = 1.0f / std::sqrt(squares / count + eps), pull = along / count * r * r * r;
#pragma omp simd
    for (size_t i = 0; i < width; ++i) {
        const float turned = grad[i] * r;
        dx[i] = turned * weight[i] - x[i] * pull;
        dweight[i] += turned * x[i];
    }
}

void rope(const float* grad, const float* cosine, const float* sine, float* dx, size_t half, bool interleaved) {
    const size_t step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
    for (size_t i = 0; i < half; ++i) {
        const float a = grad[i], b = grad[half + i];
        dx[i * step] = a * cosine[i] + b * sine[i];
        dx[i * step + second] = b * cosine[i] - a * sine[i];
    }
}

void silu_mul(const float* gate, const float* up, const float* grad, float* dgate, float* dup, size_t count) {
#pragma omp simd
    for (size_t i = 0; i < count; ++i) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s;
        dgate[i] = grad[i] * up[i] * (s + silu * (1.0f - s));
        dup[i] = grad[i] * silu;
    }
}

void activate(const float* gate, const float* up, float scale, float* out, size_t count) {
#pragma omp simd
    for (size_t i = 0; i < count; ++i) out[i] = scale * (gate[i] * sigmoid(gate[i]) * up[i]);
}

float unactivate(const float* gate, const float* up, float scale, const float* grad, float* dgate, float* dup, float* hidden,
                 size_t count) {
    float dscale = 0;
#pragma omp simd reduction(+ : dscale)
    for (size_t i = 0; i < count; ++i) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s, g = grad[i], scaled = scale * g;
        dgate[i] = scaled * up[i] * (s + silu * (1.0f - s));
        dup[i] = scaled * silu;
        hidden[i] = scale * (silu * up[i]);
        dscale += g * (silu * up[i]);
    }
    return dscale;
}

float log_sum_exp(const float* logits, size_t count) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
    double total = 0;
    for (size_t start = 0; start < count; start += BLOCK) {
        const size_t end = std::min(count, start + BLOCK);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = start; i < end; ++i) sum += exponential(logits[i] - largest);
        total += static_cast<double>(sum);
    }
    return static_cast<float>(static_cast<double>(largest) + std::log(total));
}

void cross_entropy(const float* logits, float log_sum, float grad, float* out, size_t count) {
#pragma omp simd
    for (size_t i = 0; i < count; ++i) out[i] = -grad * exponential(logits[i] - log_sum);
}

}  // namespace

constexpr GradientBody PORCELET_BODY = {rms_norm, rope, silu_mul, activate, unactivate, log_sum_exp, cross_entropy};

}  // namespace porcelet
