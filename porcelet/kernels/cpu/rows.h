// Rows taken from tables by index, and rows put into the cache.
#pragma once

#include "float_body.h"
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

// out [rows, K]: row index[t] of a packed weight with K columns, scale * q + minimum rounded once (kernels/linear.py).
struct TakeInt8RowsArgs {
    const uint8_t* packed;
    const int64_t* index;
    float* out;
    size_t K;
};

// Row t of `values` becomes part of slot slots[t] of a cache: `width` values, the slots `slot_stride` values apart.
struct CacheWriteArgs {
    const FloatBody* body;
    void* cache;
    CacheType type;
    size_t slot_stride;
    const float* values;
    size_t values_stride;
    const int64_t* slots;
    size_t width;
};

void take_rows(const TakeRowsArgs& args, size_t rows, const Team& team);
void take_int8_rows(const TakeInt8RowsArgs& args, size_t rows, const Team& team);
void cache_write(const CacheWriteArgs& args, size_t rows, const Team& team);

}  // namespace porcelet
