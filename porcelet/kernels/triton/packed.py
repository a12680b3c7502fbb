"""Matrix products over packed weights of 8 and 4 bits, in their one layout (kernels/linear.py).

    C [M, N] = A [M, K] · B [N, K]ᵀ      B may be a stack of E such matrices, of which each row of A meets one

A's values are in half precision and are not rounded further. The numbers of a group, up to 255, are exact in half
precision too, so the matrix instructions multiply them as they are; scale and minimum come behind, in float32, once for
each group of 32 columns: C = Σ over groups of (A · q) · scale + ΣA · minimum. So a card needs neither FP8 nor integer
instructions, and nothing is rounded that the format does not round.

K is cut in parts and few rows are served as in matmul.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from porcelet.errors import InputError
from porcelet.kernels.linear import GROUP, TILE, block_bytes, kind_of_block
from porcelet.kernels.triton.matmul import ALIGNED, Tiles, add_kernel, num_parts, place

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


@triton.jit(do_not_specialize=["M", "part_groups"])
def packed_kernel(
    a,  # [M, K]
    words,  # of B's blocks, four bytes each
    halves,  # the same blocks, two bytes each
    c,  # [M, N]; float32 [parts, M, N] where PARTS > 1
    experts,  # of each row where CONTIGUOUS, -1: of none
    M,
    part_groups,
    a_row,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,  # bytes of a block
    CONTIGUOUS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = tl.program_id(1)
    row_block, column_block = place(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), STRIPE)
    expert = row_block * 0
    if CONTIGUOUS:
        expert = tl.load(experts + row_block * ROWS)
        if expert < 0:
            return
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < M, columns < N
    tile = (expert * ((N + 15) // 16) + columns // 16).to(tl.int64) * GROUPS
    word_at = words + tile[:, None] * (BLOCK // 4) + (columns % 16)[:, None] + tl.arange(0, BITS)[None, :] * 16
    half_at = halves + tile * (BLOCK // 2) + BITS * 32 + columns % 16
    a_at = a + rows.to(tl.int64)[:, None] * a_row + tl.arange(0, 32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = part * part_groups
    for group in tl.range(begin, tl.minimum(begin + part_groups, GROUPS), num_stages=STAGES):
        a_tile = tl.load(a_at + group * 32, mask=is_row[:, None], other=0)
        packed = tl.load(word_at + group * (BLOCK // 4), mask=is_column[:, None], other=0)
        scale = tl.load(half_at + group * (BLOCK // 2), mask=is_column, other=0).to(tl.float32)
        if BITS == 8:
            q = _bytes(packed, 0, 255)
        else:  # quads 0 to 3 in the low halves, 4 to 7 in the high ones
            q = tl.join(_bytes(packed, 0, 15), _bytes(packed, 4, 15))
            q = tl.reshape(tl.permute(q, (0, 2, 1)), [COLUMNS, 32])
        if SYMMETRIC:
            q -= 1 << (BITS - 1)
        total += tl.dot(a_tile, tl.trans(q.to(a_tile.dtype))) * scale[None, :]
        if not SYMMETRIC:
            minimum = tl.load(half_at + group * (BLOCK // 2) + 16, mask=is_column, other=0).to(tl.float32)
            total += tl.sum(a_tile.to(tl.float32), 1)[:, None] * minimum[None, :]
    c_rows = part.to(tl.int64) * M + rows
    tl.store(c + c_rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty), mask=is_row[:, None] & is_column)


@triton.jit
def _bytes(packed, shift: tl.constexpr, mask: tl.constexpr):
    """[columns, words] to [columns, 4 · words]: part of each byte, the low one first."""
    even = tl.interleave((packed >> shift) & mask, (packed >> (shift + 16)) & mask)
    odd = tl.interleave((packed >> (shift + 8)) & mask, (packed >> (shift + 24)) & mask)
    return tl.interleave(even, odd)


def choose_tiles(M: int) -> Tiles:
    """As many rows as there are, up to what registers hold beside the widened numbers."""
    if M <= 16:
        return Tiles(16, 64, 4, 4)
    return Tiles(64, 64 if M <= 64 else 128, 3, 4)


def multiply_packed(a: Float[Tensor, "M K"], packed: UInt8[Tensor, "tiles groups block"], N: int) -> Tensor:
    """A · Bᵀ, of A's precision. `packed` is a `PackedWeight`'s, of N rows.

    Raises:
        InputError: widths that do not belong together.
    """
    return _launch(a, packed, N, None)


def multiply_packed_contiguous(
    a: Float[Tensor, "M K"],
    packed: UInt8[Tensor, "E tiles groups block"],
    N: int,
    experts: Int[Tensor, "M"],
    *,
    aligned: int = ALIGNED,
) -> Float[Tensor, "M N"]:
    """Each row of A by its expert's matrix, in the layout of `matmul.multiply_contiguous`.

    Raises:
        InputError: widths that do not belong together.
    """
    if experts.shape != a.shape[:1] or len(experts) % aligned:
        raise InputError(f"experts {list(experts.shape)} of {len(a)} rows: each has one, {aligned} are a group")
    return _launch(a, packed, N, experts, aligned)


def _launch(a: Tensor, packed: Tensor, N: int, experts: Tensor | None, most_rows: int = ALIGNED) -> Tensor:
    (M, K), (tiles, groups, size) = a.shape, packed.shape[-3:]
    kind = kind_of_block(size)
    if groups * GROUP != K or tiles != -(-N // TILE) or a.stride(1) != 1 or not packed.is_contiguous():
        raise InputError(f"rows {[M, K]} do not meet {tiles} tiles of {groups} groups, {N} rows")
    c = a.new_empty(M, N)
    if M == 0:
        return c
    chosen = choose_tiles(min(M, most_rows))
    parts = num_parts(N, K) if experts is None else 1
    out = c if parts == 1 else torch.empty(parts, M, N, dtype=torch.float32, device=a.device)
    with torch.cuda.device_of(a):  # Triton launches on the current device
        packed_kernel[triton.cdiv(M, chosen.rows) * triton.cdiv(N, chosen.columns), parts](
            a,
            packed.view(torch.int32),
            packed.view(torch.float16),
            out,
            out if experts is None else experts,
            M,
            triton.cdiv(groups, parts),
            a.stride(0),
            N,
            groups,
            kind.bits,
            kind.symmetric,
            block_bytes(kind),
            CONTIGUOUS=experts is not None,
            PARTS=parts,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            STRIPE=8,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
        )
        if parts > 1:
            add_kernel[triton.cdiv(M * N, 1024), 1](out, c, M * N, PARTS=parts, BLOCK=1024)
    return c
