// The Python face of the float32 team drivers: one call, one parallel region.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <omp.h>

#include <array>
#include <optional>
#include <vector>

#include "experts.h"
#include "heads.h"
#include "linear_float.h"
#include "route.h"

namespace nb = nanobind;
using namespace porcelet;

namespace {

constexpr size_t WORTH_THREADS = 1 << 16;  // multiply-adds; for fewer, entering a region costs more than it saves

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class Args>
void in_region(void (*driver)(const Args&, size_t, const Team&), const Args& args, size_t rows, size_t work, int threads) {
    nb::gil_scoped_release unlocked;
    if (threads == 1 || work < WORTH_THREADS) return driver(args, rows, {0, 1, nullptr});
    std::optional<Barrier> barrier;
#pragma omp parallel num_threads(threads)
    {
        const size_t size = static_cast<size_t>(omp_get_num_threads());
#pragma omp single
        barrier.emplace(size);
        driver(args, rows, {static_cast<size_t>(omp_get_thread_num()), size, &*barrier});
    }
}

void call_linear_float(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, std::array<size_t, 6> sizes, int threads) {
    const auto [T, K, N, x_stride, weight_stride, out_stride] = sizes;
    const LinearFloatArgs args = {select_isa(), {at<const float>(x), x_stride}, {at<const float>(weight), weight_stride},
                                  at<const float>(bias), at<float>(out), out_stride, K, N};
    in_region(linear_float, args, T, T * K * N, threads);
}

void call_heads_linear(uintptr_t x, uintptr_t weight, uintptr_t out, std::array<size_t, 4> sizes, std::array<size_t, 6> strides,
                       bool mixed, int threads) {
    const auto [T, H, inputs, outputs] = sizes;
    const auto [x_token, x_head, weight_head, weight_row, out_token, out_head] = strides;
    const HeadsArgs args = {select_isa(), at<const float>(x), x_token, x_head, {at<const float>(weight), weight_row}, weight_head,
                            at<float>(out), out_token, out_head, H, inputs, outputs, mixed};
    in_region(heads_linear, args, T, T * H * inputs * outputs, threads);
}

void call_experts_float(uintptr_t x, uintptr_t gate_up, uintptr_t down, uintptr_t indices, uintptr_t weights, uintptr_t out,
                        std::array<size_t, 6> sizes, int threads) {
    const auto [T, D, F, E, A, x_stride] = sizes;
    std::vector<size_t> sorted(E + 1 + T * A);
    std::vector<float> hidden(T * A * F);
    const ExpertsArgs args = {select_isa(), {at<const float>(x), x_stride}, at<const float>(gate_up), at<const float>(down),
                              at<const int64_t>(indices), at<const float>(weights), at<float>(out), D, D, F, E, A,
                              sorted.data(), sorted.data() + E + 1, hidden.data()};
    in_region(experts_float, args, T, T * A * D * F * 3, threads);
}

void call_route(uintptr_t logits, uintptr_t bias, uintptr_t indices, uintptr_t weights, std::array<size_t, 5> sizes,
                bool normalize, float scale, int threads) {
    constexpr size_t score_work = 16;  // what an exponential and its place among the best cost, in multiply-adds
    const auto [T, E, groups, kept_groups, A] = sizes;
    std::vector<float> scratch(T * (2 * E + groups));
    const RouteArgs args = {at<const float>(logits), at<const float>(bias), E, groups, kept_groups, A, normalize, scale,
                            at<int64_t>(indices), at<float>(weights), scratch.data()};
    in_region(route, args, T, T * E * score_work, threads);
}

}  // namespace

void bind_float(nb::module_& m) {
    m.def("linear_float", call_linear_float);
    m.def("heads_linear", call_heads_linear);
    m.def("experts_float", call_experts_float);
    m.def("route", call_route);
}
