// RMSNorm, rotary embedding, SwiGLU's gate and cache writes on the CPU. Small inputs stay on the calling thread: entering a
// parallel region costs more than they do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

// out [rows, width] from x [rows, width].
void rms_norm(const float* x, const float* weight, float* out, size_t rows, size_t width, float eps, int threads, Isa isa);

// out [T, heads, 2 half], contiguous, from x with the given strides in floats; cosine and sine are [T, half].
void rope(const float* x, const float* cosine, const float* sine, float* out, size_t T, size_t heads, size_t half,
          size_t token_stride, size_t head_stride, bool interleaved, int threads, Isa isa);

void silu_mul(const float* gate, const float* up, float* out, size_t count, int threads, Isa isa);

// Row t of `values`, row_bytes long, becomes row slots[t] of `cache`.
void cache_write(std::byte* cache, const std::byte* values, const int64_t* slots, size_t T, size_t row_bytes);

}  // namespace porcelet
