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

    // The tokens of a page, of one head, where they lie.
    template <class T>
    MatrixOf<T> rows(size_t page, size_t head) const {
        return {static_cast<const T*>(first) + page * page_stride + head * head_stride, slot_stride};
    }

    // The first `count` of them as floats, `width` each: where they lie, or widened.
    Matrix floats(const FloatBody& body, size_t page, size_t head, size_t count, size_t width, float* widened) const {
        if (type == CacheType::float32) return rows<float>(page, head);
        const MatrixOf<uint16_t> halves = rows<uint16_t>(page, head);
        for (size_t i = 0; i < count; ++i) body.widen(halves.from(i).first, widened + i * width, width);
        return {widened, width};
    }
};

// Values from one matrix to another, modulo 2^64.
template <class T>
size_t distance(MatrixOf<T> from, MatrixOf<T> to) {
    return (reinterpret_cast<uintptr_t>(to.first) - reinterpret_cast<uintptr_t>(from.first)) / sizeof(T);
}

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
