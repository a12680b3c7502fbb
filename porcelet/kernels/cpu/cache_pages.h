// Cached keys and values as matrices, a page at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "float_body.h"
#include "matrix_body.h"

namespace porcelet {

// Where the cached keys or values of a layer lie: values from page to page, from slot to slot and from head to head.
struct CacheView {
    const void* first;
    CacheType type;
    size_t page_stride, slot_stride, head_stride;

    // The first `count` tokens of a page, of one head, `width` floats each: where they lie, or widened.
    Matrix rows(const FloatBody& body, size_t page, size_t head, size_t count, size_t width, float* widened) const {
        const size_t offset = page * page_stride + head * head_stride;
        if (type == CacheType::float32) return {static_cast<const float*>(first) + offset, slot_stride};
        for (size_t i = 0; i < count; ++i)
            body.widen(static_cast<const uint16_t*>(first) + offset + i * slot_stride, widened + i * width, width);
        return {widened, width};
    }

    // Floats from a page of this cache to one of another, of one head, modulo 2^64; none from half precision, whose rows are copies.
    size_t distance(size_t page, const CacheView& other, size_t other_page, size_t head) const {
        if (type != CacheType::float32) return 0;
        const float* const from = static_cast<const float*>(first) + page * page_stride + head * head_stride;
        const float* const to = static_cast<const float*>(other.first) + other_page * other.page_stride + head * other.head_stride;
        return (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) / sizeof(float);
    }
};

// Calls visit(count, x, out) with the addresses x_of(row) and out_of(row) of as many rows as a body computes at once.
template <class XOf, class OutOf, class Visit>
void each_rows(const MatrixBody& body, size_t rows, XOf x_of, OutOf out_of, Visit visit) {
    for (size_t begin = 0; begin < rows; begin += body.tokens) {
        const size_t count = std::min(body.tokens, rows - begin);
        const float* x[MAX_TOKENS];
        float* out[MAX_TOKENS];
        for (size_t i = 0; i < count; ++i) {
            x[i] = x_of(begin + i);
            out[i] = out_of(begin + i);
        }
        visit(count, x, out);
    }
}

}  // namespace porcelet
