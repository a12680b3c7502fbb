"""The native bodies with a backward pass: against float64, and bit for bit against themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import OPS, Key, Op, cpu
from porcelet.kernels.cpu import gradients, gradients_loss
from porcelet.kernels.experts import experts, route
from porcelet.kernels.loss import token_logprobs
from porcelet.kernels.pointwise import rms_norm, rope, silu_mul
from tests.kernels.cases import CASES
from tests.kernels.test_cpu import HERE, NO_COMPILER

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

TRAINED = ("rms_norm", "rope", "silu_mul", "route", "route_softmax", "experts", "token_logprobs")
CONSTANT = {"rope": (1, 2), "route": (1,)}  # arguments that never take a gradient: angles, and the bias of a choice
ROUNDING = 3e-6  # of the largest value or, where all cancel, of one; the definition in float32 is off by up to 2e-6
Outcome = tuple[Tensor, list[Tensor | None]]


@pytest.fixture
def unwrapped() -> Iterator[None]:
    """No shapes are checked from outside, as where the package is used."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def differentiate(function: Callable[..., Any], args: tuple[Any, ...], fixed: tuple[int, ...] = ()) -> Outcome:
    """The (last) output for random upstream gradients, and the gradients of all float arguments but the `fixed`."""
    leaves = []
    for i, value in enumerate(args):
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        leaves.append(value.detach().requires_grad_(i not in fixed) if is_float else value)
    out = function(*leaves)
    out = out[-1] if isinstance(out, tuple) else out
    out.backward(normal(*out.shape, seed=9).to(out.dtype))
    given = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return out.detach(), [x.grad for x in given]


def exactly(an_op: Op[..., Any], args: tuple[Any, ...]) -> Outcome:
    """What the definition gives in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return differentiate(an_op.reference, tuple(wide), CONSTANT.get(an_op.name, ()))


def assert_near(actual: Tensor | None, exact: Tensor | None) -> None:
    assert (actual is None) == (exact is None)
    if actual is not None and exact is not None:
        assert actual.shape == exact.shape and actual.dtype == torch.float32
        if actual.numel():
            assert (actual.double() - exact).abs().max() <= ROUNDING * exact.abs().max().clamp_min(1.0)


def check(an_op: Op[..., Any], *args: Any) -> Outcome:
    """An op's value and gradients are within rounding of the exact ones. Returns them."""
    fixed = CONSTANT.get(an_op.name, ())
    found, exact = differentiate(an_op, args, fixed), exactly(an_op, args)
    assert_near(found[0], exact[0])
    for actual, expected in zip(found[1], exact[1], strict=True):
        assert_near(actual, expected)
    return found


def same(first: Outcome, second: Outcome) -> bool:
    pairs = zip([first[0], *first[1]], [second[0], *second[1]], strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def make_experts(tokens: int, experts: int = 6, chosen: int = 3, D: int = 33, F: int = 21) -> tuple[Tensor, ...]:
    indices = normal(tokens, experts, seed=4).topk(chosen).indices
    stacks = normal(experts, 2 * F, D, seed=1), normal(experts, D, F, seed=2)
    return normal(tokens, D), *stacks, indices, normal(tokens, chosen, seed=3)


LARGER: dict[str, tuple[Any, ...]] = {
    "rms_norm": (normal(150, 3, 70), normal(70, seed=1), 1e-6),
    "rope": (normal(70, 5, 34), normal(70, 17, seed=1), normal(70, 17, seed=2), True),
    "silu_mul": (4 * normal(70, 530), normal(70, 530, seed=1)),
    "route": (normal(300, 16), normal(16, seed=1), 4, 2, 3, True, 2.5),
    "route_softmax": (normal(300, 16), 4, 2, 3, 16.0),
    "experts": make_experts(200),
    "token_logprobs": (normal(300, 40), normal(1100, 40, seed=1), torch.arange(300)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_float32_is_native(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bodies serve float32 on the CPU where a gradient is wanted, and nothing else."""
    key = Key("cpu", "Tensor", torch.float32, True)
    assert OPS[name].chosen(key) == "cpu_gradient"
    for other in ({"device": "cuda"}, {"dtype": torch.bfloat16}, {"needs_grad": False}):
        assert OPS[name].chosen(key._replace(**other)) != "cpu_gradient"
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    assert OPS[name].chosen(key) == "reference"


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", TRAINED)
def test_values_and_gradients_are_exact_up_to_rounding(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every instruction set, for odd and ordinary shapes and for empty ones that the definition differentiates."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    torch.manual_seed(0)
    for args in [*CASES[name](), LARGER[name]]:
        quantised = not isinstance(args[1], (Tensor, int))
        if not (quantised or (name == "experts" and not len(args[0]))):
            check(OPS[name], *args)


@pytest.mark.parametrize("name", TRAINED)
def test_bits_depend_on_neither_run_nor_threads(name: str) -> None:
    """Value and gradients repeat on any number of threads, and are the same on all where no product of torch's is."""
    outcomes, before = [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 2, 3, 3):
            torch.set_num_threads(threads)
            outcomes.append(differentiate(OPS[name], LARGER[name], CONSTANT.get(name, ())))
    finally:
        torch.set_num_threads(before)
    assert all(same(first, again) for first, again in zip(outcomes[::2], outcomes[1::2], strict=True))
    if name not in ("experts", "token_logprobs"):
        assert all(same(outcome, outcomes[0]) for outcome in outcomes[2:])


@pytest.mark.parametrize("name", TRAINED)
def test_any_subset_of_inputs_may_want_a_gradient(name: str) -> None:
    """An input without a gradient changes nothing for the others."""
    args, fixed = LARGER[name], CONSTANT.get(name, ())
    _, all_gradients = differentiate(OPS[name], args, fixed)
    floats = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
    for alone in set(floats) - set(fixed):
        _, gradients = differentiate(OPS[name], args, tuple(i for i in floats if i != alone))
        for i, gradient, expected in zip(floats, gradients, all_gradients, strict=True):
            assert (gradient is None) == (i != alone)
            if gradient is not None and expected is not None:
                torch.testing.assert_close(gradient, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def test_slices_and_transposes_are_read_where_they_lie() -> None:
    """Inputs cut from wider tensors and upstream gradients of any strides give what their copies give."""
    wide = normal(20, 4, 50)
    check(rms_norm, wide[:, 1:3, 5:22], normal(17, seed=1), 1e-6)
    check(rms_norm, normal(17, 20).T, normal(17, seed=1), 1e-6)
    check(rope, wide[..., 34:], normal(20, 8, seed=1), normal(20, 8, seed=2), True)
    check(silu_mul, *normal(20, 60).chunk(2, dim=-1))
    check(token_logprobs, normal(20, 60)[:, ::2], normal(30, 40, seed=1).T, torch.arange(40)[::2])
    x, gate_up, down, indices, weights = make_experts(20)
    transposed = down.transpose(1, 2).contiguous().transpose(1, 2)
    check(experts, normal(20, 66)[:, 33:], gate_up, transposed, indices.T.contiguous().T, weights.T.contiguous().T)


def test_blocks_of_heads_are_of_the_size_that_scratch_was_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ adds up as many heads a block as Python says: another number is exact as well, in other bits."""
    found = []
    for block in (64, 1, 1000):
        monkeypatch.setattr(gradients, "NORM_BLOCK", block)
        found.append(check(rms_norm, *LARGER["rms_norm"]))
    assert not same(found[0], found[1]) and not same(found[0], found[2])


def test_a_gradient_of_one_value_for_all_is_read() -> None:
    """The gradient of a sum has no strides; every body reads it as it reads ones that lie in memory."""
    for name in TRAINED:
        first, *rest = LARGER[name]
        x = first.clone().requires_grad_()
        out = OPS[name](x, *rest)
        out = out[-1] if isinstance(out, tuple) else out
        (found,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        (expected,) = torch.autograd.grad(out, x, torch.ones(out.shape))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_norms_of_other_shapes_are_the_definitions(needs_grad: bool) -> None:
    """One or four dimensions, a weight with gaps or in float64: what the definition gives, with a gradient or not."""
    weight = normal(6, seed=1)
    for x, scale in (
        (normal(2, 3, 4, 6), weight),
        (normal(6), weight),
        (normal(5, 6), normal(12)[::2]),
        (normal(5, 6), weight.double()),
    ):
        assert torch.equal(rms_norm(x.requires_grad_(needs_grad), scale, 1e-6), rms_norm.reference(x, scale, 1e-6))


def test_experts_without_tokens_have_a_gradient_of_zero() -> None:
    """All tokens to two experts of nine: the others' gradients are exactly zero, not whatever memory held."""
    x, gate_up, down, _, weights = make_experts(30, experts=9, chosen=2)
    indices = torch.tensor([[7, 2]]).expand(30, 2)
    _, (_, dgate_up, ddown, _) = check(experts, x, gate_up, down, indices, weights)
    for gradient in (dgate_up, ddown):
        assert gradient is not None
        assert [bool(one.any()) for one in gradient] == [e in (2, 7) for e in range(9)]


def test_tokens_without_experts_give_zeros() -> None:
    """No choices at all: the sum over none, and gradients of zero."""
    out, gradients = differentiate(experts, make_experts(5, chosen=0))
    assert not out.any() and out.shape == (5, 33)
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.usefixtures("unwrapped")
def test_experts_refuse_shapes_that_do_not_fit() -> None:
    """Native code would read past what is too short: weights, choices, rows, either stack; or an expert's slot."""
    x, gate_up, down, indices, weights = make_experts(9)
    for wrong in (
        (x, gate_up, down, indices, weights[:1]),
        (x, gate_up, down, indices, weights[:, :2]),
        (x[:7], gate_up, down, indices, weights),
        (x[:, :32], gate_up, down, indices, weights),
        (x, gate_up[:, :41], down, indices, weights),
        (x, gate_up[:5], down, indices, weights),
        (x, gate_up, down[:, :32], indices, weights),
        (x, gate_up, down, indices[:, 0], weights[:, 0]),
        (x, gate_up, down, indices + 1, weights),
        (x, gate_up, down, indices - 1, weights),
    ):
        with pytest.raises(AssertionError):
            experts(wrong[0].clone().requires_grad_(), *wrong[1:])


def test_one_token_and_one_expert() -> None:
    """The smallest batches of all."""
    check(experts, *make_experts(1))
    check(experts, *make_experts(5, experts=1, chosen=1))
    check(token_logprobs, normal(1, 1), normal(1, 1, seed=1), torch.zeros(1, dtype=torch.int64))
    check(route, normal(1, 2), normal(2, seed=1), 1, 1, 1, False, 2.5)


def test_no_tokens_give_gradients_of_zero() -> None:
    """An empty batch leaves every weight's gradient zero."""
    for an_op, args in (
        (rms_norm, (normal(0, 5), normal(5), 1e-6)),
        (experts, make_experts(0)),
        (token_logprobs, (normal(0, 5), normal(7, 5), torch.zeros(0, dtype=torch.int64))),
    ):
        _, gradients = differentiate(an_op, args)
        assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("saved", [0, 3 << 17, 1 << 28])
def test_chunks_and_what_is_saved_of_them_do_not_show(saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a chunk's logits are kept or computed again is bit for bit the same, and both are exact."""
    monkeypatch.setattr(gradients_loss, "CHUNK_BYTES", 1 << 17)
    args = LARGER["token_logprobs"]
    monkeypatch.setattr(gradients_loss, "SAVED_BYTES", saved)
    found = check(token_logprobs, *args)
    monkeypatch.setattr(gradients_loss, "SAVED_BYTES", 1 << 18)
    assert same(found, differentiate(token_logprobs, args))


def test_logprobs_are_the_same_with_and_without_gradients() -> None:
    """Scoring, training and training under a frozen head give the same bits."""
    hidden, weight, targets = LARGER["token_logprobs"]
    scored = token_logprobs(hidden, weight, targets)
    for fixed in ((), (0,), (1,)):
        assert torch.equal(differentiate(token_logprobs, (hidden, weight, targets), fixed)[0], scored)


def test_logprobs_of_extreme_logits() -> None:
    """Logits of hundreds neither overflow nor lose the gradient; NaN stays in its row."""
    hidden, weight = 300 * normal(6, 8), normal(50, 8, seed=1)
    check(token_logprobs, hidden, weight, torch.arange(6))
    hidden[2, 3] = torch.nan
    bad = token_logprobs(hidden, weight, torch.arange(6)).isnan()
    assert bad.tolist() == [row == 2 for row in range(6)]


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    """Native code would read past the row."""
    for target in (-100, 7):
        with pytest.raises(AssertionError, match="outside the vocabulary"):
            token_logprobs(normal(1, 3).requires_grad_(), normal(7, 3), torch.tensor([target]))


@pytest.mark.usefixtures("unwrapped")
@pytest.mark.parametrize("needs_grad", [False, True])
def test_log_probabilities_need_a_target_for_every_row(needs_grad: bool) -> None:
    """Native code would read past the targets, or rows of another width."""
    for hidden, width, targets in ((3000, 4, (2,)), (3, 4, (4,)), (3, 4, (3, 1)), (3, 5, (3,))):
        with pytest.raises(AssertionError, match="row"):
            rows = normal(hidden, 4).requires_grad_(needs_grad)
            token_logprobs(rows, normal(9, width), torch.zeros(targets, dtype=torch.int64))
    with pytest.raises(AssertionError, match="row"):
        token_logprobs(normal(3, 1, 4), normal(9, 4), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", TRAINED)
def test_the_default_dtype_does_not_matter(name: str) -> None:
    """Training in float32 has the same bits in a process whose new tensors are float64."""
    expected = differentiate(OPS[name], LARGER[name], CONSTANT.get(name, ()))
    frozen = differentiate(OPS[name], LARGER[name], (*CONSTANT.get(name, ()), 1))
    torch.set_default_dtype(torch.float64)
    try:
        assert same(differentiate(OPS[name], LARGER[name], CONSTANT.get(name, ())), expected)
        assert same(differentiate(OPS[name], LARGER[name], (*CONSTANT.get(name, ()), 1)), frozen)
        with torch.no_grad():
            scored = OPS[name](*LARGER[name])
    finally:
        torch.set_default_dtype(torch.float32)
    assert (scored[-1] if isinstance(scored, tuple) else scored).dtype == torch.float32


def test_a_second_backward_pass_gives_the_same() -> None:
    """Nothing that is saved is overwritten: with retain_graph the gradients are the same again."""
    for name in ("experts", "token_logprobs"):
        leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in LARGER[name]]
        loss = OPS[name](*leaves).square().sum()
        wanted = [x for x in leaves if x.requires_grad]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_swiglu_layer_matches_torch() -> None:
    """Norm, gate and head in one graph, as a model has them, against torch's own functions in float64."""
    x, scale, weight = normal(40, 24), normal(24, seed=1), normal(24, 24, seed=2)

    def ours(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        normed = rms_norm(x, scale, 1e-6)
        return x + silu_mul(functional.linear(normed, weight), normed)

    def theirs(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        normed = functional.rms_norm(x, (24,), scale, 1e-6)
        return x + functional.silu(functional.linear(normed, weight)) * normed

    found = differentiate(ours, (x, scale, weight))
    exact = differentiate(theirs, (x.double(), scale.double(), weight.double()))
    for actual, expected in zip([found[0], *found[1]], [exact[0], *exact[1]], strict=True):
        assert_near(actual, expected)
