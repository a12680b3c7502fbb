"""Drawing tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels.cpu.target import available, is_float
from porcelet.kernels.sample import allow, sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

if available():
    from porcelet.kernels.cpu import _native


@sample.body("cpu", when=is_float, available=available)
def sample_cpu(
    logits: Float[Tensor, "rows V"],
    rows: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"],
    top_k: Int[Tensor, "B"],
    top_p: Float[Tensor, "B"],
    min_p: Float[Tensor, "B"],
    uniform: Float[Tensor, "B"],
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """A few passes a draw, nothing sorted but what lies next to a cut. Probabilities are float32, their sums float64:
    the reference's token, unless `uniform` or a cut falls within that rounding of another."""
    assert rows.dtype == top_k.dtype == torch.int64
    assert temperature.dtype == top_p.dtype == min_p.dtype == torch.float32
    logits = logits.contiguous()
    rows, temperature, top_k = rows.contiguous(), temperature.contiguous(), top_k.contiguous()
    top_p, min_p, uniform = top_p.contiguous(), min_p.contiguous(), uniform.double().contiguous()
    cuts = top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr()
    tokens, logprobs = torch.empty(len(rows), dtype=torch.int64), logits.new_empty(len(rows))
    _native.sample(
        logits.data_ptr(),
        (rows.data_ptr(), temperature.data_ptr(), *cuts, uniform.data_ptr()),
        len(rows),
        logits.shape[1],
        tokens.data_ptr(),
        logprobs.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, logprobs


@allow.body("cpu", when=is_float, available=available)
def allow_cpu(logits: Float[Tensor, "B V"], masks: UInt8[Tensor, "B bytes"]) -> Float[Tensor, "B V"]:
    """One pass."""
    B, V = logits.shape
    assert masks.dtype == torch.uint8 and masks.shape == (B, -(-V // 8))
    logits, masks = logits.contiguous(), masks.contiguous()
    out = torch.empty_like(logits)
    _native.allow(logits.data_ptr(), masks.data_ptr(), out.data_ptr(), B, V)
    return out
