// The float32 ops of a decode step, in plain loops that the compiler vectorises. Compiled once for each instruction set;
// PORCELET_BODY names the table to define. Sums run in an order fixed by the reduced dimension alone, so a row's result
// never depends on the rest of the batch.
#include "float_body.h"

#include <algorithm>
#include <cmath>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "exponential.h"
#include "half.h"

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

void narrow(const float* from, uint16_t* to, size_t count) {
    size_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) to[i] = to_half(from[i]);
}

void widen(const uint16_t* from, float* to, size_t count) {
    size_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < count; ++i) to[i] = from_half(from[i]);
}

void exponentials(float* scores, size_t count, float scale, float* state) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; ++i) {
        scores[i] *= scale;
        largest = std::max(largest, scores[i]);
    }
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) {
        scores[i] = exponential(scores[i] - largest);
        sum += scores[i];
    }
    state[0] = largest;
    state[1] = sum;
}

void merge(const float* partial, size_t parts, size_t v_width, float* out) {
    const size_t stride = v_width + 2;
    float largest = -INFINITY, sum = 0;
    for (size_t part = 0; part < parts; ++part) largest = std::max(largest, partial[part * stride + v_width]);
    std::fill(out, out + v_width, 0.0f);
    for (size_t part = 0; part < parts; ++part) {
        const float* values = partial + part * stride;
        const float weight = exponential(values[v_width] - largest);
        sum += weight * values[v_width + 1];
        for (size_t i = 0; i < v_width; ++i) out[i] += weight * values[i];
    }
    for (size_t i = 0; i < v_width; ++i) out[i] /= sum;
}

// Whole rows are computed, so that a value never meets a loop's scalar end: its bits do not depend on what is visible beside it.
void soften(float* scores, size_t visible, size_t count, float scale, float* state, float* out, size_t width) {
    for (size_t i = visible; i < count; ++i) scores[i] = -INFINITY;
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; ++i) {
        scores[i] *= scale;
        largest = std::max(largest, scores[i]);
    }
    largest = std::max(largest, state[0]);
    const float factor = exponential(state[0] - largest);
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) {
        scores[i] = exponential(scores[i] - largest);
        sum += scores[i];
    }
    for (size_t i = visible; i < count; ++i) scores[i] = 0.0f;
    if (state[0] < largest)
        for (size_t i = 0; i < width; ++i) out[i] *= factor;
    state[0] = largest;
    state[1] = state[1] * factor + sum;
}

}  // namespace

constexpr FloatBody PORCELET_BODY = {rms_norm, rope, silu_mul, exponentials, merge, soften, narrow, widen};

}  // namespace porcelet
