// exp() in plain float arithmetic, for loops that the compiler vectorises. `static`, since every instruction set compiles
// its own copy and the linker must not merge them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace porcelet {

// exp(x) for x within +-87, to about 1e-7: 2^n times a polynomial of the remainder (Cephes' expf).
static inline float exponential(float x) {
    constexpr float log2_e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    x = std::min(std::max(x, -87.0f), 87.0f);
    const float shifted = x * log2_e + shift, n = shifted - shift;
    const float r = x - n * ln2_high - n * ln2_low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;  // the integer is in the last bits of `shifted`; a conversion would be undefined for NaN
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

}  // namespace porcelet
