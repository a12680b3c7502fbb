// Which experts a token goes to: the gates of DeepSeek-V3 and V2 as kernels/experts.py defines them. Where two scores tie, the
// lower index is preferred; NaN counts as the largest, as in torch.topk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace porcelet {

struct RouteArgs {
    const float* logits;  // [T, E], contiguous
    const float* bias;    // [E]: V3's gate; null: V2's
    size_t E, groups, kept_groups, A;
    bool normalize;  // V3's only
    float scale;
    int64_t* indices;  // [T, A], best first
    float* weights;    // [T, A]
    float* scratch;    // [T, 2 E + groups]
};

void route(const RouteArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
