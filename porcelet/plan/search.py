"""Which fleet: the smallest that holds a model or serves its users, and what to change where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from porcelet.plan.hardware import Device, Fleet
from porcelet.plan.layout import layouts
from porcelet.plan.memory import device_memory
from porcelet.plan.model import FORMATS, PlannedModel, find_model, known_models
from porcelet.plan.serve import Option, Traffic, options, users

MAX_DEVICES = 2048
CHANGES = 3  # that a refusal names


@dataclass(frozen=True)
class Change:
    """A change that makes a plan possible: what to say on the command line, and the best option then."""

    kind: str  # "weights", "context", "devices", "hardware" or "model"
    setting: str
    model: PlannedModel
    fleet: Fleet
    traffic: Traffic
    option: Option


def counts(per_node: int) -> Iterator[int]:
    """Sizes of fleets that people build: parts of a node by powers of two, then whole nodes, ever larger steps."""
    size = 1
    while size < per_node:
        yield size
        size *= 2
    nodes = 1
    while nodes * per_node <= MAX_DEVICES:
        yield nodes * per_node
        nodes += max(1, nodes // 4)


def smallest_fleet(
    model: PlannedModel, device: Device, traffic: Traffic, wanted: float = 0
) -> tuple[Fleet, Option] | None:
    """Nearly the fewest devices that hold the model and serve `wanted` people online as `traffic` promises; None: no
    fleet of up to 2,048 does. With none wanted, one request that fits is enough, at whatever speed."""
    sizes = [count for count in counts(device.per_node) if _holds(model, Fleet(device, count))]
    first, found = 0, None
    last = len(sizes)
    while first < last:  # more devices hardly ever serve fewer people, so the search halves what is left
        middle = (first + last) // 2
        fleet = Fleet(device, sizes[middle])
        best = next(iter(options(model, fleet, traffic)), None)
        if best and (not wanted or (best.best and users(best.best, traffic) >= wanted)):
            found, last = (fleet, best), middle
        else:
            first = middle + 1
    return found


def _holds(model: PlannedModel, fleet: Fleet) -> bool:
    """A quick no: even cut evenly over all devices the weights do not fit."""
    return model.num_bytes - model.sizes["mtp"] < fleet.count * fleet.device.memory.value


def changes_that_fit(
    model: PlannedModel, fleet: Fleet, traffic: Traffic, devices: Mapping[str, Device]
) -> list[Change]:
    """At most three changes after each of which the model fits, the least first: shorter requests, fewer bits, more of
    the same devices, as many others, a smaller model. Each has been tried."""
    found: list[Change] = []
    for change in _changes(model, fleet, traffic, devices):
        found.append(change)
        if len(found) == CHANGES:
            break
    return found


def _changes(model: PlannedModel, fleet: Fleet, traffic: Traffic, devices: Mapping[str, Device]) -> Iterator[Change]:
    shorter = _shorter(model, fleet, traffic)
    if shorter:
        yield from _tried("context", f"--prompt {shorter.prompt} --answer {shorter.answer}", model, fleet, shorter)
    for name in FORMATS:
        lighter = model.converted(name)
        if lighter.num_bytes < 0.9 * model.num_bytes:
            tried = [*_tried("weights", f"--weights {name}", lighter, fleet, traffic)]
            yield from tried
            if tried:
                break
    larger = next(
        (n for n in counts(fleet.device.per_node) if n > fleet.count and _fits(model, Fleet(fleet.device, n), traffic)),
        None,
    )
    if larger:
        more = Fleet(fleet.device, larger)
        yield from _tried("devices", f"--on {larger}x{fleet.device.name}", model, more, traffic)
    others = sorted(devices.values(), key=lambda device: device.memory.value)
    for device in others:
        if device.kind == fleet.device.kind and device.memory.value > fleet.device.memory.value:
            other = Fleet(device, fleet.count)
            tried = [*_tried("hardware", f"--on {fleet.count}x{device.name}", model, other, traffic)]
            yield from tried
            if tried:
                break
    smaller = sorted((find_model(name) for name in known_models()), key=lambda one: -one.num_bytes)
    for one in smaller:
        if one.num_bytes < model.num_bytes and _fits(one, fleet, traffic):
            yield from _tried("model", one.name, one, fleet, traffic)
            break


def _tried(kind: str, setting: str, model: PlannedModel, fleet: Fleet, traffic: Traffic) -> Iterator[Change]:
    """The change, if it does make the model fit."""
    for option in options(model, fleet, traffic)[:1]:
        yield Change(kind, setting, model, fleet, traffic, option)


def _fits(model: PlannedModel, fleet: Fleet, traffic: Traffic) -> bool:
    return _holds(model, fleet) and bool(options(model, fleet, traffic))


def _shorter(model: PlannedModel, fleet: Fleet, traffic: Traffic) -> Traffic | None:
    """Requests of a size that fits, where the weights do and only one request's cache does not."""
    rooms = (
        device_memory(model, layout, fleet.device)
        for layout in layouts(model.config, fleet.count, fleet.device.per_node)
    )
    room = max((memory.room for memory in rooms if memory.fits), default=0.0)
    wanted = traffic.prompt + traffic.written
    if not 64 <= room < wanted:
        return None
    scale = room / wanted * 0.99
    return replace(traffic, prompt=max(1, int(traffic.prompt * scale)), answer=max(1, int(traffic.answer * scale)))
