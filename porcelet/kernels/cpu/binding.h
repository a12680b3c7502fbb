// What the files that bind a Program's methods share: addresses, and the method that appends a driver's call.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "step.h"

namespace nb = nanobind;
using namespace porcelet;

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Any address of floats, [rows, ...]: the first and the distance from row to row.
using Rows = std::tuple<uintptr_t, size_t>;
using Heads = std::tuple<uintptr_t, size_t, size_t>;  // and from head to head

// The method that appends a driver's call, its arguments made from Python's.
template <class Args, class... P>
auto appends(void (*driver)(const Args&, size_t, const Team&), Args (*make)(P...)) {
    return [=](Program& program, P... values) { program.append(driver, make(values...)); };
}

// The same for a driver of rows, as Program::append_rows has it.
template <class Args, class... P>
auto appends_rows(void (*driver)(const Args&, size_t, const Team&), Args (*make)(P...)) {
    return [=](Program& program, P... values) { program.append_rows(driver, make(values...)); };
}
