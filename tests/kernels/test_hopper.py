"""The Gluon kernel for Hopper: its numbers and its protocol on a modelled machine, and on a GPU as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from porcelet.kernels.triton import hopper  # noqa: E402
from tests.kernels.gluon_machine import Modelled, faulty  # noqa: E402
from tests.kernels.test_triton import FULL, HALF, HAS_GPU, Grid, case, expected  # noqa: E402

pytestmark = pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)

SMALL: list[Grid] = [
    (1, 1, 20, 16, 1, False, True),
    (2, 1, 300, 64, 1, True, True),
    (3, 2, 140, 16, 1, True, True),
    (2, 2, 140, 64, 1, True, False),
    (1, 3, 200, 33, 1, False, True),
]


@pytest.fixture(params=range(3))
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What draws the order of the machine's events; its two multiprocessors take all items."""
    if not HAS_GPU:
        monkeypatch.setattr(hopper, "decode_kernel", Modelled(hopper, "decode_kernel", request.param))
        monkeypatch.setattr(hopper, "multiprocessors", lambda device: 2)
    return request.param


def check(arguments: dict[str, Any], part: int) -> None:
    """FlashMLA's tolerances."""
    q, cache, table, lengths, _, causal = arguments.values()
    b, s_q, heads, width = q.shape
    offsets = torch.arange(b + 1, dtype=torch.int32, device=q.device) * s_q
    flat = q.reshape(-1, heads, width)
    out, lse = hopper.attend(flat, cache, offsets, lengths, table, width**-0.5, causal=causal, part=part)
    wanted = list(expected(q, cache, table, lengths, causal))
    outs, lses = torch.stack(wanted[::2]), torch.stack(wanted[1::2]).transpose(1, 2)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    torch.testing.assert_close(out.view(outs.shape).double(), outs, atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(lse.view(lses.shape).double(), lses, atol=1e-6, rtol=8.01 / 65536)


@pytest.mark.parametrize("grid", SMALL, ids=str)
@pytest.mark.parametrize("part", [128, 1024])
def test_it_attends_as_flash_mla_s_reference(grid: Grid, part: int, seed: int) -> None:
    """Ragged lengths, several new tokens, one part and several, NaN behind each length, in any order of events."""
    torch.manual_seed(0)
    check(case(grid, HALF), part)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_attends_as_flash_mla_s_reference_on_its_whole_grid(dtype: torch.dtype) -> None:
    """Where one head's latents serve all."""
    torch.manual_seed(0)
    for grid in FULL:
        if grid[4] == 1:
            check(case(grid, dtype), 1024)


@pytest.mark.parametrize("seed", [0], indirect=True)
def test_empty_sequences_give_zeros(seed: int) -> None:
    """Also beside others, and where causality hides all keys from the first of two tokens."""
    torch.manual_seed(0)
    arguments = case((3, 2, 0, 16, 1, False, True), HALF, lengths=[0, 130, 1])
    check(arguments, 1024)


@pytest.mark.parametrize("seed", [1], indirect=True)
def test_a_token_does_not_depend_on_its_batch(seed: int) -> None:
    """Decoded beside others of any length: the same bits."""
    torch.manual_seed(0)
    q, cache, table, lengths, *_ = case((3, 1, 140, 5, 1, True, True), HALF, lengths=[300, 40, 129]).values()
    offsets = torch.arange(4, dtype=torch.int32, device=q.device)
    whole, _ = hopper.attend(q[:, 0], cache, offsets, lengths, table, 576**-0.5, part=128)
    for row in range(3):
        own = slice(row, row + 1)
        alone, _ = hopper.attend(q[own, 0], cache, offsets[:2], lengths[own], table[own], 576**-0.5, part=128)
        assert torch.equal(alone[0], whole[row])


def test_the_list_has_every_item_once() -> None:
    """Blocks of 64 rows times parts, in the order of the sequences; prompts are not cut along their keys."""
    new, lengths = torch.tensor([1, 9, 3, 1]), torch.tensor([300, 200, 64, 0], dtype=torch.int32)
    offsets = torch.cat([torch.zeros(1), new.cumsum(0)]).int()
    device = "cuda" if HAS_GPU else "cpu"
    work = torch.full((40, 2), -1, dtype=torch.int32, device=device)
    sizes = {"HEADS": 128, "ROWS": 64, "PART": 128, "MOST_NEW": 8}
    hopper.list_work_kernel[4,](work, offsets.to(device), lengths.to(device), 4, 10**6, **sizes, AT_ONCE=2)
    counts = [2 * 3, 18 * 1, 6 * 1, 2 * 1]
    wanted = [[row, place] for row, count in enumerate(counts) for place in range(count)]
    assert int(work[0, 0]) == sum(counts) and work[1 : 1 + sum(counts)].tolist() == wanted
    assert (work[1 + sum(counts) :] == -1).all()


def test_what_it_does_not_serve() -> None:
    """Other widths, pages, precisions and heads, and what the tensor memory accelerator cannot read."""
    q, cache = torch.empty(2, 16, 576, dtype=HALF), torch.empty(3, 64, 1, 576, dtype=HALF)
    assert hopper.fits(q, cache, 512)
    assert hopper.fits(q, torch.empty(3, 65, 1, 576, dtype=HALF)[:, :64], 512)  # pages need not be neighbours
    for other in [
        (q.float(), cache.float(), 512),
        (q, cache, 256),
        (q[..., :512], cache[..., :512], 512),
        (q, torch.empty(3, 32, 1, 576, dtype=HALF), 512),
        (q, torch.empty(3, 64, 2, 576, dtype=HALF), 512),
        (q.transpose(0, 1), cache, 512),
        (q, torch.empty(3, 64, 1, 577, dtype=HALF)[..., 1:], 512),
        (q, torch.empty(3, 64, 1, 656, dtype=torch.uint8), 512),
    ]:
        assert not hopper.fits(*other)


# What is left out or turned round, and how often it stands in the source.
FAULTS = [
    ("fence_async_shared()\n            mbarrier", "mbarrier", 1),
    ("mbarrier.wait(weights_full.index(0), phase)", "pass", 1),
    ("mbarrier.wait(weights_full.index(1), phase)", "pass", 1),
    ("mbarrier.wait(k_full.index(BOXES * SIDE + box), phase)", "pass", 1),
    ("mbarrier.wait(k_free.index(3 * side + box // 4), (pairs & 1) ^ 1)", "pass", 1),
    ("mbarrier.wait(q_full.index(0), items & 1)", "pass", 1),
    ("mbarrier.wait(q_free.index(0), (items & 1) ^ 1)", "pass", 1),
    ("mbarrier.wait(totals_full.index(OTHER), items & 1)", "pass", 1),
    ("(pairs & 1) ^ 1", "pairs & 1", 1),
    ("(items & 1) ^ 1", "items & 1", 1),
    ("mbarrier.arrive(k_free.index(1), count=1)", "pass", 1),
    ("mbarrier.arrive(k_free.index(3), count=1)", "pass", 1),
    ("mbarrier.init(q_free.index(0), count=2)", "mbarrier.init(q_free.index(0), count=1)", 1),
    ("mbarrier.expect(full, BOX_BYTES)", "mbarrier.expect(full, BOX_BYTES // 2)", 1),
    ("warpgroup_mma_wait(1, deps=(scores,))", "warpgroup_mma_wait(2, deps=(scores,))", 1),
    ("count - KEYS, box * BOX", "0, box * BOX", 2),
    ("pairs += 1", "pairs += 2", 2),
]


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not notice")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].strip()[:60])
def test_the_machine_notices_each_fault(
    fault: tuple[str, str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait, arrival, fence and phase is needed: without it some order of events fails."""
    module = faulty(hopper, *fault, tmp_path)
    torch.manual_seed(0)
    arguments = case((2, 1, 300, 16, 1, False, True), HALF)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 1)
    with pytest.raises(AssertionError):
        for seed in range(20):
            monkeypatch.setattr(hopper, "decode_kernel", Modelled(module, "decode_kernel", seed))
            check(arguments, 1024)
