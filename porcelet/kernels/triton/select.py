"""Choosing: experts for a token, and tokens from logits. Neither sorts, and neither asks the device for a number.

A gate is a row of scores in registers: groups are ranked by counting better ones, experts taken best first.

Drawing cuts without sorting. What top-k and top-p keep is all above some score and the first few at it, so the score is
searched for bit by bit on the numbers' own order: 32 passes over a row that count, or sum. Then the kept probabilities
are summed in the order of the vocabulary, in float64, up to the drawn one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PIECE = 2048  # logits at a time


# ---- gates ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["scale"])
def gate_kernel(
    logits,  # [T, E]
    bias,  # [E], of V3's gate
    indices,  # [T, A]
    weights,  # [T, A]
    scale,
    logits_row,
    E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,  # V3's gate, else V2's
    NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,  # padded
    MEMBERS: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    PER: tl.constexpr = E // NUM_GROUPS
    group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, MEMBERS)[None, :]
    expert = group * PER + member
    is_there = (group < NUM_GROUPS) & (member < PER)
    x = tl.load(logits + token * logits_row + expert, mask=is_there, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
        choice = scores + tl.load(bias + expert, mask=is_there, other=0.0)
    else:
        raised = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = raised / tl.sum(tl.sum(raised, 1), 0)
        choice = scores
    choice = tl.where(is_there, choice, float("-inf"))
    if NUM_GROUPS > 1:
        worth = tl.max(choice, 1)  # [GROUPS]
        if SIGMOID:  # a group's two best
            second = tl.where(member == tl.argmax(choice, 1)[:, None], float("-inf"), choice)
            worth += tl.max(second, 1)
        number = tl.arange(0, GROUPS)
        theirs, mine = worth[None, :], worth[:, None]
        is_better = (theirs > mine) | ((theirs == mine) & (number[None, :] < number[:, None]))
        rank = tl.sum(is_better.to(tl.int32), 1)
        choice = tl.where(rank[:, None] < TOPK_GROUP, choice, float("-inf"))
    flat, flat_scores = tl.reshape(choice, [GROUPS * MEMBERS]), tl.reshape(scores, [GROUPS * MEMBERS])
    place, slot = tl.arange(0, GROUPS * MEMBERS), tl.arange(0, CHOSEN)
    chosen, taken = tl.zeros([CHOSEN], tl.int32), tl.zeros([CHOSEN], tl.float32)
    left = place % MEMBERS < PER  # what has not been chosen
    for a in tl.static_range(TOP_K):
        best = tl.argmax(tl.where(left, flat, float("-inf")), 0)
        left = left & (place != best)
        chosen = tl.where(slot == a, best // MEMBERS * PER + best % MEMBERS, chosen)
        taken = tl.where(slot == a, tl.sum(tl.where(place == best, flat_scores, 0.0), 0), taken)
    if NORMALIZE:
        taken = taken / (tl.sum(taken, 0) + 1e-20)
    tl.store(indices + token * TOP_K + slot, chosen.to(tl.int64), mask=slot < TOP_K)
    tl.store(weights + token * TOP_K + slot, taken * scale, mask=slot < TOP_K)


def gate(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"] | None,
    num_groups: int,
    topk_group: int,
    top_k: int,
    scale: float,
    *,
    normalize: bool,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """The op `route`, or without a bias `route_softmax`. Equal scores: the lower number first."""
    T, E = logits.shape
    assert logits.stride(1) == 1 and E % num_groups == 0 and (bias is None or bias.dtype == torch.float32)
    indices = torch.empty(T, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(T, top_k, dtype=torch.float32, device=logits.device)
    if T:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            gate_kernel[T,](
                logits,
                logits if bias is None else bias,
                indices,
                weights,
                scale,
                logits.stride(0),
                E,
                num_groups,
                topk_group,
                top_k,
                SIGMOID=bias is not None,
                NORMALIZE=normalize,
                GROUPS=triton.next_power_of_2(num_groups),
                MEMBERS=triton.next_power_of_2(E // num_groups),
                CHOSEN=triton.next_power_of_2(top_k),
                num_warps=1 if E <= 64 else 4,
            )
    return indices, weights


# ---- drawing --------------------------------------------------------------------------------------------------------


@triton.jit
def draw_kernel(
    logits,  # [rows, V], float32
    rows,  # [B]
    temperature,  # [B]
    top_k,
    top_p,
    min_p,
    uniform,  # [B], float64
    tokens,  # [B]
    logprobs,  # [B]
    V,
    logits_row,
    PIECE: tl.constexpr,
):
    draw = tl.program_id(0)
    row = logits + tl.load(rows + draw).to(tl.int64) * logits_row
    heat = tl.load(temperature + draw).to(tl.float64)
    limit, mass = tl.load(top_k + draw), tl.load(top_p + draw).to(tl.float64)
    least = tl.load(min_p + draw).to(tl.float64)
    is_greedy = heat == 0.0
    heat = tl.where(is_greedy, 1.0, heat)

    highest, best = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.int32)
    for start in range(0, V, PIECE):
        columns = start + tl.arange(0, PIECE)
        values = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        own = tl.max(values, 0)
        best = tl.where(own > highest, start + tl.argmax(values, 0), best)
        highest = tl.maximum(highest, own)
    top = highest.to(tl.float64)
    # min-p: probability at least min_p of the best one's.
    floor = tl.where((least > 0.0) & (is_greedy == 0), top + heat * tl.log(tl.maximum(least, 1e-300)), float("-inf"))

    whole = tl.zeros([], tl.float64)  # no number, if any logit is none
    for start in range(0, V, PIECE):
        columns = start + tl.arange(0, PIECE)
        values = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float64)
        whole += tl.sum(tl.where(values < floor, 0.0, tl.exp((values - top) / heat)), 0)
    total, cut, ties = whole, tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.int32) + V
    if (is_greedy == 0) & (limit > 0) & (limit < V):
        cut, ties = _cut(row, V, floor, top, heat, limit.to(tl.float64), False, PIECE)
        total = _kept_mass(row, V, floor, cut, ties, top, heat, PIECE)
    if (is_greedy == 0) & (mass < 1.0):
        cut, ties = _cut_within(row, V, floor, cut, ties, top, heat, mass * total, PIECE)
        total = _kept_mass(row, V, floor, cut, ties, top, heat, PIECE)

    # The first token whose cumulative probability exceeds u · total; the last one that can be drawn at all, if none.
    wanted = tl.load(uniform + draw).to(tl.float64) * total
    before, seen = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
    found, last = tl.zeros([], tl.int32) + V, tl.zeros([], tl.int32)
    for start in range(0, V, PIECE):
        columns = start + tl.arange(0, PIECE)
        values = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        is_tie = values == cut
        number = seen + tl.cumsum(is_tie.to(tl.int32), 0)
        kept = (values.to(tl.float64) >= floor) & ((values > cut) | (is_tie & (number <= ties)))
        shares = tl.where(kept & (columns < V), tl.exp((values.to(tl.float64) - top) / heat), 0.0)
        cumulative = before + tl.cumsum(shares, 0)
        found = tl.minimum(found, tl.min(tl.where((cumulative > wanted) & (shares > 0), columns, V), 0))
        last = tl.maximum(last, tl.max(tl.where(shares > 0, columns, 0), 0))
        before += tl.sum(shares, 0)
        seen += tl.sum(is_tie.to(tl.int32), 0)
    token = tl.where(is_greedy, best, tl.minimum(found, last))
    chosen = tl.load(row + token).to(tl.float64)
    tl.store(tokens + draw, token.to(tl.int64))
    tl.store(logprobs + draw, ((chosen - top) / heat - tl.log(total) + (whole - whole)).to(tl.float32))


@triton.jit
def _ordered(values):
    """Integers in the order of the float32 numbers."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value_of(ordered):
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _cut(row, V, floor, top, heat, wanted, MASS: tl.constexpr, PIECE: tl.constexpr):
    """The score at which what is above it comes to less than `wanted` (a number of tokens, or where MASS their weight),
    and with it to no less; and how many of those at it are kept."""
    low, high = tl.zeros([], tl.int64) - 2139095041, tl.zeros([], tl.int64) + 2139095040  # of the two infinities
    while low < high:  # the least score above which there is less than wanted
        middle = (low + high) >> 1
        if _above(row, V, floor, middle.to(tl.int32), top, heat, MASS, PIECE) < wanted:
            high = middle
        else:
            low = middle + 1
    score = low.to(tl.int32)
    above = _above(row, V, floor, score, top, heat, MASS, PIECE)
    value = _value_of(score)
    weight = tl.zeros([], tl.float64) + 1.0
    if MASS:
        weight = tl.exp((value.to(tl.float64) - top) / heat)
    ties = tl.ceil((wanted - above) / tl.maximum(weight, 1e-300))
    return value, tl.minimum(ties, 2147483647.0).to(tl.int32)


@triton.jit
def _cut_within(row, V, floor, cut, ties, top, heat, wanted, PIECE: tl.constexpr):
    """The same by weight, of what an earlier cut has left."""
    value, count = _cut(row, V, floor, top, heat, wanted, True, PIECE)
    is_higher = value > cut
    count = tl.maximum(count, 1)
    return tl.where(is_higher, value, cut), tl.where(is_higher, count, tl.minimum(count, ties))


@triton.jit
def _above(row, V, floor, score, top, heat, MASS: tl.constexpr, PIECE: tl.constexpr):
    """How many logits are above a score and not below the floor, or what they weigh."""
    total = tl.zeros([], tl.float64)
    for start in range(0, V, PIECE):
        columns = start + tl.arange(0, PIECE)
        values = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        wide = values.to(tl.float64)
        is_above = (_ordered(values) > score) & (wide >= floor) & (columns < V)
        if MASS:
            total += tl.sum(tl.where(is_above, tl.exp((wide - top) / heat), 0.0), 0)
        else:
            total += tl.sum(is_above.to(tl.float64), 0)
    return total


@triton.jit
def _kept_mass(row, V, floor, cut, ties, top, heat, PIECE: tl.constexpr):
    """What all weigh that a cut keeps."""
    total, seen = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
    for start in range(0, V, PIECE):
        columns = start + tl.arange(0, PIECE)
        values = tl.load(row + columns, mask=columns < V, other=float("-inf"))
        is_tie = values == cut
        number = seen + tl.cumsum(is_tie.to(tl.int32), 0)
        kept = (values.to(tl.float64) >= floor) & ((values > cut) | (is_tie & (number <= ties))) & (columns < V)
        total += tl.sum(tl.where(kept, tl.exp((values.to(tl.float64) - top) / heat), 0.0), 0)
        seen += tl.sum(is_tie.to(tl.int32), 0)
    return total


def draw(
    logits: Float[Tensor, "rows V"],
    rows: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"],
    top_k: Int[Tensor, "B"],
    top_p: Float[Tensor, "B"],
    min_p: Float[Tensor, "B"],
    uniform: Float[Tensor, "B"],
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """The op `sample`, for float32 logits."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    if len(rows):
        columns = (one.contiguous() for one in (rows, temperature, top_k, top_p, min_p, uniform))
        with torch.cuda.device_of(logits):
            draw_kernel[len(rows),](
                logits, *columns, tokens, logprobs, logits.shape[1], logits.stride(0), PIECE=PIECE, num_warps=8
            )
    return tokens, logprobs
