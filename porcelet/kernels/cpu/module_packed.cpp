// The Python face of attention in a packed batch.
#include <nanobind/stl/vector.h>

#include <utility>

#include "binding.h"
#include "packed_attention.h"

namespace {

using Segments = std::tuple<std::vector<int64_t>, std::vector<int64_t>>;  // offsets, prefixes
using Three = std::tuple<Heads, Heads, Heads>;
using Sizes = std::tuple<size_t, size_t, size_t, size_t>;  // heads, kv_heads, k_width, v_width

template <class T>
HeadRows<T> rows_at(Heads heads) {
    const auto [address, row_stride, head_stride] = heads;
    return {at<T>(address), row_stride, head_stride};
}

PackedAttentionArgs args_of(Three inputs, Heads out, uintptr_t lse, Sizes sizes, float scale) {
    const auto [q, k, v] = inputs;
    const auto [heads, kv_heads, k_width, v_width] = sizes;
    return {rows_at<const float>(q), rows_at<const float>(k), rows_at<const float>(v), rows_at<float>(out),
            at<float>(lse), heads, kv_heads, k_width, v_width, scale};
}

PackedSegments segments_of(Segments segments) {
    auto& [offsets, prefixes] = segments;
    return {std::move(offsets), std::move(prefixes)};
}

void call_forward(Segments segments, Three inputs, Heads out, uintptr_t lse, Sizes sizes, float scale, int threads) {
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    packed_attention(args_of(inputs, out, lse, sizes, scale), segments_of(std::move(segments)), threads, isa);
}

void call_backward(Segments segments, Three inputs, Heads out, uintptr_t lse, Heads out_gradient, Three gradients, Sizes sizes,
                   float scale, int threads) {
    const auto [q, k, v] = gradients;
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    packed_attention_backward(args_of(inputs, out, lse, sizes, scale),
                              {rows_at<const float>(out_gradient), rows_at<float>(q), rows_at<float>(k), rows_at<float>(v)},
                              segments_of(std::move(segments)), threads, isa);
}

}  // namespace

void bind_packed(nb::module_& m) {
    m.def("packed_attention", call_forward);
    m.def("packed_attention_backward", call_backward);
}
