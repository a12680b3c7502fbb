// The passes over a whole row of logits, in plain loops that the compiler vectorises. Compiled once for each instruction set;
// PORCELET_BODY names the table to define. No templates of the standard library here but min and max: the linker keeps one copy
// of each, and it might be one that this processor cannot run.
#include "sample_body.h"

#include <cmath>

#include "exponential.h"

namespace porcelet {
namespace {

constexpr size_t LANES = 8;  // partial sums of a block

bool peaks(const float* logits, size_t V, float* peaks) {
    int bad = 0;
    for (size_t start = 0; start < V; start += BLOCK) {
        const size_t end = std::min(V, start + BLOCK);
        float peak = -INFINITY;
#pragma omp simd reduction(max : peak) reduction(| : bad)
        for (size_t i = start; i < end; ++i) {
            peak = logits[i] > peak ? logits[i] : peak;
            bad |= logits[i] != logits[i];
        }
        peaks[start / BLOCK] = peak;
    }
    return bad != 0;
}

void weights(const float* logits, size_t V, float best, float inverse_temperature, float floor, float* weights) {
#pragma omp simd
    for (size_t i = 0; i < V; ++i) {
        const float exponent = (logits[i] - best) * inverse_temperature;
        const float weight = exponential(exponent);
        weights[i] = exponent >= floor ? weight : 0.0f;
    }
}

void sums(const float* weights, size_t V, double* sums) {
    for (size_t start = 0; start < V; start += BLOCK) {
        double lanes[LANES] = {};
        const size_t end = std::min(V, start + BLOCK), whole = start + (end - start) / LANES * LANES;
        for (size_t i = start; i < whole; i += LANES)
            for (size_t lane = 0; lane < LANES; ++lane) lanes[lane] += static_cast<double>(weights[i + lane]);
        for (size_t i = whole; i < end; ++i) lanes[i - whole] += static_cast<double>(weights[i]);
        for (size_t half = LANES / 2; half; half /= 2)
            for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
        sums[start / BLOCK] = lanes[0];
    }
}

void keep(const float* logits, size_t V, Cut cut, float* weights) {
    const int32_t size = static_cast<int32_t>(V);
#pragma omp simd
    for (int32_t i = 0; i < size; ++i) {
        const bool kept = (logits[i] > cut.logit) | ((logits[i] == cut.logit) & (i <= cut.token));
        weights[i] = kept ? weights[i] : 0.0f;
    }
}

}  // namespace

constexpr SampleBody PORCELET_BODY = {peaks, weights, sums, keep};

}  // namespace porcelet
