"""Ops: everything that touches tensor data on the way through a model.

The legend of dimensions, here and nowhere else:

    T tokens of the flat batch   B sequences            S cached length       V vocabulary
    D model width                H heads                K key/value heads     N nope dim        R rope dim
    C latent rank                F expert width         E experts             A active experts a token
    P pages                      L layers               G samples a group     Hd head dim

An op is a plain torch function under `@op`: its body is the definition, the documentation and the reference. Faster
bodies register on it with `@name.body(...)`. A call picks its body once per (device, weight format, dtype, needs-grad)
and remembers the choice. `PORCELET_KERNELS=reference` turns every other body off.

While a recorder is active (kernels/record.py) a call computes nothing: the op's `instruction` for the key joins the
recording instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import update_wrapper
from inspect import signature
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Key(NamedTuple):
    """What a body is chosen by. `format` is the class name of the op's second argument ("Tensor", "Int8Weight",
    ...)."""

    device: str
    format: str
    dtype: torch.dtype
    needs_grad: bool


class Recorder(Protocol):
    """What takes the calls of ops instead of their bodies."""

    def record(self, an_op: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...


RECORDER: ContextVar[Recorder | None] = ContextVar("RECORDER", default=None)


@dataclass(frozen=True)
class Body(Generic[P, R]):
    """One implementation of an op: `when(key)` says where it applies, `available` whether this machine has it."""

    name: str
    function: Callable[P, R]
    when: Callable[[Key], bool]
    available: Callable[[], bool]


class Op(Generic[P, R]):
    """A reference function and the faster bodies registered on it; calling it dispatches.

    The first argument is a tensor and gives device and dtype; the class of the second gives the weight format.
    Arguments annotated as tensors or weights are passed by position, so that a call can ask them for requires_grad.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self.name: str = reference.__name__
        self.bodies: list[Body[P, R]] = []
        self.instructions: list[Body[..., R]] = []
        self._resolved: dict[Any, Callable[P, R]] = {}
        annotations = [str(parameter.annotation) for parameter in signature(reference).parameters.values()]
        self._tensors = [i for i, kind in enumerate(annotations) if "Tensor" in kind or "Weight" in kind]
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        arguments: tuple[Any, ...] = args
        recorder = RECORDER.get()
        if recorder is not None:
            return recorder.record(self, arguments, kwargs)
        first = arguments[0]
        needs_grad = False
        if torch.is_grad_enabled():
            for position in self._tensors:  # isinstance on every argument would cost more than all the rest
                if arguments[position].requires_grad:
                    needs_grad = True
                    break
        # The class itself, not its name, is the dictionary's key: it is what costs nothing to look up.
        function = self._resolved.get((first.is_cpu, arguments[1].__class__, first.dtype, needs_grad))
        if function is None:
            function = self._resolve(first, arguments[1], needs_grad)
        return function(*args, **kwargs)

    def body(
        self, name: str, *, when: Callable[[Key], bool], available: Callable[[], bool] = lambda: True
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a faster body. The last registered body that applies is taken."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.bodies.append(Body(name, function, when, available))
            self._resolved.clear()
            return function

        return register

    def instruction(
        self, *, when: Callable[[Key], bool], available: Callable[[], bool] = lambda: True
    ) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
        """Register what records the op: a function of the recorder and the op's arguments."""

        def register(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
            self.instructions.append(Body("instruction", function, when, available))
            return function

        return register

    def instruction_for(self, key: Key) -> Callable[..., R] | None:
        """What records the op for `key`, if anything does. The last registered one that applies is taken."""
        found = _last(self.instructions, key)
        return found.function if found else None

    def chosen(self, key: Key) -> str:
        """The name of the body that serves `key`: what the tests look at."""
        body = _last(self.bodies, key)
        return body.name if body else "reference"

    def _resolve(self, first: torch.Tensor, second: object, needs_grad: bool) -> Callable[P, R]:
        # One table a device kind: a process computes on the CPU and at most one kind of accelerator.
        body = _last(self.bodies, Key(first.device.type, type(second).__name__, first.dtype, needs_grad))
        function = body.function if body else self.reference
        self._resolved[first.is_cpu, second.__class__, first.dtype, needs_grad] = function
        return function


def _last(bodies: list[Body[P, R]], key: Key) -> Body[P, R] | None:
    if os.environ.get("PORCELET_KERNELS") == "reference":
        return None
    return next((b for b in reversed(bodies) if b.when(key) and b.available()), None)


OPS: dict[str, Op[..., Any]] = {}


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Make a function the definition of an op and enter it in the table of ops."""
    made = Op(reference)
    OPS[made.name] = made
    return made


def composed(made: Op[..., Any]) -> None:
    """Say that an op's definition calls other ops alone: a recording takes these."""
    made.instruction(when=lambda key: True)(lambda recorder, *args, **kwargs: made.reference(*args, **kwargs))
