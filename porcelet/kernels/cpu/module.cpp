// The Python face of the native bodies. Tensors come as addresses: no torch header, no torch ABI; kernels/cpu/__init__.py checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <stdexcept>

#include "attention.h"
#include "isa.h"
#include "linear.h"
#include "pointwise.h"

namespace nb = nanobind;
using namespace porcelet;

void bind_float(nb::module_& m);  // module_float.cpp

namespace {

void call_linear_int8(uintptr_t x, uintptr_t packed, uintptr_t out, size_t T, size_t K, size_t N, int threads) {
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    linear_int8(reinterpret_cast<const float*>(x), reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<float*>(out), T, K, N, threads, isa);
}

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void call_rms_norm(uintptr_t x, uintptr_t weight, uintptr_t out, size_t rows, size_t width, float eps, int threads) {
    rms_norm(at<const float>(x), at<const float>(weight), at<float>(out), rows, width, eps, threads, select_isa());
}

void call_rope(uintptr_t x, uintptr_t cosine, uintptr_t sine, uintptr_t out, size_t T, size_t heads, size_t half,
               size_t token_stride, size_t head_stride, bool interleaved, int threads) {
    rope(at<const float>(x), at<const float>(cosine), at<const float>(sine), at<float>(out), T, heads, half, token_stride,
         head_stride, interleaved, threads, select_isa());
}

void call_silu_mul(uintptr_t gate, uintptr_t up, uintptr_t out, size_t count, int threads) {
    silu_mul(at<const float>(gate), at<const float>(up), at<float>(out), count, threads, select_isa());
}

void call_cache_write(uintptr_t cache, uintptr_t values, uintptr_t slots, size_t T, size_t row_bytes) {
    cache_write(at<std::byte>(cache), at<const std::byte>(values), at<const int64_t>(slots), T, row_bytes);
}

using Strides = std::tuple<size_t, size_t, size_t>;  // floats from page to page, from slot to slot, from head to head

void call_attention_decode(uintptr_t q, uintptr_t k, Strides k_strides, uintptr_t v, Strides v_strides, uintptr_t lengths,
                           uintptr_t tables, uintptr_t out, std::tuple<size_t, size_t, size_t, size_t, size_t, size_t, size_t> sizes,
                           float scale, int threads) {
    const auto [sequences, heads, kv_heads, k_width, v_width, page_size, max_pages] = sizes;
    const auto [k_page, k_slot, k_head] = k_strides;
    const auto [v_page, v_slot, v_head] = v_strides;
    const DecodeShape shape = {sequences, heads, kv_heads, k_width, v_width, page_size, max_pages, k_head, v_head};
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    attention_decode(at<const float>(q), {at<const float>(k), k_page, k_slot}, {at<const float>(v), v_page, v_slot},
                     at<const int64_t>(lengths), at<const int64_t>(tables), at<float>(out), shape, scale, threads, isa);
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
    m.def("linear_int8", call_linear_int8);
    m.def("rms_norm", call_rms_norm);
    m.def("rope", call_rope);
    m.def("silu_mul", call_silu_mul);
    m.def("cache_write", call_cache_write);
    m.def("attention_decode", call_attention_decode);
    bind_float(m);
}
