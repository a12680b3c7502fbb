// What the drivers of the float32 ops (pointwise.cpp, rows.cpp, attention.cpp) and their bodies (float_body.cpp, compiled once for
// each instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

enum class CacheType { float32, float16 };

// Where the cached keys or values of one head lie: values from page to page and from slot to slot within a page.
struct CacheView {
    const void* first;
    CacheType type;
    size_t page_stride, slot_stride;
};

// A few query heads that read the same keys and values, over the cached tokens [begin, end) of their sequence.
struct AttendArgs {
    const float* q;  // [queries, k_width]
    size_t queries;
    CacheView k, v;
    const int64_t* pages;
    size_t page_size, begin, end, k_width, v_width;
    float scale;
    float* scores;  // room for queries * (end - begin)
    float* widened;  // room for 4 * max(k_width, v_width)
    float* partial;  // [queries, partial_stride]: sum of exp(score - largest) * value [v_width], largest, sum of exp
    size_t partial_stride;
};

// One instruction set's body.
//   rms_norm   out = x / sqrt(mean(x^2) + eps) * weight over one row
//   rope       rotates one head: pairs (2i, 2i + 1) if interleaved, else (i, i + half), come out half-split
//   silu_mul   out = gate / (1 + exp(-gate)) * up
//   attend     part of a softmax over cached tokens
//   merge      out [v_width] from the parts of one query head, partial [parts, v_width + 2], in their order
//   narrow     float32 to half precision
struct FloatBody {
    void (*rms_norm)(const float* x, const float* weight, float* out, size_t width, float eps);
    void (*rope)(const float* x, const float* cosine, const float* sine, float* out, size_t half, bool interleaved);
    void (*silu_mul)(const float* gate, const float* up, float* out, size_t count);
    void (*attend)(const AttendArgs& args);
    void (*merge)(const float* partial, size_t parts, size_t v_width, float* out);
    void (*narrow)(const float* from, uint16_t* to, size_t count);
};

extern const FloatBody float_scalar, float_avx2, float_avx512;

const FloatBody& float_body(Isa isa);

}  // namespace porcelet
