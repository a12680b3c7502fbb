"""Kernels that do the same task on a GPU: which are there, which one is measured fastest, and what vendors' are called
with. Vendors' packages are stood in for; ours are interpreted."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet import flash_mla
from porcelet.engine.runner import _layer_cache
from porcelet.engine.step import Inputs
from porcelet.errors import CapacityError, InputError
from porcelet.kernels.triton import contest, paged, tasks
from porcelet.kernels.triton.tasks import OWN, TASKS, fp8_experts, fp8_product, grouped_attention, latent_attention
from porcelet.types import Batch
from tests.models.variants import LLAMA, V3

pytest.importorskip("triton")
from porcelet.kernels.triton import attention, hopper, hopper_products, matmul  # noqa: E402
from tests.kernels.gluon_machine import Modelled  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own kernels")
CPU = torch.device("cpu")
BATCH = Batch(
    request_ids=("a", "b"),
    tokens=(1, 2),
    positions=(0, 0),
    offsets=(0, 1, 2),
    lengths=(1, 1),
    tables=((0,), (1,)),
    expanded=(False, False),
    sampled_rows=(0, 1),
    draws=(),
)


@pytest.fixture(autouse=True)
def hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU that is interpreted or modelled, with no vendor's package; tasks take ours again in the end."""
    for module in (attention, matmul, tasks):
        monkeypatch.setattr(module, "arch_of", lambda device: 90)
    monkeypatch.setattr(hopper, "decode_kernel", Modelled(hopper, "decode_kernel", 0))
    monkeypatch.setattr(hopper_products, "product_kernel", Modelled(hopper_products, "product_kernel", 0))
    for module in (hopper, hopper_products):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)
    for one in TASKS.values():
        monkeypatch.setattr(one, "taken", OWN)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A package of these functions."""
    for part in (name.partition(".")[0], name):
        module = ModuleType(part)
        module.__spec__ = ModuleSpec(part, None)
        monkeypatch.setitem(sys.modules, part, module)
    vars(sys.modules[name]).update(functions)


def install_all(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Every vendor's package, computing with ours; and what was called."""
    called: dict[str, list[str]] = {"flash_mla": [], "flashinfer": [], "deep_gemm": []}

    def with_kvcache(
        q: Tensor,
        cache: Tensor,
        tables: Tensor,
        lengths: Tensor,
        num_values: int,
        metadata: object,
        splits: None,
        *,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        called["flash_mla"].append(str(tuple(q.shape)))
        assert tables.dtype == lengths.dtype == torch.int32 and isinstance(metadata, flash_mla.FlashMLASchedMeta)
        past = torch.arange(len(q) + 1, dtype=torch.int32), lengths, tables, softmax_scale
        out, lse = attention.attend(q[:, 0], cache, num_values, *past, causal=causal)
        return out[:, None], lse[:, :, None]

    def paged(
        q: Tensor, kv: tuple[Tensor, Tensor], workspace: Tensor, tables: Tensor, lengths: Tensor, most: int, **how: Any
    ) -> Tensor:
        called["flashinfer"].append(how["kv_layout"])
        assert how["kv_layout"] == "HND"
        assert not workspace.any() and most == tables.shape[1] * kv[0].shape[2] and how["bmm2_scale"] == 1.0
        assert tables.dtype == lengths.dtype == torch.int32 and all(pages.is_contiguous() for pages in kv)
        offsets, turned = torch.arange(len(q) + 1, dtype=torch.int32), [pages.transpose(1, 2) for pages in kv]
        return attention.attend(q, *turned, offsets, lengths, tables, how["bmm1_scale"])[0]

    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor) -> None:
        called["deep_gemm"].append(str(out.dtype))
        out.copy_(fp8_product.own(matmul.FP8Rows(*a), contest.FP8Weight(*b), out.dtype))

    def grouped(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, experts: Tensor) -> None:
        called["deep_gemm"].append("grouped")
        out.copy_(fp8_experts.own(matmul.FP8Rows(*a), contest.FP8Weight(*b), experts, 128, out.dtype))

    install(
        monkeypatch,
        "flash_mla",
        get_mla_metadata=flash_mla.get_mla_metadata,
        flash_mla_with_kvcache=with_kvcache,
    )
    install(monkeypatch, "flashinfer.decode", trtllm_batch_decode_with_kv_cache=paged)
    install(monkeypatch, "deep_gemm", fp8_gemm_nt=product, m_grouped_fp8_gemm_nt_contiguous=grouped)
    return called


def test_what_is_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By generation, by what is installed, and without vendors' where they are not wanted."""
    assert {name: one.names(CPU) for name, one in TASKS.items()} == {
        "latent_attention": [OWN, "gluon"],
        "grouped_attention": [OWN],
        "fp8_product": [OWN, "gluon"],
        "fp8_experts": [OWN, "gluon"],
    }
    install_all(monkeypatch)
    assert latent_attention.names(CPU) == [OWN, "gluon", "flash_mla"]
    assert grouped_attention.names(CPU) == [OWN, "flashinfer"] and fp8_product.names(CPU) == [OWN, "gluon", "deep_gemm"]
    monkeypatch.setenv("PORCELET_KERNELS", "own")
    assert latent_attention.names(CPU) == fp8_product.names(CPU) == [OWN, "gluon"]
    monkeypatch.setattr(tasks, "arch_of", lambda device: 80)
    assert latent_attention.names(CPU) == [OWN]
    with pytest.raises(InputError, match="latent_attention has no kernel 'cutlass'; it has triton, gluon, flash_mla"):
        latent_attention.take("cutlass")


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task, one in TASKS.items() for name in one.rivals],
)
def test_a_rival_takes_the_calls_it_serves(task: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what ours gives; other calls stay with ours."""
    called = install_all(monkeypatch)
    one, (arguments,) = TASKS[task], list(contest.ARGUMENTS[task](CPU, True))
    wanted = one(*arguments)
    assert not any(called.values())
    run = one.rivals[name]
    assert run.serves(*arguments)
    found = run.function(*arguments)
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (wanted, found)), strict=True):
        torch.testing.assert_close(theirs.float(), ours.float(), atol=2e-3, rtol=2e-2)
    assert name == "gluon" or called[name]
    one.take(name)
    other = {
        "latent_attention": lambda: (arguments[0].float(), arguments[1].float(), *arguments[2:]),
        "grouped_attention": lambda: (arguments[0][..., :64], *(a[..., :64] for a in arguments[1:3]), *arguments[3:]),
        "fp8_product": lambda: (*arguments[:2], torch.float32),
        "fp8_experts": lambda: (*arguments[:4], torch.float32),
    }[task]()
    assert not run.serves(*other)
    before = {key: list(value) for key, value in called.items()}
    one(*other)
    assert called == before


@pytest.mark.parametrize("name", ["gluon", "flash_mla"])
def test_the_engine_s_latents_reach_a_rival(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the op, with V3's widths, from inputs and cache as a step has them."""
    called = install_all(monkeypatch)
    torch.manual_seed(0)
    config = dataclasses.replace(V3, kv_lora_rank=512, qk_rope_head_dim=64)
    (pages,) = _layer_cache(config, 3, torch.float16)
    pages.normal_().div_(10)
    inputs, H = Inputs(2, 2, 2), 16
    inputs.fill(dataclasses.replace(BATCH, tables=((2, 0), (1,)), lengths=(70, 5), positions=(69, 4)))
    q_nope, q_rope, w_uk, w_uv = (
        (torch.randn(*shape) / 10).half() for shape in ((2, H, 128), (2, H, 64), (H, 512, 128), (H, 128, 512))
    )
    past = inputs.offsets, inputs.lengths, inputs.tables, torch.tensor([2])
    arguments = q_nope, w_uk, w_uv, q_rope, pages, *past, 192**-0.5
    wanted = paged.attention_latent_triton(*arguments)
    served = watched(latent_attention, name, monkeypatch)
    found = paged.attention_latent_triton(*arguments)
    assert served == [True] and (name == "gluon" or called[name])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-2)


def test_the_engine_s_grouped_queries_reach_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the op, with pages as the engine lays them out."""
    called = install_all(monkeypatch)
    torch.manual_seed(0)
    config = dataclasses.replace(LLAMA, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    k, v = (pages.normal_() for pages in _layer_cache(config, 3, torch.float16))
    inputs = Inputs(2, 2, 2)
    inputs.fill(dataclasses.replace(BATCH, tables=((2, 0), (1,)), lengths=(70, 5), positions=(69, 4)))
    arguments = torch.randn(2, 4, 64).half(), k, v, inputs.offsets, inputs.lengths, inputs.tables, 0.125
    wanted = paged.attention_paged_triton(*arguments)
    served = watched(grouped_attention, "flashinfer", monkeypatch)
    found = paged.attention_paged_triton(*arguments)
    assert served == [True] and called["flashinfer"]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-2)


def watched(one: tasks.Task[Any, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Take the rival; what it says of each call from now on."""
    rival, said = one.rivals[name], list[bool]()

    def serves(*args: Any, **kwargs: Any) -> bool:
        said.append(rival.serves(*args, **kwargs))
        return said[-1]

    monkeypatch.setitem(one.rivals, name, dataclasses.replace(rival, serves=serves))
    one.take(name)
    return said


def clock(seconds: dict[str, float]) -> Callable[[Callable[[], object]], float]:
    """Makes ours in Triton take a second, and rivals as long as is said, in the order in which they are measured."""
    turns = list(seconds.values())
    count = 0

    def timer(run: Callable[[], object]) -> float:
        nonlocal count
        count += 1
        return turns[(count - 1) % len(turns)]

    return timer


def test_the_fastest_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of each task; kept in a file and taken from there, unless something has changed since."""
    install_all(monkeypatch)
    told: list[str] = []
    held = contest.hold(CPU, clock({OWN: 1.0, "gluon": 0.5, "flash_mla": 0.8}), small=True, tell=told.append)
    assert told[:2] == ["measuring latent_attention by gluon", "measuring latent_attention by flash_mla"]
    by_task = {outcome.task: outcome for outcome in held.outcomes}
    latent = by_task["latent_attention"]
    assert latent.taken == "gluon" and not latent.failed
    assert latent.ratios == pytest.approx({"gluon": 2.0, "flash_mla": 1.25})
    path = tmp_path / "made" / contest.FILE
    contest.save(held, path)
    assert contest.load(path) == held
    contest.apply(path, CPU)
    assert latent_attention.taken == "gluon"
    monkeypatch.setattr(contest, "__version__", "other")
    assert contest.stale(held, CPU) == "porcelet"
    contest.apply(path, CPU)
    assert latent_attention.taken == OWN


def test_what_fails_or_disagrees_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that raises, one with other results, one that is hardly faster."""
    install_all(monkeypatch)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such image")

    monkeypatch.setattr(sys.modules["flash_mla"], "flash_mla_with_kvcache", broken)
    monkeypatch.setattr(sys.modules["deep_gemm"], "fp8_gemm_nt", lambda a, b, out: out.zero_())
    held = contest.hold(CPU, clock({OWN: 1.0, "rival": 0.99}), small=True)
    latent, grouped, product, _ = held.outcomes
    assert latent.failed == {"flash_mla": "RuntimeError: no such image"} and latent.ratios.keys() == {"gluon"}
    assert grouped.taken == OWN and grouped.ratios["flashinfer"] == pytest.approx(1 / 0.99)
    assert product.taken == OWN and product.failed["deep_gemm"].startswith("its results differ from ours by 1, where")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """None is none; another one, an unknown task, and a folder that cannot be written."""
    path = tmp_path / contest.FILE
    assert contest.load(path) is None
    contest.apply(path, CPU)
    assert latent_attention.taken == OWN
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="is no measurement of kernels"):
        contest.load(path)
    held = contest.Contest(contest.conditions(CPU), "2026-11-23", (contest.Outcome("sorting", OWN),))
    contest.save(held, path)
    with pytest.raises(InputError, match="unknown task 'sorting'"):
        contest.apply(path, CPU)
    with pytest.raises(CapacityError, match="PORCELET_HOME"):
        contest.save(held, path / "below" / contest.FILE)
    assert json.loads(path.read_text(encoding="utf-8"))["date"] == "2026-11-23"
