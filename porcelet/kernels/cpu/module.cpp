// The Python face of the native bodies. Tensors come as addresses: no torch header, no torch ABI; kernels/cpu/__init__.py checks them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "isa.h"
#include "linear.h"

namespace nb = nanobind;
using namespace porcelet;

namespace {

void call_linear_int8(uintptr_t x, uintptr_t packed, uintptr_t out, size_t T, size_t K, size_t N, int threads) {
    const Isa isa = select_isa();
    nb::gil_scoped_release unlocked;
    linear_int8(reinterpret_cast<const float*>(x), reinterpret_cast<const uint8_t*>(packed), reinterpret_cast<float*>(out), T, K, N, threads, isa);
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
}
