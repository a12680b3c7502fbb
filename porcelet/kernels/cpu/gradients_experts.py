"""Routed experts with a backward pass, for training in float32.

Assignments, one a token and chosen expert, are sorted by expert. Then every expert's are one contiguous piece, and a
layer is two products a piece forward and four backward, by torch, into slices of a few tall buffers. The routing weight
is folded into the activation, hence the rows before `down` carry it:

    forward    out = Σ down · h      h = w · silu(gate) · up
    backward   dh = downᵀ · dout     ddown = dout · hᵀ      dw = Σ dh · h / w      dx = Σ gate_upᵀ · dgate_up

Sums over a token's experts gather its rows in the order of its choices, so nothing is scattered. The backward pass
makes `x` sorted and `h` again; gate and up are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from porcelet.kernels.cpu.gradients import trains_plain
from porcelet.kernels.cpu.target import Target, at_once, available, rows_of
from porcelet.kernels.experts import ExpertWeight, experts

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Sorted:
    """Assignments in order of their expert: `pieces` lists (expert, first, end) of the experts that have any, `order`
    [T·A] the assignments, `tokens` [T·A] their tokens, `place` [T, A] where an assignment went."""

    pieces: list[tuple[int, int, int]]
    order: Int[Tensor, "TA"]
    tokens: Int[Tensor, "TA"]
    place: Int[Tensor, "T A"]

    def take(self, x: Float[Tensor, "T W"]) -> Float[Tensor, "TA W"]:
        """Every assignment's token's row."""
        return at_once(_take, len(self.tokens), len(self.tokens) * x.shape[1], x, self.tokens)

    def add_up(self, rows: Float[Tensor, "TA W"]) -> Float[Tensor, "T W"]:
        """The sum of every token's rows, zero for tokens without any."""
        if not len(rows):
            return rows.new_zeros(len(self.place), rows.shape[1])
        return at_once(_add_up, len(self.place), rows.numel(), rows, self.place)


class _Experts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        by_expert = _sort(indices, len(gate_up))
        rows = by_expert.take(x)
        products = rows.new_empty(len(rows), gate_up.shape[1])
        for expert, first, end in by_expert.pieces:
            torch.mm(rows[first:end], gate_up[expert].T, out=products[first:end])
        hidden = _activate(products, weights, by_expert.order)
        for expert, first, end in by_expert.pieces:
            torch.mm(hidden[first:end], down[expert].T, out=rows[first:end])
        ctx.save_for_backward(x, gate_up, down, weights, products)
        ctx.by_expert = by_expert
        return by_expert.add_up(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, products = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        by_expert = ctx.by_expert
        rows = by_expert.take(grad)
        hidden = rows.new_empty(len(rows), down.shape[2])
        for expert, first, end in by_expert.pieces:
            torch.mm(rows[first:end], down[expert], out=hidden[first:end])
        dproducts, dweights = _activate_backward(products, weights, by_expert.order, hidden)
        ddown = _outer(down, by_expert, rows, hidden) if needs_down else None
        dgate_up = _outer(gate_up, by_expert, dproducts, by_expert.take(x)) if needs_gate_up else None
        dx = None
        if needs_x:
            for expert, first, end in by_expert.pieces:
                torch.mm(dproducts[first:end], gate_up[expert], out=rows[first:end])
            dx = by_expert.add_up(rows)
        return dx, dgate_up, ddown, None, dweights


def _outer(stack: Tensor, by_expert: Sorted, left: Tensor, right: Tensor) -> Tensor:
    """Every expert's leftᵀ · right, of the stack's shape; zero for an expert without tokens."""
    out = torch.empty_like(stack, memory_format=torch.contiguous_format)
    reached = {expert for expert, _, _ in by_expert.pieces}
    for expert in range(len(stack)):
        if expert not in reached:
            out[expert].zero_()
    for expert, first, end in by_expert.pieces:
        torch.mm(left[first:end].T, right[first:end], out=out[expert])
    return out


def _sort(indices: Int[Tensor, "T A"], num_experts: int) -> Sorted:
    assert indices.dtype == torch.int64 and (not indices.numel() or 0 <= indices.min() <= indices.max() < num_experts)
    starts, count = torch.empty(num_experts + 1, dtype=torch.int64), indices.numel()
    order, tokens = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    indices = indices.contiguous()
    place = torch.empty_like(indices)

    def append(target: Target) -> None:
        out = order.data_ptr(), tokens.data_ptr(), place.data_ptr()
        target.program.sort_experts(indices.data_ptr(), starts.data_ptr(), out, num_experts, indices.shape[1])

    at_once(append, len(indices), 0)
    cuts = starts.tolist()
    pieces = [(e, a, b) for e, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)) if a < b]
    return Sorted(pieces, order, tokens, place)


def _take(target: Target, x: Tensor, tokens: Tensor) -> Tensor:
    out = target.empty(len(tokens), x.shape[1])
    target.program.take_rows(rows_of(target.dense(x)), tokens.data_ptr(), out.data_ptr(), x.shape[1])
    return out


def _add_up(target: Target, rows: Tensor, place: Tensor) -> Tensor:
    out = target.empty(len(place), rows.shape[1])
    target.program.sum_rows(rows.data_ptr(), place.data_ptr(), out.data_ptr(), place.shape[1], rows.shape[1])
    return out


def _activate(products: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """weight · silu(gate) · up of sorted assignments, [T·A, F]."""
    hidden = products.new_empty(len(products), products.shape[1] // 2)

    def append(target: Target) -> None:
        addresses = products.data_ptr(), weights.data_ptr(), order.data_ptr(), hidden.data_ptr()
        target.program.activate(*addresses, hidden.shape[1])

    at_once(append, len(products), products.numel())
    return hidden


def _activate_backward(products: Tensor, weights: Tensor, order: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `products` and `weights`. `hidden` holds its own gradient before and itself afterwards."""
    dproducts, dweights = torch.empty_like(products), torch.empty_like(weights)

    def append(target: Target) -> None:
        inputs = products.data_ptr(), weights.data_ptr(), order.data_ptr(), hidden.data_ptr()
        target.program.activate_backward(*inputs, dproducts.data_ptr(), dweights.data_ptr(), hidden.shape[1])

    at_once(append, len(products), products.numel())
    return dproducts, dweights


@experts.body("cpu_gradient", when=trains_plain, available=available)
def experts_gradient(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """One product an expert, matrix and direction; experts without tokens take part in none."""
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    if any(tensor.dtype != torch.float32 for tensor in (gate_up, down, weights)):
        return experts.reference(x, gate_up, down, indices, weights)
    E, D, F = down.shape
    assert gate_up.shape == (E, 2 * F, D) and x.shape == (len(indices), D), "stacks as wide as the rows"
    assert indices.dim() == 2 and indices.shape == weights.shape, "a weight for every choice"
    return _Experts.apply(x, gate_up, down, indices, weights.contiguous())  # type: ignore[no-untyped-call]
