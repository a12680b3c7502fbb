// What the drivers of the float32 ops (pointwise.cpp, attention.cpp) and their bodies (float_body.cpp, compiled once for each
// instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

// Where the cached keys or values of one head lie: floats from page to page and from slot to slot within a page.
struct CacheView {
    const float* first;
    size_t page_stride, slot_stride;
};

// One instruction set's body.
//   rms_norm   out = x / sqrt(mean(x^2) + eps) * weight over one row
//   rope       rotates one head: pairs (2i, 2i + 1) if interleaved, else (i, i + half), come out half-split
//   silu_mul   out = gate / (1 + exp(-gate)) * up
//   attend     one query head over `length` cached tokens; `scores` has room for `length` floats
struct FloatBody {
    void (*rms_norm)(const float* x, const float* weight, float* out, size_t width, float eps);
    void (*rope)(const float* x, const float* cosine, const float* sine, float* out, size_t half, bool interleaved);
    void (*silu_mul)(const float* gate, const float* up, float* out, size_t count);
    void (*attend)(const float* q, CacheView k, CacheView v, const int64_t* pages, size_t page_size, size_t length, size_t k_width,
                   size_t v_width, float scale, float* scores, float* out);
};

extern const FloatBody float_scalar, float_avx2, float_avx512;

const FloatBody& float_body(Isa isa);

}  // namespace porcelet
