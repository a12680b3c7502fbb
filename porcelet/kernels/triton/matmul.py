"""Matrix products over FP8 and half-precision weights, one Triton kernel: dense, and grouped by expert.

    C [M, N] = A [M, K] · B [N, K]ᵀ      B may be a stack [E, N, K], of which each row of A meets one

FP8 values (e4m3) have float32 scales: weights one a block of 128 · 128, activations one a row and 128 columns, as
DeepSeek-V3 multiplies them (report, section 3.3.2). The product over 128 columns is summed by the matrix
instructions, and then, scaled, in float32: on Hopper these keep 14 bits of a long FP8 sum. Activations that are not FP8
meet the weights' own values, widened in registers. So a checkpoint in FP8 runs on cards without FP8 instructions, which
widen activations too, and the result is the definition's.

Narrow products, and few rows, do not fill a device: K is then cut into parts, which a second kernel adds in their
order. How many depends on N and K alone, so what a row gets does not depend on the batch.

Weights of 8 and 4 bits are packed.py's; FP8 by FP8 for Hopper, by warps of different tasks, is hopper_products.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from porcelet.errors import InputError
from porcelet.kernels.generations import generation_of
from porcelet.kernels.linear import FP8_BLOCK, FP8Weight
from porcelet.kernels.triton.device import arch_of
from porcelet.kernels.triton.e4m3 import from_e4m3, to_e4m3
from porcelet.kernels.triton.tasks import fp8_experts, fp8_product

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ALIGNED = 128  # rows of a group in the contiguous layout
FEWEST_BLOCKS = 64  # which fill a device; narrower products are cut along K
SMALLEST_PART = 4  # blocks of 128 columns that a part has at least


@dataclass(frozen=True)
class FP8Rows:
    """Activations [M, K] of float8_e4m3fn with a scale for every row and 128 columns, rounded up at the edge."""

    values: Tensor
    scale: Float[Tensor, "M blocks"]

    @classmethod
    def empty(cls, M: int, K: int, device: torch.device) -> FP8Rows:
        """Room. The rows' scales of one block lie side by side, padded to 16 bytes, as Hopper loads them."""
        scale = torch.empty(-(-K // FP8_BLOCK), -(-M // 4) * 4, dtype=torch.float32, device=device)
        return cls(torch.empty(M, K, dtype=torch.float8_e4m3fn, device=device), scale[:, :M].t())


def quantize_rows(x: Float[Tensor, "M K"], *, power_of_two: bool = False) -> FP8Rows:
    """Each row's 128 columns by their largest magnitude over 448; with `power_of_two` rounded up to such a scale, which
    UE8M0 holds (V3.1 on)."""
    M, K = x.shape
    rows = FP8Rows.empty(M, K, x.device)
    if M:
        with torch.cuda.device_of(x):
            quantize_kernel[M, -(-K // FP8_BLOCK)](
                x,
                rows.values.view(torch.uint8),
                rows.scale,
                K,
                x.stride(0),
                rows.scale.stride(1),
                BLOCK=FP8_BLOCK,
                POWER_OF_TWO=power_of_two,
                num_warps=1,
            )
    return rows


@triton.jit(do_not_specialize=["K", "scale_block"])
def quantize_kernel(x, values, scale, K, x_row, scale_block, BLOCK: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < K
    part = tl.load(x + row * x_row + columns, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(part)), 1e-4) / 448.0
    if POWER_OF_TWO:
        factor = tl.exp2(tl.ceil(tl.log2(factor)))
    tl.store(scale + row + block.to(tl.int64) * scale_block, factor)
    tl.store(values + row * K + columns, to_e4m3(part / factor), mask=is_there)


@triton.jit(do_not_specialize=["M", "num_blocks", "scale_row", "scale_block"])
def matmul_kernel(
    a,  # [M, K], or [E, M, K] where MASKED; bytes where A_FP8
    a_scale,  # [M, blocks]
    b,  # [E, N, K]; bytes where B_FP8
    b_scale,  # [E, N / 128, blocks]
    c,  # [M, N]; float32 [parts, M, N] where PARTS > 1
    experts,  # of each row where CONTIGUOUS, -1: of none; of each expert the number of its rows where MASKED
    M,
    num_blocks,  # of 128 columns, of a part
    N: tl.constexpr,
    K: tl.constexpr,
    a_expert,
    a_row,
    scale_row,
    scale_block,
    CONTIGUOUS: tl.constexpr,
    MASKED: tl.constexpr,
    A_FP8: tl.constexpr,
    B_FP8: tl.constexpr,
    NATIVE: tl.constexpr,  # whether the device multiplies FP8
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides 128, so that a block meets one scale of B at a time
    STRIPE: tl.constexpr,  # blocks of rows that share columns of B in the cache
    STAGES: tl.constexpr,
):
    part, expert = tl.program_id(1), tl.program_id(2)
    num_rows = M
    if MASKED:
        num_rows = tl.load(experts + expert)
    row_block, column_block = place(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS), STRIPE)
    if row_block * ROWS >= num_rows:
        return
    if CONTIGUOUS:
        expert = tl.load(experts + row_block * ROWS)
        if expert < 0:
            return
    SCALES: tl.constexpr = (K + 127) // 128
    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    within = tl.arange(0, 128)
    is_row, is_column = rows < num_rows, columns < N
    a_at = a + expert.to(tl.int64) * a_expert * MASKED + rows.to(tl.int64)[:, None] * a_row + within[None, :]
    b_at = b + (expert.to(tl.int64) * N + columns)[:, None] * K + within[None, :]
    first_row = expert.to(tl.int64) * M * MASKED
    a_scales = a_scale + first_row * scale_row
    b_scales = b_scale + (expert.to(tl.int64) * tl.cdiv(N, 128) + column_block * COLUMNS // 128) * SCALES
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = part * num_blocks
    for block in tl.range(begin, tl.minimum(begin + num_blocks, SCALES), num_stages=STAGES):
        offset = block * 128
        if K % 128:
            left = (within < K - offset)[None, :]
            a_tile = tl.load(a_at + offset, mask=is_row[:, None] & left, other=0)
            b_tile = tl.load(b_at + offset, mask=is_column[:, None] & left, other=0)
        else:
            a_tile = tl.load(a_at + offset, mask=is_row[:, None], other=0)
            b_tile = tl.load(b_at + offset, mask=is_column[:, None], other=0)
        if A_FP8 or B_FP8:
            factor = tl.full([ROWS], 1.0, tl.float32)
            if A_FP8:
                factor = tl.load(a_scales + block * scale_block + rows * scale_row, mask=is_row, other=0.0)
            if B_FP8:
                factor = factor * tl.load(b_scales + block)
            if A_FP8 and NATIVE:
                a_tile, b_tile = a_tile.to(tl.float8e4nv, bitcast=True), b_tile.to(tl.float8e4nv, bitcast=True)
            else:
                if A_FP8:
                    a_tile, factor = from_e4m3(a_tile), factor * 256.0
                b_tile, factor = from_e4m3(b_tile).to(a_tile.dtype), factor * 256.0
            total += tl.dot(a_tile, tl.trans(b_tile)) * factor[:, None]
        else:
            total = tl.dot(a_tile, tl.trans(b_tile), total)
    c_rows = (tl.program_id(2) * PARTS + part).to(tl.int64) * M + rows if PARTS > 1 else first_row + rows
    c_at = c + c_rows[:, None] * N + columns[None, :]
    tl.store(c_at, total.to(c.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def place(block, row_blocks, column_blocks, STRIPE: tl.constexpr):
    """Blocks in stripes of rows, column by column, so that neighbours in time share what they read."""
    stripe = block // (STRIPE * column_blocks)
    height = tl.minimum(row_blocks - stripe * STRIPE, STRIPE)
    within = block % (STRIPE * column_blocks)
    return stripe * STRIPE + within % height, within // height


@triton.jit(do_not_specialize=["size"])
def add_kernel(parts, c, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The parts of K added in their order; a stack's product has its parts one behind the other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stack = tl.program_id(1).to(tl.int64)
    is_there = at < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (stack * PARTS + part) * size + at, mask=is_there, other=0.0)
    tl.store(c + stack * size + at, total.to(c.dtype.element_ty), mask=is_there)


@dataclass(frozen=True)
class Tiles:
    """What a block computes, and how."""

    rows: int
    columns: int
    stages: int
    warps: int


def choose_tiles(M: int, arch: int, *, a_fp8: bool, b_fp8: bool) -> Tiles:
    """As many rows as there are, up to what registers hold; bytes of two FP8 tiles are half of others'."""
    generation = generation_of(arch)
    native = a_fp8 and b_fp8 and generation.multiplies_fp8
    if M <= 16:
        return Tiles(16, 64, 4 if arch >= 90 else 3, 4)
    if M <= 64:
        return Tiles(64, 64, 4 if native else 3, 4)
    if arch < 90 or not native:
        return Tiles(64, 128, 3 if generation.shared_kib > 99 else 2, 4)
    return Tiles(128, 128, 4, 8)


def num_parts(N: int, K: int) -> int:
    """How many parts K is cut into: a power of two, so that blocks of 64 columns fill a device."""
    parts, blocks = 1, -(-K // FP8_BLOCK)
    while parts * -(-N // 64) < FEWEST_BLOCKS and blocks // (2 * parts) >= SMALLEST_PART:
        parts *= 2
    return parts


def multiply(
    a: Tensor | FP8Rows, b: Tensor | FP8Weight, *, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "M N"]:
    """A [M, K] · B [N, K]ᵀ. FP8 activations need FP8 weights.

    Raises:
        InputError: shapes or formats that do not belong together.
    """
    if isinstance(a, FP8Rows) and isinstance(b, FP8Weight):
        return fp8_product(a, b, dtype)
    values = a.values if isinstance(a, FP8Rows) else a
    return launch(a, b, torch.empty(len(values), _rows_of(b), dtype=dtype, device=values.device))


def multiply_contiguous(
    a: Tensor | FP8Rows,
    b: Tensor | FP8Weight,
    experts: Int[Tensor, "M"],
    *,
    aligned: int = ALIGNED,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "M N"]:
    """Each row of A [M, K] by its expert's matrix of B [E, N, K]. Rows of one expert lie together and begin at
    multiples of `aligned`, a power of two from 16 to 128; between them lie rows that fill up, with any expert. The
    results of rows of expert -1 are not written.

    Raises:
        InputError: shapes or formats that do not belong together.
    """
    values = a.values if isinstance(a, FP8Rows) else a
    if experts.shape != values.shape[:1] or len(experts) % aligned:
        raise InputError(f"experts {list(experts.shape)} of {len(values)} rows: each has one, {aligned} are a group")
    if isinstance(a, FP8Rows) and isinstance(b, FP8Weight):
        return fp8_experts(a, b, experts, aligned, dtype)
    c = torch.empty(values.shape[0], _rows_of(b), dtype=dtype, device=values.device)
    return launch(a, b, c, experts, most_rows=aligned)


def multiply_masked(
    a: Tensor | FP8Rows, b: Tensor | FP8Weight, counts: Int[Tensor, "E"], *, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "E M N"]:
    """The first counts[e] rows of A [E, M, K] by B [E, N, K]; what lies behind them is not written.

    Raises:
        InputError: shapes or formats that do not belong together.
    """
    values = a.values if isinstance(a, FP8Rows) else a
    if values.dim() != 3 or counts.shape != values.shape[:1]:
        raise InputError(f"counts {list(counts.shape)} of rows {list(values.shape)}: rows are [experts, M, K]")
    c = torch.empty(*values.shape[:2], _rows_of(b), dtype=dtype, device=values.device)
    return launch(a, b, c, counts, masked=True)


def _rows_of(b: Tensor | FP8Weight) -> int:
    return b.shape[-2]


def launch(
    a: Tensor | FP8Rows,
    b: Tensor | FP8Weight,
    c: Tensor,
    experts: Tensor | None = None,
    *,
    masked: bool = False,
    most_rows: int = ALIGNED,
) -> Tensor:
    """The kernel into `c`, which is returned."""
    a_fp8, b_fp8 = isinstance(a, FP8Rows), isinstance(b, FP8Weight)
    values, a_scale = (a.values, a.scale) if isinstance(a, FP8Rows) else (a, a)
    weights, b_scale = (b.values, b.scale) if isinstance(b, FP8Weight) else (b, b)
    M, K, N = values.shape[-2], values.shape[-1], weights.shape[-2]
    _check(a, b, values, weights, experts)
    arch = arch_of(values.device)
    tiles = choose_tiles(min(M, most_rows), arch, a_fp8=a_fp8, b_fp8=b_fp8)
    parts = num_parts(N, K) if experts is None else 1
    stack = len(values) if masked else 1
    if M == 0:
        return c
    out = c if parts == 1 else torch.empty(stack * parts, M, N, dtype=torch.float32, device=c.device)
    grid = triton.cdiv(M, tiles.rows) * triton.cdiv(N, tiles.columns), parts, stack
    with torch.cuda.device_of(values):  # Triton launches on the current device
        matmul_kernel[grid](
            values.view(torch.uint8) if a_fp8 else values,
            a_scale,
            weights.view(torch.uint8) if b_fp8 else weights,
            b_scale,
            out,
            out if experts is None else experts,
            M,
            triton.cdiv(triton.cdiv(K, FP8_BLOCK), parts),
            N,
            K,
            values.stride(0) if masked else 0,
            values.stride(-2),
            a_scale.stride(-2),
            a_scale.stride(-1),
            CONTIGUOUS=experts is not None and not masked,
            MASKED=masked,
            A_FP8=a_fp8,
            B_FP8=b_fp8,
            NATIVE=a_fp8 and b_fp8 and generation_of(arch).multiplies_fp8,
            PARTS=parts,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            STRIPE=8,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )
        if parts > 1:
            add_kernel[triton.cdiv(M * N, 1024), stack](out, c, M * N, PARTS=parts, BLOCK=1024)
    return c


def _check(a: object, b: object, values: Tensor, weights: Tensor, experts: Tensor | None) -> None:
    stacked = 2 if experts is None else 3
    if weights.dim() != stacked or values.shape[-1] != weights.shape[-1]:
        raise InputError(f"rows {list(values.shape)} do not meet weights {list(weights.shape)}")
    if isinstance(a, FP8Rows) and not isinstance(b, FP8Weight):
        raise InputError(f"rows in FP8 meet weights in FP8, not {weights.dtype}")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        raise InputError(f"rows are {a.dtype}, weights {b.dtype}; they must be of one precision")
    if values.stride(-1) != 1 or not weights.is_contiguous():
        raise InputError("rows must have neighbouring columns, weights must be contiguous; call .contiguous()")
