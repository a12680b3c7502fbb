// What the driver of attention in a packed batch (packed_attention.cpp) and its bodies (packed_attention_body.cpp, compiled once
// for each instruction set) agree on.
#pragma once

#include <cstddef>

namespace porcelet {

constexpr size_t BLOCK_KEYS = 64, BLOCK_QUERIES = 60;  // that meet at once: their scores stay in the first-level cache

// Rows of heads of floats: values from row to row and from head to head.
template <class T>
struct HeadRows {
    T* first;
    size_t row_stride, head_stride;

    T* at(size_t row, size_t head) const { return first + row * row_stride + head * head_stride; }
};

struct RowRange {
    size_t first, last;
};

// Segment 0 and those that read it whole before themselves.
struct SegmentTree {
    const RowRange* segments;
    size_t count;
};

struct PackedAttentionArgs {
    HeadRows<const float> q, k, v;      // [T, heads, k_width], [T, kv_heads, k_width], [T, kv_heads, v_width]
    HeadRows<float> out;                // [T, heads, v_width]
    float* lse;                         // [T, heads]: logarithm of the sum of exponentials
    size_t heads, kv_heads, k_width, v_width;
    float scale;
};

struct PackedAttentionGradients {
    HeadRows<const float> out;  // with respect to `out`
    HeadRows<float> q, k, v;
};

// Room for one unit of work; `rows` [T, heads] belongs to all of them.
struct PackedAttentionScratch {
    float *turned_keys, *keys;         // [k_width, BLOCK_KEYS], [BLOCK_KEYS, k_width]
    float *turned_values, *values;     // [v_width, BLOCK_KEYS], [BLOCK_KEYS, v_width]
    float *scores, *score_gradients;  // [BLOCK_QUERIES, BLOCK_KEYS]
    float *queries, *out_gradients;    // [BLOCK_QUERIES, k_width], [BLOCK_QUERIES, v_width]
    float* rows;
};

// One instruction set's body: one tree of segments, one key head and the query heads that share it.
struct PackedAttentionBody {
    void (*forward)(const PackedAttentionArgs&, SegmentTree, size_t kv_head, const PackedAttentionScratch&);
    void (*backward)(const PackedAttentionArgs&, const PackedAttentionGradients&, SegmentTree, size_t kv_head,
                     const PackedAttentionScratch&);
};

extern const PackedAttentionBody packed_attention_scalar, packed_attention_avx2, packed_attention_avx512;

}  // namespace porcelet
