"""What it costs: a fleet that is rented, bought, or owned already, and the same tokens through an API.

A rented device costs its rent. A bought one costs its price over its life, electricity and operations. An owned one
costs electricity and operations alone: what was paid is paid. Electricity is watts under load, or idle watts for the
part of the hours that nobody uses it, times what cooling adds. Left out: interest, taxes, staff beyond `operations`,
resale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from porcelet.errors import InputError
from porcelet.plan.figure import Figure, Number, weakest
from porcelet.plan.hardware import Fleet
from porcelet.plan.tariffs import Tariff

HOURS_A_MONTH = 730.0
MONTHS_A_YEAR = 12
WAYS = ("rented", "bought", "owned")
IDLE = Number(0.35, "assumed", "power of an idle device, as a share of its load's", "2025-05", 0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Supply:
    """How devices are had. `electricity` is dollars a kWh, `cooling` the power usage effectiveness, `life` years over
    which a price is spread, `operations` dollars a device and month for space, repair and people."""

    way: str = "rented"
    electricity: float = 0.15
    cooling: float = 1.3
    life: float = 4.0
    operations: float = 0.0

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise InputError(f"supply is {self.way!r}; it must be one of {', '.join(WAYS)}")
        for name, least in (("electricity", 0.0), ("cooling", 1.0), ("life", 0.01), ("operations", 0.0)):
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {least:g} or more")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a month: prompts' that hit the cache and that miss it, and what is written."""

    hit: float
    miss: float
    output: float


def hourly(fleet: Fleet, supply: Supply, busy: float = 1.0) -> Figure:
    """Dollars an hour for the whole fleet, of which it computes the share `busy` of the time."""
    low, value, high = (_hourly(fleet, supply, busy, at) for at in range(3))
    used = _used(supply)
    numbers = {name: getattr(fleet.device, name) for name in used}
    label = weakest(number.label for number in numbers.values())
    return Figure(value, "$/h", FORMULAS[supply.way], label, _cited(fleet, numbers), low, high)


FORMULAS = {
    "rented": "devices x rent",
    "bought": "devices x (price / life + operations + power x cooling x electricity)",
    "owned": "devices x (operations + power x cooling x electricity)",
}


def _used(supply: Supply) -> tuple[str, ...]:
    return {"rented": ("rent",), "bought": ("price", "power"), "owned": ("power",)}[supply.way]


def _hourly(fleet: Fleet, supply: Supply, busy: float, at: int) -> float:
    """At the low end (0), usually (1) or at the high end (2)."""
    if supply.way == "rented":
        return fleet.count * _end(fleet.device.rent, at)
    running = supply.operations / HOURS_A_MONTH + _kilowatts(fleet, supply, busy, at) * supply.electricity / fleet.count
    if supply.way == "owned":
        return fleet.count * running
    spread = supply.life * MONTHS_A_YEAR * HOURS_A_MONTH
    return fleet.count * (running + _end(fleet.device.price, at) / spread)


def _kilowatts(fleet: Fleet, supply: Supply, busy: float, at: int) -> float:
    share = busy + (1 - busy) * _end(IDLE, at)
    return fleet.count * _end(fleet.device.power, at) * share * supply.cooling / 1000


def _end(number: Number, at: int) -> float:
    low, high = number.range
    return (low, number.value, high)[at]


def _cited(fleet: Fleet, numbers: Mapping[str, Number]) -> tuple[str, ...]:
    return tuple(number.cited(f"{fleet.device.name} {name}") for name, number in numbers.items())


# ---- tokens ---------------------------------------------------------------------------------------------------------


def cost_figures(
    fleet: Fleet, supply: Supply, written: float, computed: float, prompt_share: float, usage: Usage, tariff: Tariff
) -> dict[str, Figure]:
    """What tokens cost on a fleet that writes `written` tokens a second while `prompt_share` of its time goes to
    prompts, of which it computes `computed` a second; and what a month of `usage` costs here and through the API.

    Of a full fleet's cost, prompts bear their share of the time, and answers the rest. The month's cost is that of the
    whole fleet, used or not.
    """
    capacity = written * HOURS_A_MONTH * 3600
    busy = min(1.0, usage.output / capacity)
    full, month = hourly(fleet, supply), hourly(fleet, supply, busy)
    second = _scaled(full, 1 / 3600, "$/s", "hourly / 3600")
    rows = {
        "hourly": full,
        "output_million": _scaled(
            second, (1 - prompt_share) / written * 1e6, "$/M tokens", "answers' share of the cost / written"
        ),
        "input_million": _scaled(
            second,
            prompt_share / max(_read(written, prompt_share, computed), 1e-9) * 1e6,
            "$/M tokens",
            "prompts' share of the cost / computed",
        ),
        "month": _scaled(month, HOURS_A_MONTH, "$/month", "hourly x 730, idle hours with idle power"),
        "busy": Figure(busy, "of capacity", "tokens written in a month / what the fleet could write", full.label),
        "kwh_million": _energy(fleet, supply, written),
    }
    api = tariff.cost(usage.hit, usage.miss, usage.output)
    rows["api_month"] = Figure(
        api,
        "$/month",
        "hits, misses and output x their prices, spread evenly over the week",
        "derived",
        (tariff.cited,),
    )
    rows["break_even"] = break_even(fleet, supply, written, usage, tariff)
    return rows


def _read(written: float, prompt_share: float, computed: float) -> float:
    """Prompt tokens a second beside `written` ones."""
    return prompt_share * computed


def _scaled(figure: Figure, factor: float, unit: str, formula: str) -> Figure:
    low, high = figure.range
    return Figure(figure.value * factor, unit, formula, figure.label, figure.sources, low * factor, high * factor)


def _energy(fleet: Fleet, supply: Supply, written: float) -> Figure:
    low, value, high = (_kilowatts(fleet, supply, 1.0, at) / 3600 / written * 1e6 for at in range(3))
    sources = _cited(fleet, {"power": fleet.device.power})
    label = weakest([fleet.device.power.label])
    return Figure(value, "kWh/M tokens", "power x cooling / tokens written", label, sources, low, high)


def break_even(fleet: Fleet, supply: Supply, written: float, usage: Usage, tariff: Tariff) -> Figure:
    """The share of its capacity from which the fleet is cheaper than the API, for tokens mixed as in `usage`; above 1
    it never is."""
    if not usage.output:
        raise InputError("a month without tokens has no break-even; give users or tokens")
    price = tariff.cost(usage.hit, usage.miss, usage.output) / usage.output  # of all that comes with a written token
    capacity = written * HOURS_A_MONTH * 3600 * price
    shares = []
    for at in range(3):
        idle, full = (_hourly(fleet, supply, busy, at) * HOURS_A_MONTH for busy in (0.0, 1.0))
        saved = capacity - (full - idle)  # a month of the API, less what load adds to the bill of electricity
        shares.append(idle / saved if saved > 0 else math.inf)
    low, value, high = shares
    label = weakest(getattr(fleet.device, name).label for name in _used(supply))
    formula = "cost of an idle month / (the API's price of a full one - what load adds)"
    return Figure(value, "of capacity", formula, label, (tariff.cited,), low, high)


def night_hours(fleet: Fleet, busy_hours: float) -> Figure:
    """Device hours a month that are free for training where people are served `busy_hours` of a day."""
    if not 0 <= busy_hours <= 24:
        raise InputError(f"busy_hours is {busy_hours}; a day has 24")
    free = fleet.count * (24 - busy_hours) / 24 * HOURS_A_MONTH
    return Figure(free, "device hours/month", "devices x free hours of a day x days of a month")
