"""Native bodies for the CPU, in C++: for AVX-512 VNNI, AVX-512, AVX2 or any processor, chosen at run time.

Importing this package registers them on their ops. An installation that found no C++ compiler has no native module and
keeps the torch bodies. PORCELET_ISA in the environment names a lesser instruction set, for tests and comparison.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

# torch first: it brings its own libgomp.so.1, which the native module then shares; else there were two thread pools.
import torch
from torch import Tensor

from porcelet.kernels import Key
from porcelet.kernels.attention import attention_paged, cache_write
from porcelet.kernels.linear import GROUP, Int8Weight, Weight, linear
from porcelet.kernels.pointwise import rms_norm, rope, silu_mul
from porcelet.kernels.sample import allow, sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

# A module that is there and does not load raises here; only one that was never built is done without.
_BUILT = importlib.util.find_spec("porcelet.kernels.cpu._native") is not None
if _BUILT:
    from porcelet.kernels.cpu import _native


def available() -> bool:
    """Whether the native module was built."""
    return _BUILT


def isa() -> str:
    """The instruction set in use. InputError if `PORCELET_ISA` names an unknown one or one this processor lacks."""
    assert _BUILT
    return _native.isa()


def _is_int8(key: Key) -> bool:
    return key.format == "Int8Weight" and _is_float(key)


def _is_float(key: Key) -> bool:
    return key.device == "cpu" and key.dtype == torch.float32 and not key.needs_grad


@linear.body("cpu_int8", when=_is_int8, available=available)
def linear_int8(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ with x quantised to 16 bits a token and group of 32: within 1e-4 of the reference's largest value.

    The result is the same bit for bit whatever the instruction set, the number of threads and the other tokens. A token
    that holds NaN or infinity gets NaN in all its outputs.
    """
    assert isinstance(weight, Int8Weight) and x.dtype == torch.float32 and weight.packed.dtype == torch.uint8
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape[1] == K and K % GROUP == 0, (x.shape, weight.shape)
    assert x.is_cpu and weight.packed.is_cpu and weight.packed.is_contiguous()
    x = x.contiguous()
    out = torch.empty(T, N)
    _native.linear_int8(x.data_ptr(), weight.packed.data_ptr(), out.data_ptr(), T, K, N, torch.get_num_threads())
    return out


@rms_norm.body("cpu_float", when=_is_float, available=available)
def rms_norm_float(x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float) -> Float[Tensor, "*rows W"]:
    """One pass a row."""
    assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == x.shape[-1:]
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    _native.rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps, torch.get_num_threads())
    return out


@rope.body("cpu_float", when=_is_float, available=available)
def rope_float(
    x: Float[Tensor, "T heads R"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"], interleaved: bool
) -> Float[Tensor, "T heads R"]:
    """One pass a head, from any strides: MLA's rotary parts are slices."""
    T, heads, R = x.shape
    assert x.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (T, R // 2)
    out = torch.empty(T, heads, R)
    angles, strides = (cos.data_ptr(), sin.data_ptr()), (x.stride(0), x.stride(1))
    _native.rope(
        x.data_ptr(), *angles, out.data_ptr(), T, heads, R // 2, *strides, interleaved, torch.get_num_threads()
    )
    return out


@silu_mul.body("cpu_float", when=_is_float, available=available)
def silu_mul_float(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """One pass, with an exponential good to 1e-7."""
    assert up.dtype == torch.float32 and gate.shape == up.shape
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _native.silu_mul(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), torch.get_num_threads())
    return out


@cache_write.body("cpu", when=lambda key: key.device == "cpu" and not key.needs_grad, available=available)
def cache_write_cpu(
    cache: Float[Tensor, "P page *width"], values: Float[Tensor, "T *width"], slots: Int[Tensor, "T"]
) -> None:
    """One copy a token."""
    assert cache.is_contiguous() and cache.shape[2:] == values.shape[1:]
    assert slots.dtype == torch.int64 and slots.is_contiguous() and len(slots) == len(values)
    values = values.to(cache.dtype).contiguous()
    row_bytes = cache.stride(1) * cache.element_size()
    _native.cache_write(cache.data_ptr(), values.data_ptr(), slots.data_ptr(), len(values), row_bytes)


@attention_paged.body("cpu_decode", when=_is_float, available=available)
def attention_decode(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Reads pages in place where every sequence has one new token; prompts go to torch's SDPA, faster for them."""
    num_sequences = len(lengths)
    if len(q) != num_sequences or not num_sequences or k_cache.dtype != torch.float32:
        return attention_paged.reference(q, k_cache, v_cache, offsets, lengths, tables, scale)
    assert k_cache.stride(3) == v_cache.stride(3) == 1 and tables.is_contiguous() and lengths.is_contiguous()
    assert lengths.dtype == tables.dtype == torch.int64 and len(tables) == num_sequences
    assert v_cache.dtype == torch.float32 and q.shape[2] == k_cache.shape[3] and q.shape[1] % k_cache.shape[2] == 0
    q = q.contiguous()
    _, H, k_width = q.shape
    _, page_size, K, v_width = v_cache.shape
    out = torch.empty(num_sequences, H, v_width)
    _native.attention_decode(
        q.data_ptr(),
        k_cache.data_ptr(),
        _strides(k_cache),
        v_cache.data_ptr(),
        _strides(v_cache),
        lengths.data_ptr(),
        tables.data_ptr(),
        out.data_ptr(),
        (num_sequences, H, K, k_width, v_width, page_size, tables.shape[1]),
        scale,
        torch.get_num_threads(),
    )
    return out


@sample.body("cpu", when=_is_float, available=available)
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
    tokens, logprobs = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
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


@allow.body("cpu", when=_is_float, available=available)
def allow_cpu(logits: Float[Tensor, "B V"], masks: UInt8[Tensor, "B bytes"]) -> Float[Tensor, "B V"]:
    """One pass."""
    B, V = logits.shape
    assert masks.dtype == torch.uint8 and masks.shape == (B, -(-V // 8))
    logits, masks = logits.contiguous(), masks.contiguous()
    out = torch.empty_like(logits)
    _native.allow(logits.data_ptr(), masks.data_ptr(), out.data_ptr(), B, V)
    return out


def _strides(cache: Tensor) -> tuple[int, int, int]:
    """Values from page to page, from slot to slot and from head to head."""
    return cache.stride(0), cache.stride(1), cache.stride(2)
