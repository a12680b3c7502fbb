"""FP8 by FP8 for Hopper, in Gluon: what `matmul_kernel` computes of activations and weights in FP8, dense or each row
by its expert's matrix, by warps that have different tasks.

One block stays on each multiprocessor and takes tile after tile of C: 128 of its columns for up to 128 tokens. A warp
of its own loads blocks of 128 columns of K into a ring of stages: weights, activations and the tokens' scales. Two
groups of four warps multiply, each 64 of the tile's columns. The weights are the left side of the matrix instructions,
whose 64 rows are always filled, and tokens the right one, which can be as narrow as 16: one schedule for few and many.

A product over one block of K is summed by the matrix instructions and then, scaled, in float32, since Hopper keeps 14
bits of a long FP8 sum. While one group scales, the other multiplies. A tile of results is turned over in shared memory
and stored from there while the next one is computed.

K is cut where `num_parts` says, as for `matmul_kernel`, so what a row gets does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from porcelet.kernels.linear import FP8_BLOCK, FP8Weight
from porcelet.kernels.triton.device import multiprocessors
from porcelet.kernels.triton.hopper import load_box
from porcelet.kernels.triton.matmul import FP8Rows, add_kernel, num_parts

store_box = getattr(tma, "async_store", tma.async_copy_shared_to_global)  # Triton 3.9's name, or 3.6's

COLUMNS, HALF, BLOCK = gl.constexpr(128), gl.constexpr(64), gl.constexpr(FP8_BLOCK)
STRIPE = gl.constexpr(8)  # tiles side by side that share activations in the cache
SHARED = 200 << 10  # bytes of shared memory that stages and results may take


@gluon.jit(do_not_specialize=["row_tiles", "blocks_of_part", "scale_block"])
def product_kernel(
    w_boxes,  # descriptors of [E · N, K], [M, K], [blocks · scale_block] and [parts, M, N]
    x_boxes,
    scale_boxes,
    c_boxes,
    w_scale,  # [E, N / 128, blocks]
    experts,  # [M], of each row where GROUPED; -1: of none
    row_tiles,
    blocks_of_part,
    scale_block,  # from one block's scales to the next
    N: gl.constexpr,
    K: gl.constexpr,
    TOKENS: gl.constexpr,  # of a tile
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    GROUPED: gl.constexpr,
):
    bytes_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    line: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    c_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, HALF], c_boxes.dtype)
    tiles = (
        gl.allocate_shared_memory(w_boxes.dtype, [STAGES, COLUMNS, BLOCK], bytes_layout),
        gl.allocate_shared_memory(x_boxes.dtype, [STAGES, TOKENS, BLOCK], bytes_layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, TOKENS], line),
        gl.allocate_shared_memory(c_boxes.dtype, [2, TOKENS, HALF], c_layout),
    )
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    barriers = (full, free)
    sizes = (row_tiles, blocks_of_part, scale_block)
    fixed: gl.constexpr = (N, K, TOKENS, STAGES, PARTS, GROUPED)
    gl.warp_specialize(
        [
            (multiply, (tiles, barriers, c_boxes, w_scale, experts, sizes, 0, fixed)),
            (multiply, (tiles, barriers, c_boxes, w_scale, experts, sizes, 1, fixed)),
            (load, (tiles, barriers, w_boxes, x_boxes, scale_boxes, experts, sizes, fixed)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def tile_of(index, experts, sizes, fixed: gl.constexpr):
    """Of an item: its tile's row and column, its expert, its part, and its blocks of K from the first to the last."""
    TOKENS: gl.constexpr = fixed[2]
    PARTS: gl.constexpr = fixed[4]
    GROUPED: gl.constexpr = fixed[5]
    BLOCKS: gl.constexpr = (fixed[1] + BLOCK - 1) // BLOCK
    WIDE: gl.constexpr = (fixed[0] + COLUMNS - 1) // COLUMNS
    row_tiles, blocks_of_part, _ = sizes
    part, place = index % PARTS, index // PARTS
    stripe = place // (STRIPE * row_tiles)
    width = gl.minimum(WIDE - stripe * STRIPE, STRIPE)
    within = place % (STRIPE * row_tiles)
    row, column = within // width, stripe * STRIPE + within % width
    expert = part * 0
    if GROUPED:
        expert = gl.load(experts + row * TOKENS)
    begin = part * blocks_of_part
    return row, column, expert, part, begin, gl.minimum(begin + blocks_of_part, BLOCKS)


@gluon.jit
def load(tiles, barriers, w_boxes, x_boxes, scale_boxes, experts, sizes, fixed: gl.constexpr):
    """The loading warp."""
    w_tiles, x_tiles, scale_tiles = tiles[0], tiles[1], tiles[2]
    full, free = barriers
    N: gl.constexpr = fixed[0]
    TOKENS: gl.constexpr = fixed[2]
    STAGES: gl.constexpr = fixed[3]
    BYTES: gl.constexpr = COLUMNS * BLOCK + TOKENS * BLOCK + TOKENS * 4
    count = 0
    for index in range(gl.program_id(0), num_items(sizes, fixed), gl.num_programs(0)):
        row, column, expert, _, begin, end = tile_of(index, experts, sizes, fixed)
        if expert >= 0:
            for block in range(begin, end):
                stage, phase = count % STAGES, count // STAGES & 1
                mbarrier.wait(free.index(stage), phase ^ 1)
                bar = full.index(stage)
                mbarrier.expect(bar, BYTES)
                load_box(w_boxes, [expert * N + column * COLUMNS, block * BLOCK], bar, w_tiles.index(stage))
                load_box(x_boxes, [row * TOKENS, block * BLOCK], bar, x_tiles.index(stage))
                load_box(scale_boxes, [block * sizes[2] + row * TOKENS], bar, scale_tiles.index(stage))
                count += 1


@gluon.jit
def multiply(tiles, barriers, c_boxes, w_scale, experts, sizes, SIDE: gl.constexpr, fixed: gl.constexpr):
    """A group of four warps: 64 columns of each tile of C."""
    w_tiles, x_tiles, scale_tiles, c_tiles = tiles
    full, free = barriers
    TOKENS: gl.constexpr = fixed[2]
    STAGES: gl.constexpr = fixed[3]
    BLOCKS: gl.constexpr = (fixed[1] + BLOCK - 1) // BLOCK
    WIDE: gl.constexpr = (fixed[0] + COLUMNS - 1) // COLUMNS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32])
    count = 0
    for index in range(gl.program_id(0), num_items(sizes, fixed), gl.num_programs(0)):
        row, column, expert, part, begin, end = tile_of(index, experts, sizes, fixed)
        if expert >= 0:
            scales_at = w_scale + (expert * WIDE + column) * BLOCKS
            sums = gl.zeros([HALF, TOKENS], gl.float32, SUMS)
            w_factor = gl.load(scales_at + begin)
            for block in range(begin, end):
                stage, phase = count % STAGES, count // STAGES & 1
                mbarrier.wait(full.index(stage), phase)
                left = w_tiles.index(stage).slice(HALF * SIDE, HALF, dim=0)
                right = x_tiles.index(stage).permute((1, 0))
                empty = gl.zeros([HALF, TOKENS], gl.float32, SUMS)
                product = warpgroup_mma(left, right, empty, use_acc=False, is_async=True)
                factor = scale_tiles.index(stage).load(gl.SliceLayout(0, SUMS)) * w_factor
                w_factor = gl.load(scales_at + gl.minimum(block + 1, end - 1))  # on its way until the next block
                product = warpgroup_mma_wait(0, deps=(product,))
                fence_async_shared()  # scales were read, and are loaded over
                mbarrier.arrive(free.index(stage), count=1)
                sums += product * factor[None, :]
                count += 1
            tma.store_wait(0)  # of the last tile's results
            c_tiles.index(SIDE).permute((1, 0)).store(sums.to(c_tiles.dtype))
            fence_async_shared()
            at = [part, row * TOKENS, column * COLUMNS + SIDE * HALF]
            store_box(c_boxes, at, c_tiles.index(SIDE))
    tma.store_wait(0)


@gluon.jit
def num_items(sizes, fixed: gl.constexpr):
    """Tiles times parts."""
    return sizes[0] * ((fixed[0] + COLUMNS - 1) // COLUMNS) * fixed[4]


def fits(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> bool:
    """Whether `multiply_fp8` takes these: what the tensor memory accelerator can read and write."""
    (M, K), N = a.values.shape, b.shape[-2]
    is_even = K % 16 == N % 8 == a.scale.stride(1) % 4 == 0 and (a.scale.stride(0) == 1 or M == 1)
    is_plain = a.values.is_contiguous() and b.values.is_contiguous() and b.scale.is_contiguous()
    is_aligned = all(t.data_ptr() % 16 == 0 for t in (a.values, a.scale, b.values))
    return M > 0 and b.shape[-1] == K and is_even and is_plain and is_aligned and dtype.itemsize == 2


def multiply_fp8(
    a: FP8Rows, b: FP8Weight, dtype: torch.dtype, experts: Tensor | None = None, aligned: int = 128
) -> Tensor:
    """As `matmul.multiply`, or with `experts` as `matmul.multiply_contiguous`, on a Hopper GPU, where `fits` says
    so."""
    (M, K), N, device = a.values.shape, b.shape[-2], a.values.device
    tokens = min(128, max(16, triton.next_power_of_2(M)), aligned)
    parts = num_parts(N, K) if experts is None else 1
    row_tiles, blocks = triton.cdiv(M, tokens), triton.cdiv(K, FP8_BLOCK)
    c = torch.empty(M, N, dtype=dtype, device=device)
    out = c[None] if parts == 1 else torch.empty(parts, M, N, dtype=torch.float32, device=device)
    results = 2 * tokens * 64 * out.element_size()
    stages = min(8, (SHARED - results) // (128 * 128 + tokens * 132))
    num_tiles = row_tiles * triton.cdiv(N, 128) * parts
    scales = a.scale.t()
    step = scales.stride(0) if blocks > 1 else triton.cdiv(M, 4) * 4
    flat = torch.as_strided(scales, (step * (blocks - 1) + M,), (1,))
    with torch.cuda.device_of(a.values):  # Triton launches on the current device
        product_kernel[min(num_tiles, multiprocessors(device)),](
            _boxes(b.values.view(-1, K), [128, 128]),
            _boxes(a.values, [tokens, 128]),
            _boxes(flat, [tokens]),
            _boxes(out, [1, tokens, 64]),
            b.scale,
            b.scale if experts is None else experts,
            row_tiles,
            triton.cdiv(blocks, parts),
            step,
            N=N,
            K=K,
            TOKENS=tokens,
            STAGES=stages,
            PARTS=parts,
            GROUPED=experts is not None,
            num_warps=4,
            maxnreg=168,
            enable_fp_fusion=True,
        )
        if parts > 1:
            add_kernel[triton.cdiv(M * N, 1024), 1](out, c, M * N, PARTS=parts, BLOCK=1024)
    return c


def _boxes(source: Tensor, box: list[int]) -> TensorDescriptor:
    bits, width = 8 * source.element_size(), box[-1] * source.element_size()
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=0 if len(box) == 1 else min(128, width), element_bitwidth=bits, rank=len(box)
    )
    return TensorDescriptor(source, list(source.shape), list(source.stride()), box, layout)
