"""FP8 products for Hopper in Gluon: numbers and protocol on a modelled machine, and on a GPU as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from porcelet.kernels.linear import FP8Weight  # noqa: E402
from porcelet.kernels.triton import hopper_products  # noqa: E402
from porcelet.kernels.triton.hopper_products import fits, multiply_fp8  # noqa: E402
from porcelet.kernels.triton.matmul import FP8Rows, num_parts  # noqa: E402
from tests.kernels.gluon_machine import Modelled, faulty  # noqa: E402
from tests.kernels.test_triton_matmul import DEVICE, HAS_GPU, WIDE, difference, exact, operands  # noqa: E402

pytestmark = pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)
# Rows, rows of weights, columns; the last two are cut into parts.
SHAPES = [(1, 128, 256), (3, 136, 400), (40, 264, 128), (130, 72, 272), (5, 200, 1024), (130, 64, 1104)]


@pytest.fixture(params=range(2))
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """What draws the order of the machine's events; its two multiprocessors take all tiles."""
    torch.manual_seed(0)
    if not HAS_GPU:
        monkeypatch.setattr(
            hopper_products, "product_kernel", Modelled(hopper_products, "product_kernel", request.param)
        )
        monkeypatch.setattr(hopper_products, "multiprocessors", lambda device: 2)
    return request.param


def fp8(M: int, N: int, K: int) -> tuple[FP8Rows, FP8Weight]:
    a, b = operands("fp8", (M, K), (N, K))
    assert isinstance(a, FP8Rows) and isinstance(b, FP8Weight)
    return a, b


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_their_definition(shape: tuple[int, int, int], seed: int) -> None:
    """Few rows and many, edges that fill no tile, K in one part and in several, in any order of events."""
    a, b = fp8(*shape)
    found, wanted = multiply_fp8(a, b, torch.bfloat16), exact(a, b)
    torch.testing.assert_close(found.double(), wanted, rtol=8e-3, atol=2e-3 * float(wanted.abs().mean()))


def test_grouped_rows_meet_their_experts(seed: int) -> None:
    """Groups of 16 rows; one expert has none, and rows that belong to nobody are left alone."""
    a, _ = operands("fp8", (64, 256), (72, 256))
    _, b = operands("fp8", (1, 256), (4, 72, 256))
    assert isinstance(a, FP8Rows) and isinstance(b, FP8Weight)
    owners = torch.tensor([2, -1, 0, 3], device=DEVICE, dtype=torch.int32).repeat_interleave(16)
    found = multiply_fp8(a, b, torch.bfloat16, owners, aligned=16)
    for group, expert in enumerate((2, -1, 0, 3)):
        if expert >= 0:
            own = slice(16 * group, 16 * group + 16)
            part = exact(FP8Rows(a.values[own], a.scale[own]), b[expert])
            torch.testing.assert_close(found[own].double(), part, rtol=8e-3, atol=2e-3 * float(part.abs().mean()))


def test_what_it_does_not_serve() -> None:
    """What the tensor memory accelerator cannot read or write, and nothing at all."""
    a, b = fp8(5, 128, 256)
    assert fits(a, b, torch.bfloat16) and not fits(a, b, torch.float32)
    assert not fits(FP8Rows(a.values, a.scale.contiguous()), b, torch.bfloat16)
    assert not fits(FP8Rows(a.values[1:], a.scale[1:]), b, torch.bfloat16)  # scales begin at 4 bytes
    assert not fits(FP8Rows(a.values[:0], a.scale[:0]), b, torch.bfloat16)
    assert not fits(*fp8(5, 132, 256), torch.bfloat16) and not fits(*fp8(5, 128, 264), torch.bfloat16)
    assert not fits(a, fp8(5, 128, 512)[1], torch.bfloat16)


@pytest.mark.gpu
def test_products_equal_their_definition_on_deep_gemm_s_shapes(seed: int) -> None:
    """By its metric."""
    for N, K in WIDE:
        for M in (1, 17, 128, 4096):
            a, b = fp8(M, N, K)
            assert difference(multiply_fp8(a, b, torch.bfloat16), exact(a, b)) < 1e-3


FAULTS = [
    ("mbarrier.wait(free.index(stage), phase ^ 1)", "pass", 1),
    ("phase ^ 1", "phase", 1),
    ("mbarrier.wait(full.index(stage), phase)", "pass", 1),
    ("mbarrier.arrive(free.index(stage), count=1)", "pass", 1),
    ("mbarrier.init(free.index(i), count=2)", "mbarrier.init(free.index(i), count=1)", 1),
    ("fence_async_shared()  # scales", "pass  # scales", 1),
    ("fence_async_shared()\n            at", "at", 1),
    ("tma.store_wait(0)  # of the last", "pass  # of the last", 1),
    ("tma.store_wait(0)\n\n", "pass\n\n", 1),
    ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,", 1),
    ("COLUMNS * BLOCK + TOKENS * BLOCK + TOKENS * 4", "COLUMNS * BLOCK + TOKENS * BLOCK", 1),
    ("gl.minimum(block + 1, end - 1)", "block", 1),
]


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not notice")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].strip()[:60])
def test_the_machine_notices_each_fault(
    fault: tuple[str, str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait, arrival, fence and phase is needed: without it some order of events fails."""
    module = faulty(hopper_products, *fault, tmp_path)
    torch.manual_seed(0)
    a, b = fp8(20, 264, 1300 // 16 * 16)
    assert num_parts(264, 1296) == 2
    monkeypatch.setattr(hopper_products, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(hopper_products, "SHARED", 60 << 10)  # so that the ring is short
    with pytest.raises(AssertionError):
        for seed in range(20):
            monkeypatch.setattr(hopper_products, "product_kernel", Modelled(module, "product_kernel", seed))
            wanted = exact(a, b)
            found = multiply_fp8(a, b, torch.bfloat16).double()
            torch.testing.assert_close(found, wanted, rtol=8e-3, atol=2e-3 * float(wanted.abs().mean()))
