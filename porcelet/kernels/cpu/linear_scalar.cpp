// Packed linear layers one row at a time, in portable C++: what the other sets are compared with.
#include <cmath>

#include "linear_body.h"

namespace porcelet {
namespace {

struct Scalar {
    static constexpr size_t lanes = 1, vectors = 1, tokens = 4;
    static constexpr bool has_limbs = false;
    using Ints = int32_t;
    using Floats = float;
    using Record = WordRecord<0, 1, 2, 3>;
    struct Quad {
        uint8_t q[4];
    };

    static Quad whole(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
    static Quad low(const uint8_t* p) { return {{half(p[0]), half(p[1]), half(p[2]), half(p[3])}}; }
    static Quad high(const uint8_t* p) { return {{half(p[0] >> 4), half(p[1] >> 4), half(p[2] >> 4), half(p[3] >> 4)}}; }
    static void spread(const uint8_t* p, uint8_t add, uint8_t* low, uint8_t* high) {
        for (size_t i = 0; i < 4; ++i) {
            low[i] = static_cast<uint8_t>((p[i] & 15) + add);
            high[i] = static_cast<uint8_t>((p[i] >> 4) + add);
        }
    }
    static int32_t integers(int32_t i) { return i; }
    static int32_t times_16(int32_t i) { return i * 16; }
    static const int16_t* values(const Record& x, size_t quad) { return x.q + 4 * quad; }
    static int32_t dot(int32_t sum, const Quad& w, const int16_t* x) {
        for (size_t i = 0; i < 4; ++i) sum += w.q[i] * x[i];
        return sum;
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

    static uint8_t half(int byte) { return static_cast<uint8_t>(byte & 15); }
};

}  // namespace

constexpr LinearBody linear_scalar = make_body<Scalar>();

}  // namespace porcelet
