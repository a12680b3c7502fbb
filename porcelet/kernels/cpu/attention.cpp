#include "attention.h"

#include <algorithm>
#include <vector>

namespace porcelet {

void attention_decode(const float* q, CacheView k, CacheView v, const int64_t* lengths, const int64_t* tables, float* out,
                      const DecodeShape& shape, float scale, int threads, Isa isa) {
    const FloatBody& body = float_body(isa);
    const size_t group = shape.heads / shape.kv_heads;
    const size_t longest = static_cast<size_t>(*std::max_element(lengths, lengths + shape.sequences));
#pragma omp parallel num_threads(threads)
    {
        thread_local std::vector<float> scores;
        if (scores.size() < longest) scores.resize(longest);
#pragma omp for collapse(2) schedule(dynamic) nowait
        for (size_t b = 0; b < shape.sequences; ++b)
            for (size_t head = 0; head < shape.heads; ++head) {
                const size_t row = b * shape.heads + head, kv_head = head / group;
                const CacheView keys = {k.first + kv_head * shape.k_head_stride, k.page_stride, k.slot_stride};
                const CacheView values = {v.first + kv_head * shape.v_head_stride, v.page_stride, v.slot_stride};
                body.attend(q + row * shape.k_width, keys, values, tables + b * shape.max_pages, shape.page_size,
                            static_cast<size_t>(lengths[b]), shape.k_width, shape.v_width, scale, scores.data(),
                            out + row * shape.v_width);
            }
    }
}

}  // namespace porcelet
