"""What devices can do: hardware.toml, and beside it the user's own file of the same form.

Numbers keep their label, source, date and range all the way into a plan's figures. A device that says `base` takes what
it leaves unsaid from another one; `false` takes a rate away.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from porcelet import hub
from porcelet.errors import InputError
from porcelet.plan.figure import LABELS, Number

KINDS = ("gpu", "npu", "cpu")
RATES = ("fp8", "int8", "bf16", "fp16", "fp32")
NUMBERS = (
    *("memory", "bandwidth", "link", "network", "power", "price", "rent"),
    *("compute_share", "bandwidth_share", "launch"),
)
FIELDS = ("base", "kind", "names", "per_node", *RATES, *NUMBERS)
OWN_FILE = "hardware.toml"  # in the store's folder


@dataclass(frozen=True, kw_only=True)
class Device:
    """One card, chip or machine without cards. Units: bytes, bytes/s, operations/s by the format they are in, watts,
    dollars, dollars an hour, shares, seconds. `link` and `network` are one way; power, price and rent hold a device's
    share of its node of `per_node` devices."""

    name: str
    kind: str
    per_node: int
    memory: Number
    bandwidth: Number
    rates: Mapping[str, Number]
    link: Number
    network: Number
    power: Number
    price: Number
    rent: Number
    compute_share: Number
    bandwidth_share: Number
    launch: Number
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fleet:
    """So many equal devices."""

    device: Device
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def devices() -> dict[str, Device]:
    """All devices by name: those of hardware.toml, then the user's own.

    Raises:
        InputError: the user's file cannot be read, or holds something that is not known.
    """
    own = hub.home() / OWN_FILE
    known = _shipped()
    return known | read_devices(own, known) if own.exists() else known


@cache
def _shipped() -> dict[str, Device]:
    text = files("porcelet.plan").joinpath("hardware.toml").read_text(encoding="utf-8")
    return _parse(text, "hardware.toml", {})


def read_devices(path: Path, known: Mapping[str, Device]) -> dict[str, Device]:
    """The devices of a file; `base` may name one of `known` too.

    Raises:
        InputError: the file cannot be read, or a device lacks a number or has one that cannot be.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} cannot be read: {problem}") from problem
    return _parse(text, str(path), known)


def find_device(name: str) -> Device:
    """A device by its name, however it is spelt: "h20", "RTX 4090", "rtx4090", "4090".

    Raises:
        InputError: there is none; it names the near ones, and where one's own are written.
    """
    known = devices()
    spelt = {_plain(other): device for device in known.values() for other in (device.name, *device.names)}
    found = spelt.get(_plain(name))
    if found:
        return found
    near = difflib.get_close_matches(_plain(name), spelt, n=3, cutoff=0.5)
    told = (
        f"near: {', '.join(dict.fromkeys(spelt[one].name for one in near))}" if near else f"known: {', '.join(known)}"
    )
    raise InputError(f"there is no device {name!r}; {told}; your own are written to {hub.home() / OWN_FILE}")


def parse_fleet(text: str) -> Fleet:
    """ "8xH20", "16 x H800" or "H200".

    Raises:
        InputError: the count or the device is not known.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*(.+?)\s*", text)
    if match is None or _is_known(text):
        return Fleet(find_device(text), 1)
    if not 1 <= int(match[1]) <= 100_000:
        raise InputError(f"{text!r} asks for {match[1]} devices; plans are for 1 to 100,000")
    return Fleet(find_device(match[2]), int(match[1]))


def _is_known(name: str) -> bool:
    return any(_plain(name) == _plain(other) for device in devices().values() for other in (device.name, *device.names))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# ---- reading --------------------------------------------------------------------------------------------------------


def _parse(text: str, source: str, known: Mapping[str, Device]) -> dict[str, Device]:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{source} is not TOML: {problem}") from problem
    found: dict[str, Device] = {}
    for name, row in table.items():
        if not isinstance(row, dict):
            raise InputError(f"{source}: {name} is {row!r}; a table such as [{name}] was expected")
        found[name] = _device(name, row, f"{source}: {name}", {**known, **found})
    return found


def _device(name: str, row: Mapping[str, Any], place: str, known: Mapping[str, Device]) -> Device:
    for key in row:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1)
            raise InputError(
                f"{place}: unknown key {key!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELDS)}")
            )
    base = _base(row.get("base"), place, known)
    rates = {} if base is None else dict(base.rates)
    rates |= {key: read_number(row[key], f"{place}: {key}") for key in RATES if row.get(key, False) is not False}
    rates = {key: rate for key, rate in rates.items() if row.get(key) is not False}
    if not rates:
        raise InputError(f"{place} has no rate; give one of {', '.join(RATES)}")
    numbers = {key: read_number(row[key], f"{place}: {key}") for key in NUMBERS if key in row}
    for key in NUMBERS:
        if key not in numbers:
            if base is None:
                raise InputError(f"{place} has no {key}; give it, or a base that has")
            numbers[key] = getattr(base, key)
    kind = row.get("kind", base.kind if base else None)
    if kind not in KINDS:
        raise InputError(f"{place}: kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    per_node = row.get("per_node", base.per_node if base else None)
    if type(per_node) is not int or per_node < 1:
        raise InputError(f"{place}: per_node is {per_node!r}; it must be a positive integer")
    names = row.get("names", [])
    if not isinstance(names, list) or not all(isinstance(other, str) for other in names):
        raise InputError(f"{place}: names is {names!r}; a list of texts was expected")
    return Device(name=name, kind=kind, per_node=per_node, rates=rates, names=tuple(names), **numbers)


def _base(name: object, place: str, known: Mapping[str, Device]) -> Device | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in known:
        raise InputError(f"{place}: base is {name!r}; known before it: {', '.join(known) or 'none'}")
    return known[name]


def read_number(row: object, place: str) -> Number:
    """A number of a TOML file: {value, label, source, date, low, high}.

    Raises:
        InputError: it has another form, is not positive, or lies outside its own range.
    """
    fields = {"value", "label", "source", "date", "low", "high"}
    if not isinstance(row, dict) or not {"value", "label", "source"} <= set(row) <= fields:
        raise InputError(f'{place} is {row!r}; {{ value = 1, label = "published", source = "..." }} was expected')
    if row["label"] not in LABELS:
        raise InputError(f"{place}: label is {row['label']!r}; it must be one of {', '.join(LABELS)}")
    low, value, high = row.get("low"), row["value"], row.get("high")
    for given in (low, value, high):
        if given is not None and (
            not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given < 1e18
        ):
            raise InputError(f"{place}: {given!r} is no positive number")
    if not (value if low is None else low) <= value <= (value if high is None else high):
        raise InputError(f"{place}: {value} lies outside its range from {low} to {high}")
    if not isinstance(row["source"], str) or not row["source"] or not isinstance(row.get("date", ""), str):
        raise InputError(f"{place}: source and date must be texts, and a source there must be")
    return Number(value, row["label"], row["source"], row.get("date", ""), low, high)
