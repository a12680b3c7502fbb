"""Native bodies for the CPU, in C++: for AVX-512 VNNI, AVX-512, AVX2 or any processor, chosen at run time.

Importing this package registers them on their ops. An installation that found no C++ compiler has no native module and
keeps the torch bodies. PORCELET_ISA in the environment names a lesser instruction set, for tests and comparison.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

# torch first: it brings its own libgomp.so.1, which the native module then shares; else there were two thread pools.
import torch

from porcelet.kernels import Key
from porcelet.kernels.linear import GROUP, Int8Weight, Weight, linear

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# A module that is there and does not load raises here; only one that was never built is done without.
_BUILT = importlib.util.find_spec("porcelet.kernels.cpu._native") is not None
if _BUILT:
    from porcelet.kernels.cpu import _native


def available() -> bool:
    """Whether the native module was built."""
    return _BUILT


def isa() -> str:
    """The instruction set in use. InputError if `PORCELET_ISA` names an unknown one or one this processor lacks."""
    assert _BUILT
    return _native.isa()


def _is_int8(key: Key) -> bool:
    return key.device == "cpu" and key.format == "Int8Weight" and key.dtype == torch.float32 and not key.needs_grad


@linear.body("cpu_int8", when=_is_int8, available=available)
def linear_int8(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ with x quantised to 16 bits a token and group of 32: within 1e-4 of the reference's largest value.

    The result is the same bit for bit whatever the instruction set, the number of threads and the other tokens. A token
    that holds NaN or infinity gets NaN in all its outputs.
    """
    assert isinstance(weight, Int8Weight) and x.dtype == torch.float32 and weight.packed.dtype == torch.uint8
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape[1] == K and K % GROUP == 0, (x.shape, weight.shape)
    assert x.is_cpu and weight.packed.is_cpu and weight.packed.is_contiguous()
    x = x.contiguous()
    out = x.new_empty(T, N)
    _native.linear_int8(x.data_ptr(), weight.packed.data_ptr(), out.data_ptr(), T, K, N, torch.get_num_threads())
    return out
