"""Published figures that plain arithmetic must give, each with its source and tolerance.

The numbers G1 to G18 are those by which calculators are compared; the speeds among them are in test_golden_speed.py.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from porcelet.plan.cost import Supply, Usage, cost_figures, hourly
from porcelet.plan.hardware import Fleet, find_device, parse_fleet
from porcelet.plan.layout import Layout, cache_on_device
from porcelet.plan.memory import device_memory
from porcelet.plan.model import find_model
from porcelet.plan.published import check, entries
from porcelet.plan.serve import Traffic, options
from porcelet.plan.tariffs import find_tariff
from porcelet.plan.training import Run, operations, reached

V3 = find_model("deepseek-v3")
H800 = find_device("H800")


@pytest.mark.parametrize(
    "name", ["v3-training", "v3-step", "r1-training", "r1-serving", "r1-layout", "cloudmatrix-serving"]
)
def test_published_accounts_close(name: str) -> None:
    """G1, G2, G4, G5, G7, G10: what their makers published agrees with itself."""
    assert check(name) == []


def test_press_figures_that_do_not_fit_are_found() -> None:
    """G4, G12: 648 cards for 198 hours are 28 % more than the published cost holds, and a post's throughput of Ascend
    chips is 23 % above the paper's."""
    (cards,) = check("r1-training-press")
    assert cards.computed == 128_304 and cards.factor == pytest.approx(1.27, abs=0.01)
    (chips,) = check("cloudmatrix-press")
    assert chips.factor == pytest.approx(1.233, abs=0.001)


def test_v3_pretraining_rate() -> None:
    """G2, G3: 180K hours a trillion tokens on 2,048 cards are 3.66 days and 1,543 tokens a second and card; by the
    products alone 340 TFLOP/s, a third of the BF16 peak."""
    days = 180e3 / 2048 / 24
    assert days == pytest.approx(3.66, abs=0.01)
    products, *_ = reached(V3.config, Run(tokens=1), 1e12 / (180e3 * 3600))
    assert products == pytest.approx(340e12, rel=0.01)
    assert products / H800.rates["bf16"].value == pytest.approx(0.346, rel=0.02)
    assert operations(V3.config, 4096).products == pytest.approx(6 * 36.7e9, rel=0.005)


def test_a_day_of_serving() -> None:
    """G5, G6: 226.75 nodes at 2 dollars a card and hour are 87,072 dollars a day; at R1's prices the tokens of that day
    are worth 562,027 (562,100 from rounded tokens), a margin of 545 %."""
    day = entries()["r1-serving"]
    cost = 24 * hourly(Fleet(H800, 1), Supply(way="rented")).value * 8 * day["nodes"]
    assert cost == pytest.approx(87_072)
    revenue = find_tariff("deepseek-r1").cost(
        day["tokens_hit"], day["tokens_in"] - day["tokens_hit"], day["tokens_out"]
    )
    assert revenue == pytest.approx(562_027, rel=0.0005)
    assert revenue / cost - 1 == pytest.approx(5.45, abs=0.01)


def test_streams_of_a_node() -> None:
    """G8: at 21 tokens a second each, a node that writes 14.8k has about 705 answers under way; with 4,989 cached
    tokens each their cache takes 247 GB in BF16."""
    streams = 14_800 / 21
    assert streams == pytest.approx(705, abs=1)
    assert streams * 4989 * 2 * V3.config.cache_values_per_token() == pytest.approx(247e9, rel=0.01)


def test_cost_of_a_token() -> None:
    """G9, G11: at 16 dollars a node and hour, a million tokens written at 14.8k a second cost 0.300, read at 73.7k
    0.060; SGLang's 22.3k make it 0.20."""
    node, usage, tariff = Fleet(H800, 8), Usage(hit=0, miss=1, output=1), find_tariff("deepseek-r1")
    writing = cost_figures(node, Supply(), 14_800, 1, 0.0, usage, tariff)
    assert writing["output_million"].value == pytest.approx(0.300, abs=0.001)
    reading = cost_figures(node, Supply(), 1e-6, 73_700, 1.0, usage, tariff)
    assert reading["input_million"].value == pytest.approx(0.0603, abs=0.0001)
    sglang = cost_figures(node, Supply(), 22_300, 1, 0.0, usage, tariff)
    assert sglang["output_million"].value == pytest.approx(0.1993, abs=0.0005)


@pytest.mark.parametrize(
    ("device", "tokens", "dollars", "hour"),
    [("B200", 5857, 0.092, 1.94), ("MI300X", 725, 0.429, 1.12), ("H100", 266, 1.365, 1.31)],
)
def test_rents_that_published_costs_imply(device: str, tokens: float, dollars: float, hour: float) -> None:
    """G13: InferenceX's dollars a million tokens times its tokens a second are the hour it reckons with; of what it
    costs to own, so below or at the low end of our rents."""
    implied = dollars * tokens * 3600 / 1e6
    assert implied == pytest.approx(hour, abs=0.01)
    assert implied <= find_device(device).rent.value


def test_mla_cache() -> None:
    """G15, and the most common error: 163,840 tokens of V3.1 take 10.72 GiB, 70,272 bytes each, not twice 512 values a
    layer, nor 71 times as much as an engine keeps that expands heads."""
    config = find_model("deepseek-v3.1").config
    token = cache_on_device(config, Layout(), 2)
    assert token == 70_272
    assert 163_840 * token / 2**30 == pytest.approx(10.7227, abs=0.0001)
    assert 2 * 61 * 128 * (192 + 128) / token == pytest.approx(71.1, abs=0.1)


def test_where_v3_fits() -> None:
    """G16: 671 GB of FP8 weights, 685 B parameters with the MTP layer; not on 8 x 80 GB, but on 8 x 96 (87 % full),
    8 x 141 (59 %) and 16 x 80 GB."""
    weights = V3.num_bytes - V3.sizes["mtp"]
    assert weights == pytest.approx(671e9, rel=0.005)
    assert V3.config.num_parameters(mtp=True) == pytest.approx(685e9, rel=0.005)
    assert weights / (8 * 96e9) == pytest.approx(0.87, abs=0.01)
    assert weights / (8 * 141e9) == pytest.approx(0.59, abs=0.01)
    fits = {name: bool(options(V3, parse_fleet(name), Traffic())) for name in ("8xH100", "8xH20", "8xH200", "16xH800")}
    assert fits == {"8xH100": False, "8xH20": True, "8xH200": True, "16xH800": True}


def test_tariff_by_the_hour() -> None:
    """G18: flash is 0.003/0.15/0.60 off peak and twice that from Monday to Friday at 01 to 04 and 06 to 10 UTC, in
    whatever zone the clock is told."""
    flash = find_tariff("deepseek-flash")
    monday = [datetime(2026, 11, 16, hour, 30, tzinfo=UTC) for hour in range(24)]
    peak = [hour for hour, time in enumerate(monday) if flash.at(time) == flash.peak]
    assert peak == [1, 2, 3, 6, 7, 8, 9]
    assert flash.at(datetime(2026, 11, 21, 2, tzinfo=UTC)) == flash.usual  # a Saturday
    assert flash.at(datetime.fromisoformat("2026-11-16T09:30+08:00")) == flash.peak
    assert (flash.usual.hit, flash.usual.miss, flash.usual.output) == (0.003, 0.15, 0.60)
    assert flash.peak.cost(1e6, 1e6, 1e6) == 2 * flash.usual.cost(1e6, 1e6, 1e6)
    assert flash.peak_share == pytest.approx(35 / 168)
    assert find_tariff("deepseek-v4-pro").peak.output == 3.96


def test_owned_chips_cost_their_electricity() -> None:
    """A node of 10.2 kW at 0.15 a kWh is 1.53 an hour: 0.019 a million tokens at 22.3k a second, 0.21 at 2k (product
    research, section 5.3, without cooling)."""
    supply = Supply(way="owned", electricity=0.15, cooling=1.0)
    node, usage, tariff = Fleet(H800, 8), Usage(hit=0, miss=1, output=1), find_tariff("deepseek-flash")
    assert hourly(node, supply).value == pytest.approx(1.53)
    fast, slow = (cost_figures(node, supply, tokens, 1, 0.0, usage, tariff) for tokens in (22_300, 2_000))
    assert fast["output_million"].value == pytest.approx(0.019, abs=0.0005)
    assert slow["output_million"].value == pytest.approx(0.2125, abs=0.0005)


def test_memory_of_a_decode_unit() -> None:
    """G10: of 144 cards each holds two experts a layer, with redundant ones; ours, without them, hold 256 / 144."""
    memory = device_memory(V3, Layout(data=144, expert=144), H800)
    assert memory.fits and memory.weights < 30e9
