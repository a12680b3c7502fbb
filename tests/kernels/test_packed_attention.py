"""Attention of packed batches: every body against float64, and what segments may and may not see of one another."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from porcelet.kernels import Key, cpu
from porcelet.kernels.attention import Segments, attention_bucketed, attention_packed
from tests.kernels.test_cpu import HERE, NO_COMPILER
from tests.kernels.test_float import normal, on

NATIVE = cpu.available() or not NO_COMPILER
needs_native = pytest.mark.skipif(not NATIVE, reason="no compiler, hence no native module")
Attend = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
BODIES: list[Attend] = [attention_bucketed, *([cpu.attention_packed_float] if NATIVE else [])]

TREE = Segments((0, 70, 75, 75, 205, 300, 301, 331, 331, 340), (-1, 0, 0, 0, -1, 4, 4, -1, 7))
WIDTHS = [(4, 4, 24, 16), (6, 2, 16, 16), (2, 1, 33, 7), (1, 1, 192, 128)]  # heads, key heads, of keys, of values


def leaves(T: int, heads: int, kv_heads: int, width: int, value: int, seed: int = 0) -> list[Tensor]:
    shapes = (T, heads, width), (T, kv_heads, width), (T, kv_heads, value)
    return [normal(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]


def results(attend: Attend, inputs: list[Tensor], segments: Segments, scale: float = 0.3) -> list[Tensor]:
    """The output, and the gradients of a sum of it with fixed factors."""
    out = attend(inputs[0], inputs[1], inputs[2], segments, scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, normal(*out.shape, seed=9).to(out.dtype))]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_near(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, exact in zip(actual, expected, strict=True):
        assert one.shape == exact.shape
        scale = exact.abs().amax() if exact.numel() else 0
        assert ((one - exact).abs() <= tolerance * (scale + 1)).all()


def assert_exact(attend: Attend, inputs: list[Tensor], segments: Segments, tolerance: float = 1e-5) -> None:
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    assert_near(results(attend, inputs, segments), results(attention_packed.reference, doubles, segments), tolerance)


@st.composite
def trees(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and prefixes of segments in any order, some behind earlier ones."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 200)), min_size=1, max_size=7).filter(any))
    prefixes: list[int] = []
    for b in range(len(lengths)):
        roots = [p for p in range(b) if prefixes[p] < 0]
        prefixes.append(draw(st.sampled_from([-1, *roots])))
    return (0, *accumulate(lengths)), tuple(prefixes)


@settings(max_examples=25, deadline=None)
@given(trees(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.sampled_from(HERE))
def test_any_tree_of_segments(
    tree: tuple[tuple[int, ...], tuple[int, ...]], group: int, kv_heads: int, width: int, value: int, isa: str
) -> None:
    """Values and gradients of every body equal the loop's in float64, for all trees, groups and widths."""
    segments = Segments(*tree)
    inputs = leaves(segments.offsets[-1], group * kv_heads, kv_heads, width, min(value, width))
    for attend in BODIES:
        on(isa, lambda attend=attend: assert_exact(attend, inputs, segments))


@needs_native
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("widths", WIDTHS)
def test_native_has_the_same_bits_on_any_threads(isa: str, widths: tuple[int, int, int, int]) -> None:
    """One, two and three threads, and the same once more, agree bit for bit; and with float64 nearly."""
    inputs = leaves(TREE.offsets[-1], *widths)
    runs = [
        on(isa, lambda: flat(results(cpu.attention_packed_float, inputs, TREE)), threads) for threads in (1, 2, 3, 1)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)
    on(isa, lambda: assert_exact(cpu.attention_packed_float, inputs, TREE))


@needs_native
@pytest.mark.parametrize("isa", HERE)
def test_native_does_not_depend_on_the_batch(isa: str) -> None:
    """A segment alone has the bits that it has among others."""
    inputs = leaves(TREE.offsets[-1], 4, 2, 20, 20)
    whole = on(isa, lambda: cpu.attention_packed_float(*inputs, TREE, 0.3))
    alone = [tensor[205:331] for tensor in inputs]
    segments = Segments((0, 95, 96, 126), (-1, 0, 0))
    assert torch.equal(on(isa, lambda: cpu.attention_packed_float(*alone, segments, 0.3)), whole[205:331])


@needs_native
def test_native_reads_any_strides() -> None:
    """Slices of wider tensors, and gradients that are views, give the bits of their copies."""
    wide = normal(90, 4, 50)
    views = [wide[..., :20].requires_grad_(), wide[:, ::2, 20:40].requires_grad_(), wide[:, ::2, 40:].requires_grad_()]
    copies = [view.detach().clone().requires_grad_() for view in views]
    segments = Segments((0, 30, 60, 90), (-1, 0, -1))
    gradient = normal(4, 90, 10).transpose(0, 1)
    outs = [cpu.attention_packed_float(*inputs, segments, 0.3) for inputs in (views, copies)]
    assert torch.equal(*outs)
    gradients = [
        torch.autograd.grad(out, inputs, given)
        for out, inputs, given in zip(outs, (views, copies), (gradient, gradient.contiguous()), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    spread = torch.autograd.grad(cpu.attention_packed_float(*copies, segments, 0.3).sum(), copies)  # strides of 0
    assert_near(list(spread), list(torch.autograd.grad(attention_bucketed(*copies, segments, 0.3).sum(), copies)))


@pytest.mark.parametrize("attend", BODIES)
def test_nothing_sees_the_future_or_other_segments(attend: Attend) -> None:
    """A change of one token alters no output before it and none of segments that do not read it, by not a bit."""
    inputs = leaves(TREE.offsets[-1], 2, 2, 16, 16)
    before = attend(*inputs, TREE, 0.3)
    for row, readers in ((40, [(40, 205)]), (72, [(72, 75)]), (130, [(130, 205)]), (300, [(300, 301)])):
        changed = [tensor.detach().clone() for tensor in inputs]
        for tensor in changed:
            tensor[row] += 1
        differs = (attend(*changed, TREE, 0.3) != before).flatten(1).any(1)
        allowed = torch.zeros_like(differs)
        for first, last in readers:
            allowed[first:last] = True
        assert differs[row] and not differs[~allowed].any()


@pytest.mark.parametrize("attend", BODIES)
def test_a_shared_prefix_is_its_copies_in_one(attend: Attend) -> None:
    """Sharing changes no output; the gradient of shared rows is the sum over the copies."""
    prompt, answers = 50, (20, 70, 1)
    shared = Segments(Segments.of(prompt, *answers).offsets, (-1, 0, 0, 0))
    inputs = leaves(shared.offsets[-1], 4, 2, 24, 16)
    starts = shared.offsets[1:-1]
    rows = torch.cat(
        [torch.cat((torch.arange(prompt), torch.arange(a, a + n))) for a, n in zip(starts, answers, strict=True)]
    )
    apart = Segments.of(*(prompt + answer for answer in answers))
    copies = [tensor.detach()[rows].requires_grad_() for tensor in inputs]
    out, separate = attend(*inputs, shared, 0.3), attend(*copies, apart, 0.3)
    assert_near([separate], [out[rows]])
    gradient = normal(*out.shape, seed=9)
    # A prompt's row counts once, so its copies share its gradient.
    counts = torch.zeros(len(out)).index_add(0, rows, torch.ones(len(rows)))
    given = torch.autograd.grad(separate, copies, (gradient / counts[:, None, None])[rows])
    summed = [torch.zeros_like(tensor).index_add(0, rows, one) for tensor, one in zip(inputs, given, strict=True)]
    assert_near(list(torch.autograd.grad(out, inputs, gradient)), summed)


@pytest.mark.parametrize("attend", BODIES)
def test_bodies_repeat_themselves_under_deterministic_algorithms(attend: Attend) -> None:
    """The trainer's mode raises nothing and changes nothing from one run to the next."""
    inputs = leaves(TREE.offsets[-1], 4, 2, 24, 16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (flat(results(attend, inputs, TREE)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores of some hundreds, falling and rising along the keys, keep the softmax's sums."""
    T = 150
    for sign in (-1, 1):
        q, k = torch.ones(T, 1, 4), (sign * torch.arange(T, dtype=torch.float32))[:, None, None].expand(T, 1, 4).clone()
        inputs = [q.requires_grad_(), k.requires_grad_(), normal(T, 1, 4).requires_grad_()]
        for attend in BODIES:
            assert_exact(attend, inputs, Segments.of(T), 1e-4)  # scores of 180 are rounded to 1e-5


def test_segments_are_in_order_and_cover_the_rows() -> None:
    """Offsets that fall are no segments, and native code is given none that end before or behind the last row."""
    for offsets in ((0, 20, 10), (0, -1, 5), (1, 5, 9)):
        with pytest.raises(AssertionError):
            Segments(offsets, (-1, -1))
    if NATIVE:
        for T in (8, 10):
            with pytest.raises(AssertionError):
                cpu.attention_packed_float(*leaves(T, 1, 1, 4, 4), Segments.of(4, 5), 0.3)


def test_buckets_pad_a_quarter_at_most() -> None:
    """Lengths of one bucket differ by a quarter or seven rows; every row lies at its place."""
    segments = Segments.of(*range(1, 300, 3))
    plan = segments.plan(torch.device("cpu"))
    assert plan is segments.plan(torch.device("cpu"))
    read = torch.cat([bucket.queries.flatten() for bucket in plan.buckets])
    assert torch.equal(read[plan.places], torch.arange(segments.offsets[-1]))
    for bucket in plan.buckets:
        lengths = [segments.lengths[segments.offsets.index(int(row[0]))] for row in bucket.queries]
        assert max(lengths) - min(lengths) <= max(7, max(lengths) // 4)


@needs_native
def test_native_serves_float32_with_and_without_gradients() -> None:
    """Training and scoring take the same body, so that both give the same numbers."""
    for needs_grad in (False, True):
        assert attention_packed.chosen(Key("cpu", "Tensor", torch.float32, needs_grad)) == "cpu_packed"
        assert attention_packed.chosen(Key("cpu", "Tensor", torch.bfloat16, needs_grad)) == "bucketed"
