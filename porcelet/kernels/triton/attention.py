"""Attention over cache pages, as one Triton kernel and one that joins what it split: MLA's absorbed form, grouped
queries, decoding and prompts.

A block takes some rows, new tokens times the query heads that share a key head, of one sequence, and goes over the
keys page by page, softmax and sum online (FlashAttention-2, Algorithm 1). With MLA the first columns of a key are its
value, so a tile of keys is loaded once for both products. Keys are split in parts of a fixed length, each a block of
its own, so that one long sequence fills the device; a second kernel joins the parts by their log-sum-exps
(Flash-Decoding). Where a sequence is cut depends on its length alone, so what a decoded token gets does not depend on
who shares the step.

Keys that every row of a block sees take a loop without masks. The last ones, and what lies past the end of the
sequence, where a page can hold anything, take a second one, which reads zeros there.

Left out: a sequence of more than `MOST_NEW` new tokens is never split. One pipeline for all warps: on Hopper, loading
and both products could be different warps' work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from porcelet.kernels.generations import generation_of
from porcelet.kernels.latent8 import LATENT, ROPE, parts_of
from porcelet.kernels.triton.device import arch_of
from porcelet.kernels.triton.e4m3 import from_e4m3

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

PART = 1024  # keys of a split sequence that a block takes
MOST_NEW = 8  # new tokens of a sequence that is split
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_sequences", "num_keys", "most_new"])
def attend_kernel(
    q,  # [T, H, FIRST + REST]
    k,  # [P, PAGE, K, FIRST]
    k_rest,  # [P, PAGE, K, REST]; REST may be 0
    v,  # [P, PAGE, K, VALUES]; not read where SHARED
    k_boxes,  # descriptors of the three, or None
    rest_boxes,
    v_boxes,
    scales,  # [P, PAGE, K, FIRST / 128] where EIGHT_BIT
    out,  # [T, H, VALUES]
    lse,  # [T, H]
    partial,  # [parts, B, most_new, H, VALUES]
    partial_lse,  # [parts, B, most_new, H], to base 2
    offsets,  # [B + 1]
    lengths,  # [B]
    tables,  # [B, max_pages]
    scale,  # of scores, times log2(e)
    num_sequences,
    num_keys,  # beyond them a sequence has none here
    most_new,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    rest_page,
    rest_slot,
    rest_head,
    v_page,
    v_slot,
    v_head,
    scales_page,
    scales_slot,
    tables_row,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads a key head
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    PAGE: tl.constexpr,
    PART: tl.constexpr,
    MOST_NEW: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,  # values are the first columns of the keys
    EIGHT_BIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL: tl.constexpr,  # keys at a time where masks are needed
    STAGES: tl.constexpr,
):
    block, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = _sequence_of(block, offsets, num_sequences, GROUP, ROWS)
    first_token = tl.load(offsets + sequence).to(tl.int32)
    num_new = tl.load(offsets + sequence + 1).to(tl.int32) - first_token
    past = tl.load(lengths + sequence).to(tl.int32) - num_new
    first_row = (block - first_token * GROUP // ROWS - sequence) * ROWS
    if first_row >= num_new * GROUP:
        return
    last_row = tl.minimum(first_row + ROWS, num_new * GROUP) - 1
    least = _visible(first_row // GROUP, past, num_new, num_keys, CAUSAL)
    most = _visible(last_row // GROUP, past, num_new, num_keys, CAUSAL)
    is_split = (num_new <= MOST_NEW) & (tl.minimum(past + num_new, num_keys) > PART)
    begin = part * PART
    end = most
    if is_split:
        end = tl.minimum(begin + PART, most)
    if (part > 0) & ((begin >= end) | (is_split == 0)):
        return

    rows = first_row + tl.arange(0, ROWS)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    is_row = rows <= last_row
    visible = tl.minimum(tl.zeros([ROWS], tl.int32) + most, _visible(token, past, num_new, num_keys, CAUSAL))
    q_rows = q + (first_token + token).to(tl.int64)[:, None] * q_token + head[:, None] * q_head
    FIRST_PADDED: tl.constexpr = padded(FIRST)
    REST_PADDED: tl.constexpr = padded(REST)
    VALUES_PADDED: tl.constexpr = padded(VALUES)
    first = tl.arange(0, FIRST_PADDED)[None, :]
    q_first = tl.load(q_rows + first, mask=is_row[:, None] & (first < FIRST), other=0.0)
    q_rest = q_first
    if REST > 0:
        rest = tl.arange(0, REST_PADDED)[None, :]
        q_rest = tl.load(q_rows + FIRST + rest, mask=is_row[:, None] & (rest < REST), other=0.0)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUES_PADDED], tl.float32)
    table = tables + sequence.to(tl.int64) * tables_row
    unmasked = begin + tl.maximum(tl.minimum(least, end) - begin, 0) // KEYS * KEYS
    for MASKED in tl.static_range(2):
        highest, total, sums = _over_keys(
            highest,
            total,
            sums,
            q_first,
            q_rest,
            visible,
            unmasked if MASKED else begin,
            end if MASKED else unmasked,
            kv_head,
            table,
            k,
            k_rest,
            v,
            k_boxes,
            rest_boxes,
            v_boxes,
            scales,
            scale,
            k_page,
            k_slot,
            k_head,
            rest_page,
            rest_slot,
            rest_head,
            v_page,
            v_slot,
            v_head,
            scales_page,
            scales_slot,
            FIRST,
            REST,
            VALUES,
            PAGE,
            SHARED,
            EIGHT_BIT,
            TAIL if MASKED else KEYS,
            STAGES,
            MASKED,
        )
    total = tl.where(total > 0, total, 1.0)
    result, total_log2 = sums / total[:, None], highest + tl.log2(total)
    columns = tl.arange(0, VALUES_PADDED)[None, :]
    is_stored = is_row[:, None] & (columns < VALUES)
    if is_split:
        at = ((part * num_sequences + sequence) * most_new + token).to(tl.int64) * HEADS + head
        tl.store(partial + at[:, None] * VALUES + columns, result, mask=is_stored)
        tl.store(partial_lse + at, total_log2, mask=is_row)
    else:
        at = (first_token + token).to(tl.int64) * HEADS + head
        tl.store(out + at[:, None] * VALUES + columns, result.to(out.dtype.element_ty), mask=is_stored)
        tl.store(lse + at, total_log2 * LN2, mask=is_row)


@triton.jit
def _over_keys(
    highest,  # [ROWS], of a row's scores so far, to base 2
    total,  # [ROWS], of its weights
    sums,  # [ROWS, VALUES], of weighted values
    q_first,
    q_rest,
    visible,
    begin,
    end,
    kv_head,
    table,
    k,
    k_rest,
    v,
    k_boxes,
    rest_boxes,
    v_boxes,
    scales,
    scale,
    k_page,
    k_slot,
    k_head,
    rest_page,
    rest_slot,
    rest_head,
    v_page,
    v_slot,
    v_head,
    scales_page,
    scales_slot,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    PAGE: tl.constexpr,
    SHARED: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax goes on over keys `begin` to `end`."""
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        page, slot, left = tl.load(table + start // PAGE), start % PAGE, end - start
        keys = _tile(k, k_boxes, page, slot, kv_head, left, k_page, k_slot, k_head, FIRST, KEYS, MASKED)
        if EIGHT_BIT:
            factors = scales + page.to(tl.int64) * scales_page + slot * scales_slot
            keys = _widen(keys, factors, left, scales_slot, FIRST, KEYS, MASKED).to(q_first.dtype)
        scores = tl.dot(q_first, tl.trans(keys))
        if REST > 0:
            others = _tile(
                k_rest, rest_boxes, page, slot, kv_head, left, rest_page, rest_slot, rest_head, REST, KEYS, MASKED
            )
            if EIGHT_BIT:
                others = others.to(q_rest.dtype)
            scores = tl.dot(q_rest, tl.trans(others), scores)
        if MASKED:
            hidden = start + tl.arange(0, KEYS)[None, :] >= visible[:, None]
            scores = tl.where(hidden, float("-inf"), scores)
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        base = higher
        if MASKED:  # a row may have seen no key yet
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, kept = tl.exp2(scores * scale - base[:, None]), tl.exp2(highest - base)
        total = total * kept + tl.sum(weights, 1)
        if SHARED:
            values = keys
        else:
            values = _tile(v, v_boxes, page, slot, kv_head, left, v_page, v_slot, v_head, VALUES, KEYS, MASKED)
        sums = tl.dot(weights.to(values.dtype), values, sums * kept[:, None])
        highest = higher
    return highest, total, sums


@triton.jit(do_not_specialize=["num_sequences", "num_keys", "most_new"])
def combine_kernel(
    out,
    lse,
    partial,
    partial_lse,
    offsets,
    lengths,
    num_sequences,
    num_keys,
    most_new,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    PART: tl.constexpr,
    MOST_NEW: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One row of a split sequence from its parts, in their order."""
    sequence, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_token = tl.load(offsets + sequence).to(tl.int32)
    num_new = tl.load(offsets + sequence + 1).to(tl.int32) - first_token
    past = tl.load(lengths + sequence).to(tl.int32) - num_new
    if (token >= num_new) | (num_new > MOST_NEW) | (tl.minimum(past + num_new, num_keys) <= PART):
        return
    num_parts = tl.cdiv(_visible(token, past, num_new, num_keys, CAUSAL), PART)
    columns = tl.arange(0, padded(VALUES))
    highest, total = float("-inf"), 0.0
    sums = tl.zeros([padded(VALUES)], tl.float32)
    for part in range(num_parts):
        at = ((part * num_sequences + sequence) * most_new + token).to(tl.int64) * HEADS + head
        log2 = tl.load(partial_lse + at)
        higher = tl.maximum(highest, log2)
        kept, weight = tl.exp2(highest - higher), tl.exp2(log2 - higher)
        values = tl.load(partial + at * VALUES + columns, mask=columns < VALUES, other=0.0)
        sums = sums * kept + values * weight
        total = total * kept + weight
        highest = higher
    at = (first_token + token).to(tl.int64) * HEADS + head
    total = tl.where(total > 0, total, 1.0)
    result = sums / total
    tl.store(out + at * VALUES + columns, result.to(out.dtype.element_ty), mask=columns < VALUES)
    tl.store(lse + at, (highest + tl.log2(total)) * LN2)


@triton.jit
def _sequence_of(block, offsets, num_sequences, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Sequence b's blocks begin at offsets[b] * GROUP // ROWS + b, which leaves each enough of them: the last b that
    does so at or before `block`."""
    low, high = block * 0, block * 0 + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(offsets + middle).to(tl.int32) * GROUP // ROWS + middle <= block
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@triton.jit
def _visible(token, past, num_new, num_keys, CAUSAL: tl.constexpr):
    """How many keys a sequence's new token sees."""
    seen = past + (token + 1 if CAUSAL else num_new)
    return tl.minimum(tl.maximum(seen, 0), num_keys)


@triton.constexpr_function
def padded(width):
    """What a matrix instruction takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _tile(
    source,
    boxes,
    page,
    slot,
    head,
    left,
    stride_page,
    stride_slot,
    stride_head,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """KEYS rows of a page from `slot` on, [KEYS, padded WIDTH]; where MASKED, zeros for the ones behind `left`."""
    rows, columns = tl.arange(0, KEYS)[:, None], tl.arange(0, padded(WIDTH))[None, :]
    if boxes is not None and not MASKED:
        tile = tl.reshape(boxes.load([page.to(tl.int32), slot, head, 0]), [KEYS, WIDTH])
    else:
        at = source + page.to(tl.int64) * stride_page + head * stride_head + (slot + rows) * stride_slot + columns
        if MASKED:
            tile = tl.load(at, mask=(rows < left) & (columns < WIDTH), other=0)
        elif padded(WIDTH) > WIDTH:
            tile = tl.load(at, mask=columns < WIDTH, other=0)
        else:
            tile = tl.load(at)
    return tile


@triton.jit
def _widen(
    tile,
    factors,
    left,
    stride_slot,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The values of e4m3 bytes, each 128 of a row by their scale."""
    rows, columns = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    is_read = (rows < left) | (MASKED == 0)
    scale = tl.zeros([KEYS, WIDTH], tl.float32)
    for group in tl.static_range(WIDTH // 128):
        factor = tl.load(factors + rows * stride_slot + group, mask=is_read, other=0.0) * 256.0
        scale = tl.where(columns[None, :] // 128 == group, factor[:, None], scale)
    return from_e4m3(tile).to(tl.float32) * scale


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for."""

    group: int  # query heads a key head
    first: int  # columns of a key that one product takes: with MLA those that are the value
    rest: int  # the others
    values: int
    is_shared: bool  # values are the first columns of the keys
    is_eight_bit: bool
    is_decode: bool  # every sequence has one new token
    fits_boxes: bool  # the tensor memory accelerator can read the cache


@dataclass(frozen=True)
class Tiles:
    """What a block takes at a time."""

    rows: int
    keys: int
    tail: int  # keys at a time where masks are needed
    stages: int
    warps: int
    descriptors: bool  # by the tensor memory accelerator


def choose_tiles(shape: Shape, arch: int) -> Tiles:
    """Rows for the widest matrix instruction that they fill; as many keys and stages as shared memory holds."""
    generation = generation_of(arch)
    shared = generation.shared_kib
    descriptors = generation.has_tensor_memory_accelerator and shape.fits_boxes
    rows = min(64, padded(shape.group)) if shape.is_decode else 64
    if not shape.is_shared:
        rows = rows if shape.is_decode or shared < 160 else 128
        keys = 64 if shared > 160 else 32
        return Tiles(rows, keys, keys, 2, 8 if rows == 128 else 4, descriptors)
    if shared < 160:
        rows = min(rows, 32)
        return Tiles(rows, 16, 16, 2, 8 if rows > 16 and shape.is_eight_bit else 4, descriptors)
    if shape.is_eight_bit:  # widened values pass through registers
        rows = rows if arch >= 90 else min(rows, 32)
        return Tiles(rows, 32, 16, 2, 8 if rows > 16 else 4, descriptors)
    keys = 64 if arch == 90 else 32  # on Blackwell Triton 3.6 keeps tiles twice, and 64 would not fit
    return Tiles(rows, keys, 16, 2, 8 if rows == 64 else 4, descriptors)


def attend(
    q: Float[Tensor, "T H Hd"],
    k_cache: Shaped[Tensor, "P page K cached"],
    v_cache: Float[Tensor, "P page K Vd"] | int,
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
    *,
    causal: bool = True,
    part: int = PART,
) -> tuple[Float[Tensor, "T H Vd"], Float[Tensor, "T H"]]:
    """Each sequence's new tokens, at least one, attend to its `lengths` cached ones, themselves included; also
    log-sum-exps, float32.

    `v_cache` may be a number of columns: values are then the first ones of their head's keys. A `k_cache` of
    bytes holds 8-bit latents (`to_latent8`). Without `causal` every new token sees all keys. `part` is how many keys of
    a split sequence a block takes, whole pages. Keys behind the pages that `tables` list are not seen. A length may be
    less than the new tokens; a token that sees no key gets zeros and -inf.
    """
    (T, H, _), (_, page_size, K, _), B = q.shape, k_cache.shape, len(lengths)
    shape, (k, k_rest, v, scales) = _sources(q, k_cache, v_cache, B)
    tiles = choose_tiles(shape, arch_of(q.device))
    assert H % K == 0 and part % page_size == page_size % tiles.keys == 0
    assert q.stride(2) == k.stride(3) == k_rest.stride(3) == v.stride(3) == tables.stride(1) == 1
    num_keys = tables.shape[1] * page_size
    num_parts, most_new = max(1, triton.cdiv(num_keys, part)), min(T - B + 1, MOST_NEW)
    out, lse = q.new_empty(T, H, shape.values), q.new_empty(T, H, dtype=torch.float32)
    if T == 0:
        return out, lse
    partials = (num_parts, B, most_new, H) if num_parts > 1 else (0,)
    partial, partial_lse = (q.new_empty(*partials, *width, dtype=torch.float32) for width in ((shape.values,), ()))
    results, sizes = (out, lse, partial, partial_lse, offsets, lengths), (B, num_keys, most_new)
    fixed: dict[str, Any] = {
        "HEADS": H,
        "VALUES": shape.values,
        "PART": part,
        "MOST_NEW": MOST_NEW,
        "CAUSAL": causal,
    }
    with torch.cuda.device_of(q):  # Triton launches on the current device
        attend_kernel[T * shape.group // tiles.rows + B, K, num_parts](
            q,
            *(k, k_rest, v, *(_boxes(source, tiles) for source in (k, k_rest, v)), scales),
            *results,
            tables,
            scale * LOG2E,
            *sizes,
            *q.stride()[:2],
            *(*k.stride()[:3], *k_rest.stride()[:3], *v.stride()[:3], *scales.stride()[:2]),
            tables.stride(0),
            **fixed,
            GROUP=shape.group,
            FIRST=shape.first,
            REST=shape.rest,
            PAGE=page_size,
            SHARED=shape.is_shared,
            EIGHT_BIT=shape.is_eight_bit,
            ROWS=tiles.rows,
            KEYS=tiles.keys,
            TAIL=tiles.tail,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
            enable_fp_fusion=True,
        )
        if num_parts > 1:
            combine_kernel[B, most_new, H](*results, *sizes, **fixed, enable_fp_fusion=True)
    return out, lse


def _sources(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | int, num_sequences: int
) -> tuple[Shape, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Keys in two pieces, values and scales, each as a view; what is not there is another view that nothing reads."""
    width, group, is_decode = q.shape[2], q.shape[1] // k_cache.shape[2], len(q) == num_sequences
    if k_cache.dtype == torch.uint8:
        k, scales, k_rest = parts_of(k_cache)
        assert v_cache == LATENT and width == LATENT + ROPE and k_cache.shape[2] == 1
        return Shape(group, LATENT, ROPE, LATENT, True, True, is_decode, False), (k, k_rest, k, scales)
    assert width == k_cache.shape[3] and q.dtype == k_cache.dtype
    is_shared = isinstance(v_cache, int)
    first = v_cache if isinstance(v_cache, int) else 1 << (width.bit_length() - 1)
    k, k_rest = k_cache[..., :first], k_cache[..., first:] if first < width else k_cache
    v = k if isinstance(v_cache, int) else v_cache
    assert v.dtype == k.dtype
    fits_boxes = all(_fits_box(source) for source in (k, k_rest, v))
    return Shape(group, first, width - first, v.shape[3], is_shared, False, is_decode, fits_boxes), (k, k_rest, v, k)


def _fits_box(source: Tensor) -> bool:
    is_aligned = all(n * source.element_size() % 16 == 0 for n in (*source.stride()[:3], source.storage_offset()))
    return is_aligned and source.shape[3] == padded(source.shape[3])


def _boxes(source: Tensor, tiles: Tiles) -> TensorDescriptor | None:
    """What the tensor memory accelerator reads `source` by: some keys of one page and head at a time."""
    if not tiles.descriptors:
        return None
    return TensorDescriptor(source, source.shape, source.stride(), [1, tiles.keys, 1, source.shape[3]])
