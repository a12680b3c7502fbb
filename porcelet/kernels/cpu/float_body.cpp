// The float32 ops of a decode step, in plain loops that the compiler vectorises. Compiled once for each instruction set;
// PORCELET_BODY names the table to define. Sums run in an order fixed by the reduced dimension alone, so a row's result
// never depends on the rest of the batch.
#include "float_body.h"

#include <algorithm>
#include <cmath>
#include <utility>

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

// Cached tokens are read four at a time: four sums are under way at once, and an output is read and written once for four values.
constexpr size_t FOUR = 4;

// The addresses of `count` <= 4 cached tokens from `token` on, all in one page; half precision goes through `widened`.
inline void locate(const CacheView& view, const AttendArgs& args, size_t token, size_t count, size_t width, const float** rows) {
    const size_t page = static_cast<size_t>(args.pages[token / args.page_size]);
    const size_t place = page * view.page_stride + token % args.page_size * view.slot_stride;
    for (size_t i = 0; i < count; ++i) {
        if (view.type == CacheType::float32) {
            rows[i] = static_cast<const float*>(view.first) + place + i * view.slot_stride;
        } else {
            widen(static_cast<const uint16_t*>(view.first) + place + i * view.slot_stride, args.widened + i * width, width);
            rows[i] = args.widened + i * width;
        }
    }
}

// Calls visit(token, rows) for four tokens at once, then rest(token, row) for those left over at the end.
template <class Visit, class Rest>
inline void each_four(const CacheView& view, const AttendArgs& args, size_t width, Visit visit, Rest rest) {
    const float* rows[FOUR];
    size_t token = args.begin;
    for (; token + FOUR <= args.end; token += FOUR) {
        locate(view, args, token, FOUR, width, rows);
        visit(token - args.begin, rows);
    }
    for (; token < args.end; ++token) {
        locate(view, args, token, 1, width, rows);
        rest(token - args.begin, rows[0]);
    }
}

inline void four_dots(const float* q, const float* const* keys, size_t width, float scale, float* out) {
    const float *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (size_t i = 0; i < width; ++i) {
        s0 += q[i] * k0[i];
        s1 += q[i] * k1[i];
        s2 += q[i] * k2[i];
        s3 += q[i] * k3[i];
    }
    out[0] = s0 * scale, out[1] = s1 * scale, out[2] = s2 * scale, out[3] = s3 * scale;
}

inline void add_four(const float* weights, const float* const* values, size_t width, float* out) {
    const float *v0 = values[0], *v1 = values[1], *v2 = values[2], *v3 = values[3];
    const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
#pragma omp simd
    for (size_t i = 0; i < width; ++i) out[i] += (w0 * v0[i] + w1 * v1[i]) + (w2 * v2[i] + w3 * v3[i]);
}

// Scores become exp(score - largest); returns {largest, their sum}.
inline std::pair<float, float> exponentials(float* scores, size_t count) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, scores[i]);
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) {
        scores[i] = exponential(scores[i] - largest);
        sum += scores[i];
    }
    return {largest, sum};
}

void attend(const AttendArgs& args) {
    const size_t count = args.end - args.begin;
    each_four(
        args.k, args, args.k_width,
        [&](size_t place, const float* const* keys) {
            for (size_t i = 0; i < args.queries; ++i)
                four_dots(args.q + i * args.k_width, keys, args.k_width, args.scale, args.scores + i * count + place);
        },
        [&](size_t place, const float* key) {
            for (size_t i = 0; i < args.queries; ++i)
                args.scores[i * count + place] = dot(args.q + i * args.k_width, key, args.k_width) * args.scale;
        });
    for (size_t i = 0; i < args.queries; ++i) {
        float* partial = args.partial + i * args.partial_stride;
        const auto [largest, sum] = exponentials(args.scores + i * count, count);
        std::fill(partial, partial + args.v_width, 0.0f);
        partial[args.v_width] = largest;
        partial[args.v_width + 1] = sum;
    }
    each_four(
        args.v, args, args.v_width,
        [&](size_t place, const float* const* values) {
            for (size_t i = 0; i < args.queries; ++i)
                add_four(args.scores + i * count + place, values, args.v_width, args.partial + i * args.partial_stride);
        },
        [&](size_t place, const float* value) {
            for (size_t i = 0; i < args.queries; ++i) {
                float* partial = args.partial + i * args.partial_stride;
                const float weight = args.scores[i * count + place];
                for (size_t j = 0; j < args.v_width; ++j) partial[j] += weight * value[j];
            }
        });
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

}  // namespace

constexpr FloatBody PORCELET_BODY = {rms_norm, rope, silu_mul, attend, merge, narrow};

}  // namespace porcelet
