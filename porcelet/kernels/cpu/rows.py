"""Rows of tables: embeddings, sampled tokens, rotary angles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.cpu.target import (
    Target,
    available,
    indices_of,
    is_float,
    is_packed,
    is_plain,
    native,
    on_cpu,
    packed_of,
    rows_of,
)
from porcelet.kernels.linear import PackedWeight, TableWeight, embedding, take_rows
from porcelet.kernels.pointwise import rotary_angles
from porcelet.kernels.record import NotRecordable, Tape

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@native(embedding, "cpu_packed", is_packed)
def embedding_packed(target: Target, tokens: Int[Tensor, "T"], weight: TableWeight) -> Float[Tensor, "T D"]:
    """Rows of a packed table, to the bits of the definition."""
    assert isinstance(weight, PackedWeight)
    out = target.empty(len(tokens), weight.shape[1])
    target.program.take_packed_rows(packed_of(weight), indices_of(tokens), out.data_ptr())
    return out


@embedding.instruction(when=is_plain, available=available)
def embedding_float(target: Target, tokens: Int[Tensor, "T"], weight: TableWeight) -> Float[Tensor, "T D"]:
    assert isinstance(weight, Tensor)
    return _take(target, weight, tokens)


@take_rows.instruction(when=is_float, available=available)
def take_rows_float(target: Target, x: Float[Tensor, "T D"], rows: Int[Tensor, "taken"]) -> Float[Tensor, "taken D"]:
    target.program.narrow()
    return _take(target, x, rows)


@rotary_angles.instruction(when=on_cpu, available=available)
def rotary_angles_table(
    tape: Tape, positions: Int[Tensor, "T"], frequencies: Float[Tensor, "half"], factor: float
) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
    """Rows of a table of all positions: torch's cosine, to the bit."""
    with tape.paused():
        cos, sin = rotary_angles.reference(torch.arange(tape.max_length), frequencies, factor)
    return _take(tape, tape.keep(cos), positions), _take(tape, tape.keep(sin), positions)


def _take(target: Target, table: Tensor, index: Tensor) -> Tensor:
    if table.dtype != torch.float32:
        raise NotRecordable(f"rows are taken from a table in {table.dtype}")
    assert table.stride(1) == 1
    out = target.empty(len(index), table.shape[1])
    target.program.take_rows(rows_of(table), indices_of(index), out.data_ptr(), table.shape[1])
    return out
