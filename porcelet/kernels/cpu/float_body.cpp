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
#include "vectors.h"

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

// gate / (1 + exp(-gate)) * up, a vector at a time: a value's bits do not depend on its place.
void silu_mul(const float* gate, const float* up, float* out, size_t count) {
    const Floats zero = Set::broadcast(0.0f), one = Set::broadcast(1.0f);
    const auto activated = [=](Floats x, Floats y) { return x / (one + exponential_of(zero - x)) * y; };
    size_t i = 0;
    for (; i + Set::lanes <= count; i += Set::lanes) Set::store(out + i, activated(Set::load(gate + i), Set::load(up + i)));
    const size_t rest = count - i;
    if (rest) Set::store(out + i, activated(Set::load(gate + i, rest), Set::load(up + i, rest)), rest);
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
    for (; i + Set::lanes <= count; i += Set::lanes) Set::store(to + i, Set::load(from + i));
    for (; i < count; ++i) to[i] = from_half(from[i]);
}

// What is not visible gets weight zero, and adds 1e-38 to a sum of at least one.
float weigh(float* scores, size_t visible, size_t count, float scale, float shift) {
    const float sum = soften_all(scores, count, scale, shift);
    for (size_t i = visible; i < count; ++i) scores[i] = 0.0f;
    return sum;
}

float largest_visible(float* scores, size_t visible, size_t count, float scale) {
    for (size_t i = visible; i < count; ++i) scores[i] = -INFINITY;
    return scale * largest_of(scores, count);
}

void exponentials(float* scores, size_t visible, size_t count, float scale, float* state) {
    state[0] = largest_visible(scores, visible, count, scale);
    state[1] = weigh(scores, visible, count, scale, state[0]);
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

void soften(float* scores, size_t visible, size_t count, float scale, float* state, float* out, size_t width) {
    const float largest = std::max(largest_visible(scores, visible, count, scale), state[0]);
    if (state[0] < largest) {
        const float factor = exponential(state[0] - largest);
        for (size_t i = 0; i < width; ++i) out[i] *= factor;
        state[0] = largest;
        state[1] *= factor;
    }
    state[1] += weigh(scores, visible, count, scale, largest);
}

}  // namespace

constexpr FloatBody PORCELET_BODY = {rms_norm, rope, silu_mul, exponentials, merge, soften, narrow, widen};

}  // namespace porcelet
