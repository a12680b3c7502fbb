"""Costs: who owns pays least, an API is cheapest for little use, and the break-even is where both cost the same."""

from __future__ import annotations

import math
from datetime import datetime

import pytest

from porcelet.errors import InputError
from porcelet.plan.cost import HOURS_A_MONTH, Supply, Usage, cost_figures, hourly, night_hours
from porcelet.plan.hardware import Fleet, find_device
from porcelet.plan.tariffs import Tariff, find_tariff, tariffs

NODE = Fleet(find_device("H20"), 8)
FLASH = find_tariff("deepseek-flash")
USAGE = Usage(hit=2e9, miss=3e9, output=1e9)


def test_owning_costs_less_than_buying() -> None:
    """What is paid already does not count; both have electricity in them."""
    owned, bought = (hourly(NODE, Supply(way=way)) for way in ("owned", "bought"))
    assert 0 < owned.value < bought.value
    low, high = bought.range
    assert low < bought.value < high and bought.label == "assumed"
    assert any("H20 price" in source for source in bought.sources)


def test_idle_devices_cost_less_electricity_but_the_same_rent() -> None:
    """Half the load saves electricity, and no rent."""
    for way, saves in (("rented", False), ("owned", True)):
        supply = Supply(way=way)
        assert (hourly(NODE, supply, 0.5).value < hourly(NODE, supply).value) == saves


@pytest.mark.parametrize("way", ["rented", "bought", "owned"])
def test_break_even_is_where_both_cost_the_same(way: str) -> None:
    """At the share of capacity that the plan names, a month here costs what the API charges for the same tokens."""
    supply, written = Supply(way=way), 9000.0
    rows = cost_figures(NODE, supply, written, 50_000, 0.2, USAGE, FLASH)
    share = rows["break_even"].value
    assert 0 < share < math.inf
    output = share * written * HOURS_A_MONTH * 3600
    scale = output / USAGE.output
    own = HOURS_A_MONTH * (
        hourly(NODE, supply, 0.0).value + share * (hourly(NODE, supply).value - hourly(NODE, supply, 0.0).value)
    )
    assert own == pytest.approx(scale * FLASH.cost(USAGE.hit, USAGE.miss, USAGE.output))


def test_the_whole_cost_is_shared_between_prompts_and_answers() -> None:
    """Tokens written and read in an hour, at their costs, are what the hour costs."""
    rows = cost_figures(NODE, Supply(), 5000, 40_000, 0.3, USAGE, FLASH)
    read = 0.3 * 40_000
    hour = 3600 * (5000 * rows["output_million"].value + read * rows["input_million"].value) / 1e6
    assert hour == pytest.approx(rows["hourly"].value)


def test_little_use_is_cheaper_through_the_api() -> None:
    """A thousand answers a month do not pay for a node."""
    rows = cost_figures(NODE, Supply(), 5000, 40_000, 0.3, Usage(hit=0, miss=2e6, output=4e5), FLASH)
    assert rows["api_month"].value < 1 < rows["month"].value
    assert rows["busy"].value < 1e-4


def test_every_tariff_has_a_source_and_a_date() -> None:
    """And peak prices that are no lower than the usual ones."""
    for tariff in tariffs().values():
        assert tariff.source and datetime.fromisoformat(tariff.date)
        assert tariff.peak.cost(1, 1, 1) >= tariff.usual.cost(1, 1, 1)
        assert tariff.cost(1, 1, 1, peak_share=0.0) == tariff.usual.cost(1, 1, 1)


def test_nights_are_free_for_training() -> None:
    """Of 24 hours with ten busy ones fourteen are left."""
    assert night_hours(NODE, 10).value == pytest.approx(8 * 14 / 24 * HOURS_A_MONTH)


@pytest.mark.parametrize(
    "changes", [{"way": "stolen"}, {"electricity": -1}, {"cooling": 0.5}, {"life": 0}, {"operations": math.inf}]
)
def test_impossible_supplies_are_refused(changes: dict[str, object]) -> None:
    """The refusal names the value."""
    (value,) = changes.values()
    with pytest.raises(InputError, match=str(value)):
        Supply(**changes)  # type: ignore[arg-type]


def test_what_a_tariff_cannot_answer() -> None:
    """A moment without a zone, an unknown name, a share that is none."""
    tariff: Tariff = FLASH
    with pytest.raises(InputError, match="no time zone"):
        tariff.at(datetime(2026, 11, 16))
    with pytest.raises(InputError, match="did you mean 'deepseek-flash'"):
        find_tariff("deepseek-flush")
    with pytest.raises(InputError, match="peak_share is 2"):
        tariff.cost(1, 1, 1, peak_share=2)
