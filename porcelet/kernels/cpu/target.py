"""Where an instruction goes: to the step being recorded, or to a program of its own that runs at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

# torch first: it brings its own libgomp.so.1, which the native module then shares; else there were two thread pools.
import torch
from torch import Tensor

from porcelet.kernels import Key, Op
from porcelet.kernels.linear import GROUP, KINDS, TILE, FP8Weight, PackedHeads, PackedWeight, block_bytes
from porcelet.kernels.record import Tape

# A module that is there and does not load raises here; only one that was never built is done without.
_BUILT = importlib.util.find_spec("porcelet.kernels.cpu._native") is not None
if _BUILT:
    from porcelet.kernels.cpu import _native

P = ParamSpec("P")
R = TypeVar("R")

PACKED = {kind.__name__ for kind in (*KINDS, PackedHeads)}
WORTH_THREADS = 1 << 15  # values or products below which entering a parallel region costs more than it saves


def available() -> bool:
    """Whether the native module was built."""
    return _BUILT


def isa() -> str:
    """The instruction set in use. InputError if `PORCELET_ISA` names an unknown one or one this processor lacks."""
    assert _BUILT
    return _native.isa()


def isas() -> list[str]:
    """The instruction sets that this processor has and the module has bodies for, the best first."""
    assert _BUILT
    return _native.isas()


def new_program() -> _native.Program:
    """What a `Tape` records to."""
    assert _BUILT
    return _native.Program()


def new_residency(path: Path, budget: int) -> _native.Residency:
    """Maps a file of experts, of which `budget` bytes may be in memory. RuntimeError if it cannot."""
    assert _BUILT
    return _native.Residency(str(path), budget)


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on, where the C library can: for training, whose every step frees and
    takes the same gigabytes. Pages that come fresh from the system are cleared first, which is a quarter of a step of
    10 M parameters. Returns whether it holds."""
    return _BUILT and _native.keep_freed_memory()


def return_freed_memory() -> None:
    """Give the system back what is free now, where the C library can: after a model was loaded, say, 4 MB."""
    if _BUILT:
        _native.return_freed_memory()


class AtOnce:
    """A program of one instruction. It keeps scratch and copies alive until it has run."""

    def __init__(self) -> None:
        self.program = _native.Program()
        self._kept: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        self._kept.append(made)
        return made

    def dense(self, x: Tensor) -> Tensor:
        if x.stride(-1) == 1:
            return x
        self._kept.append(x.contiguous())
        return self._kept[-1]

    def derive(self, x: Tensor, made: Tensor) -> Tensor:
        return made

    def derived(self, x: Tensor) -> Tensor | None:
        return None


Target = Tape | AtOnce  # both have `program`, `empty`, `dense`, `derive` and `derived`


def at_once(
    function: Callable[Concatenate[Target, P], R], rows: int, work: int, *args: P.args, **kwargs: P.kwargs
) -> R:
    """Append to a program of its own and run it, on one thread where the work, in values or products, is little."""
    target = AtOnce()
    out = function(target, *args, **kwargs)
    target.program.run(rows, 0, torch.get_num_threads() if work >= WORTH_THREADS else 1)
    return out


def native(
    an_op: Op[P, R],
    name: str,
    when: Callable[[Key], bool],
    *,
    tokens: int = 0,
    work: Callable[[Tensor], int] = Tensor.numel,
) -> Callable[[Callable[Concatenate[Target, P], R]], Callable[P, R]]:
    """Register a function as the op's instruction, and run at once as its body.

    Argument number `tokens` has as many rows as there are tokens; `work` tells from it how much there is to do.
    """

    def register(function: Callable[Concatenate[Target, P], R]) -> Callable[P, R]:
        @wraps(function)
        def body(*args: P.args, **kwargs: P.kwargs) -> R:
            rows = args[tokens]
            assert isinstance(rows, Tensor)
            return at_once(function, len(rows), work(rows), *args, **kwargs)

        an_op.instruction(when=when, available=available)(function)
        an_op.body(name, when=when, available=available)(body)
        return body

    return register


def on_cpu(key: Key) -> bool:
    return key.device == "cpu" and not key.needs_grad


def is_float(key: Key) -> bool:
    return on_cpu(key) and key.dtype == torch.float32


def is_plain(key: Key) -> bool:
    return on_cpu(key) and key.format in ("Tensor", "Parameter")


def is_plain_float(key: Key) -> bool:
    return is_plain(key) and is_float(key)


def is_packed(key: Key) -> bool:
    return on_cpu(key) and key.format in PACKED


def is_packed_experts(key: Key) -> bool:
    return is_float(key) and key.format == "PackedExperts"


def is_fp8(key: Key) -> bool:
    return is_float(key) and key.format == "FP8Weight"


def packed_of(weight: PackedWeight) -> tuple[int, int, bool, int, int]:
    """Address, bits a value, whether symmetric, K and N."""
    N, K = weight.shape
    assert weight.packed.dtype == torch.uint8 and weight.packed.is_cpu and weight.packed.is_contiguous()
    assert weight.packed.shape == (-(-N // TILE), K // GROUP, block_bytes(type(weight))), weight.shape
    return weight.packed.data_ptr(), weight.bits, weight.symmetric, K, N


def fp8_of(weight: FP8Weight) -> tuple[int, int, int]:
    """Addresses of values and scales, K; of a stack's first weight."""
    assert weight.values.dtype == torch.float8_e4m3fn and weight.scale.dtype == torch.float32
    assert weight.values.is_contiguous() and weight.scale.is_contiguous() and weight.values.is_cpu
    return weight.values.data_ptr(), weight.scale.data_ptr(), weight.shape[-1]


def rows_of(x: Tensor) -> tuple[int, int]:
    """Address, and values from row to row."""
    return x.data_ptr(), x.stride(0)


def heads_of(x: Tensor) -> tuple[int, int, int]:
    """Address, values from row to row and from head to head; two dimensions are one head a row."""
    assert x.dim() in (2, 3)
    return x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 3 else 0


def num_heads(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def indices_of(x: Tensor) -> int:
    assert x.dtype == torch.int64 and x.is_contiguous()
    return x.data_ptr()
