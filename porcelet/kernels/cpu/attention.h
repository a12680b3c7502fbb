// Attention of a step's new tokens over the cached ones, read from pages.
//
// Every new token is a row by itself that sees all cached tokens up to its own. A row's keys are cut into parts of a length fixed
// by the widths alone, merged in order: a long sequence occupies all threads, and its result depends on neither their number nor
// the batch. Grouped query heads read each key once.
//
// A sequence with more than `most` new tokens is a prompt (prompt_attention.cpp): its queries meet the keys in blocks, page by page, so
// that a row's result depends on its own keys alone there too.
#pragma once

#include "cache_pages.h"
#include "team.h"

namespace porcelet {

struct AttentionArgs {
    const FloatBody* body;
    const MatrixBody* matrices;
    const float* q;  // [rows, heads, k_width]
    CacheView k, v;
    const int64_t *offsets, *lengths;     // rows [offsets[b], offsets[b + 1]) are sequence b's last ones of lengths[b]
    const int64_t* tables;                // [sequences, max_pages]
    float* partials;                      // room for all rows * heads * parts * (v_width + 2); unused where parts <= 1
    float* out;                           // [rows, heads, v_width]
    size_t heads, kv_heads, k_width, v_width, page_size, max_pages;
    size_t most;
    float scale;
};

void attention(const AttentionArgs& args, size_t rows, const Team& team);

// The rows of all prompts. Needs no meeting before or after.
void attend_prompts(const AttentionArgs& args, size_t rows, const Team& team);

// Cached tokens in one part.
size_t attention_part(size_t group, size_t k_width, size_t v_width, size_t page_size);

}  // namespace porcelet
