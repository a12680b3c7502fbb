"""The tape: what joins a recording, what it refuses, and when a buffer is used again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from porcelet.kernels import RECORDER, cpu
from porcelet.kernels.linear import embedding, linear, take_rows
from porcelet.kernels.pointwise import add, concat, rms_norm, rotary_angles, silu_mul
from porcelet.kernels.record import Arena, NotRecordable, Tape
from tests.kernels.cases import fp8_weight

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no compiler, hence no native module")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


CAPACITY = 8


def tape(max_length: int = 100) -> Tape:
    return Tape(cpu.new_program(), CAPACITY, max_length)


def test_replay_reads_what_the_buffers_hold_now() -> None:
    """A recording computes nothing; each run computes its rows from the inputs of the moment, on any threads."""
    x, weight, bias = torch.zeros(CAPACITY, 40), torch.randn(24, 40), torch.randn(24)
    with tape() as recording:
        out = add(linear(x, weight), bias)
    for rows, threads in ((1, 1), (8, 2), (3, 2), (0, 1)):
        x[:rows] = torch.randn(rows, 40)
        out.fill_(torch.nan)
        recording.program.run(rows, 0, threads)
        assert torch.equal(out[:rows], linear(x[:rows], weight) + bias)
        assert out[rows:].isnan().all()


def test_taken_rows_narrow_what_follows() -> None:
    """After `take_rows` as many rows are computed as were taken."""
    x, weight = torch.randn(CAPACITY, 16), torch.ones(16)
    rows = torch.tensor([5, 0, 0, 0, 0, 0, 0, 0])
    with tape() as recording:
        out = rms_norm(take_rows(x, rows), weight, 1e-6)
    out.fill_(torch.nan)
    recording.program.run(6, 1, 1)
    assert torch.equal(out[:1], rms_norm(x[5:6], weight, 1e-6)) and out[1:].isnan().all()


def test_angles_come_from_a_table_bit_for_bit() -> None:
    """Every position's cosine and sine equal those computed from it alone."""
    positions, frequencies = torch.zeros(CAPACITY, dtype=torch.int64), torch.rand(13)
    with tape(max_length=5000) as recording:
        out = rotary_angles(positions, frequencies, 0.7)
    for start in (0, 1, 777, 4992):
        positions.copy_(torch.arange(start, start + CAPACITY))
        recording.program.run(CAPACITY, 0, 1)
        for got, expected in zip(out, rotary_angles(positions, frequencies, 0.7), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "touch",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: x.T.reshape(-1),
        lambda x: torch.cat((x, x)),
        lambda x: x[0, 0].item(),
        lambda x: x.zero_(),
        lambda x: torch.zeros(3),
        lambda x: x.double(),
    ],
    ids=["sum", "clone", "copying reshape", "cat", "item", "in place", "new", "cast"],
)
def test_only_ops_touch_data(touch: Callable[[Tensor], object]) -> None:
    """Any torch operation that is more than a view ends the recording, and leaves no tape behind."""
    x = torch.zeros(4, 6)
    with pytest.raises(NotRecordable, match="touches data outside of an op"), tape():
        touch(x)
    assert RECORDER.get() is None and torch.equal(x + 1, torch.ones(4, 6))


def test_views_are_free() -> None:
    """Shapes, slices and splits are the model's own business."""
    x = torch.zeros(CAPACITY, 24)
    with tape() as recording:
        first, second = x.unflatten(-1, (4, 6)).split((2, 4), dim=-1)
        out = concat(first, second.float()).flatten(1)
    assert len(recording.program) == 1
    x.copy_(torch.randn(CAPACITY, 24))
    recording.program.run(CAPACITY, 0, 1)
    assert torch.equal(out, x)


def test_an_op_without_an_instruction_is_named() -> None:
    """What cannot be recorded says which op it was and for which weights."""
    x, weight = torch.zeros(2, 8).bfloat16(), fp8_weight(8, 8)
    with pytest.raises(NotRecordable, match="op linear has no instruction for FP8Weight in torch.bfloat16"), tape():
        linear(x, weight)


def test_strided_inputs_are_refused() -> None:
    """A copy made while recording would be the same in every replay."""
    x, weight = torch.zeros(8, 2).T, torch.ones(8)
    with pytest.raises(NotRecordable, match="strides"), tape():
        rms_norm(x, weight, 1e-6)


def test_only_plain_rows_are_recorded() -> None:
    """More dimensions, and a second operand of another type, are refused while recording and right at once."""
    rows, cube, table = torch.randn(CAPACITY, 12), torch.randn(CAPACITY, 3, 4), torch.randn(9, 12).bfloat16()
    for an_op, first, second in (
        (silu_mul, cube, cube),
        (silu_mul, rows, rows.bfloat16()),
        (add, rows, rows.bfloat16()),
    ):
        assert torch.equal(an_op(first, second), an_op.reference(first, second))
        with pytest.raises(NotRecordable), tape():
            an_op(first, second)
    tokens = torch.zeros(CAPACITY, dtype=torch.int64)
    for an_op, first in ((linear, rows), (embedding, tokens)):
        with pytest.raises(NotRecordable, match="bfloat16"), tape():
            an_op(first, table)


SPINNING = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from porcelet.kernels import cpu
from porcelet.kernels.pointwise import add
from porcelet.kernels.record import Tape
x, times = torch.zeros(1, 16), []
with torch.inference_mode(), Tape(cpu.new_program(), 1, 1) as tape:
    out = x
    for _ in range(200):
        out = add(out, out)
for _ in range(10):
    start = time.process_time()
    tape.program.run(1, 0, 2)
    times.append(time.process_time() - start)
print(min(times))
"""


def test_threads_without_a_processor_each_do_not_spin() -> None:
    """Two threads on one processor: 200 meetings cost little time, as the one that waits gives way."""
    done = subprocess.run([sys.executable, "-c", SPINNING], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 2e-3


def test_nothing_is_recorded_where_bodies_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """PORCELET_KERNELS=reference turns instructions off with the bodies."""
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    x = torch.zeros(2, 8)
    with pytest.raises(NotRecordable, match="op add"), tape():
        add(x, x)


def test_a_buffer_is_free_when_its_last_view_is_gone() -> None:
    """Views keep a buffer; after them one of the same size takes its place."""
    arena = Arena()
    first = arena.empty((4, 8), torch.float32)
    view, address = first[1:, ::2], first.data_ptr()
    del first
    second = arena.empty((32,), torch.float32)
    assert second.data_ptr() != address and address % 64 == 0
    del view
    assert arena.empty((4, 4), torch.int64).data_ptr() == address
    assert arena.num_bytes == 2 * 128
