// Attention of one new token a sequence over its cached ones, read from pages.
#pragma once

#include "float_body.h"

namespace porcelet {

struct DecodeShape {
    size_t sequences, heads, kv_heads, k_width, v_width, page_size, max_pages;
    size_t k_head_stride, v_head_stride;  // floats from one key/value head to the next
};

// out [B, H, v_width] from q [B, H, k_width]; lengths [B]; tables [B, max_pages]. Grouped heads read the same keys.
void attention_decode(const float* q, CacheView k, CacheView v, const int64_t* lengths, const int64_t* tables, float* out,
                      const DecodeShape& shape, float scale, int threads, Isa isa);

}  // namespace porcelet
