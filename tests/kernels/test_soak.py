"""Random calls of the native bodies, each against its op's definition: any op, format, shape, instruction set and
number of threads. What lies beside an input is NaN, what lies beside an output or scratch must not change.

A call is fixed by its number, so one that fails can be made again alone: `call(number)`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE
from porcelet.kernels import OPS, Op, cpu
from porcelet.kernels.attention import Segments, attention_latent, attention_packed, attention_paged, cache_write
from porcelet.kernels.cpu.target import AtOnce
from porcelet.kernels.experts import PackedExperts, experts, route, route_softmax
from porcelet.kernels.linear import KINDS, PackedHeads, embedding, heads_linear, linear, take_rows
from porcelet.kernels.loss import token_logprobs
from porcelet.kernels.pointwise import add, rms_norm, rope, silu_mul
from porcelet.kernels.record import Tape
from porcelet.kernels.sample import allow, sample
from tests.kernels.cases import (
    EXPERTS_TOLERANCE,
    activations,
    fp8_weight,
    latent_case,
    offsets,
    packed_experts,
    packed_weight,
)
from tests.kernels.test_cpu import HERE, NO_COMPILER
from tests.kernels.test_float import on
from tests.kernels.test_gradients import CONSTANT, differentiate
from tests.kernels.test_ops import assert_close, key
from tests.kernels.test_paged import past

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

GUARD = 256  # bytes on either side of a buffer
Call = tuple[Op[..., Any], tuple[Any, ...]]
Make = Callable[[random.Random], Call]


def beside_nan(x: Tensor) -> Tensor:
    """The same values as a slice of wider rows, NaN but for them."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def size(draw: random.Random, most: int) -> int:
    """Small ones more often, and those beside a multiple of what vectors and blocks hold."""
    near = draw.choice((16, 32, 64, 128, 256)) + draw.randint(-1, 1)
    return min(most, draw.choice((1, draw.randint(1, 9), draw.randint(1, most), near)))


def tokens(draw: random.Random) -> int:
    return draw.choice((0, 1, 1, 2, draw.randint(3, 9), draw.randint(10, 100)))


def linear_call(draw: random.Random) -> Call:
    T, N, kind = tokens(draw), size(draw, 300), draw.choice(("float", "fp8", *KINDS))
    if isinstance(kind, type):
        K = 32 * draw.randint(1, 9)
        return linear, (beside_nan(activations(T, K)), packed_weight(N, K, kind))
    K = size(draw, 400)
    x = beside_nan(torch.randn(T, K))
    return linear, (x, fp8_weight(N, K) if kind == "fp8" else beside_nan(torch.randn(N, K)))


def heads_call(draw: random.Random) -> Call:
    T, heads, kind = tokens(draw), draw.randint(1, 6), draw.choice(("rows", "turned", *KINDS))
    if isinstance(kind, type):
        N, K = 16 * draw.randint(1, 5), 32 * draw.randint(1, 4)
        packed = torch.stack([packed_weight(N, K, kind).packed for _ in range(heads)])
        return heads_linear, (activations(T * heads, K).unflatten(0, (T, heads)), PackedHeads(packed, (heads, N, K)))
    N, K = size(draw, 200), size(draw, 100)
    stored = beside_nan(torch.randn((heads, K, N) if kind == "turned" else (heads, N, K)))
    return heads_linear, (beside_nan(torch.randn(T, heads, K)), stored.transpose(1, 2) if kind == "turned" else stored)


def experts_call(draw: random.Random) -> Call:
    T, E, kind = tokens(draw), draw.randint(1, 9), draw.choice(("float", "fp8", *KINDS))
    A = draw.randint(1, 4)
    D, F = (32 * draw.randint(1, 5) if isinstance(kind, type) else size(draw, 200) for _ in "DF")
    chosen = torch.randint(0, E, (T, A)), torch.randn(T, A)
    if isinstance(kind, type):
        return experts, (activations(T, D), packed_experts(E, 2, F, D, kind), packed_experts(E, 1, D, F, kind), *chosen)
    if kind == "fp8":
        return experts, (beside_nan(torch.randn(T, D)), fp8_weight(E, 2, F, D), fp8_weight(E, 1, D, F), *chosen)
    return experts, (beside_nan(torch.randn(T, D)), torch.randn(E, 2 * F, D), torch.randn(E, D, F), *chosen)


def route_call(draw: random.Random) -> Call:
    groups, members = draw.randint(1, 6), draw.randint(2, 6)
    kept = draw.randint(1, groups)
    logits, top_k = torch.randn(tokens(draw), groups * members), draw.randint(1, kept * members)
    if draw.random() < 0.5:
        return route_softmax, (logits, groups, kept, top_k, 16.0)
    return route, (logits, torch.randn(groups * members) * 0.1, groups, kept, top_k, draw.random() < 0.5, 2.5)


def pointwise_call(draw: random.Random) -> Call:
    T, W, heads = tokens(draw), size(draw, 600), draw.randint(1, 5)
    if draw.random() < 0.3:
        return rms_norm, (beside_nan(torch.randn(T, heads, W)), torch.randn(W), 1e-6)
    if draw.random() < 0.5:
        x, angles = beside_nan(torch.randn(T, heads, 2 * W)), torch.rand(2, T, W)
        return rope, (x, angles[0], angles[1], draw.random() < 0.5)
    return silu_mul, (beside_nan(torch.randn(T, W) * 4), beside_nan(torch.randn(T, W)))


def table_call(draw: random.Random) -> Call:
    N = size(draw, 100)
    index = torch.randint(0, N, (tokens(draw),))
    return embedding, (index, packed_weight(N, 32 * draw.randint(1, 6), draw.choice(KINDS)))


def paged_call(draw: random.Random) -> Call:
    kv_heads, width = draw.randint(1, 3), draw.randint(1, 40)
    shape = kv_heads * draw.randint(1, 4), kv_heads, width, draw.randint(1, width)
    new = tuple(draw.choice((1, 1, draw.randint(2, 8), draw.randint(9, 80))) for _ in range(draw.randint(1, 4)))
    lengths = tuple(count + draw.choice((0, draw.randint(0, 70), draw.randint(0, 400))) for count in new)
    q, k, v, cuts, lengths_, tables = past(lengths, new, shape, draw.choice((torch.float32, torch.float16)))
    for row, length in enumerate(lengths):  # what nobody may read
        rest = length % PAGE_SIZE
        if rest:
            k[tables[row, length // PAGE_SIZE], rest:] = v[tables[row, length // PAGE_SIZE], rest:] = torch.nan
    return attention_paged, (q, k, v, cuts, lengths_, tables, width**-0.5)


def latent_call(draw: random.Random) -> Call:
    new = tuple(draw.choice((1, draw.randint(2, 8), draw.randint(9, 80))) for _ in range(draw.randint(1, 4)))
    lengths = tuple(count + draw.choice((0, draw.randint(0, 70), draw.randint(0, 300))) for count in new)
    H, N, R, C, V = (draw.randint(1, most) for most in (5, 40, 20, 70, 40))
    is_packed = draw.choice((True, False))
    sizes = (H, 32 * -(-N // 32), R, 32 * -(-C // 32), V) if is_packed else (H, N, R, C, V)
    dtype = draw.choice((torch.float32, torch.float16))
    return attention_latent, latent_case(new, lengths, draw.randint(0, len(new)), dtype, sizes, is_packed)


def write_call(draw: random.Random) -> Call:
    pages, heads, width = draw.randint(1, 3), draw.randint(1, 3), size(draw, 70)
    slots = torch.randperm(pages * PAGE_SIZE)[: tokens(draw)]
    cache = torch.zeros(pages, PAGE_SIZE, heads, width, dtype=draw.choice((torch.float32, torch.float16)))
    return cache_write, (cache, beside_nan(torch.randn(len(slots), heads, width)), slots)


def packed_attention_call(draw: random.Random) -> Call:
    kv_heads, width = draw.randint(1, 3), draw.randint(1, 70)
    lengths = [draw.choice((0, draw.randint(1, 9), draw.randint(1, 150))) for _ in range(draw.randint(0, 5))]
    heads = kv_heads * draw.randint(1, 3), kv_heads, kv_heads
    q, k, v = (torch.randn(sum(lengths), h, w) for h, w in zip(heads, (width, width, width), strict=True))
    prefixes = [-1 if i == 0 else draw.choice((-1, 0)) for i in range(len(lengths))]
    return attention_packed, (q, k, v, Segments(tuple(offsets(*lengths).tolist()), tuple(prefixes)), width**-0.5)


def sample_call(draw: random.Random) -> Call:
    V, rows, draws = size(draw, 3000), draw.randint(1, 4), tokens(draw)
    columns = (
        torch.randint(0, rows, (draws,)),
        torch.rand(draws) * draw.choice((0.0, 1.0, 3.0)),
        torch.randint(0, 2 * V, (draws,)) * draw.choice((0, 1)),
        torch.rand(draws).clamp_min(0.01) if draw.random() < 0.5 else torch.ones(draws),
        torch.rand(draws) * draw.choice((0.0, 0.1)),
    )
    return sample, (torch.randn(rows, V) * 3, *columns, torch.rand(draws, dtype=torch.float64))


def allow_call(draw: random.Random) -> Call:
    rows, V = tokens(draw), size(draw, 500)
    return allow, (torch.randn(rows, V), torch.randint(0, 256, (rows, -(-V // 8)), dtype=torch.uint8))


def loss_call(draw: random.Random) -> Call:
    T, D, V = tokens(draw), size(draw, 60), size(draw, 300)
    return token_logprobs, (torch.randn(T, D), torch.randn(V, D), torch.randint(0, V, (T,)))


INFERENCE: tuple[Make, ...] = (
    linear_call,
    linear_call,
    heads_call,
    experts_call,
    route_call,
    pointwise_call,
    table_call,
    paged_call,
    paged_call,
    latent_call,
    write_call,
    packed_attention_call,
    sample_call,
    allow_call,
    loss_call,
)
TRAINING: tuple[Make, ...] = (experts_call, route_call, pointwise_call, packed_attention_call, loss_call)


def outcome(an_op: Op[..., Any], function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns or writes; of chosen experts their logits, as equal ones may take each other's place."""
    if an_op is cache_write:
        cache = args[0].clone()
        function(cache, *args[1:])
        return [cache]
    result = function(*args)
    if an_op in (route, route_softmax):
        return [args[0].gather(1, result[0]), result[1]]
    return list(result) if isinstance(result, tuple) else [result]


def assert_near(an_op: Op[..., Any], actual: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    """As `assert_close`, but that logarithms of probabilities may come out near zero from larger ones."""
    one = expected.new_ones(1) if an_op in (token_logprobs, sample) and expected.is_floating_point() else expected[:0]
    assert_close(
        torch.cat((actual.flatten(), one.flatten())), torch.cat((expected.flatten(), one.flatten())), tolerance
    )


def infer(draw: random.Random, isa: str, threads: int) -> None:
    an_op, args = draw.choice(INFERENCE)(draw)
    assert an_op.chosen(key(args, False)).startswith("cpu")
    with torch.inference_mode():
        actual = on(isa, lambda: outcome(an_op, an_op, args), threads)
        for one, expected in zip(actual, outcome(an_op, an_op.reference, args), strict=True):
            rounds_between = isinstance(args[1], PackedExperts) or an_op is attention_latent
            assert_near(an_op, one, expected, EXPERTS_TOLERANCE if rounds_between else 3e-5)


def train(draw: random.Random, isa: str, threads: int) -> None:
    an_op, args = draw.choice(TRAINING)(draw)
    if not isinstance(args[1], Tensor) or not len(args[0]):
        return
    assert an_op.chosen(key(args, True)).startswith("cpu")
    fixed = CONSTANT.get(an_op.name, ())
    out, gradients = on(isa, lambda: differentiate(an_op, args, fixed), threads)
    expected, expected_gradients = differentiate(an_op.reference, args, fixed)
    assert_near(an_op, out, expected)
    for one, exact in zip(gradients, expected_gradients, strict=True):
        assert (one is None) == (exact is None)
        assert one is None or (one - exact).abs().max() <= 1e-4 * (exact.abs().max() + 1)


def replay(draw: random.Random, isa: str, threads: int) -> None:
    """A recorded step of several ops, run for some rows, against the definitions."""
    capacity, D, V = draw.randint(1, 80), 32 * draw.randint(1, 4), size(draw, 90)
    table, norm = packed_weight(V, D), torch.randn(D)
    up = draw.choice((torch.randn(D, D), fp8_weight(D, D), *(packed_weight(D, D, kind) for kind in KINDS)))
    head = draw.choice((torch.randn(V, D), packed_weight(V, D)))
    index, rows = torch.randint(0, V, (capacity,)), torch.zeros(capacity, dtype=torch.int64)

    def step() -> Tensor:
        x = rms_norm(embedding(index, table), norm, 1e-6)
        x = add(x, silu_mul(linear(x, up), x))
        return linear(take_rows(x, rows), head)

    def definition(count: int, taken: int) -> Tensor:
        x = rms_norm.reference(embedding.reference(index[:count], table), norm, 1e-6)
        x = x + silu_mul.reference(linear.reference(x, up), x)
        return linear.reference(x[rows[:taken]], head)

    def recorded() -> Tensor:
        with Tape(cpu.new_program(), capacity, 1) as tape:
            out = step()
        for _ in range(2):
            index.random_(0, V)
            count = draw.randint(1, capacity)
            taken = draw.randint(0, count)
            rows[:taken] = torch.randint(0, count, (taken,))
            tape.program.run(count, taken, threads)
            # Where activations are rounded a last bit may become a step.
            assert_close(out[:taken].clone(), definition(count, taken), 2e-2)
        return out

    with torch.inference_mode():
        on(isa, recorded, threads)


def call(number: int) -> None:
    """Call number so and so."""
    draw = random.Random(number)
    torch.manual_seed(number)
    kind = draw.choice((infer, infer, infer, infer, train, replay))
    kind(draw, draw.choice(HERE), draw.choice((1, 2, 3)))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Gives every output and scratch of an eager call edges; a function that sees that they are as they were. The
    buffers begin as NaN, so that what is not written shows."""
    lent: list[tuple[Tensor, int]] = []

    def empty(self: AtOnce, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = math.prod(shape) * dtype.itemsize
        memory = torch.full((count + 2 * GUARD,), 0xFF, dtype=torch.uint8)
        lent.append((memory, count))
        return memory[GUARD : GUARD + count].view(dtype).view(shape)

    def check() -> None:
        for memory, count in lent:
            assert memory[:GUARD].eq(0xFF).all() and memory[GUARD + count :].eq(0xFF).all()
        lent.clear()

    monkeypatch.setattr(AtOnce, "empty", empty)
    yield check


def soak(numbers: range, check: Callable[[], None]) -> None:
    for number in numbers:
        try:
            call(number)
            check()
        except Exception as error:
            raise AssertionError(f"call {number}") from error


def test_three_hundred_random_calls(guarded: Callable[[], None]) -> None:
    """A second of them in every run."""
    soak(range(300), guarded)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_random_calls(guarded: Callable[[], None]) -> None:
    """Ten thousand others: half a minute."""
    soak(range(300, 10_300), guarded)


def test_the_soak_reaches_every_native_op() -> None:
    """No op with a native body is left out."""
    bodies = ((name, body.function.__module__) for name, an_op in OPS.items() for body in an_op.bodies)
    native = {name for name, module in bodies if module.startswith(cpu.__name__)}
    draw = random.Random(0)
    torch.manual_seed(0)
    assert len(native) > 10 and native <= {make(draw)[0].name for make in INFERENCE for _ in range(20)}
