// The float32 ops of a decode step, in plain loops that the compiler vectorises. Compiled once for each instruction set;
// PORCELET_BODY names the table to define. Sums run in an order fixed by the reduced dimension alone, so a row's result
// never depends on the rest of the batch.
#include "float_body.h"

#include <algorithm>
#include <cmath>

#include "exponential.h"

namespace porcelet {
namespace {

inline float dot(const float* a, const float* b, size_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

void rms_norm(const float* x, const float* weight, float* out, size_t width, float eps) {
    const float scale = 1.0f / std::sqrt(dot(x, x, width) / static_cast<float>(width) + eps);
    for (size_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
}

void rope(const float* x, const float* cosine, const float* sine, float* out, size_t half, bool interleaved) {
    const size_t step = interleaved ? 2 : 1, second = interleaved ? 1 : half;
    for (size_t i = 0; i < half; ++i) {
        const float a = x[i * step], b = x[i * step + second];
        out[i] = a * cosine[i] - b * sine[i];
        out[half + i] = b * cosine[i] + a * sine[i];
    }
}

void silu_mul(const float* gate, const float* up, float* out, size_t count) {
#pragma omp simd
    for (size_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// Calls visit(token, address) for every cached token of one head.
template <class Visit>
inline void each_token(CacheView view, const int64_t* pages, size_t page_size, size_t length, Visit visit) {
    for (size_t start = 0; start < length; start += page_size) {
        const float* page = view.first + static_cast<size_t>(pages[start / page_size]) * view.page_stride;
        const size_t end = std::min(length, start + page_size);
        for (size_t token = start; token < end; ++token) visit(token, page + (token - start) * view.slot_stride);
    }
}

void attend(const float* q, CacheView k, CacheView v, const int64_t* pages, size_t page_size, size_t length, size_t k_width,
            size_t v_width, float scale, float* scores, float* out) {
    float largest = -INFINITY;
    each_token(k, pages, page_size, length, [&](size_t token, const float* key) {
        scores[token] = dot(q, key, k_width) * scale;
        largest = std::max(largest, scores[token]);
    });
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < length; ++i) {
        scores[i] = exponential(scores[i] - largest);
        sum += scores[i];
    }
    std::fill(out, out + v_width, 0.0f);
    each_token(v, pages, page_size, length, [&](size_t token, const float* value) {
        const float weight = scores[token];
        for (size_t i = 0; i < v_width; ++i) out[i] += weight * value[i];
    });
    for (size_t i = 0; i < v_width; ++i) out[i] /= sum;
}

}  // namespace

constexpr FloatBody PORCELET_BODY = {rms_norm, rope, silu_mul, attend};

}  // namespace porcelet
