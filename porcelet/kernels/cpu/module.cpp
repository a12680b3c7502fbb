// The Python face of the native bodies: a `Program` to which each appends itself. What runs at once is a program of one instruction.
// Tensors come as addresses: no torch header, no torch ABI; kernels/cpu/__init__.py checks them.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "attention.h"
#include "binding.h"
#include "expanded_attention.h"
#include "experts.h"
#include "fp8.h"
#include "heads.h"
#include "isa.h"
#include "linear.h"
#include "linear_float.h"
#include "memory.h"
#include "pointwise.h"
#include "route.h"
#include "rows.h"

void bind_sample(nb::module_& m);                    // module_sample.cpp
void bind_packed(nb::module_& m);                    // module_packed.cpp
void bind_gradients(nb::class_<Program>& program);  // module_gradients.cpp

namespace {

using Cache = std::tuple<uintptr_t, bool, size_t, size_t, size_t>;  // address, is float16; values from page to page, slot, head

using Packed = std::tuple<uintptr_t, size_t, bool, size_t, size_t>;  // address, bits, whether symmetric, K, N

PackedMatrix packed_matrix(Packed weight) {
    const auto [first, bits, symmetric, K, N] = weight;
    const Format formats[2][2] = {{Format::int8, Format::int8_symmetric}, {Format::int4, Format::int4_symmetric}};
    return {formats[bits == 4][symmetric], at<uint8_t>(first), K / GROUP, N};
}

QuantizeArgs quantize_args(Heads x, uintptr_t records, size_t heads, size_t K, float wide_from) {
    const auto [first, stride, head_stride] = x;
    return {&linear_body(select_isa()), at<float>(first), stride, head_stride, heads, K / GROUP, wide_from, at<std::byte>(records)};
}

HeadsPackedArgs heads_packed_args(uintptr_t records, Packed weight, size_t head_bytes, size_t heads, uintptr_t out) {
    return {&linear_body(select_isa()), packed_matrix(weight), head_bytes, heads, at<std::byte>(records), at<float>(out)};
}

void append_linear_packed(Program& program, uintptr_t records, Packed weight, uintptr_t out) {
    const LinearArgs args = {&linear_body(select_isa()), packed_matrix(weight), at<std::byte>(records), at<float>(out)};
    program.append_beside(linear_packed, args, args.records, args.out);
}

RmsNormArgs rms_norm_args(Heads x, uintptr_t weight, uintptr_t out, size_t heads, size_t width, float eps) {
    const auto [first, stride, head_stride] = x;
    return {&float_body(select_isa()), at<float>(first), stride, head_stride, at<float>(weight), at<float>(out), heads, width, eps};
}

RopeArgs rope_args(Heads x, uintptr_t cosine, uintptr_t sine, uintptr_t out, size_t heads, size_t half, bool interleaved) {
    const auto [first, stride, head_stride] = x;
    return {&float_body(select_isa()), at<float>(first), stride, head_stride, at<float>(cosine), at<float>(sine),
            at<float>(out), heads, half, interleaved};
}

PairArgs pair_args(Rows first, Rows second, uintptr_t out, size_t width) {
    const auto [a, a_stride] = first;
    const auto [b, b_stride] = second;
    return {&float_body(select_isa()), at<float>(a), a_stride, at<float>(b), b_stride, at<float>(out), width};
}

ConcatArgs concat_args(Heads first, Heads second, uintptr_t out, size_t heads, size_t first_width, size_t second_width) {
    const auto [a, a_stride, a_head] = first;
    const auto [b, b_stride, b_head] = second;
    return {at<float>(a), a_stride, a_head, at<float>(b), b_stride, b_head, at<float>(out), heads, first_width, second_width};
}

TakeRowsArgs take_rows_args(Rows table, uintptr_t index, uintptr_t out, size_t width) {
    const auto [first, stride] = table;
    return {at<float>(first), stride, at<int64_t>(index), at<float>(out), width};
}

TakePackedRowsArgs take_packed_rows_args(Packed weight, uintptr_t index, uintptr_t out) {
    return {packed_matrix(weight), at<int64_t>(index), at<float>(out)};
}

CacheType type_of(bool is_half) { return is_half ? CacheType::float16 : CacheType::float32; }

CacheWriteArgs cache_write_args(Cache cache, Heads values, uintptr_t slots, std::tuple<size_t, size_t, size_t> sizes) {
    const auto [address, is_half, page_stride, slot_stride, head_stride] = cache;
    const auto [first, stride, values_head_stride] = values;
    const auto [page_size, heads, width] = sizes;
    return {&float_body(select_isa()), type_of(is_half), at<void>(address), page_stride, slot_stride, head_stride, page_size,
            at<float>(first), stride, values_head_stride, at<int64_t>(slots), heads, width};
}

AttentionArgs attention_args(uintptr_t q, Cache k, Cache v, std::tuple<uintptr_t, uintptr_t, uintptr_t> batch, uintptr_t partials,
                             uintptr_t out, std::tuple<size_t, size_t, size_t, size_t, size_t, size_t> sizes, size_t most,
                             float scale) {
    const auto [k_address, k_half, k_page, k_slot, k_head] = k;
    const auto [v_address, v_half, v_page, v_slot, v_head] = v;
    const auto [offsets, lengths, tables] = batch;
    const auto [heads, kv_heads, k_width, v_width, page_size, max_pages] = sizes;
    return {&float_body(select_isa()), &matrix_body(select_isa()), at<float>(q), {at<void>(k_address), type_of(k_half), k_page, k_slot, k_head},
            {at<void>(v_address), type_of(v_half), v_page, v_slot, v_head}, at<int64_t>(offsets), at<int64_t>(lengths),
            at<int64_t>(tables), at<float>(partials), at<float>(out), heads, kv_heads, k_width, v_width, page_size, max_pages, most,
            scale};
}

HeadsMatrix heads_matrix(std::tuple<Heads, Packed, size_t> weight) {
    const auto [floats, packed, head_bytes] = weight;
    const auto [first, head_stride, row_stride] = floats;
    return {{at<float>(first), row_stride}, head_stride, packed_matrix(packed), head_bytes};
}

HeadsView heads_view(Heads x) {
    const auto [first, stride, head_stride] = x;
    return {at<float>(first), stride, head_stride};
}

ExpandedArgs attention_expanded_args(std::tuple<Heads, Heads> q, std::tuple<Heads, Packed, size_t> w_uk,
                                     std::tuple<Heads, Packed, size_t> w_uv, Cache cache,
                                     std::tuple<uintptr_t, uintptr_t, uintptr_t> batch, uintptr_t first, uintptr_t out,
                                     std::tuple<size_t, size_t, size_t, size_t, size_t, size_t, size_t> sizes, float scale) {
    const auto [q_nope, q_rope] = q;
    const auto [address, is_half, page_stride, slot_stride, head_stride] = cache;
    const auto [offsets, lengths, tables] = batch;
    const auto [heads, nope, rope, latent, value, page_size, max_pages] = sizes;
    return {&float_body(select_isa()), &matrix_body(select_isa()), heads_view(q_nope), heads_view(q_rope), heads_matrix(w_uk),
            heads_matrix(w_uv), {at<void>(address), type_of(is_half), page_stride, slot_stride, head_stride}, at<int64_t>(offsets),
            at<int64_t>(lengths), at<int64_t>(tables), at<int64_t>(first), at<float>(out), heads, nope, rope, latent, value, page_size,
            max_pages, scale};
}

LinearFloatArgs linear_float_args(Rows x, Rows weight, uintptr_t out, size_t K, size_t N) {
    const auto [x_first, x_stride] = x;
    const auto [weight_first, weight_stride] = weight;
    return {select_isa(), {at<float>(x_first), x_stride}, {at<float>(weight_first), weight_stride}, nullptr, at<float>(out), N, K, N};
}

HeadsArgs heads_linear_args(Heads x, Heads weight, uintptr_t out, size_t heads, size_t inputs, size_t outputs, bool mixed) {
    const auto [x_first, x_stride, x_head] = x;
    const auto [weight_first, weight_head, weight_row] = weight;
    return {select_isa(), at<float>(x_first), x_stride, x_head, {at<float>(weight_first), weight_row}, weight_head, at<float>(out),
            heads * outputs, outputs, heads, inputs, outputs, mixed};
}

using Chosen = std::tuple<uintptr_t, uintptr_t, size_t, size_t, uintptr_t, uintptr_t>;  // indices, weights, E, A, starts, order

Assignments assignments(Chosen chosen) {
    const auto [indices, weights, E, A, starts, order] = chosen;
    return {at<int64_t>(indices), at<float>(weights), E, A, at<size_t>(starts), at<size_t>(order)};
}

ExpertsArgs experts_float_args(Rows x, std::tuple<uintptr_t, uintptr_t> stacks, Chosen chosen, uintptr_t hidden, uintptr_t out,
                               std::tuple<size_t, size_t> sizes) {
    const auto [first, stride] = x;
    const auto [gate_up, down] = stacks;
    const auto [D, F] = sizes;
    return {select_isa(), {at<float>(first), stride}, at<float>(gate_up), at<float>(down), assignments(chosen), at<float>(out), D, D, F,
            at<float>(hidden)};
}

using Fp8 = std::tuple<uintptr_t, uintptr_t, size_t>;  // addresses of values and scales, K

Fp8Matrix fp8_matrix(Fp8 weight) {
    const auto [values, scales, K] = weight;
    return {at<uint8_t>(values), at<float>(scales), K};
}

LinearFp8Args linear_fp8_args(Rows x, Fp8 weight, uintptr_t out, size_t N) {
    const auto [first, stride] = x;
    return {select_isa(), {at<float>(first), stride}, fp8_matrix(weight), at<float>(out), N};
}

Fp8ExpertsArgs experts_fp8_args(Rows x, std::tuple<Fp8, Fp8, Fp8> parts, std::tuple<size_t, size_t, size_t, size_t> strides,
                                Chosen chosen, uintptr_t hidden, uintptr_t out) {
    const auto [first, stride] = x;
    const auto [gate, up, down] = parts;
    const auto [gate_up_stride, gate_up_scales_stride, down_stride, down_scales_stride] = strides;
    const Fp8Matrix gate_matrix = fp8_matrix(gate), down_matrix = fp8_matrix(down);
    return {select_isa(), {at<float>(first), stride}, gate_matrix, fp8_matrix(up), down_matrix, gate_up_stride,
            gate_up_scales_stride, down_stride, down_scales_stride, assignments(chosen), at<float>(out), gate_matrix.K,
            down_matrix.K, at<float>(hidden)};
}

PackedExpertsArgs experts_packed_args(uintptr_t records, std::tuple<Packed, Packed, Packed> parts,
                                      std::tuple<size_t, size_t> strides, Chosen chosen, std::tuple<uintptr_t, uintptr_t> hidden,
                                      float wide_from, uintptr_t out, std::tuple<uintptr_t, size_t> residency) {
    const auto [gate, up, down] = parts;
    const auto [gate_up_stride, down_stride] = strides;
    const auto [floats, hidden_records] = hidden;
    return {&linear_body(select_isa()), &float_body(select_isa()), packed_matrix(gate), packed_matrix(up), packed_matrix(down),
            gate_up_stride, down_stride, at<std::byte>(records), assignments(chosen), at<float>(out), at<float>(floats),
            wide_from, at<std::byte>(hidden_records), at<Residency>(std::get<0>(residency)), std::get<1>(residency)};
}

RouteArgs route_args(uintptr_t logits, uintptr_t bias, uintptr_t indices, uintptr_t weights, uintptr_t scratch,
                     std::tuple<size_t, size_t, size_t, size_t> sizes, bool normalize, float scale) {
    const auto [E, groups, kept_groups, A] = sizes;
    return {at<float>(logits), at<float>(bias), E, groups, kept_groups, A, normalize, scale, at<int64_t>(indices), at<float>(weights),
            at<float>(scratch)};
}

}  // namespace

NB_MODULE(_native, m) {
    // The one thing that can be wrong from outside is PORCELET_ISA.
    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const std::invalid_argument& e) {
            PyErr_SetString(nb::module_::import_("porcelet.errors").attr("InputError").ptr(), e.what());
        }
    });
    m.def("isa", [] { return std::string(name(select_isa())); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (Isa isa : supported_isas()) names.push_back(name(isa));
        return names;
    });
    m.def("record_bytes", [](size_t K) { return K / GROUP * linear_body(select_isa()).record_bytes; });
    m.def("attention_part", attention_part);
    m.def("keep_freed_memory", keep_freed_memory);
    m.def("return_freed_memory", return_freed_memory);
    nb::class_<Residency>(m, "Residency")
        .def(nb::init<const std::string&, size_t>())
        .def("add_layer", &Residency::add_layer)
        .def("address", [](const Residency& residency) { return reinterpret_cast<uintptr_t>(&residency); })
        .def("mapping", &Residency::mapping)
        .def("budget", &Residency::budget)
        .def("counts", [](const Residency& residency) {
            const Residency::Counts counts = residency.counts();
            return std::make_tuple(counts.hits, counts.misses, counts.prefetched, counts.bytes_read, counts.resident_bytes);
        });
    nb::class_<Program> program(m, "Program");
    program.def(nb::init<>())
        .def("__len__", &Program::size)
        .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
        .def("narrow", &Program::narrow)
        .def("limit", [](Program& self, uintptr_t rows) { self.limit(at<int64_t>(rows)); })
        .def("quantize", appends_rows(quantize, quantize_args))
        .def("linear_packed", append_linear_packed)
        .def("rms_norm", appends_rows(rms_norm, rms_norm_args))
        .def("rope", appends_rows(rope, rope_args))
        .def("silu_mul", appends_rows(silu_mul, pair_args))
        .def("add", appends_rows(add, pair_args))
        .def("concat", appends_rows(concat, concat_args))
        .def("take_rows", appends(take_rows, take_rows_args))
        .def("take_packed_rows", appends_rows(take_packed_rows, take_packed_rows_args))
        .def("cache_write", appends_rows(cache_write, cache_write_args))
        .def("linear_float", appends(linear_float, linear_float_args))
        .def("heads_linear", appends(heads_linear, heads_linear_args))
        .def("heads_packed", appends(heads_packed, heads_packed_args))
        .def("experts_float", appends(experts_float, experts_float_args))
        .def("linear_fp8", appends(linear_fp8, linear_fp8_args))
        .def("experts_fp8", appends(experts_fp8, experts_fp8_args))
        .def("experts_packed", appends(experts_packed, experts_packed_args))
        .def("route", appends(route, route_args))
        .def("attention", appends(attention, attention_args))
        .def("attention_expanded", appends(attention_expanded, attention_expanded_args));
    bind_gradients(program);
    bind_sample(m);
    bind_packed(m);
}
