"""FP8 numbers (e4m3) on any device: computed on their bits, as cards before Ada have no instructions for them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """The bytes of the nearest e4m3 numbers, ties to even, for |x| up to 448; computed on the bits, as not every device
    has the instruction."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 bits go; adding half of the last that stays, less one if that is even, rounds ties to even.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9: adding 2^14 makes float32's last bit that step.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def from_e4m3(bits):
    """The values of e4m3 bytes, over 256, in half precision: moved up seven bits."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
