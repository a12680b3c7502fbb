// What the driver of sampling (sample.cpp) and its bodies (sample_body.cpp, compiled once for each instruction set) agree on.
// A row of logits is walked in blocks; sums are made a block at a time, in an order that the vocabulary's size alone decides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace porcelet {

constexpr size_t BLOCK = 64;  // tokens

inline size_t num_blocks(size_t V) { return (V + BLOCK - 1) / BLOCK; }

// The last token that is kept in the order of sampling: the larger logit first, of equals the lower id.
struct Cut {
    float logit;
    int32_t token;
};

// One instruction set's body.
//   peaks     the largest logit of each block; returns whether the row holds a NaN
//   weights   exp((logit - best) * inverse_temperature), 0 where that exponent is below `floor` (at least -87)
//   sums      each block's sum of weights
//   keep      sets the weights of what comes after `cut` to 0
struct SampleBody {
    bool (*peaks)(const float* logits, size_t V, float* peaks);
    void (*weights)(const float* logits, size_t V, float best, float inverse_temperature, float floor, float* weights);
    void (*sums)(const float* weights, size_t V, double* sums);
    void (*keep)(const float* logits, size_t V, Cut cut, float* weights);
};

extern const SampleBody sample_scalar, sample_avx2, sample_avx512;

}  // namespace porcelet
