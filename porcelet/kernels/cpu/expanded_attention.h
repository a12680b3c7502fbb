// MLA's expanded form over the cache (DeepSeek-V2 paper, section 2.1.2): keys and values of every head, made from the cached latents
// page by page. For many new tokens that is less work than the absorbed form, whose keys and values are four times as wide.
//
// A part is one sequence's block of new tokens with one head, and a row's result depends on its own keys alone: on neither the
// batch nor the threads.
#pragma once

#include "cache_pages.h"
#include "linear.h"
#include "team.h"

namespace porcelet {

// Where queries of each head lie: values from token to token and from head to head.
struct HeadsView {
    const float* first;
    size_t token_stride, head_stride;

    const float* at(size_t token, size_t head) const { return first + token * token_stride + head * head_stride; }
};

// One matrix a head: floats, or packed if `packed` has an address.
struct HeadsMatrix {
    Matrix floats;
    size_t head_stride;
    PackedMatrix packed;
    size_t head_bytes;
};

struct ExpandedArgs {
    const FloatBody* body;
    const MatrixBody* matrices;
    HeadsView q_nope, q_rope;  // [rows, heads, nope or rope]
    HeadsMatrix w_uk, w_uv;    // [heads, nope, latent], packed [heads, latent, nope]; [heads, value, latent]
    CacheView cache;           // [pages, page_size, 1, latent + rope]
    const int64_t *offsets, *lengths, *tables;
    const int64_t* first;  // the sequences from this row on are computed
    float* out;            // [rows, heads, value]
    size_t heads, nope, rope, latent, value, page_size, max_pages;
    float scale;
};

void attention_expanded(const ExpandedArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
