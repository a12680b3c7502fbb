// What the drivers of the float32 ops (pointwise.cpp, rows.cpp, attention.cpp) and their bodies (float_body.cpp, compiled once for
// each instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

enum class CacheType { float32, float16 };

constexpr size_t SCORES = 16;  // rows of scores are filled up to whole vectors of any instruction set

inline size_t whole_scores(size_t count) { return (count + SCORES - 1) / SCORES * SCORES; }

// One instruction set's body.
//   rms_norm   out = x / sqrt(mean(x^2) + eps) * weight over one row
//   rope       rotates one head: pairs (2i, 2i + 1) if interleaved, else (i, i + half), come out half-split
//   silu_mul   out = gate / (1 + exp(-gate)) * up
//   exponentials  the first `visible` of `count` scores become exp(scale * score - largest), the others 0; `state` is {largest, the sum}
//   merge      out [v_width] from the parts of one query head, partial [parts, v_width + 2], in their order
//   soften     the same in a softmax under way: `state` is {largest, sum} so far, and `out` [width] shrinks where the largest has grown.
//              For both `count` is a multiple of SCORES
//   narrow     float32 to half precision
//   widen      half precision to float32
struct FloatBody {
    void (*rms_norm)(const float* x, const float* weight, float* out, size_t width, float eps);
    void (*rope)(const float* x, const float* cosine, const float* sine, float* out, size_t half, bool interleaved);
    void (*silu_mul)(const float* gate, const float* up, float* out, size_t count);
    void (*exponentials)(float* scores, size_t visible, size_t count, float scale, float* state);
    void (*merge)(const float* partial, size_t parts, size_t v_width, float* out);
    void (*soften)(float* scores, size_t visible, size_t count, float scale, float* state, float* out, size_t width);
    void (*narrow)(const float* from, uint16_t* to, size_t count);
    void (*widen)(const uint16_t* from, float* to, size_t count);
};

extern const FloatBody float_scalar, float_avx2, float_avx512;

const FloatBody& float_body(Isa isa);

}  // namespace porcelet
