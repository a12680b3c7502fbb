// The Python face of sampling.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "sample.h"

namespace nb = nanobind;
using namespace porcelet;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Columns = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

void call_sample(uintptr_t logits, Columns columns, size_t draws, size_t V, uintptr_t tokens, uintptr_t logprobs, int threads) {
    const auto [rows, temperature, top_k, top_p, min_p, uniform] = columns;
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    sample(at<const float>(logits),
           {at<const int64_t>(rows), at<const float>(temperature), at<const int64_t>(top_k), at<const float>(top_p),
            at<const float>(min_p), at<const double>(uniform)},
           draws, V, at<int64_t>(tokens), at<float>(logprobs), threads, isa);
}

void call_allow(uintptr_t logits, uintptr_t masks, uintptr_t out, size_t rows, size_t V) {
    nb::gil_scoped_release unlocked;
    allow(at<const float>(logits), at<const uint8_t>(masks), at<float>(out), rows, V);
}

}  // namespace

void bind_sample(nb::module_& m) {
    m.def("sample", call_sample);
    m.def("allow", call_allow);
}
