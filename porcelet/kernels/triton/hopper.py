"""MLA's absorbed attention for Hopper, in Gluon: what `attend_kernel` computes, by warps that have different tasks.

One block stays on each multiprocessor and takes item after item from a list: 64 rows (new tokens times heads) of a
sequence with one part of its keys. A warp of its own loads. Two groups of four warps multiply, and each owns 256 of the
512 columns of the sums, since a group's registers do not hold all of them. Keys come in pairs of tiles of 64: group 0
scores the even tile and group 1 the odd one, each hands its weights to the other through shared memory, and both add
both tiles' values to their columns. While one group is at its softmax the other multiplies.

A tile of keys is 9 boxes of 64 columns, each with a barrier, so scoring begins with the first 8 KiB; the values are the
first 8 boxes, read again. Both groups add tiles in the order of the sequence, as `attend_kernel` does.

Behind the end of a sequence a page can hold anything, and zero times NaN is NaN. The last tile is therefore loaded from
below: its box begins so many rows before the page as there are rows too many, and the tensor memory accelerator fills
what lies outside of a page with zeros. The keys then lie at the end of the tile. A tile behind the last one is all
zeros.

Every barrier completes once a pair, or once an item, so its phase is the number of pairs, or items, so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
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

from porcelet.kernels.latent8 import LATENT, ROPE
from porcelet.kernels.triton.attention import LN2, LOG2E, MOST_NEW, PART, combine_kernel
from porcelet.kernels.triton.device import multiprocessors

if TYPE_CHECKING:
    from jaxtyping import Float, Int

load_box = getattr(tma, "async_load", tma.async_copy_global_to_shared)  # Triton 3.9's name, or 3.6's

ROWS, KEYS, BOX = gl.constexpr(64), gl.constexpr(64), gl.constexpr(64)
WIDTH, LATENTS, HALF = gl.constexpr(LATENT + ROPE), gl.constexpr(LATENT), gl.constexpr(LATENT // 2)
BOXES = gl.constexpr((LATENT + ROPE) // 64)
BOX_BYTES = gl.constexpr(64 * 64 * 2)
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
OF_SCORES, OF_SUMS = gl.constexpr(gl.SliceLayout(1, SCORES)), gl.constexpr(gl.SliceLayout(1, SUMS))
LEFT_OF_SCORES = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SCORES, k_width=2))
LEFT_OF_SUMS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2))


@triton.jit(do_not_specialize=["num_sequences", "num_keys"])
def list_work_kernel(
    work,  # [1 + most items, 2]; first the number of items, then of each its sequence and its place there
    offsets,  # [B + 1]
    lengths,  # [B]
    num_sequences,
    num_keys,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    MOST_NEW: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The items of one sequence, behind those of the sequences before it: blocks of rows times parts of keys."""
    sequence = tl.program_id(0)
    before = 0
    for start in range(0, sequence + 1, AT_ONCE):
        others = start + tl.arange(0, AT_ONCE)
        is_before = others < sequence
        first = tl.load(offsets + others, mask=is_before, other=0).to(tl.int32)
        num_new = tl.load(offsets + others + 1, mask=is_before, other=0).to(tl.int32) - first
        length = tl.load(lengths + others, mask=is_before, other=0).to(tl.int32)
        before += tl.sum(num_items(num_new, length, num_keys, HEADS, ROWS, PART, MOST_NEW))
    first = tl.load(offsets + sequence).to(tl.int32)
    num_new = tl.load(offsets + sequence + 1).to(tl.int32) - first
    own = num_items(num_new, tl.load(lengths + sequence).to(tl.int32), num_keys, HEADS, ROWS, PART, MOST_NEW)
    for start in range(0, own, AT_ONCE):
        places = start + tl.arange(0, AT_ONCE)
        at = work + 2 * (1 + before + places)
        tl.store(at, places * 0 + sequence, mask=places < own)
        tl.store(at + 1, places, mask=places < own)
    if sequence == num_sequences - 1:
        tl.store(work, before + own)


@triton.jit
def num_items(
    num_new, length, num_keys, HEADS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, MOST_NEW: tl.constexpr
):
    """Blocks of rows of a sequence, times its parts."""
    parts = tl.maximum((tl.minimum(length, num_keys) + PART - 1) // PART, 1)
    return (num_new * HEADS + ROWS - 1) // ROWS * tl.where(num_new <= MOST_NEW, parts, 1)


@gluon.jit(do_not_specialize=["num_sequences", "num_keys", "most_new"])
def decode_kernel(
    q_boxes,  # descriptors of [T · H, 576] and [P, 64, 576]
    k_boxes,
    q,  # [T, H, 576], contiguous
    out,  # [T, H, 512]
    lse,  # [T, H]
    partial,  # [parts, B, most_new, H, 512]
    partial_lse,  # [parts, B, most_new, H], to base 2
    offsets,  # [B + 1]
    lengths,  # [B]
    work,
    tables,  # [B, max_pages]
    scale,  # of scores, times log2(e)
    num_tokens,
    num_sequences,
    num_keys,
    most_new,
    tables_row,
    HEADS: gl.constexpr,
    PART: gl.constexpr,
    MOST_NEW: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    line: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = (
        gl.allocate_shared_memory(q_boxes.dtype, [ROWS, LATENTS], layout),  # queries, without their rotary columns
        gl.allocate_shared_memory(q_boxes.dtype, [2, KEYS, LATENTS], layout),
        gl.allocate_shared_memory(q_boxes.dtype, [2, KEYS, BOX], layout),
        gl.allocate_shared_memory(q_boxes.dtype, [2, ROWS, KEYS], layout),  # weights that a group hands over
        gl.allocate_shared_memory(gl.float32, [2, ROWS], line),  # what they are relative to
        gl.allocate_shared_memory(gl.float32, [2, ROWS], line),  # each group's sum of its weights
    )
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * BOXES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [6, 1], barrier)  # of a tile's columns: left, right, rotary
    weights_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    totals_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_free.index(0), count=2)
    for i in gl.static_range(2 * BOXES):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(6):
        mbarrier.init(k_free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(totals_full.index(i), count=1)
    fence_async_shared()
    barriers = (q_full, q_free, k_full, k_free, weights_full, totals_full)
    past = (offsets, lengths, work, num_keys)
    results = (out, lse, partial, partial_lse, num_sequences, most_new)
    fixed: gl.constexpr = (HEADS, PART, MOST_NEW, CAUSAL)
    gl.warp_specialize(
        [
            (multiply, (tiles, barriers, past, results, q, scale, num_tokens, 0, fixed)),
            (multiply, (tiles, barriers, past, results, q, scale, num_tokens, 1, fixed)),
            (load, (tiles, barriers, past, q_boxes, k_boxes, tables, tables_row, fixed)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def item_of(index, past, fixed: gl.constexpr):
    """Of an item: its sequence, part and first row, how many rows and keys there are, where its keys begin and end,
    and whether the sequence has other parts."""
    offsets, lengths, work, num_keys = past
    HEADS: gl.constexpr = fixed[0]
    PART: gl.constexpr = fixed[1]
    MOST_NEW: gl.constexpr = fixed[2]
    CAUSAL: gl.constexpr = fixed[3]
    sequence = gl.load(work + 2 + 2 * index)
    place = gl.load(work + 3 + 2 * index)
    first_token = gl.load(offsets + sequence).to(gl.int32)
    num_new = gl.load(offsets + sequence + 1).to(gl.int32) - first_token
    length = gl.load(lengths + sequence).to(gl.int32)
    blocks = gl.cdiv(num_new * HEADS, ROWS)
    part = place // blocks
    first_row = place % blocks * ROWS
    end = length
    if CAUSAL:  # what the last of the rows sees
        last_row = gl.minimum(first_row + ROWS, num_new * HEADS) - 1
        end = length - num_new + last_row // HEADS + 1
    end = gl.minimum(gl.maximum(end, 0), num_keys)
    is_split = (num_new <= MOST_NEW) & (gl.minimum(length, num_keys) > PART)
    begin = part * PART
    if is_split:
        end = gl.minimum(end, begin + PART)
    return sequence, part, first_token, first_row, num_new, length, begin, end, is_split


@gluon.jit
def load(tiles, barriers, past, q_boxes, k_boxes, tables, tables_row, fixed: gl.constexpr):
    """The loading warp."""
    q_tile, k_tiles, rope_tiles = tiles[0], tiles[1], tiles[2]
    q_full, q_free, k_full, k_free = barriers[0], barriers[1], barriers[2], barriers[3]
    HEADS: gl.constexpr = fixed[0]
    items, pairs = 0, 0
    for index in range(gl.program_id(0), gl.load(past[2]), gl.num_programs(0)):
        item = item_of(index, past, fixed)
        sequence, first_token, first_row, begin, end = item[0], item[2], item[3], item[6], item[7]
        mbarrier.wait(q_free.index(0), (items & 1) ^ 1)
        mbarrier.expect(q_full.index(0), (BOXES - 1) * BOX_BYTES)
        for box in gl.static_range(BOXES - 1):
            at = [first_token * HEADS + first_row, box * BOX]
            load_box(q_boxes, at, q_full.index(0), q_tile.slice(box * BOX, BOX, dim=1))
        table = tables + sequence.to(gl.int64) * tables_row
        for pair in range(gl.maximum(gl.cdiv(end - begin, 2 * KEYS), 1)):
            for side in gl.static_range(2):
                start = begin + (2 * pair + side) * KEYS
                count = gl.minimum(gl.maximum(end - start, 0), KEYS)
                page = gl.load(table + start // KEYS, mask=count > 0, other=0).to(gl.int32)
                for box in gl.static_range(BOXES):
                    if box % 4 == 0:
                        mbarrier.wait(k_free.index(3 * side + box // 4), (pairs & 1) ^ 1)
                    full = k_full.index(BOXES * side + box)
                    mbarrier.expect(full, BOX_BYTES)
                    if box == BOXES - 1:
                        load_box(k_boxes, [page, count - KEYS, box * BOX], full, rope_tiles.index(side))
                    else:
                        columns = k_tiles.index(side).slice(box * BOX, BOX, dim=1)
                        load_box(k_boxes, [page, count - KEYS, box * BOX], full, columns)
            pairs += 1
        items += 1  # noqa: SIM113  Triton has no enumerate


@gluon.jit
def multiply(
    tiles,
    barriers,
    past,
    results,
    q,
    scale,
    num_tokens,
    SIDE: gl.constexpr,  # which tile of a pair is scored, and which half of the columns summed
    fixed: gl.constexpr,
):
    """A group of four warps."""
    q_tile, k_tiles, rope_tiles, weights_tiles, relative_to, totals = tiles
    q_full, q_free, k_full, k_free, weights_full, totals_full = barriers
    HEADS: gl.constexpr = fixed[0]
    CAUSAL: gl.constexpr = fixed[3]
    OTHER: gl.constexpr = 1 - SIDE
    items, pairs = 0, 0
    for index in range(gl.program_id(0), gl.load(past[2]), gl.num_programs(0)):
        sequence, part, first_token, first_row, num_new, length, begin, end, is_split = item_of(index, past, fixed)
        rows = first_row + gl.arange(0, ROWS, layout=OF_SCORES)
        visible = gl.zeros([ROWS], gl.int32, OF_SCORES) + length
        if CAUSAL:
            visible = length - num_new + rows // HEADS + 1
        visible = gl.minimum(gl.maximum(visible, 0), end)
        highest = gl.full([ROWS], float("-inf"), gl.float32, OF_SCORES)
        total = gl.zeros([ROWS], gl.float32, OF_SCORES)
        sums = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        q_rows = first_token * HEADS + first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT_OF_SCORES))
        q_columns = LATENTS + gl.arange(0, BOX, layout=gl.SliceLayout(0, LEFT_OF_SCORES))
        q_at = q + q_rows.to(gl.int64)[:, None] * WIDTH + q_columns[None, :]
        q_rope = gl.load(q_at, mask=(q_rows < num_tokens * HEADS)[:, None], other=0.0)
        mbarrier.wait(q_full.index(0), items & 1)
        for pair in range(gl.maximum(gl.cdiv(end - begin, 2 * KEYS), 1)):
            phase = pairs & 1
            scores = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
            for box in gl.static_range(BOXES):
                mbarrier.wait(k_full.index(BOXES * SIDE + box), phase)
                if box == BOXES - 1:
                    right = rope_tiles.index(SIDE).permute((1, 0))
                    scores = warpgroup_mma(q_rope, right, scores, is_async=True)
                else:
                    left = q_tile.slice(box * BOX, BOX, dim=1)
                    right = k_tiles.index(SIDE).slice(box * BOX, BOX, dim=1).permute((1, 0))
                    scores = warpgroup_mma(left, right, scores, use_acc=box > 0, is_async=True)
            if SIDE == 1:  # the even tile's weights come first
                mbarrier.wait(weights_full.index(0), phase)
                higher = relative_to.index(0).load(OF_SCORES)
                kept = gl.exp2(highest - finite(higher))
                total, highest = total * kept, higher
                sums = sums * gl.convert_layout(kept, OF_SUMS)[:, None]
                values = k_tiles.index(0).slice(HALF, HALF, dim=1)
                sums = warpgroup_mma(weights_tiles.index(0), values, sums, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
            else:
                scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_free.index(3 * SIDE + 2), count=1)

            start = begin + (2 * pair + SIDE) * KEYS
            if start + KEYS > end - num_new:  # some row may not see all
                position = gl.minimum(end, start + KEYS) - KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
                hidden = (position < start)[None, :] | (position[None, :] >= visible[:, None])
                scores = gl.where(hidden, float("-inf"), scores)
            higher = gl.maximum(highest, gl.max(scores, 1) * scale)
            kept = gl.exp2(highest - finite(higher))
            weights = gl.exp2(scores * scale - finite(higher)[:, None])
            total, highest = total * kept + gl.sum(weights, 1), higher
            handed = weights.to(q_tile.dtype)
            # The other group has read the last ones: it freed this tile's columns only then.
            relative_to.index(SIDE).store(higher)
            weights_tiles.index(SIDE).store(handed)
            fence_async_shared()
            mbarrier.arrive(weights_full.index(SIDE), count=1)
            if SIDE == 1:
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(k_free.index(1), count=1)

            sums = sums * gl.convert_layout(kept, OF_SUMS)[:, None]
            values = k_tiles.index(SIDE).slice(HALF * SIDE, HALF, dim=1)
            sums = warpgroup_mma(gl.convert_layout(handed, LEFT_OF_SUMS), values, sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(k_free.index(3 * SIDE + SIDE), count=1)
            if SIDE == 0:
                mbarrier.wait(weights_full.index(1), phase)
                higher = relative_to.index(1).load(OF_SCORES)
                kept = gl.exp2(highest - finite(higher))
                total, highest = total * kept, higher
                sums = sums * gl.convert_layout(kept, OF_SUMS)[:, None]
                values = k_tiles.index(1).slice(0, HALF, dim=1)
                sums = warpgroup_mma(weights_tiles.index(1), values, sums, is_async=True)
                sums = warpgroup_mma_wait(0, deps=(sums,))
                mbarrier.arrive(k_free.index(3), count=1)
            pairs += 1
        mbarrier.arrive(q_free.index(0), count=1)

        # The other group reads this before it scores the next item's first pair, and this group waits for that.
        totals.index(SIDE).store(total)
        mbarrier.arrive(totals_full.index(SIDE), count=1)
        mbarrier.wait(totals_full.index(OTHER), items & 1)
        total += totals.index(OTHER).load(OF_SCORES)
        total = gl.where(total > 0, total, 1.0)
        write(results, sums, total, highest, sequence, part, first_token, first_row, num_new, is_split, SIDE, HEADS)
        items += 1  # noqa: SIM113


@gluon.jit
def finite(highest):
    """What weights are relative to: where a row has seen no key yet, anything."""
    return gl.where(highest == float("-inf"), 0.0, highest)


@gluon.jit
def write(
    results,
    sums,
    total,
    highest,
    sequence,
    part,
    first_token,
    first_row,
    num_new,
    is_split,
    SIDE: gl.constexpr,
    HEADS: gl.constexpr,
):
    """A group's columns of the rows, and from group 0 their log-sum-exps."""
    out, lse, partial, partial_lse, num_sequences, most_new = results
    sums = sums * gl.convert_layout(1.0 / total, OF_SUMS)[:, None]
    rows = first_row + gl.arange(0, ROWS, layout=OF_SUMS)
    columns = HALF * SIDE + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
    is_row = (rows < num_new * HEADS)[:, None]
    lse_rows = first_row + gl.arange(0, ROWS, layout=OF_SCORES)
    is_lse_row = (lse_rows < num_new * HEADS) & (SIDE == 0)
    log2 = highest + gl.log2(total)
    if is_split:
        base = ((part * num_sequences + sequence) * most_new).to(gl.int64) * HEADS
        gl.store(partial + (base + rows)[:, None] * LATENTS + columns[None, :], sums, mask=is_row)
        gl.store(partial_lse + base + lse_rows, log2, mask=is_lse_row)
    else:
        base = first_token.to(gl.int64) * HEADS
        at = out + (base + rows)[:, None] * LATENTS + columns[None, :]
        gl.store(at, sums.to(out.dtype.element_ty), mask=is_row)
        gl.store(lse + base + lse_rows, log2 * LN2, mask=is_lse_row)


def fits(q: Tensor, k_cache: Tensor, v_cache: Tensor | int) -> bool:
    """Whether `attend` takes these: V2's and V3's latents in half precision, in pages of 64."""
    has_shape = q.shape[2] == LATENT + ROPE and k_cache.shape[1:] == (64, 1, LATENT + ROPE)
    is_half = q.dtype == k_cache.dtype and q.element_size() == 2
    steps = k_cache.stride(0), k_cache.stride(1), k_cache.storage_offset()
    is_aligned = k_cache.stride(3) == 1 and all(step % 8 == 0 for step in steps)
    return has_shape and is_half and isinstance(v_cache, int) and v_cache == LATENT and q.is_contiguous() and is_aligned


def attend(
    q: Float[Tensor, "T H 576"],
    k_cache: Float[Tensor, "P 64 1 576"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
    *,
    causal: bool = True,
    part: int = PART,
) -> tuple[Float[Tensor, "T H 512"], Float[Tensor, "T H"]]:
    """As `attention.attend` over latents, on a Hopper GPU, where `fits` says so."""
    (T, H, _), B = q.shape, len(lengths)
    assert fits(q, k_cache, LATENT) and part % 64 == 0 and tables.stride(1) == 1
    num_keys = tables.shape[1] * 64
    num_parts, most_new = max(1, triton.cdiv(num_keys, part)), min(T - B + 1, MOST_NEW)
    out, lse = q.new_empty(T, H, LATENT), q.new_empty(T, H, dtype=torch.float32)
    if T == 0:
        return out, lse
    partials = (num_parts, B, most_new, H) if num_parts > 1 else (0,)
    partial, partial_lse = (q.new_empty(*partials, *width, dtype=torch.float32) for width in ((LATENT,), ()))
    most_items = (T * H // 64 + B) * num_parts
    work = torch.empty(1 + most_items, 2, dtype=torch.int32, device=q.device)
    fixed = {"HEADS": H, "PART": part, "MOST_NEW": MOST_NEW}
    results, sizes = (out, lse, partial, partial_lse, offsets, lengths), (B, num_keys, most_new)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        list_work_kernel[B,](work, offsets, lengths, B, num_keys, **fixed, ROWS=64, AT_ONCE=128)
        decode_kernel[min(most_items, multiprocessors(q.device)),](
            *(boxes(q.view(T * H, -1)), boxes(k_cache[:, :, 0]), q),
            *results,
            work,
            tables,
            scale * LOG2E,
            T,
            *sizes,
            tables.stride(0),
            **fixed,
            CAUSAL=causal,
            num_warps=4,
            maxnreg=168,
            enable_fp_fusion=True,
        )
        if num_parts > 1:
            combine_kernel[B, most_new, H](
                *results, *sizes, **fixed, VALUES=LATENT, CAUSAL=causal, enable_fp_fusion=True
            )
    return out, lse


def boxes(source: Tensor) -> TensorDescriptor:
    """What the tensor memory accelerator reads `source` by: 64 rows of one page, of 64 columns."""
    rank = source.dim()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
    return TensorDescriptor(source, list(source.shape), list(source.stride()), [1] * (rank - 2) + [64, 64], layout)
