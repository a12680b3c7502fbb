"""Serving: how fast answers come, for how many at once, and how many people that serves.

A plan's throughput is that of a fleet which does both prompts and answers, each device in turn: N answers under way
are written at D tokens a second in steps of their own; a request also wants its prompt computed, at P tokens a second,
so of each second a share f goes to prompts and X = D / (1 + D · prompt / (answer · P)) tokens are written. Splitting
the fleet into devices for prompts and devices for answers divides time alike and gives the same X; what it changes is
that answers no longer pause for prompts. A prompt's first token waits for those before it (M/D/1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from porcelet.errors import InputError
from porcelet.plan.figure import Number
from porcelet.plan.hardware import Fleet
from porcelet.plan.layout import Layout, divisors, layouts
from porcelet.plan.memory import CHUNK, Memory, device_memory
from porcelet.plan.model import PlannedModel
from porcelet.plan.work import Batch, StepTime, step_time

ACCEPTED = Number(
    0.85, "published", "DeepSeek-V3 report, section 5.4.3: 85 to 90 % of second tokens", "2024-12", 0.8, 0.9
)
MAX_INSTANCE = 384  # devices that serve one copy of a model; DeepSeek's own have 32 and 144
MAX_CONCURRENCY = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What requests are like and what their users expect.

    A request has `prompt` tokens, of which the share `hits` is found in the cache, and an answer of `answer` visible
    tokens, times `thinking` with its reasoning (a reasoning model writes 3 to 10 times what it shows). A user wants
    `speed` tokens a second and the first within `first_token` seconds; asks `turns` times an hour while online.
    """

    prompt: int = 2000
    answer: int = 400
    thinking: float = 1.0
    hits: float = 0.0
    speed: float = 10.0
    first_token: float = 5.0
    turns: float = 10.0

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "speed", "first_token", "turns"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        if not self.thinking >= 1:
            raise InputError(f"thinking is {self.thinking}; it is at least 1: all tokens written over those shown")
        if not 0 <= self.hits < 1:
            raise InputError(f"hits is {self.hits}; it is a share of the prompt's tokens, from 0 to below 1")

    @property
    def written(self) -> float:
        """Tokens written for a request, reasoning included."""
        return self.answer * self.thinking

    @property
    def computed(self) -> float:
        """Tokens of the prompt that are not found in the cache."""
        return max(1.0, self.prompt * (1 - self.hits))

    @property
    def context(self) -> float:
        """Cached tokens of a request under way, on average."""
        return self.prompt + self.written / 2


@dataclass(frozen=True)
class Point:
    """What `concurrency` answers under way at once get. `written` and `computed` are the fleet's tokens a second,
    `speed` those of one answer, `first_token` seconds."""

    concurrency: int
    written: float
    computed: float
    speed: float
    first_token: float
    decode: StepTime
    prefill: StepTime
    prompt_share: float  # of time, that goes to prompts

    @property
    def limit(self) -> str:
        """What bounds the larger part of the time."""
        return self.prefill.limit if self.prompt_share > 0.5 else self.decode.limit

    @property
    def range(self) -> tuple[float, float]:
        """Tokens written a second, if all times are at their long end and at their short one."""
        slow = self.written * self.decode.seconds / self.decode.high
        return slow, self.written * self.decode.seconds / self.decode.low

    def latency(self, traffic: Traffic) -> float:
        """Seconds from a question to the whole answer."""
        return self.first_token + traffic.written / self.speed


@dataclass(frozen=True)
class Option:
    """One way to serve: a layout, how many copies of it the fleet holds, what memory it takes; throughput against
    concurrency; and the busiest point at which users still get what they expect (None: never)."""

    layout: Layout
    copies: int
    memory: Memory
    curve: Sequence[Point]
    best: Point | None

    @property
    def max_concurrency(self) -> int:
        return self.curve[-1].concurrency if self.curve else 0


def options(
    model: PlannedModel, fleet: Fleet, traffic: Traffic, *, cache_bytes: float = 2, mtp: bool = False
) -> list[Option]:
    """Every layout that fits, the one that writes most for satisfied users first; then by throughput alone."""
    found = list(_options(model, fleet, traffic, cache_bytes, mtp))
    return sorted(found, key=_merit, reverse=True)


def _merit(option: Option) -> tuple[float, float]:
    most = max((point.written for point in option.curve), default=0.0)
    return option.best.written if option.best else 0.0, most


def _options(model: PlannedModel, fleet: Fleet, traffic: Traffic, cache_bytes: float, mtp: bool) -> Iterator[Option]:
    device = fleet.device
    for size in divisors(fleet.count):
        if size > MAX_INSTANCE:
            return
        for layout in layouts(model.config, size, device.per_node):
            memory = device_memory(model, layout, device, cache_bytes=cache_bytes, mtp=mtp)
            if memory.fits and memory.room >= traffic.prompt + traffic.written:
                yield option(model, fleet, layout, memory, traffic, cache_bytes=cache_bytes, mtp=mtp)


def option(
    model: PlannedModel,
    fleet: Fleet,
    layout: Layout,
    memory: Memory,
    traffic: Traffic,
    *,
    cache_bytes: float = 2,
    mtp: bool = False,
) -> Option:
    """One layout's curve, at concurrencies that double, and its best point, by bisection between them."""
    copies = fleet.count // layout.num_devices
    most = int(memory.room / traffic.context) * copies * layout.data * layout.pipeline

    def at(concurrency: int) -> Point:
        return point(model, fleet, layout, traffic, concurrency, cache_bytes=cache_bytes, mtp=mtp)

    counts = [1 << i for i in range(min(most, MAX_CONCURRENCY).bit_length())]
    curve = [at(count) for count in counts] + ([at(most)] if most > counts[-1] else [])
    return Option(layout, copies, memory, curve, _busiest(curve, traffic, at))


def _busiest(curve: Sequence[Point], traffic: Traffic, at: Callable[[int], Point]) -> Point | None:
    """The point with the most answers at once that are still as fast as `traffic` wants. Both speed and wait only get
    worse with concurrency."""
    good = [one for one in curve if satisfies(one, traffic)]
    if not good or good[-1] is curve[-1]:
        return good[-1] if good else None
    low, high = good[-1], curve[len(good)]
    while high.concurrency - low.concurrency > max(1, low.concurrency // 32):
        middle = at((low.concurrency + high.concurrency) // 2)
        low, high = (middle, high) if satisfies(middle, traffic) else (low, middle)
    return low


def satisfies(point: Point, traffic: Traffic) -> bool:
    """Whether users get the speed they expect, and the first token in time."""
    return point.speed >= traffic.speed and point.first_token <= traffic.first_token


def point(
    model: PlannedModel,
    fleet: Fleet,
    layout: Layout,
    traffic: Traffic,
    concurrency: int,
    *,
    cache_bytes: float = 2,
    mtp: bool = False,
) -> Point:
    """What `concurrency` answers under way get of a fleet of copies of a layout."""
    copies = fleet.count // layout.num_devices
    replicas = copies * layout.data * layout.pipeline  # with a pipeline, as many batches are under way
    sequences = max(1.0, concurrency / replicas)
    drafted = 2 if mtp else 1
    decode = step_time(model, layout, fleet.device, Batch(sequences, drafted, traffic.context), cache_bytes)
    gained = 1 + ACCEPTED.value if mtp else 1.0
    pure = min(concurrency, replicas * sequences) * gained / (layout.pipeline * decode.seconds)

    behind = traffic.prompt - traffic.computed
    together = max(1.0, CHUNK // traffic.computed)
    prefill = step_time(model, layout, fleet.device, Batch(together, traffic.computed, behind), cache_bytes)
    computed = copies * layout.data * together * traffic.computed / prefill.seconds
    wanted = pure * traffic.computed / (traffic.written * computed)  # seconds of prompts for one of answers
    share = wanted / (1 + wanted)
    written = pure / (1 + wanted)
    alone = step_time(model, layout, fleet.device, Batch(1.0, traffic.computed, behind), cache_bytes)
    service = layout.pipeline * alone.seconds
    waiting = service * share / (2 * (1 - share))
    return Point(concurrency, written, computed, written / concurrency, service + waiting, decode, prefill, share)


def users(best: Point, traffic: Traffic) -> float:
    """People online that a fleet serves: those of whom, by Little's law, `concurrency` wait for an answer at once."""
    return best.concurrency / (traffic.turns / 3600 * best.latency(traffic))
