"""Who asks, and who looks on: limits, usage and metrics all hear of a generation through one small protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from porcelet.types import Output

if TYPE_CHECKING:
    from fastapi import Request  # the command line reads keys without loading it


@dataclass(frozen=True)
class Caller:
    """Who asks. `id` separates tenants in the engine: their shares, and their cached prefixes. `key` is the id of the
    API key by which they came, empty without one."""

    id: str
    name: str
    key: str = ""


LOCAL = Caller("local", "local")  # whoever sits at this machine, where no key is needed


def caller_of(request: Request) -> Caller:
    """Whom the guard found behind a request."""
    caller = request.scope["caller"]
    assert isinstance(caller, Caller), "the guard stands in front of every route"
    return caller


@dataclass
class Job:
    """One generation from its admission to its end; times are `time.monotonic`'s seconds."""

    id: str
    model: str
    caller: Caller
    num_prompt_tokens: int
    max_tokens: int
    num_samples: int = 1
    created: float = field(default_factory=monotonic)
    num_cached_tokens: int = 0
    num_generated: list[int] = field(default_factory=list)  # for each sample
    num_reasoning: int = 0

    def __post_init__(self) -> None:
        self.num_generated = [0] * self.num_samples


class Watch(Protocol):
    """Hears of every generation. None of its methods may wait."""

    def admit(self, job: Job) -> None:
        """It is about to be submitted; raise a `PorceletError` to refuse it."""

    def progressed(self, job: Job, output: Output) -> None:
        """One step's output has arrived and is counted in `job`."""

    def ended(self, job: Job, reason: str) -> None:
        """It is over, once for each job that this watch admitted: "done", "refused", "abort" or "error"."""


@contextmanager
def watched(watches: Sequence[Watch], job: Job) -> Iterator[None]:
    """Admit a job and tell of its end, whichever way it ends."""
    admitted: list[Watch] = []
    reason = "refused"
    try:
        for watch in watches:
            watch.admit(job)
            admitted.append(watch)
        reason = "abort"  # a generator that is closed early raises what is no Exception
        yield
        reason = "done"
    except Exception:
        reason = "error" if reason == "abort" else reason
        raise
    finally:
        for watch in admitted:
            watch.ended(job, reason)
