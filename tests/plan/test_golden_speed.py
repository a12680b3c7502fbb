"""Published speeds beside the roofline's: a range that holds them, or by how much it does not.

Each row names its source. What is published comes from systems in production or tuned by hand, so a row says how the
planner's range must lie: it holds the published number, or (`ceiling`) the number is below what the planner thinks
possible, by at most the factor given, where the published system is known to leave something.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from porcelet.plan.hardware import find_device
from porcelet.plan.layout import Layout
from porcelet.plan.model import find_model
from porcelet.plan.offload import offloaded_memory, offloaded_time
from porcelet.plan.work import Batch, step_time

V3 = find_model("deepseek-v3")
IN_INT8 = find_model("deepseek-v3", "int8")  # as Ascend's chips, which have no FP8, serve it


@dataclass(frozen=True)
class Published:
    """Tokens a second of one device with a layout and a batch a device."""

    label: str
    device: str
    layout: Layout
    batch: Batch
    tokens: float
    source: str


# Prompts: 16,000 tokens a device and step, as in DeepSeek's profile, half of them found in the cache for G7; decoding:
# the batch that gives the published speed.
ROWS = [
    Published(
        "G7 prompts", "H800", Layout(data=32, expert=32), Batch(8, 2000, 2500), 73_700 / 8 * (1 - 342 / 608),
        "open-infra-index, day 6: 73.7k tokens/s a node, 342 of 608 B of them cache hits",
    ),
    Published(
        "G7 decoding", "H800", Layout(data=144, expert=144), Batch(88, 1, 4989), 14_800 / 8,
        "open-infra-index, day 6: 14.8k tokens/s a node, 4,989 tokens of context",
    ),
    Published(
        "G11 prompts", "H100", Layout(data=32, expert=32), Batch(8, 2048, 0), 52_300 / 8,
        "lmsys.org, 2025-05-05: 52.3k tokens/s a node, prompts of 2,000 tokens",
    ),
    Published(
        "G11 decoding", "H100", Layout(data=72, expert=72), Batch(256, 1, 2050), 22_300 / 8,
        "lmsys.org, 2025-05-05: 22.3k tokens/s a node, 2,000 tokens before 100 of answer",
    ),
    Published(
        "G12 decoding", "Ascend 910C", Layout(data=320, expert=320), Batch(96, 1, 4096), 1943,
        "arXiv 2506.12708: 1,943 tokens/s an NPU below 50 ms a token",
    ),
    Published(
        "G12 prompts", "Ascend 910C", Layout(data=32, expert=32), Batch(4, 4096, 0), 6688,
        "arXiv 2506.12708: 6,688 tokens/s an NPU",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_published_speeds_are_in_the_range(row: Published) -> None:
    """Between the planner's slowest and fastest estimate, so within what it claims to know."""
    model = IN_INT8 if row.device.startswith("Ascend") else V3
    time = step_time(model, row.layout, find_device(row.device), row.batch)
    slow, fast = (row.batch.tokens / seconds for seconds in (time.high, time.low))
    assert slow <= row.tokens <= fast, f"{slow:.0f} to {fast:.0f}, published {row.tokens:.0f}: {row.source}"
    assert 0.9 <= row.batch.tokens / time.seconds / row.tokens <= 1.6  # the usual estimate flatters production


def test_experts_in_the_hosts_memory() -> None:
    """G14: R1 in four bits on one RTX 4090 and two Xeon 6454S writes 8.73 to 13.69 tokens a second, with 14 GB on the
    card and 382 GB beside it (KTransformers' tutorial): the range reaches both, and the memory is right within 15 %."""
    card, host = find_device("RTX 4090"), find_device("2x Xeon 6454S")
    model = find_model("deepseek-v3", "int4")
    time = offloaded_time(model, card, host, Batch(1, 1, 1000))
    assert 1 / time.high <= 8.73 and 1 / time.low >= 13.69
    memory, on_host = offloaded_memory(model, card)
    assert memory.fits and memory.weights == pytest.approx(14e9, rel=0.15)
    assert on_host == pytest.approx(382e9, rel=0.15)
