"""Plan before load: what cannot fit is refused before anything is read, with the nearest three things that do.

Each of them was tried: the forecast with it fits. They are sorted by what they cost a user: fewer cached tokens, a
smaller step, other numbers in the cache, experts on disk, weights of fewer bits; then other models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from operator import le
from pathlib import Path
from typing import Any

from porcelet.config import EngineConfig, TrainConfig, parse_memory
from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.memory.engine import RUNTIME_BYTES, cached_tokens, engine_memory, may_stay_on_disk
from porcelet.memory.process import ProcessMemory, resident_bytes
from porcelet.memory.tensors import Inventory, kept, read_inventory
from porcelet.memory.training import pass_rows, training_memory
from porcelet.weights.memory import available_memory

NUM_WAYS = 3
CLEARLY_LESS = 0.9
FEWEST_TOKENS = 1024  # that a cache is worth having for
FEWEST_ROWS = 256  # of a pass
SHARES = (2, 4, 8)  # of the experts in memory, one of so many
SMALL_STEP = {"max_batch_tokens": 128, "max_sequences": 8}

Settings = Mapping[str, Any]
Change = tuple[tuple[float, ...], Settings]  # what each kind of a change costs, and the change


@dataclass(frozen=True)
class Way:
    """What fits: settings, or another model; the bytes that it takes, and what it costs a user, who feels half the
    cache as 1."""

    words: str
    peak: int
    loss: float = 0.0

    def __str__(self) -> str:
        return f"{self.words} ({gigabytes(self.peak)})"


@dataclass(frozen=True)
class Wanted:
    """An engine to be: its model's tensors and its settings. `native` is whether the native bodies are there."""

    inventory: Inventory
    engine: EngineConfig
    native: bool = True

    def with_settings(self, settings: Settings) -> Wanted:
        return replace(self, engine=replace(self.engine, **settings))

    def forecast(self, available: int) -> ProcessMemory:
        return engine_memory(
            self.inventory.config, self.engine, stored=self.inventory, native=self.native, available=available
        )

    def fits(self, room: int) -> bool:
        """Whether it takes no more than `room` bytes, with a cache that is worth having."""
        tokens = cached_tokens(self.inventory.config, self.engine, self.inventory, room, native=self.native)
        return self.forecast(room).peak <= room and tokens >= min(FEWEST_TOKENS, self.engine.cache_tokens)


def check_engine(path: Path, engine: EngineConfig, *, native: bool = True) -> ProcessMemory:
    """The forecast of an engine in this process, for a GGUF file or a folder.

    Raises:
        CapacityError: it needs more memory than can be had; names what does fit.
        ModelError: the files are missing, damaged or not supported.
    """
    wanted = Wanted(read_inventory(path), engine, native)
    here = min(resident_bytes(), RUNTIME_BYTES)  # of the runtime, which the forecast counts too
    return check_engines({path.name: wanted}, available_memory() + here)[path.name]


def check_engines(wanted: Mapping[str, Wanted], available: int | None = None) -> dict[str, ProcessMemory]:
    """The forecasts of engines that are to run side by side, by name, each in a process of its own.

    Raises:
        CapacityError: together they need more than `available` bytes, by default what can be had now.
    """
    available = available_memory() if available is None else available
    found = {name: one.forecast(available) for name, one in wanted.items()}
    total = sum(forecast.peak for forecast in found.values())
    if total <= available:
        return found
    ways: list[Way] = []
    for name, one in wanted.items():
        whose = f"for {name} " if len(wanted) > 1 else ""
        rest = total - found[name].peak
        near = engine_ways(one, available - rest)
        ways += [replace(way, words=whose + way.words, peak=rest + way.peak) for way in near]
        if len(wanted) > 1 and rest <= available:
            ways.append(Way(f"without {name}", rest, loss=100.0))
    if len(wanted) == 1 and len(ways) < NUM_WAYS:
        ways += _stored_models(next(iter(wanted.values())), available)
    parts = largest_parts(*found.values())
    raise refusal(" and ".join(wanted), total, parts, available, sorted(ways, key=lambda way: way.loss))


def refusal(name: str, needed: int, parts: str, available: int, ways: list[Way]) -> CapacityError:
    """What is told to those whose model does not fit."""
    *most, last = [str(way) for way in ways[:NUM_WAYS]] or ["no other setting of it: free some memory"]
    fitting = f"{', '.join(most)} or {last}" if most else last
    return CapacityError(
        f"{name} would take {gigabytes(needed)} of memory ({parts}), and {gigabytes(available)} are available; "
        f"what fits: {fitting}"
    )


def largest_parts(*forecasts: ProcessMemory) -> str:
    """The three parts that take most, all processes together."""
    total: dict[str, int] = {}
    for forecast in forecasts:
        for name, part in forecast.largest.items():
            total[name] = total.get(name, 0) + part
    most = sorted(total.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {gigabytes(part)}" for name, part in most)


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"


# ---- what else would fit --------------------------------------------------------------------------------------------


def engine_ways(wanted: Wanted, room: int) -> list[Way]:
    """The nearest settings with which an engine takes no more than `room` bytes, at most three."""

    def peak_with(settings: Settings) -> int | None:
        changed = wanted.with_settings(settings)
        return changed.forecast(room).peak if changed.fits(room) else None

    return nearest(_changes(wanted), peak_with)


def nearest(changes: Iterable[Change], peak_with: Callable[[Settings], int | None]) -> list[Way]:
    """The three that cost least of the changes that fit: first those that no other one is a part of, then those that
    take clearly less than these. `peak_with` gives the bytes of a change, or None if it does not fit."""
    ways: list[Way] = []
    further: list[Way] = []
    found: list[tuple[float, ...]] = []
    for losses, settings in sorted(changes, key=lambda change: sum(change[0])):
        is_further = any(all(map(le, nearer, losses)) for nearer in found)
        if len(ways) == NUM_WAYS or (is_further and len(further) == NUM_WAYS):
            continue
        peak = peak_with(settings)
        if peak is None:
            continue
        way = Way(" ".join(f"{name}={value}" for name, value in settings.items()), peak, sum(losses))
        if not is_further:
            found.append(losses)
            ways.append(way)
        elif all(peak < CLEARLY_LESS * other.peak for other in (*ways, *further)):
            further.append(way)
    return sorted((*ways, *further)[:NUM_WAYS], key=lambda way: way.loss)


def _changes(wanted: Wanted) -> Iterator[Change]:
    """Settings that take less, alone and together."""
    for weights_loss, weights in _formats(wanted):
        base = wanted.with_settings(weights)
        for knobs in product(_experts(base), _cache_types(base), _steps(base), _caches(base)):
            settings = dict(weights)
            for _, change in knobs:
                settings |= change
            if settings:
                yield (weights_loss, *(loss for loss, _ in knobs)), settings


def _formats(wanted: Wanted) -> Iterator[tuple[float, Settings]]:
    yield 0.0, {}
    inventory = wanted.inventory
    now = kept(inventory, inventory.format_of(wanted.engine.weights, native=wanted.native)).weights
    for loss, weights in ((3.0, "int8"), (5.0, "int4")):
        if kept(inventory, weights).weights < now:
            yield loss, {"weights": weights}


def _experts(wanted: Wanted) -> Iterator[tuple[float, Settings]]:
    """Experts on disk, or fewer of them in memory."""
    yield 0.0, {}
    weights = wanted.inventory.format_of(wanted.engine.weights, native=wanted.native)
    if not may_stay_on_disk(wanted.inventory, weights):
        return
    now = kept(wanted.inventory, weights).experts
    if wanted.engine.expert_memory:
        amount = parse_memory(wanted.engine.expert_memory, "expert_memory")
        now = min(now, int(amount * available_memory()) if amount <= 1 else int(amount))
    config = wanted.inventory.config
    layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    chosen = kept(wanted.inventory, weights).experts * config.num_experts_per_tok // (layers * config.n_routed_experts)
    for loss, share in zip((4.0, 5.0, 6.0), SHARES, strict=True):
        if now // share >= max(chosen, 10**7):  # less than a token's in one layer is of no use
            yield loss, {"expert_memory": f"{now // share // 10**6}MB"}


def _cache_types(wanted: Wanted) -> Iterator[tuple[float, Settings]]:
    yield 0.0, {}
    if wanted.engine.cache_dtype != "float16":
        yield 1.5, {"cache_dtype": "float16"}


def _steps(wanted: Wanted) -> Iterator[tuple[float, Settings]]:
    yield 0.0, {}
    smaller = {name: value for name, value in SMALL_STEP.items() if getattr(wanted.engine, name) > value}
    if smaller:
        yield 2.0, smaller


def _caches(wanted: Wanted) -> Iterator[tuple[float, Settings]]:
    """Half the cache, a quarter, and so on."""
    yield 0.0, {}
    engine, halvings = wanted.engine, 1
    while engine.cache_memory:
        amount = parse_memory(engine.cache_memory) / 2**halvings
        if halvings > 8 or 1 < amount < 10**6:
            return
        yield float(halvings), {"cache_memory": f"{amount:.3g}" if amount <= 1 else f"{amount / 1e6:.0f}MB"}
        halvings += 1
    while engine.cache_tokens >> halvings >= FEWEST_TOKENS:
        yield float(halvings), {"cache_tokens": engine.cache_tokens >> halvings}
        halvings += 1


def _stored_models(wanted: Wanted, available: int) -> Iterator[Way]:
    """Models of the store that fit with the same settings, the largest first."""
    from porcelet import hub

    found = []
    for model in hub.list_models():
        try:
            one = Wanted(read_inventory(model.path), replace(wanted.engine, weights="auto", expert_memory=""))
        except ModelError:  # a damaged one, which `porcelet doctor` tells
            continue
        if one.inventory.config != wanted.inventory.config and one.fits(available):
            found.append(Way(f"the model {model.name}", one.forecast(available).peak, loss=50.0))
    yield from sorted(found, key=lambda way: -way.peak)


# ---- training -------------------------------------------------------------------------------------------------------


def check_training(train: TrainConfig, model: Inventory, teacher: Inventory | None = None) -> ProcessMemory:
    """The forecast of a run in this process; `model` is what it starts from, or `counted` for a new one. Rows that only
    texts decide count as none, so a run may still take more.

    Raises:
        CapacityError: it needs more memory than can be had; names what does fit.
    """
    available = available_memory() + min(resident_bytes(), RUNTIME_BYTES)
    found = training_memory(train, model, teacher)
    if found.peak > available:
        ways = training_ways(train, model, teacher, available)
        raise refusal(f"the run in {train.output}", found.peak, largest_parts(found), available, ways)
    return found


def training_ways(train: TrainConfig, model: Inventory, teacher: Inventory | None, room: int) -> list[Way]:
    """The nearest overrides of a recipe with which it takes no more than `room` bytes, at most three."""

    def peak_with(settings: Settings) -> int | None:
        try:
            peak = training_memory(changed(train, settings), model, teacher).peak
        except InputError:  # two settings that exclude each other
            return None
        return peak if peak <= room else None

    return nearest(_training_changes(train), peak_with)


def changed(train: TrainConfig, settings: Settings) -> TrainConfig:
    """A recipe with overrides as on the command line: of [train] by their names, of other tables as table.name."""
    for name, value in settings.items():
        table, _, key = name.rpartition(".")
        new = {table: replace(getattr(train, table), **{key: value})} if table else {key: value}
        train = replace(train, **new)
    return train


def _training_changes(train: TrainConfig) -> Iterator[Change]:
    """Overrides that take less, alone and together."""
    alone = (
        (2.0, {"policy.sampler_weights": "float32"}, train.policy.sampler_weights == "int8"),
        (4.0, {"policy.kl_weight": 0.0}, bool(train.policy.kl_weight)),
        (3.0, {"optimizer.name": "muon"}, train.optimizer.name == "adamw" and not train.lora.rank),
        (5.0, {"lora.rank": 16}, bool(train.model) and not train.lora.rank and train.dtype == "float32"),
    )
    choices = [[(0.0, dict[str, Any]()), (loss, change)] for loss, change, applies in alone if applies]
    for knobs in product(_passes(train), *choices):
        settings = {name: value for _, change in knobs for name, value in change.items()}
        if settings:
            yield tuple(loss for loss, _ in knobs), settings


def _passes(train: TrainConfig) -> Iterator[tuple[float, dict[str, Any]]]:
    """The same step in more passes, which costs some time."""
    yield 0.0, {}
    rows, halvings = pass_rows(train), 1
    while rows >> halvings >= FEWEST_ROWS:
        yield 0.5 * halvings, {"tokens_per_pass": rows >> halvings}
        halvings += 1
