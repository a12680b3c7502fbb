"""The native float32 matrix bodies: against float64, and bit for bit against themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from porcelet.kernels import Key, cpu
from porcelet.kernels.experts import experts, route, route_softmax
from porcelet.kernels.linear import linear
from tests.kernels.test_cpu import HERE, NO_COMPILER

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

WIDTHS = (1, 3, 4, 15, 16, 17, 31, 33, 64)
TOKENS = (1, 2, 3, 5, 6, 7, 13, 64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(isa: str, function: Callable[[], Tensor], threads: int = 1) -> Tensor:
    """What a function gives on one instruction set and some threads."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORCELET_ISA", isa)
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)


def assert_within_rounding(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """The error bound of a sum of `terms` rounded products whose magnitudes add up to `magnitude`."""
    assert actual.shape == exact.shape
    bound = (terms + 2) * 2.0**-24 * magnitude + 1e-37
    assert ((actual.double() - exact).abs() <= bound).all()


def heads(x: Tensor, weight: Tensor, mixed: bool) -> Tensor:
    """`heads_linear` by a weight [H, outputs, inputs], or if mixed [H, inputs, outputs]."""
    return cpu.heads_linear_float(x, weight.transpose(1, 2) if mixed else weight)


def make_experts(T: int, D: int = 33, F: int = 21, E: int = 6, A: int = 3) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(T)
    indices = torch.rand(T, E, generator=random).topk(A).indices if T else torch.zeros(0, A, dtype=torch.int64)
    return normal(T, D), normal(E, 2 * F, D, seed=1), normal(E, D, F, seed=2), indices, normal(T, A, seed=3)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("K", WIDTHS)
def test_linear_is_within_rounding_of_the_exact_product(isa: str, K: int) -> None:
    """Every width and height, with all tails, is as near to float64 as a sum of K rounded products must be."""
    for N, T in itertools.product((1, 2, 3, 4, 5, 130), (1, 4, 7)):
        x, weight = normal(T, K), normal(N, K, seed=1)
        out = on(isa, lambda x=x, weight=weight: cpu.linear_float(x, weight))
        exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        assert_within_rounding(out, exact, magnitude, K)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 64), st.integers(1, 70), st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_linear_reads_slices(T: int, N: int, K: int, before: int, after: int) -> None:
    """Rows of wider tensors give the bits of their copies, whatever lies beside them."""
    x, weight = (torch.full((rows, before + K + after), torch.nan) for rows in (T, N))
    x[:, before : before + K], weight[:, before : before + K] = normal(T, K), normal(N, K, seed=1)
    x, weight = x[:, before : before + K], weight[:, before : before + K]
    out = cpu.linear_float(x, weight)
    assert torch.equal(out, cpu.linear_float(x.contiguous(), weight.contiguous()))
    assert_within_rounding(out, x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T, K)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("N", "K"), [(130, 67), (37, 576), (700, 96)])
def test_a_row_does_not_depend_on_its_batch(isa: str, N: int, K: int) -> None:
    """A token alone, in any batch, at any place in it and on any number of threads has the same bits."""
    x, weight = normal(64, K), normal(N, K, seed=1)
    alone = torch.cat([on(isa, lambda t=t: cpu.linear_float(x[t : t + 1], weight)) for t in range(64)])
    for T, threads in itertools.product(TOKENS, (1, 2, 3)):
        for rows in (slice(T), slice(64 - T, 64)):
            out = on(isa, lambda rows=rows: cpu.linear_float(x[rows], weight), threads)
            assert torch.equal(out, alone[rows]), (T, threads)


@pytest.mark.parametrize("isa", HERE)
def test_an_output_does_not_depend_on_its_neighbours(isa: str) -> None:
    """A row of the weight gives the same bits wherever it stands."""
    x, weight = normal(5, 100), normal(41, 100, seed=1)
    whole = on(isa, lambda: cpu.linear_float(x, weight))
    for first, count in itertools.product((0, 1, 6, 37), (1, 2, 3, 4)):
        part = on(isa, lambda first=first, count=count: cpu.linear_float(x, weight[first : first + count]))
        assert torch.equal(part, whole[:, first : first + count])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_go_where_torch_sends_them(isa: str, bad: float) -> None:
    """A bad activation or weight, in the body or the tail of a row, spoils its token or output alone, as in torch."""
    for column in (0, 16, 36):
        x, weight = normal(9, 37), normal(11, 37, seed=1)
        x[4, column] = weight[7, column] = bad
        weight[2, column] = 0
        out = on(isa, lambda x=x, weight=weight: cpu.linear_float(x, weight))
        torch.testing.assert_close(out, functional.linear(x, weight), equal_nan=True)
        assert out[4].isfinite().logical_not().all() and out[torch.arange(9) != 4][:, :7].isfinite().all()


def test_linear_is_chosen_for_float_and_never_for_training() -> None:
    """`linear` runs natively on float32 weights without gradients, in batches of any size to the same bits."""
    for kind in ("Tensor", "Parameter"):
        assert linear.chosen(Key("cpu", kind, torch.float32, False)) == "cpu_float"
        assert linear.chosen(Key("cpu", kind, torch.float32, True)) == "reference"
        assert linear.chosen(Key("cpu", kind, torch.bfloat16, False)) == "reference"
    x, weight = normal(300, 96), normal(48, 96, seed=1)
    whole = linear(x, weight)
    torch.testing.assert_close(whole, functional.linear(x, weight))
    assert all(torch.equal(linear(x[t : t + 1], weight), whole[t : t + 1]) for t in range(300))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (5, 17), (16, 33), (24, 130), (37, 257)])
def test_heads_are_within_rounding(isa: str, mixed: bool, inputs: int, outputs: int) -> None:
    """Both forms of MLA's products, between slices of wider tensors, are near float64."""
    for T in (0, 1, 4, 7):
        x = normal(T, 3, inputs + 2)[..., :inputs]
        shape = (3, inputs + 4, outputs) if mixed else (3, outputs + 4, inputs)
        weight = normal(*shape, seed=1)[:, 1:-3]  # a slice of kv_b_proj
        out = on(isa, lambda x=x, weight=weight: heads(x, weight, mixed))
        product = "thn,hnc->thc" if mixed else "thc,hvc->thv"
        exact = torch.einsum(product, x.double(), weight.double())
        magnitude = torch.einsum(product, x.double().abs(), weight.double().abs())
        assert_within_rounding(out, exact, magnitude, inputs)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("mixed", [False, True])
def test_heads_do_not_depend_on_the_batch(isa: str, mixed: bool) -> None:
    """A token has the same bits in any batch and on any number of threads."""
    x, weight = normal(13, 5, 40), normal(5, 40, 150, seed=1) if mixed else normal(5, 150, 40, seed=1)
    alone = torch.cat([on(isa, lambda t=t: heads(x[t : t + 1], weight, mixed)) for t in range(13)])
    for T, threads in itertools.product((2, 6, 7, 13), (1, 2, 3)):
        assert torch.equal(on(isa, lambda T=T: heads(x[-T:], weight, mixed), threads), alone[-T:])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("D", "F"), [(1, 1), (33, 21), (16, 64), (70, 150)])
def test_experts_are_near_the_exact_sum(isa: str, D: int, F: int) -> None:
    """Odd widths, several pieces and an empty batch agree with the definition in float64."""
    for T in (0, 1, 7, 20):
        x, gate_up, down, indices, weights = make_experts(T, D, F)
        out = on(isa, lambda args=(x, gate_up, down, indices, weights): cpu.experts_float(*args))
        exact = experts.reference(x.double(), gate_up.double(), down.double(), indices, weights.double())
        assert out.shape == exact.shape and out.dtype == torch.float32
        assert not T or (out - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("isa", HERE)
def test_experts_of_a_token_do_not_depend_on_the_batch(isa: str) -> None:
    """A token has the same bits alone, in any batch and on any number of threads."""
    x, gate_up, down, indices, weights = make_experts(40, 48, 150)
    parts = [(x[t : t + 1], gate_up, down, indices[t : t + 1], weights[t : t + 1]) for t in range(40)]
    alone = torch.cat([on(isa, lambda args=args: cpu.experts_float(*args)) for args in parts])
    for T, threads in itertools.product((2, 7, 40), (1, 2, 3)):
        args = x[-T:], gate_up, down, indices[-T:], weights[-T:]
        assert torch.equal(on(isa, lambda args=args: cpu.experts_float(*args), threads), alone[-T:])


def test_experts_propagate_nan_to_their_token_only() -> None:
    """A bad activation spoils its token; a bad expert those that chose it."""
    x, gate_up, down, indices, weights = make_experts(9)
    clean = cpu.experts_float(x, gate_up, down, indices, weights)
    x[4, 2], gate_up[5] = torch.nan, torch.nan
    spoilt = (torch.arange(9) == 4) | (indices == 5).any(-1)
    out = cpu.experts_float(x, gate_up, down, indices, weights)
    assert out[spoilt].isnan().all() and torch.equal(out[~spoilt], clean[~spoilt])


def test_a_token_may_choose_an_expert_twice() -> None:
    """Equal choices of a token add up, as in the definition."""
    x, gate_up, down, _, weights = make_experts(3)
    indices = torch.tensor([[2, 2, 2], [0, 2, 0], [5, 0, 5]])
    args = x, gate_up, down, indices, weights
    expected = experts.reference(*args)
    assert (cpu.experts_float(*args) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_expert_that_is_not_there_asserts() -> None:
    """An index outside the stack never reaches an address."""
    x, gate_up, down, indices, weights = make_experts(2)
    for bad in (-1, 6):
        indices[1, 1] = bad
        with pytest.raises(AssertionError):
            cpu.experts_float(x, gate_up, down, indices, weights)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_routes_equal_their_definitions(data: st.DataObject) -> None:
    """Both gates choose the definition's experts in its order, for every number of groups."""
    groups, members = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 9))
    kept = data.draw(st.integers(1, groups))
    chosen, T = data.draw(st.integers(1, kept * members)), data.draw(st.integers(0, 6))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    logits, bias = (torch.randn(*shape, groups * members, generator=random) for shape in ((T,), ()))
    normalize = data.draw(st.booleans())
    for gate, args in (
        (route, (logits, bias, groups, kept, chosen, normalize, 2.5)),
        (route_softmax, (logits, groups, kept, chosen, 16.0)),
    ):
        indices, weights = gate(*args)
        expected_indices, expected_weights = gate.reference(*args)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(weights, expected_weights)


def test_ties_go_to_the_lower_index() -> None:
    """Equal scores, of experts and of groups, are resolved by index."""
    logits = torch.zeros(1, 12)
    assert route_softmax(logits, 1, 1, 4, 1.0)[0].tolist() == [[0, 1, 2, 3]]
    assert route_softmax(logits, 4, 2, 5, 1.0)[0].tolist() == [[0, 1, 2, 3, 4]]
    logits[0, 9:] = 1
    assert route(logits, torch.zeros(12), 4, 2, 5, True, 1.0)[0].tolist() == [[9, 10, 11, 0, 1]]


def test_a_nan_logit_counts_as_the_best() -> None:
    """As in torch.topk; its token's weights are NaN, the others keep theirs."""
    logits = normal(3, 16)
    clean = route(logits, torch.zeros(16), 4, 2, 3, True, 1.0)
    logits[1, 6] = torch.nan
    indices, weights = route(logits, torch.zeros(16), 4, 2, 3, True, 1.0)
    assert indices[1, 0] == 6 and weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], clean[1][[0, 2]]) and torch.equal(indices[[0, 2]], clean[0][[0, 2]])
    assert route_softmax(logits, 4, 2, 3, 1.0)[1].isnan().any(-1).tolist() == [False, True, False]


def test_routes_do_not_depend_on_threads() -> None:
    """One, two and three threads choose alike, bit for bit."""
    logits, bias = normal(64, 256), normal(256, seed=1) * 0.1
    results = [
        on(HERE[0], lambda: torch.cat(route(logits, bias, 8, 4, 8, True, 2.5)), threads) for threads in (1, 2, 3)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
