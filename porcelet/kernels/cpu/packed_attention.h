// Attention of a packed training batch: segments side by side, each causal, each perhaps behind a prefix that it shares.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "packed_attention_body.h"

namespace porcelet {

// Segment b is rows offsets[b] to offsets[b + 1]; it reads segment prefixes[b] whole before itself, or none if that is -1.
struct PackedSegments {
    std::vector<int64_t> offsets, prefixes;
};

// Writes args.out and args.lse.
void packed_attention(const PackedAttentionArgs& args, const PackedSegments& segments, int threads, Isa isa);

// Writes the gradients of q, k and v.
void packed_attention_backward(const PackedAttentionArgs& args, const PackedAttentionGradients& gradients,
                               const PackedSegments& segments, int threads, Isa isa);

}  // namespace porcelet
