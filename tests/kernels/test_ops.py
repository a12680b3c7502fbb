"""Every body of every op against the op's definition, and what a call through the table costs."""

from __future__ import annotations

import importlib
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet import kernels
from porcelet.kernels import OPS, Body, Key, Op, experts, op
from porcelet.kernels.sample import sample
from tests.kernels.cases import CASES, EXPERTS_TOLERANCE, TOLERANCE

for module in ("attention", "cpu", "experts", "linear", "loss", "pointwise", "sample"):
    importlib.import_module(f"porcelet.kernels.{module}")  # fills the table of ops


def key(args: tuple[Any, ...], needs_grad: bool) -> Key:
    return Key(args[0].device.type, type(args[1]).__name__, args[0].dtype, needs_grad)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite])
    actual, expected = actual[~infinite], expected[~infinite]
    if expected.numel():
        scale = expected.double().abs().max().clamp_min(1e-30)
        assert (actual.double() - expected.double()).abs().max() <= tolerance * scale


def outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a function returns and what it leaves in its arguments."""
    own = [a.clone() if isinstance(a, Tensor) else a for a in args]
    result = function(*own)
    returned = result if isinstance(result, tuple) else (result,)
    left = [t.nan_to_num() for t in own if isinstance(t, Tensor)]  # caches are poisoned with NaN, results must not be
    return [*(t for t in returned if isinstance(t, Tensor)), *left]


TRAINING = Key("cpu", "Tensor", torch.float32, True)
# The trainer's number formats register bodies too; tests/train/test_numerics.py is about them, test_triton.py about
# those for GPUs.
BODIES = [
    (an_op, body)
    for an_op in OPS.values()
    for body in an_op.bodies
    if body.available() and body.function.__module__.startswith(kernels.__name__) and body.name != "triton"
]


def test_every_op_has_cases() -> None:
    """No op escapes the parity test by having no cases."""
    assert set(OPS) == set(CASES)


@pytest.mark.parametrize(("an_op", "body"), BODIES, ids=lambda x: getattr(x, "name", ""))
def test_body_equals_reference(an_op: Op[..., Any], body: Body[..., Any]) -> None:
    """A body gives what the definition gives, on every case that it says it serves."""
    torch.manual_seed(0)
    served = 0
    for args in CASES[an_op.name]():
        if not (body.when(key(args, False)) or body.when(key(args, True))):
            continue
        served += 1
        rounds_between = (an_op.name, body.name) in (("experts", "cpu_packed"), ("attention_latent", "cpu"))
        tolerance = EXPERTS_TOLERANCE if rounds_between else TOLERANCE[torch.float32]
        outcomes = [outcome(function, args) for function in (body.function, an_op.reference)]
        for actual, expected in zip(*outcomes, strict=True):
            assert_close(actual, expected, tolerance)
    assert served, f"no case of {an_op.name} reaches {body.name}"


@pytest.mark.parametrize(
    ("an_op", "body"),
    [(o, b) for o, b in BODIES if o.name in ("attention_packed", "token_logprobs") and b.when(TRAINING)],
    ids=lambda x: x.name,
)
def test_gradients_equal_reference(an_op: Op[..., Any], body: Body[..., Any]) -> None:
    """A body that serves training gives the definition's gradients."""
    torch.manual_seed(0)
    for args in CASES[an_op.name]():
        gradients = []
        if not len(args[0]):
            continue
        for function in (body.function, an_op.reference):
            leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args if isinstance(a, Tensor)]
            rest = [a for a in args if not isinstance(a, Tensor)]
            out = function(*leaves, *rest)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            gradients.append([leaf.grad for leaf in leaves if leaf.requires_grad and leaf.grad is not None])
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 1e-4)


def test_dispatch_costs_under_two_microseconds() -> None:
    """A call through the table adds less than 2 µs to the function itself, with and without gradients."""

    @op
    def probe_dispatch(x: Tensor, weight: Tensor) -> Tensor:
        return x

    del OPS["probe_dispatch"]
    x, weight, number = torch.zeros(1), torch.zeros(1), 20000
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            through = min(timeit.repeat(lambda: probe_dispatch(x, weight), number=number, repeat=9))
            direct = min(timeit.repeat(lambda: probe_dispatch.reference(x, weight), number=number, repeat=9))
        assert (through - direct) / number < 2e-6


def test_the_last_body_that_applies_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolution honours `when` and `available`, and PORCELET_KERNELS=reference turns every body off."""

    @op
    def probe_choice(x: Tensor, weight: Tensor) -> str:
        return "reference"

    del OPS["probe_choice"]
    probe_choice.body("first", when=lambda key: True)(lambda x, weight: "first")
    probe_choice.body("inference", when=lambda key: not key.needs_grad)(lambda x, weight: "inference")
    probe_choice.body("absent", when=lambda key: True, available=lambda: False)(lambda x, weight: "absent")
    x = torch.zeros(1)
    assert probe_choice(x, x) == "inference"
    assert probe_choice(x.requires_grad_(), x) == "first"
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    assert probe_choice.chosen(Key("cpu", "Tensor", torch.float32, False)) == "reference"


def test_sample_draws_from_the_distribution() -> None:
    """Frequencies match softmax under top-k and top-p (chi-square), and the reported log-probability is the drawn
    one's."""
    torch.manual_seed(0)
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5]), 20000
    columns = torch.full((draws,), 1.3), torch.full((draws,), 4), torch.full((draws,), 0.9), torch.zeros(draws)
    rows = torch.zeros(draws, dtype=torch.int64)
    tokens, logprobs = sample(logits[None], rows, *columns, torch.rand(draws, dtype=torch.float64))
    p = (logits / 1.3).double().softmax(-1)
    p[3] = 0  # fifth of five: cut by top-k 4
    p /= p.sum()
    p[2] = 0  # 2.0, 1.5 and 1.0 reach 0.9 together
    p /= p.sum()
    counts = torch.bincount(tokens, minlength=5).double()
    kept = p > 0
    assert counts[~kept].sum() == 0
    assert ((counts - draws * p)[kept] ** 2 / (draws * p[kept])).sum() < 13.8  # chi-square, 2 degrees, p = 0.001
    assert_close(logprobs.double(), p[tokens].log(), 1e-6)


def test_masked_groups_stay_out_below_zero() -> None:
    """V3's correction bias may push every score below zero: experts of groups left out must still not be chosen."""
    logits, bias = torch.zeros(1, 8), torch.full((8,), -3.0)
    bias[:4] = torch.tensor([-1.0, -1.0, -9.0, -9.0])  # the best two and the worst two in one group
    indices, weights = experts.route(logits, bias, 2, 1, 4, True, 2.5)
    assert sorted(indices[0].tolist()) == [0, 1, 2, 3]
    assert weights.sum() == pytest.approx(2.5)


def test_v2_takes_a_groups_best_and_v3_its_two_best() -> None:
    """One strong expert decides V2's choice of groups, two good ones V3's; V2's weights are scaled, never renormed."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    v3, _ = experts.route(logits, torch.zeros(4), 2, 1, 1, False, 1.0)
    v2, weights = experts.route_softmax(logits, 2, 1, 1, 16.0)
    assert v3.item() in (2, 3) and v2.item() == 0
    assert weights.item() == pytest.approx(16 * logits.softmax(-1)[0, 0].item())
