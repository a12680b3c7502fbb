// Rows taken from tables by index, and rows put into the cache.
#pragma once

#include "float_body.h"
#include "linear.h"
#include "team.h"

namespace porcelet {

// out [rows, width]: row index[t] of `table`, whose rows lie `stride` floats apart.
struct TakeRowsArgs {
    const float* table;
    size_t stride;
    const int64_t* index;
    float* out;
    size_t width;
};

// out [rows, 32 * groups]: row index[t] of a packed weight, scale * q + minimum rounded once (kernels/linear.py).
struct TakePackedRowsArgs {
    PackedMatrix weight;
    const int64_t* index;
    float* out;

    size_t row_values() const { return weight.groups * GROUP; }
};

// Row t of `values` [rows, heads, width] becomes part of slot slots[t] of a cache, which is slot slots[t] % page_size of a page.
struct CacheWriteArgs {
    const FloatBody* body;
    CacheType type;
    void* cache;
    size_t page_stride, slot_stride, head_stride, page_size;
    const float* values;
    size_t values_stride, values_head_stride;
    const int64_t* slots;
    size_t heads, width;

    size_t row_values() const { return heads * width; }
};

void take_rows(const TakeRowsArgs& args, size_t rows, const Team& team);
void take_packed_rows(const TakePackedRowsArgs& args, size_t rows, const Team& team);
void cache_write(const CacheWriteArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
