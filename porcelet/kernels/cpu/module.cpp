// The Python face of the native bodies: a `Program` to which each appends itself. What runs at once is a program of one instruction.
// Tensors come as addresses: no torch header, no torch ABI; kernels/cpu/__init__.py checks them.
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "attention.h"
#include "binding.h"
#include "experts.h"
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

LinearInt8Args linear_int8_args(Rows x, uintptr_t packed, uintptr_t records, uintptr_t out, size_t K, size_t N) {
    const auto [first, stride] = x;
    return {&linear_body(select_isa()), at<float>(first), stride, at<uint8_t>(packed), at<std::byte>(records), at<float>(out), K, N};
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

TakeInt8RowsArgs take_int8_rows_args(uintptr_t packed, uintptr_t index, uintptr_t out, size_t K) {
    return {at<uint8_t>(packed), at<int64_t>(index), at<float>(out), K};
}

CacheType type_of(bool is_half) { return is_half ? CacheType::float16 : CacheType::float32; }

CacheWriteArgs cache_write_args(Cache cache, Rows values, uintptr_t slots, size_t width) {
    const auto [address, is_half, page_stride, slot_stride, head_stride] = cache;
    const auto [first, stride] = values;
    return {&float_body(select_isa()), at<void>(address), type_of(is_half), slot_stride, at<float>(first), stride, at<int64_t>(slots),
            width};
}

AttentionArgs attention_args(uintptr_t q, Cache k, Cache v, std::tuple<uintptr_t, uintptr_t, uintptr_t> batch, uintptr_t partials,
                             uintptr_t out, std::tuple<size_t, size_t, size_t, size_t, size_t, size_t> sizes, size_t most,
                             float scale) {
    const auto [k_address, k_half, k_page, k_slot, k_head] = k;
    const auto [v_address, v_half, v_page, v_slot, v_head] = v;
    const auto [offsets, lengths, tables] = batch;
    const auto [heads, kv_heads, k_width, v_width, page_size, max_pages] = sizes;
    return {&float_body(select_isa()), at<float>(q), {at<void>(k_address), type_of(k_half), k_page, k_slot},
            {at<void>(v_address), type_of(v_half), v_page, v_slot}, k_head, v_head, at<int64_t>(offsets), at<int64_t>(lengths),
            at<int64_t>(tables), at<float>(partials), at<float>(out), heads, kv_heads, k_width, v_width, page_size, max_pages, most,
            scale};
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

ExpertsArgs experts_float_args(Rows x, std::tuple<uintptr_t, uintptr_t> stacks, std::tuple<uintptr_t, uintptr_t> chosen,
                               std::tuple<uintptr_t, uintptr_t, uintptr_t> scratch, uintptr_t out,
                               std::tuple<size_t, size_t, size_t, size_t> sizes) {
    const auto [first, stride] = x;
    const auto [gate_up, down] = stacks;
    const auto [indices, weights] = chosen;
    const auto [starts, order, hidden] = scratch;
    const auto [D, F, E, A] = sizes;
    return {select_isa(), {at<float>(first), stride}, at<float>(gate_up), at<float>(down), at<int64_t>(indices), at<float>(weights),
            at<float>(out), D, D, F, E, A, at<size_t>(starts), at<size_t>(order), at<float>(hidden)};
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
    m.def("linear_int8_record_bytes", [](size_t K) { return K / GROUP * linear_body(select_isa()).record_bytes; });
    m.def("attention_part", attention_part);
    m.def("keep_freed_memory", keep_freed_memory);
    nb::class_<Program> program(m, "Program");
    program.def(nb::init<>())
        .def("__len__", &Program::size)
        .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
        .def("narrow", &Program::narrow)
        .def("linear_int8", appends(linear_int8, linear_int8_args))
        .def("rms_norm", appends(rms_norm, rms_norm_args))
        .def("rope", appends(rope, rope_args))
        .def("silu_mul", appends(silu_mul, pair_args))
        .def("add", appends(add, pair_args))
        .def("concat", appends(concat, concat_args))
        .def("take_rows", appends(take_rows, take_rows_args))
        .def("take_int8_rows", appends(take_int8_rows, take_int8_rows_args))
        .def("cache_write", appends(cache_write, cache_write_args))
        .def("linear_float", appends(linear_float, linear_float_args))
        .def("heads_linear", appends(heads_linear, heads_linear_args))
        .def("experts_float", appends(experts_float, experts_float_args))
        .def("route", appends(route, route_args))
        .def("attention", appends(attention, attention_args));
    bind_gradients(program);
    bind_sample(m);
    bind_packed(m);
}
