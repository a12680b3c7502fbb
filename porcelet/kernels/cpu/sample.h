// Drawing one token from each of many distributions over the vocabulary, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace porcelet {

// How one token is drawn; kernels/sample.py has the meaning. Temperature 0 takes the best.
struct Choice {
    float temperature;
    int64_t top_k;
    float top_p, min_p;
    double uniform;
};

// tokens and logprobs [draws]; draw i reads row rows[i] of logits [.., V] and entry i of the columns.
struct SampleColumns {
    const int64_t* rows;
    const float* temperature;
    const int64_t* top_k;
    const float *top_p, *min_p;
    const double* uniform;
};

void sample(const float* logits, const SampleColumns& columns, size_t draws, size_t V, int64_t* tokens, float* logprobs,
            int threads, Isa isa);

// out [rows, V]: the logit where bit t of the row's mask (bit t % 8 of byte t / 8) is set, else -infinity.
void allow(const float* logits, const uint8_t* masks, float* out, size_t rows, size_t V);

}  // namespace porcelet
