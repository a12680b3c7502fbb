// Half precision in portable C++. Internal linkage: including files are compiled for different processors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace porcelet {
namespace {

template <class To, class From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

inline float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    return bits_of<float>(bits);
}

// To the nearest, ties to even.
inline uint16_t to_half(float value) {
    constexpr uint32_t nan = 0x7f800001, overflows = 0x477ff000, normal = 0x38800000;
    const uint32_t bits = bits_of<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= nan) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= overflows) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < normal)  // adding 0.5 rounds to a multiple of 2^-24, the step of half's subnormals
        return static_cast<uint16_t>(sign | (bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - bits_of<uint32_t>(0.5f)));
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

}  // namespace
}  // namespace porcelet
