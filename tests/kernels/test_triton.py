"""The Triton kernels against plain attention: interpreted on the CPU in small shapes, FlashMLA's own grid on a GPU.

The interpreter multiplies bfloat16 wrongly, so float16 stands for it there.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet import flash_mla
from porcelet.errors import InputError, MissingExtraError
from porcelet.kernels import Key
from porcelet.kernels.attention import attention_latent, attention_paged
from porcelet.kernels.latent8 import BYTES, from_latent8, to_latent8
from porcelet.kernels.triton import device, paged
from tests.kernels import cases
from tests.kernels.test_ops import assert_close

pytest.importorskip("triton")
from porcelet.kernels.triton import attention  # noqa: E402

HAS_GPU = torch.cuda.is_available()

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16
Grid = tuple[int, int, int, int, int, bool, bool]  # b, s_q, s_k, h_q, h_kv, ragged, causal
SMALL: list[Grid] = [
    (1, 1, 20, 1, 1, False, False),
    (2, 1, 140, 9, 3, True, True),
    (2, 2, 140, 3, 1, True, True),
    (3, 2, 70, 16, 2, True, False),
    (1, 3, 140, 63, 1, False, True),
    (1, 4, 20, 128, 1, False, True),
]
FULL: list[Grid] = [
    (b, s_q, s_k, h_q, h_kv, ragged, causal)
    for b, s_q, s_k, h_q, h_kv, ragged, causal in itertools.product(
        (1, 2, 6, 64),
        (1, 2, 4),
        (20, 140, 4096),
        (1, 3, 9, 63, 64, 126, 128),
        (1, 2, 3, 8),
        (False, True),
        (False, True),
    )
    if h_q % h_kv == 0
]


@pytest.fixture(autouse=True)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whose tiles the interpreter takes, 90's with descriptors; a GPU takes its own."""
    wanted: int = getattr(request, "param", 90)
    if not HAS_GPU:
        monkeypatch.setattr(attention, "arch_of", lambda device: wanted)
    return wanted


EACH_ARCH = pytest.mark.parametrize("arch", [90] if HAS_GPU else [80, 86, 90], indirect=True)


def case(grid: Grid, dtype: torch.dtype, lengths: list[int] | None = None) -> dict[str, Any]:
    """Arguments as FlashMLA's test draws them: small normal numbers, pages in random order, NaN behind each length."""
    b, s_q, s_k, h_q, h_kv, is_ragged, causal = grid
    if lengths is None:
        lengths = [max(s_q, int(n)) for n in torch.normal(s_k, s_k / 2 * is_ragged, (b,))]
    num_pages = max(1, -(-max(lengths) // 64))
    q = (torch.randn(b, s_q, h_q, 576) / 10).clamp(-1, 1)
    cache = (torch.randn(b, num_pages * 64, h_kv, 576) / 10).clamp(-1, 1)
    for row, length in enumerate(lengths):
        cache[row, length:] = torch.nan
    order = torch.randperm(b * num_pages)
    blocks = torch.empty(b * num_pages, 64, h_kv, 576)
    blocks[order] = cache.view(-1, 64, h_kv, 576)
    return {
        "q": q.to(DEVICE, dtype),
        "k_cache": blocks.to(DEVICE, dtype),
        "block_table": order.view(b, num_pages).to(DEVICE, torch.int32),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "head_dim_v": 512,
        "causal": causal,
    }


def expected(q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, causal: bool) -> Iterator[Tensor]:
    """Outputs and log-sum-exps of each sequence, in float64 and one after the other."""
    s_q, h_q = q.shape[1:3]
    for row, length in enumerate(cache_seqlens.tolist()):
        keys = k_cache[block_table[row].long()].flatten(0, 1)[:length].double()
        keys = keys.repeat_interleave(h_q // keys.shape[1], 1)
        scores = torch.einsum("qhw,khw->hqk", q[row].double(), keys) * 576**-0.5
        if causal:
            hidden = torch.ones(s_q, length, dtype=torch.bool, device=q.device).triu(length - s_q + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
        yield torch.einsum("hqk,khw->qhw", weights, keys[..., :512])
        yield lse.masked_fill(lse == -torch.inf, torch.inf)


def check(arguments: dict[str, Any]) -> None:
    """FlashMLA's tolerances: each number, and the angle between all of them."""
    metadata, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=metadata, **arguments)
    assert out.dtype == arguments["q"].dtype and lse.dtype == torch.float32
    names = "q", "k_cache", "block_table", "cache_seqlens", "causal"
    wanted = list(expected(*(arguments[name] for name in names)))
    outs, lses = torch.stack(wanted[::2]), torch.stack(wanted[1::2])
    torch.testing.assert_close(out.double(), outs, atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(lse.double(), lses, atol=1e-6, rtol=8.01 / 65536)
    norms = (out.double() ** 2 + outs**2).sum()
    assert norms == 0 or 1 - 2 * (out.double() * outs).sum() / norms < 5e-6


@pytest.mark.parametrize("grid", SMALL, ids=str)
@pytest.mark.parametrize(("arch", "part"), [(80, 64), (86, 1024), (90, 64), (90, 1024)], indirect=["arch"])
def test_flash_mla_agrees_on_its_own_cases(grid: Grid, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any heads, several new tokens, ragged lengths, in one part and in several."""
    defaults = attention.attend.__kwdefaults__
    monkeypatch.setitem(defaults, "part", part)
    torch.manual_seed(0)
    check(case(grid, HALF))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_mla_agrees_on_its_whole_grid(dtype: torch.dtype) -> None:
    """FlashMLA's grid of batches, new tokens, lengths and heads."""
    torch.manual_seed(0)
    for grid in FULL:
        check(case(grid, dtype))


@pytest.mark.parametrize("s_q", [1, 2, 3])
def test_empty_sequences_give_zeros(s_q: int) -> None:
    """A query that sees no key gets zeros and +inf, whether nothing is cached or it comes before all keys."""
    torch.manual_seed(0)
    check(case((4, s_q, 0, 3, 1, False, True), HALF, lengths=[0, 1, 65, 2]))
    check(case((2, s_q, 0, 3, 1, False, False), HALF, lengths=[0, 0]))


def test_what_flash_mla_cannot_serve_is_named() -> None:
    """Sparse attention, wrong widths and a cache of another type are refused, each by name."""
    arguments = case((1, 1, 20, 1, 1, False, False), HALF) | {
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]
    }
    for change, message in [
        ({"indices": arguments["block_table"]}, "indices asks for sparse"),
        ({"head_dim_v": 256}, "head_dim_v 256"),
        ({"is_fp8_kvcache": True}, "rows are 576"),
        ({"k_cache": arguments["k_cache"].double()}, "float64"),
        ({"k_cache": arguments["k_cache"].repeat_interleave(2, 3)[..., ::2]}, "contiguous"),
        ({"q": arguments["q"].float()}, "q is torch.float32"),
        ({"cache_seqlens": None}, "needs block_table"),
        ({"num_splits": arguments["cache_seqlens"]}, "get_mla_metadata"),
    ]:
        with pytest.raises(InputError, match=message):
            flash_mla.flash_mla_with_kvcache(**(arguments | change))


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies import without Triton, and a call says what to install."""
    monkeypatch.setitem(sys.modules, "triton", None)
    arguments = case((1, 1, 20, 1, 1, False, False), HALF) | {
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]
    }
    with pytest.raises(MissingExtraError, match=r"porcelet\[gpu\]"):
        flash_mla.flash_mla_with_kvcache(**arguments)
    code = "import sys; sys.modules['triton'] = None; import porcelet.models.layers, porcelet.flash_mla"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_elsewhere_are_refused() -> None:
    """The kernels run on GPUs only, and say so."""
    with pytest.raises(InputError, match="on cpu"):
        device.arch_of(torch.device("cpu"))


@EACH_ARCH
def test_eight_bit_latents_are_attended_as_what_they_stand_for() -> None:
    """Over 656 bytes a token the kernel gives what it gives over the values that these hold."""
    torch.manual_seed(0)
    arguments = case((2, 2, 100, 5, 1, True, True), HALF, lengths=[70, 100])
    arguments["k_cache"] = to_latent8(arguments["k_cache"].nan_to_num(1e4)).view(torch.float8_e4m3fn)
    metadata, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=metadata, is_fp8_kvcache=True, **arguments)
    arguments["k_cache"] = from_latent8(arguments["k_cache"].view(torch.uint8)).to(HALF)
    plain_out, plain_lse = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=metadata, **arguments)
    torch.testing.assert_close(out, plain_out, atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(lse, plain_lse, atol=1e-6, rtol=8.01 / 65536)


def test_eight_bit_latents_round_within_e4m3() -> None:
    """656 bytes a token; a latent moves by less than a sixteenth or the smallest step, rotary values by bfloat16's."""
    torch.manual_seed(0)
    values = torch.randn(3, 576) * torch.tensor([1e-3, 1.0, 300.0])[:, None]
    rows = to_latent8(values)
    assert rows.shape == (3, BYTES) == (3, 656)
    back = from_latent8(rows)
    assert torch.equal(back[:, 512:], values[:, 512:].bfloat16().float())
    steps = values.abs().amax(1, keepdim=True) / 448
    assert ((back - values)[:, :512].abs() <= values[:, :512].abs() / 16 + steps).all()
    with pytest.raises(InputError, match="575"):
        to_latent8(values[:, 1:])


@pytest.mark.skipif(HAS_GPU, reason="float32 is what the interpreter computes exactly")
@EACH_ARCH
def test_paged_attention_equals_its_definition() -> None:
    """Grouped heads, odd widths, decoding, chunks, prompts and mixes, split or not."""
    torch.manual_seed(0)
    for args in cases.attention_paged():
        for part in (64, 1024):
            out, _ = attention.attend(*args, part=part)
            assert_close(out, attention_paged.reference(*args), 2e-5)


@pytest.mark.skipif(HAS_GPU, reason="float32 is what the interpreter computes exactly")
@EACH_ARCH
def test_latent_attention_equals_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's body for GPUs over mixes of absorbed and expanded sequences, by chunks of one page and whole."""
    torch.manual_seed(0)
    for new, lengths, absorbed in [
        ((1, 9, 70, 1), (5, 64, 70, 129), 2),
        ((64, 65), (64, 130), 0),
        ((3, 2), (63, 67), 2),
    ]:
        args = cases.latent_case(new, lengths, absorbed, torch.float32, (3, 5, 3, 7, 6), False)
        for chunk in (64, 8192):
            monkeypatch.setattr(paged.attend_expanded, "__defaults__", (chunk,))
            assert_close(paged.attention_latent_triton(*args), attention_latent.reference(*args), 2e-5)


@pytest.mark.skipif(HAS_GPU, reason="the reference's own numbers on another device")
def test_a_cache_of_another_precision_is_the_definition_s() -> None:
    """Both ops, with float16 pages behind float32 queries."""
    torch.manual_seed(0)
    q, k, v, *past = list(cases.attention_paged())[1]
    over_half = q, k.half(), v.half(), *past
    assert torch.equal(paged.attention_paged_triton(*over_half), attention_paged.reference(*over_half))
    latent = list(cases.latent_case((1, 9), (5, 64), 1, torch.float16, (3, 5, 3, 7, 6), False))
    assert torch.equal(paged.attention_latent_triton(*latent), attention_latent.reference(*latent))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Decoded beside others of any length: the same bits."""
    torch.manual_seed(0)
    arguments = case((3, 1, 140, 5, 1, True, True), HALF, lengths=[300, 40, 129])
    metadata, _ = flash_mla.get_mla_metadata()
    whole, _ = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=metadata, **arguments)
    for row in range(3):
        own = {name: arguments[name][row : row + 1] for name in ("q", "block_table", "cache_seqlens")}
        alone, _ = flash_mla.flash_mla_with_kvcache(tile_scheduler_metadata=metadata, **(arguments | own))
        assert torch.equal(alone[0], whole[row])


def test_bodies_serve_gpus_alone() -> None:
    """Half precision on a GPU without gradients takes the kernels where they can run; nothing else does."""
    for an_op in (attention_paged, attention_latent):
        body = next(b for b in an_op.bodies if b.name == "triton")
        assert body.available() == HAS_GPU
        assert body.when(Key("cuda", "Tensor", torch.bfloat16, False))
        for key in [
            Key("cpu", "Tensor", torch.bfloat16, False),
            Key("cuda", "Tensor", torch.float32, False),
            Key("cuda", "Tensor", torch.bfloat16, True),
            Key("cuda", "PackedHeads", torch.bfloat16, False),
        ]:
            assert not body.when(key)


@pytest.mark.gpu
def test_bodies_equal_their_definitions_on_a_gpu() -> None:
    """Every case of both ops, moved to the device and rounded to bfloat16."""
    torch.manual_seed(0)
    for an_op in (attention_paged, attention_latent):
        body = next(b for b in an_op.bodies if b.name == "triton").function
        for args in cases.CASES[an_op.name]():
            if all(isinstance(a, Tensor | float) for a in args):
                moved = [on_device(a) for a in args]
                assert_close(body(*moved), an_op.reference(*moved), 2e-2)


def on_device(argument: Tensor | float) -> Tensor | float:
    if not isinstance(argument, Tensor):
        return argument
    return argument.to(DEVICE, torch.bfloat16 if argument.is_floating_point() else None)
