#include "pointwise.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "float_body.h"

namespace porcelet {
namespace {

constexpr size_t WORTH_THREADS = 1 << 15;  // floats

}  // namespace

const FloatBody& float_body(Isa isa) {
    assert(supported(isa));
    switch (isa) {
#ifdef __x86_64__
        case Isa::avx2: return float_avx2;
        case Isa::avx512:
        case Isa::avx512vnni: return float_avx512;
#endif
        default: return float_scalar;
    }
}

void rms_norm(const float* x, const float* weight, float* out, size_t rows, size_t width, float eps, int threads, Isa isa) {
    const FloatBody& body = float_body(isa);
#pragma omp parallel for num_threads(threads) if (rows * width >= WORTH_THREADS)
    for (size_t row = 0; row < rows; ++row) body.rms_norm(x + row * width, weight, out + row * width, width, eps);
}

void rope(const float* x, const float* cosine, const float* sine, float* out, size_t T, size_t heads, size_t half,
          size_t token_stride, size_t head_stride, bool interleaved, int threads, Isa isa) {
    const FloatBody& body = float_body(isa);
#pragma omp parallel for num_threads(threads) if (T * heads * half >= WORTH_THREADS)
    for (size_t t = 0; t < T; ++t)
        for (size_t head = 0; head < heads; ++head)
            body.rope(x + t * token_stride + head * head_stride, cosine + t * half, sine + t * half,
                      out + (t * heads + head) * 2 * half, half, interleaved);
}

void silu_mul(const float* gate, const float* up, float* out, size_t count, int threads, Isa isa) {
    constexpr size_t piece = 4096;
    const FloatBody& body = float_body(isa);
#pragma omp parallel for num_threads(threads) if (count >= WORTH_THREADS)
    for (size_t start = 0; start < count; start += piece)
        body.silu_mul(gate + start, up + start, out + start, std::min(piece, count - start));
}

void cache_write(std::byte* cache, const std::byte* values, const int64_t* slots, size_t T, size_t row_bytes) {
    for (size_t t = 0; t < T; ++t)
        std::memcpy(cache + static_cast<size_t>(slots[t]) * row_bytes, values + t * row_bytes, row_bytes);
}

}  // namespace porcelet
