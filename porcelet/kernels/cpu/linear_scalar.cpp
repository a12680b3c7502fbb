// The int8 linear layer one row at a time, in portable C++: what the other sets are compared with.
#include <cmath>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Scalar {
    static constexpr size_t lanes = 1;
    using Ints = int32_t;
    using Floats = float;

    static constexpr size_t place(size_t column) { return column; }
    static const uint8_t* weights(const uint8_t* p) { return p; }
    static int32_t dot(int32_t sum, const uint8_t* w, const int16_t* x) {
        return sum + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
    }
    static float halves(const uint8_t* p) {
        uint16_t half;
        std::memcpy(&half, p, sizeof half);
        return from_half(half);
    }
    static float broadcast(float s) { return s; }
    static float to_float(int32_t i) { return static_cast<float>(i); }
    static float multiply(float a, float b) { return a * b; }
    static float fma(float a, float b, float c) { return std::fma(a, b, c); }
    static void store(float* p, float v) { *p = v; }
};

}  // namespace

constexpr LinearBody linear_scalar = make_body<Scalar>();

}  // namespace porcelet
