"""The Triton bodies of norms, gates, rotation, cache writes, routing, drawing and log-probabilities against their
definitions: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet.kernels import Body, Key, Op
from porcelet.kernels.attention import write_keys_values, write_latents
from porcelet.kernels.experts import route, route_softmax
from porcelet.kernels.loss import CHUNK, token_logprobs
from porcelet.kernels.pointwise import add_rms_norm, rms_norm, rope, silu_mul
from porcelet.kernels.sample import sample
from porcelet.kernels.triton import pointwise
from tests.kernels.cases import CASES
from tests.kernels.test_ops import assert_close, outcome

pytest.importorskip("triton")
from porcelet.kernels.triton import rows  # noqa: E402
from porcelet.kernels.triton.matmul import quantize_rows  # noqa: E402
from porcelet.kernels.triton.select import draw  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TRAINED = [rms_norm, silu_mul, rope, token_logprobs]
INFERENCE = [add_rms_norm, write_latents, write_keys_values, route, route_softmax, sample]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def body_of(an_op: Op[..., Any]) -> Body[..., Any]:
    return next(body for body in an_op.bodies if body.name == "triton")


def moved(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)


@pytest.mark.parametrize("an_op", TRAINED + INFERENCE, ids=lambda an_op: an_op.name)
def test_body_equals_its_definition(an_op: Op[..., Any]) -> None:
    """On every case of the op, in float32; caches keep what nothing was written to."""
    for args in CASES[an_op.name]():
        if len(args[0]) > CHUNK and not HAS_GPU:
            args = (args[0][: CHUNK + 5], args[1], args[2][: CHUNK + 5])  # a second chunk of log-probabilities
        outcomes = [outcome(function, moved(args)) for function in (body_of(an_op).function, an_op.reference)]
        for actual, expected in zip(*outcomes, strict=True):
            assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("an_op", TRAINED, ids=lambda an_op: an_op.name)
def test_gradients_equal_the_definitions(an_op: Op[..., Any]) -> None:
    """Of every input that can have one."""
    for case in CASES[an_op.name]():
        args = moved(case)
        if not len(args[0]) or len(args[0]) > CHUNK:
            continue
        gradients = []
        for function in (body_of(an_op).function, an_op.reference):
            leaves = [a.clone() if isinstance(a, Tensor) else a for a in args]
            learnt = leaves[:1] if an_op is rope else [a for a in leaves[:2] if isinstance(a, Tensor)]
            for leaf in learnt:
                leaf.requires_grad_()
            out = function(*leaves)
            (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum().backward()
            gradients.append([leaf.grad for leaf in learnt])
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 1e-5)


def test_many_rows_share_a_weights_gradient() -> None:
    """More rows than programs that sum it."""
    x, weight = torch.randn(300, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    grad = torch.randn(300, 40, device=DEVICE)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    rms_norm.reference(*leaves, 1e-6).backward(grad)
    for actual, expected in zip(rows.norm_backward(x, weight, grad, 1e-6), leaves, strict=True):
        assert expected.grad is not None
        assert_close(actual, expected.grad, 1e-5)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("width", [128, 300, 1536])
def test_quantised_forms_round_what_the_plain_ones_give(width: int, power_of_two: bool) -> None:
    """The same numbers in FP8 as if the op's result had been rounded afterwards."""
    first, second = (torch.randn(5, width, device=DEVICE) for _ in range(2))
    weight = torch.randn(width, device=DEVICE)
    total, normed = add_rms_norm.reference(first, second, weight, 1e-6)
    by_norm, found_total = rows.norm_quantized(first, weight, 1e-6, second, power_of_two=power_of_two)
    by_gate = rows.gate_quantized(first, second, power_of_two=power_of_two)
    assert torch.equal(found_total, total)
    for found, plain in ((by_norm, normed), (by_gate, silu_mul.reference(first, second))):
        wanted = quantize_rows(plain, power_of_two=power_of_two)
        torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-5, atol=0)
        steps = (found.values.view(torch.uint8).int() - wanted.values.view(torch.uint8).int()).abs()
        assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01  # a number may lie next to the middle of two


def test_inputs_may_be_parts_of_wider_rows() -> None:
    """Halves of one product, heads of another, and a rotary part between them."""
    wide = torch.randn(5, 64, device=DEVICE)
    gate, up = wide.chunk(2, dim=-1)
    assert_close(pointwise.silu_mul_triton(gate, up), silu_mul.reference(gate, up), 1e-6)
    heads, angles = wide.view(5, 4, 16)[..., 6:], (torch.rand(5, 5, device=DEVICE), torch.rand(5, 5, device=DEVICE))
    assert_close(pointwise.rope_triton(heads, *angles, True), rope.reference(heads, *angles, True), 1e-6)
    narrow, weight = wide[:, 3:20], torch.randn(17, device=DEVICE)
    assert_close(pointwise.rms_norm_triton(narrow, weight, 1e-6), rms_norm.reference(narrow, weight, 1e-6), 1e-6)
    flipped = torch.randn(17, 5, device=DEVICE).t()
    assert_close(pointwise.rms_norm_triton(flipped, weight, 1e-6), rms_norm.reference(flipped, weight, 1e-6), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * HAS_GPU)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Within the result's own rounding of float32."""
    x, other = (torch.randn(4, 96, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=DEVICE).to(dtype)
    total, normed = pointwise.add_rms_norm_triton(x, other, weight, 1e-6)
    assert torch.equal(total, x + other) and normed.dtype == dtype
    wanted = rms_norm.reference(total.float(), weight.float(), 1e-6)
    torch.testing.assert_close(normed.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    gated = pointwise.silu_mul_triton(x, other)
    torch.testing.assert_close(
        gated.float(), silu_mul.reference(x.float(), other.float()), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_equal_logits_are_cut_in_order() -> None:
    """Of equals the first ones stay, as many as top-k and top-p leave."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0, 1.0, -torch.inf, -torch.inf]], device=DEVICE)
    for top_k, top_p, min_p in [
        (2, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.5, 0.0),
        (4, 0.9, 0.0),
        (8, 1.0, 0.0),
        (3, 1.0, 1.0),
    ]:
        count = 8
        uniform = torch.linspace(0, 0.999, count, device=DEVICE, dtype=torch.float64)
        settings = [
            torch.full((count,), value, device=DEVICE)
            for value in (torch.tensor(1.0), torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p))
        ]
        rows_of = torch.zeros(count, dtype=torch.int64, device=DEVICE)
        found, wanted = (function(logits, rows_of, *settings, uniform) for function in (draw, sample.reference))
        assert torch.equal(found[0], wanted[0]), (top_k, top_p, min_p)
        assert_close(found[1], wanted[1], 1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which numpy serves
def test_logits_that_are_no_numbers_are_told() -> None:
    """Some token, and a log-probability that is not finite, whatever is cut."""
    whole = torch.randn(3, 70, device=DEVICE)
    whole[0, 5], whole[1] = torch.nan, torch.nan
    whole[2, 7] = torch.inf
    for temperature, top_k, top_p in [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 3, 0.5)]:
        settings = (temperature, top_k, top_p, 0.0, 0.5)
        columns = (torch.tensor([value] * 3, device=DEVICE) for value in settings)
        tokens, logprobs = draw(whole, torch.arange(3, device=DEVICE), *columns)
        assert ((tokens >= 0) & (tokens < 70)).all() and not logprobs.isfinite().any()


@pytest.mark.parametrize("shape", [(256, 8, 4, 8), (160, 8, 3, 6), (64, 1, 1, 6)], ids=str)
def test_gates_of_released_models_choose_the_same_experts(shape: tuple[int, int, int, int]) -> None:
    """V3's, V2's and V2-Lite's numbers of experts, groups, groups chosen and experts chosen."""
    E, groups, topk_group, top_k = shape
    logits, bias = torch.randn(20, E, device=DEVICE), torch.rand(E, device=DEVICE)
    for found, wanted in [
        (body_of(route).function(logits, bias, groups, topk_group, top_k, True, 2.5),
         route.reference(logits, bias, groups, topk_group, top_k, True, 2.5)),
        (body_of(route_softmax).function(logits, groups, topk_group, top_k, 16.0),
         route_softmax.reference(logits, groups, topk_group, top_k, 16.0)),
    ]:  # fmt: skip
        assert torch.equal(found[0], wanted[0])
        assert_close(found[1], wanted[1], 1e-6)


def test_bodies_serve_gpus_alone() -> None:
    """Training where there is a backward pass; other devices and packed weights never."""
    served: Callable[[Op[..., Any], Key], bool] = lambda an_op, key: body_of(an_op).when(key)  # noqa: E731
    for an_op in TRAINED + INFERENCE:
        assert body_of(an_op).available() == HAS_GPU
        assert served(an_op, Key("cuda", "Tensor", torch.float32, False))
        assert served(an_op, Key("cuda", "Tensor", torch.float32, True)) == (an_op in TRAINED)
        assert not served(an_op, Key("cpu", "Tensor", torch.float32, False))
        assert not served(an_op, Key("cuda", "Tensor", torch.float64, False))
    for an_op in TRAINED:
        assert served(an_op, Key("cuda", "Parameter", torch.bfloat16, True))
