"""What reads and writes each value about once: norms, gates, rotation, cache writes, log-probabilities. A program takes
a row, or a piece of one; sums are float32, and the result is rounded once.

Quantised forms round what they give to FP8 for a product with FP8 weights (matmul.py), so that values cross memory once
and in one byte: DeepSeek-V3 multiplies so. Backward passes read what the forward pass read, and nothing it made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from porcelet.kernels.linear import FP8_BLOCK
from porcelet.kernels.triton.e4m3 import to_e4m3
from porcelet.kernels.triton.matmul import FP8Rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PIECE = 1024  # values of a row that a program takes where it need not see the whole
SUMMED = 128  # programs whose sums of a weight's gradient are added in the end


# ---- norms ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["eps", "scales_group"])
def norm_kernel(
    x,  # [rows, W]
    other,  # the same, where ADDS
    weight,  # [W]
    out,  # [rows, W], bytes where QUANTIZES
    total,  # x + other where ADDS
    scales,  # [W / 128, rows] where QUANTIZES
    W,
    eps,
    x_row,
    other_row,
    scales_group,
    ADDS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_there = columns < W
    value = tl.load(x + row * x_row + columns, mask=is_there, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(other + row * other_row + columns, mask=is_there, other=0.0)).to(
            value.dtype
        )
        tl.store(total + row * W + columns, value, mask=is_there)
    wide = value.to(tl.float32)
    normed = (wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / W + eps))).to(value.dtype)
    result = normed.to(tl.float32) * tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    if QUANTIZES:
        _store_quantized(result, out + row * W, scales + row, scales_group, columns, W, POWER_OF_TWO, BLOCK)
    else:
        tl.store(out + row * W + columns, result.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_backward_kernel(
    x, weight, grad, x_grad, weight_grads, rows, W, eps, x_row, grad_row, SUMMED: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = r · (w · dy) - x · r³ / W · Σ(w · dy · x), and of every SUMMED-th row the sum of dy · x · r."""
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_there = columns < W
    factor = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for row in range(first, rows, SUMMED):
        at = tl.zeros([], tl.int64) + row
        wide = tl.load(x + at * x_row + columns, mask=is_there, other=0.0).to(tl.float32)
        dy = tl.load(grad + at * grad_row + columns, mask=is_there, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / W + eps)
        inner = tl.sum(factor * dy * wide, 0)
        dx = inverse * (factor * dy) - wide * (inverse * inverse * inverse * inner / W)
        tl.store(x_grad + at * W + columns, dx.to(x_grad.dtype.element_ty), mask=is_there)
        summed += dy * wide * inverse
    tl.store(weight_grads + first * W + columns, summed, mask=is_there)


def norm(
    x: Float[Tensor, "rows W"], weight: Float[Tensor, "W"], eps: float, other: Float[Tensor, "rows W"] | None = None
) -> tuple[Float[Tensor, "rows W"], Float[Tensor, "rows W"]]:
    """RMSNorm of x, or of x + other; and that sum, or x."""
    out, total = torch.empty(x.shape, dtype=torch.result_type(x, weight), device=x.device), x
    if other is not None:
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _norm(x, weight, eps, other, out, total, None, power_of_two=False)
    return out, total


def norm_quantized(
    x: Float[Tensor, "rows W"],
    weight: Float[Tensor, "W"],
    eps: float,
    other: Float[Tensor, "rows W"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[FP8Rows, Float[Tensor, "rows W"]]:
    """`norm` with its result in FP8, as `matmul.quantize_rows` would round it."""
    rows, total = FP8Rows.empty(len(x), x.shape[1], x.device), x
    if other is not None:
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _norm(x, weight, eps, other, rows.values.view(torch.uint8), total, rows.scale, power_of_two=power_of_two)
    return rows, total


def _norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    other: Tensor | None,
    out: Tensor,
    total: Tensor,
    scales: Tensor | None,
    *,
    power_of_two: bool,
) -> None:
    rows, W = x.shape
    assert x.stride(1) == weight.stride(0) == 1 and (other is None or other.stride(1) == 1)
    if not rows:
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device
        norm_kernel[rows,](
            x,
            x if other is None else other,
            weight,
            out,
            total,
            out if scales is None else scales,
            W,
            eps,
            x.stride(0),
            0 if other is None else other.stride(0),
            0 if scales is None else scales.stride(1),
            ADDS=other is not None,
            QUANTIZES=scales is not None,
            POWER_OF_TWO=power_of_two,
            BLOCK=max(FP8_BLOCK, triton.next_power_of_2(W)),
            num_warps=4 if W <= 2048 else 8,
        )


def norm_backward(
    x: Float[Tensor, "rows W"], weight: Float[Tensor, "W"], grad: Float[Tensor, "rows W"], eps: float
) -> tuple[Float[Tensor, "rows W"], Float[Tensor, "W"]]:
    """Gradients of x and weight."""
    rows, W = x.shape
    assert x.stride(1) == grad.stride(1) == weight.stride(0) == 1
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight_grads = torch.zeros(min(SUMMED, rows), W, dtype=torch.float32, device=x.device)
    if rows:
        with torch.cuda.device_of(x):
            norm_backward_kernel[len(weight_grads),](
                x,
                weight,
                grad,
                x_grad,
                weight_grads,
                rows,
                W,
                eps,
                x.stride(0),
                grad.stride(0),
                SUMMED=len(weight_grads),
                BLOCK=triton.next_power_of_2(W),
                num_warps=4 if W <= 2048 else 8,
            )
    return x_grad, weight_grads.sum(0).to(weight.dtype)


# ---- gates ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["scales_group"])
def gate_kernel(
    gate,  # [rows, F]
    up,
    out,  # bytes where QUANTIZES
    scales,  # [F / 128, rows] where QUANTIZES
    F,
    gate_row,
    up_row,
    scales_group,
    QUANTIZES: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < F
    g = tl.load(gate + row * gate_row + columns, mask=is_there, other=0.0)
    u = tl.load(up + row * up_row + columns, mask=is_there, other=0.0).to(tl.float32)
    wide = g.to(tl.float32)
    result = wide / (1.0 + tl.exp(-wide)) * u
    if QUANTIZES:
        _store_quantized(result, out + row * F, scales + row, scales_group, columns, F, POWER_OF_TWO, BLOCK)
    else:
        tl.store(out + row * F + columns, result.to(out.dtype.element_ty), mask=is_there)


@triton.jit
def gate_backward_kernel(gate, up, grad, gate_grad, up_grad, F, gate_row, up_row, grad_row, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < F
    g = tl.load(gate + row * gate_row + columns, mask=is_there, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=is_there, other=0.0).to(tl.float32)
    dy = tl.load(grad + row * grad_row + columns, mask=is_there, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    dg, du = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid)), dy * g * sigmoid
    tl.store(gate_grad + row * F + columns, dg.to(gate_grad.dtype.element_ty), mask=is_there)
    tl.store(up_grad + row * F + columns, du.to(up_grad.dtype.element_ty), mask=is_there)


def gate(gate: Float[Tensor, "rows F"], up: Float[Tensor, "rows F"]) -> Float[Tensor, "rows F"]:
    """silu(gate) · up."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _gate(gate, up, out, None, power_of_two=False)
    return out


def gate_quantized(
    gate: Float[Tensor, "rows F"], up: Float[Tensor, "rows F"], *, power_of_two: bool = False
) -> FP8Rows:
    """`gate` with its result in FP8, as `matmul.quantize_rows` would round it."""
    rows = FP8Rows.empty(len(gate), gate.shape[1], gate.device)
    _gate(gate, up, rows.values.view(torch.uint8), rows.scale, power_of_two=power_of_two)
    return rows


def _gate(gate: Tensor, up: Tensor, out: Tensor, scales: Tensor | None, *, power_of_two: bool) -> None:
    rows, F = gate.shape
    assert gate.stride(1) == up.stride(1) == 1
    if not out.numel():
        return
    with torch.cuda.device_of(gate):
        gate_kernel[rows, triton.cdiv(F, PIECE)](
            gate,
            up,
            out,
            out if scales is None else scales,
            F,
            gate.stride(0),
            up.stride(0),
            0 if scales is None else scales.stride(1),
            QUANTIZES=scales is not None,
            POWER_OF_TWO=power_of_two,
            BLOCK=PIECE,
        )


def gate_backward(
    gate: Float[Tensor, "rows F"], up: Float[Tensor, "rows F"], grad: Float[Tensor, "rows F"]
) -> tuple[Float[Tensor, "rows F"], Float[Tensor, "rows F"]]:
    """Gradients of both."""
    rows, F = gate.shape
    assert gate.stride(1) == up.stride(1) == grad.stride(1) == 1
    grads = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in (gate, up)]
    if gate.numel():
        strides = gate.stride(0), up.stride(0), grad.stride(0)
        with torch.cuda.device_of(gate):
            gate_backward_kernel[rows, triton.cdiv(F, PIECE)](gate, up, grad, *grads, F, *strides, BLOCK=PIECE)
    return grads[0], grads[1]


# ---- rotation and cache writes --------------------------------------------------------------------------------------


@triton.jit
def rope_kernel(
    x,  # [T, heads, R]
    cos,  # [T, R / 2]
    sin,
    out,  # [T, heads, R]
    heads,
    x_token,
    x_head,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Pairs come out half-split. Backward, they come in so, turn the other way, and go where they were."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PADDED)[None, :]
    is_there = (head < heads) & (pair < HALF)
    c = tl.load(cos + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    first_at, second_at = pair, pair + HALF
    if INTERLEAVED:
        first_at, second_at = 2 * pair, 2 * pair + 1
    source, target = x + token * x_token + head * x_head, out + (token * heads + head) * (2 * HALF)
    if BACKWARD:
        first = tl.load(source + pair, mask=is_there, other=0.0).to(tl.float32)
        second = tl.load(source + pair + HALF, mask=is_there, other=0.0).to(tl.float32)
        tl.store(target + first_at, (first * c + second * s).to(out.dtype.element_ty), mask=is_there)
        tl.store(target + second_at, (second * c - first * s).to(out.dtype.element_ty), mask=is_there)
    else:
        first = tl.load(source + first_at, mask=is_there, other=0.0).to(tl.float32)
        second = tl.load(source + second_at, mask=is_there, other=0.0).to(tl.float32)
        tl.store(target + pair, (first * c - second * s).to(out.dtype.element_ty), mask=is_there)
        tl.store(target + pair + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=is_there)


def rotate(
    x: Float[Tensor, "T heads R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
    *,
    backward: bool = False,
) -> Float[Tensor, "T heads R"]:
    """The op `rope`; or what its input's gradient is, given its output's."""
    T, heads, R = x.shape
    assert x.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if T:
        width = min(16, triton.next_power_of_2(heads))
        with torch.cuda.device_of(x):
            rope_kernel[T, triton.cdiv(heads, width)](
                x,
                cos,
                sin,
                out,
                heads,
                *x.stride()[:2],
                HALF=R // 2,
                INTERLEAVED=interleaved,
                BACKWARD=backward,
                HEADS=width,
                PADDED=triton.next_power_of_2(R // 2),
            )
    return out


@triton.jit
def write_kernel(
    plain,  # [T, heads, WIDTH]: written as it is
    turned,  # [T, heads, 2 · HALF]: rotated on its way
    cos,
    sin,
    slots,  # [T]
    plain_cache,  # [P, PAGE, heads, WIDTH]
    turned_cache,  # [P, PAGE, heads, 2 · HALF]
    plain_token,
    plain_head,
    turned_token,
    turned_head,
    plain_page,
    plain_slot,
    plain_cache_head,
    turned_page,
    turned_slot,
    turned_cache_head,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    page, place = slot // PAGE, slot % PAGE
    columns, pair = tl.arange(0, WIDTH_PADDED), tl.arange(0, HALF_PADDED)
    values = tl.load(plain + token * plain_token + head * plain_head + columns, mask=columns < WIDTH, other=0.0)
    at = plain_cache + page * plain_page + place * plain_slot + head * plain_cache_head
    tl.store(at + columns, values.to(plain_cache.dtype.element_ty), mask=columns < WIDTH)
    first_at, second_at = pair, pair + HALF
    if INTERLEAVED:
        first_at, second_at = 2 * pair, 2 * pair + 1
    source, is_there = turned + token * turned_token + head * turned_head, pair < HALF
    first = tl.load(source + first_at, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(source + second_at, mask=is_there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + pair, mask=is_there, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pair, mask=is_there, other=0.0).to(tl.float32)
    at = turned_cache + page * turned_page + place * turned_slot + head * turned_cache_head
    tl.store(at + pair, (first * c - second * s).to(turned_cache.dtype.element_ty), mask=is_there)
    tl.store(at + pair + HALF, (second * c + first * s).to(turned_cache.dtype.element_ty), mask=is_there)


def write_rotated(
    plain_cache: Float[Tensor, "P page K W"],
    turned_cache: Float[Tensor, "P page K R"],
    plain: Float[Tensor, "T K W"],
    turned: Float[Tensor, "T K R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
    slots: Int[Tensor, "T"],
) -> None:
    """Values as they are and keys rotated, each into its slot: one pass. With MLA `plain` are latents."""
    (T, heads, width), half = plain.shape, turned.shape[2] // 2
    assert plain.stride(2) == turned.stride(2) == plain_cache.stride(3) == turned_cache.stride(3) == 1
    assert cos.is_contiguous() and sin.is_contiguous()
    if not T:
        return
    with torch.cuda.device_of(plain):
        write_kernel[T, heads](
            plain,
            turned,
            cos,
            sin,
            slots,
            plain_cache,
            turned_cache,
            *plain.stride()[:2],
            *turned.stride()[:2],
            *plain_cache.stride()[:3],
            *turned_cache.stride()[:3],
            PAGE=plain_cache.shape[1],
            WIDTH=width,
            HALF=half,
            INTERLEAVED=interleaved,
            WIDTH_PADDED=triton.next_power_of_2(width),
            HALF_PADDED=triton.next_power_of_2(half),
            num_warps=1 if width <= 128 else 4,
        )


# ---- log-probabilities ----------------------------------------------------------------------------------------------


@triton.jit
def logprob_kernel(logits, targets, out, lse, V, row_stride, BLOCK: tl.constexpr):
    """Of each row's target, and the log-sum-exp, read once."""
    row = tl.program_id(0).to(tl.int64)
    highest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * row_stride + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(values - base), 0)
        highest = higher
    sum_log = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(total)
    chosen = tl.load(logits + row * row_stride + tl.load(targets + row)).to(tl.float32)
    tl.store(out + row, chosen - sum_log)
    tl.store(lse + row, sum_log)


@triton.jit
def logprob_backward_kernel(logits, targets, lse, grad, V, row_stride, BLOCK: tl.constexpr):
    """Logits become their gradients: grad · (1 of the target - softmax)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * row_stride + columns
    values = tl.load(at, mask=columns < V, other=float("-inf")).to(tl.float32)
    share = tl.exp(values - tl.load(lse + row))
    is_target = columns == tl.load(targets + row)
    result = tl.load(grad + row) * (tl.where(is_target, 1.0, 0.0) - share)
    tl.store(at, result.to(logits.dtype.element_ty), mask=columns < V)


def logprobs(
    logits: Float[Tensor, "rows V"], targets: Int[Tensor, "rows"]
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """log softmax(logits)[targets] and log-sum-exps, in float32."""
    out, lse = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    assert logits.stride(1) == 1
    if len(logits):
        with torch.cuda.device_of(logits):
            logprob_kernel[len(logits),](logits, targets, out, lse, logits.shape[1], logits.stride(0), BLOCK=4096)
    return out, lse


def logprobs_backward_(
    logits: Float[Tensor, "rows V"],
    targets: Int[Tensor, "rows"],
    lse: Float[Tensor, "rows"],
    grad: Float[Tensor, "rows"],
) -> Float[Tensor, "rows V"]:
    """The gradient of logits, in their place."""
    rows, V = logits.shape
    assert logits.stride(1) == 1 and grad.is_contiguous()
    if rows:
        with torch.cuda.device_of(logits):
            grid = rows, triton.cdiv(V, PIECE)
            logprob_backward_kernel[grid](logits, targets, lse, grad, V, logits.stride(0), BLOCK=PIECE)
    return logits


# ---- FP8 ------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_quantized(result, values, scales, scales_group, columns, W, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr):
    """A row's values by the largest magnitude of each 128, and these scales."""
    groups = tl.reshape(result, [BLOCK // 128, 128])
    factor = tl.maximum(tl.max(tl.abs(groups), 1), 1e-4) / 448.0
    if POWER_OF_TWO:
        factor = tl.exp2(tl.ceil(tl.log2(factor)))
    quantized = tl.reshape(to_e4m3(groups / factor[:, None]), [BLOCK])
    tl.store(values + columns, quantized, mask=columns < W)
    group = tl.min(columns, 0) // 128 + tl.arange(0, BLOCK // 128)
    tl.store(scales + group.to(tl.int64) * scales_group, factor, mask=group * 128 < W)
