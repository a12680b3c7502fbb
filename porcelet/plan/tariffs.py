"""What the same tokens cost through an API: prices of cache hits, misses and output, and of hours of the week.

Tariffs are data (tariffs.toml) with their source and date. Prices move: a plan prints which one it used.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files

from porcelet.errors import InputError

HOURS_A_WEEK = 168


@dataclass(frozen=True)
class Prices:
    """Dollars a million tokens."""

    hit: float
    miss: float
    output: float

    def cost(self, hit: float, miss: float, output: float) -> float:
        """Dollars for so many tokens."""
        return (hit * self.hit + miss * self.miss + output * self.output) / 1e6


@dataclass(frozen=True)
class Tariff:
    """An API's prices, off peak and at peak; `windows` are (weekday from 1, first hour, hour after the last), in
    UTC."""

    name: str
    usual: Prices
    peak: Prices
    windows: tuple[tuple[int, int, int], ...]
    source: str
    date: str

    def at(self, time: datetime) -> Prices:
        """The prices at a moment.

        Raises:
            InputError: the moment does not say its time zone.
        """
        offset = time.utcoffset()
        if offset is None:
            raise InputError(f"{time} has no time zone; peak hours are in UTC")
        utc = time.replace(tzinfo=None) - offset
        inside = any(day == utc.isoweekday() and first <= utc.hour < after for day, first, after in self.windows)
        return self.peak if inside else self.usual

    @property
    def peak_share(self) -> float:
        """Of the hours of a week, those at peak: the share of evenly spread use."""
        return sum(after - first for _, first, after in self.windows) / HOURS_A_WEEK

    def cost(self, hit: float, miss: float, output: float, *, peak_share: float | None = None) -> float:
        """Dollars for tokens of which `peak_share` come at peak hours; without it they are spread evenly over the
        week."""
        share = self.peak_share if peak_share is None else peak_share
        if not 0 <= share <= 1:
            raise InputError(f"peak_share is {share}; it is a share of the tokens, from 0 to 1")
        return share * self.peak.cost(hit, miss, output) + (1 - share) * self.usual.cost(hit, miss, output)

    @property
    def cited(self) -> str:
        prices = f"{self.usual.hit:g}/{self.usual.miss:g}/{self.usual.output:g}"
        return f"{self.name} {prices} dollars a million (hit/miss/output): {self.source}, {self.date} (published)"


@cache
def tariffs() -> Mapping[str, Tariff]:
    """All tariffs by name, the current ones first."""
    table = tomllib.loads(files("porcelet.plan").joinpath("tariffs.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table.items():
        usual = Prices(row["hit"], row["miss"], row["output"])
        peak = Prices(*(row.get(f"peak_{kind}", row[kind]) for kind in ("hit", "miss", "output")))
        times = row.get("peak", {"days": [], "hours": []})
        windows = tuple((day, first, after) for day in times["days"] for first, after in times["hours"])
        found[name] = Tariff(name, usual, peak, windows, row["source"], row["date"])
    return found


def find_tariff(name: str) -> Tariff:
    """Raises InputError for a tariff that is not known, with those that are."""
    known = tariffs()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"there is no tariff {name!r}; {hint}")
    return known[name]
