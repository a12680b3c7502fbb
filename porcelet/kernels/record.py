"""The recording of a step: the model's Python runs once, its ops append instructions instead of computing.

While a `Tape` is active nothing else may touch data: a torch operation that is more than a view raises `NotRecordable`,
and so does an op without an instruction. Outputs are written to buffers with room for `capacity` rows. A buffer is
free again once the model has let go of its last view of it; replay is right with that because it runs in the same
order.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from porcelet.kernels import RECORDER, Key, Op

if TYPE_CHECKING:
    from porcelet.kernels.cpu._native import Program

ALIGNMENT = 64  # bytes; a cache line


class NotRecordable(Exception):
    """The step holds something that has no instruction. It can still be run eagerly."""


class Arena:
    """Buffers by size. `num_bytes` counts all that were ever made."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; its buffer comes back when the last tensor on it is gone."""
        num_bytes = max(math.prod(shape), 1) * dtype.itemsize
        free = self._free[num_bytes]
        memory = free.pop() if free else self._new(num_bytes)
        lent = memory[:]  # an object of its own, which the tensor and all its views keep alive
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype)[: math.prod(shape)].view(shape)

    def _new(self, num_bytes: int) -> np.ndarray:
        self.num_bytes += num_bytes
        memory = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + num_bytes]


class Tape:
    """Records the ops called while it is entered. Positions in the recorded step stay below `max_length`."""

    def __init__(self, program: Program, capacity: int, max_length: int) -> None:
        self.program, self.capacity, self.max_length = program, capacity, max_length
        self.arena = Arena()
        self._kept: list[Tensor] = []
        self._derived: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._guard = _Guard()
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        token = RECORDER.set(self)
        self._entered.callback(RECORDER.reset, token)
        self._entered.enter_context(self._guard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    def record(self, an_op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append an op's instruction; its output, not yet computed."""
        key = Key(args[0].device.type, type(args[1]).__name__, args[0].dtype, needs_grad=False)
        instruction = an_op.instruction_for(key)
        if instruction is None:
            raise NotRecordable(f"op {an_op.name} has no instruction for {key.format} in {key.dtype} on {key.device}")
        return instruction(self, *args, **kwargs)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An output or scratch buffer."""
        return self.arena.empty(shape, dtype)

    def dense(self, x: Tensor) -> Tensor:
        """`x`, whose last dimension must be contiguous: a copy would hold what is there now, not in the replay."""
        if x.stride(-1) != 1:
            raise NotRecordable(f"an op's input of shape {tuple(x.shape)} has strides {x.stride()}")
        return x

    def derive(self, x: Tensor, made: Tensor) -> Tensor:
        """Remember what was made from `x` until something is made from another tensor."""
        self._derived = weakref.ref(x), made
        return made

    def derived(self, x: Tensor) -> Tensor | None:
        """What was made from `x`, if it is what was made last: values are never overwritten while a tensor lives."""
        return self._derived[1] if self._derived and self._derived[0]() is x else None

    def keep(self, x: Tensor) -> Tensor:
        """Hold a constant of the recording for as long as the tape."""
        self._kept.append(x)
        return x

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute at once: constants of the recording."""
        self._guard.allows = True
        token = RECORDER.set(None)
        try:
            yield
        finally:
            RECORDER.reset(token)
            self._guard.allows = False


class _Guard(TorchDispatchMode):
    """Refuses every torch operation but views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allows = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is ever compiled, and the mark that says so would import the whole compiler: seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {})) if self.allows or func.is_view else None
        if not (self.allows or _shares(out, args[0] if args else None)):
            raise NotRecordable(f"{func} touches data outside of an op")
        return out


def _shares(views: Any, x: Any) -> bool:
    """Whether all of `views` lie in the memory of `x`: a reshape or a cast may have had to copy."""
    outputs = views if isinstance(views, (list, tuple)) else [views]
    return isinstance(x, Tensor) and all(isinstance(o, Tensor) and _memory(o) == _memory(x) for o in outputs)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
