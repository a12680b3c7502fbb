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
from porcelet.kernels.experts import ExpertWeight, experts, route, route_softmax
from porcelet.kernels.linear import GROUP, Int8Weight, Weight, linear
from porcelet.kernels.pointwise import rms_norm, rope, silu_mul

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# A module that is there and does not load raises here; only one that was never built is done without.
_BUILT = importlib.util.find_spec("porcelet.kernels.cpu._native") is not None
if _BUILT:
    from porcelet.kernels.cpu import _native


# More tokens go to torch's GEMM, which packs its operands: that pays from about here.
LARGEST_BATCH = 64


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


def _has_float_weight(key: Key) -> bool:
    return key.format in ("Tensor", "Parameter") and _is_float(key)


def _rows_are_float(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_cpu and weight.stride(-1) == 1


@linear.body("cpu_float", when=_has_float_weight, available=available)
def linear_float(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ from the parameter as it lies, up to 64 tokens, each with the same bits in every batch and on any
    number of threads. More tokens, and weights whose rows do not lie in one piece, go to torch."""
    assert isinstance(weight, Tensor)
    T, K = x.shape
    if T > LARGEST_BATCH or not _rows_are_float(weight):
        return linear.reference(x, weight)
    N = len(weight)
    assert weight.shape == (N, K), (x.shape, weight.shape)
    x = _with_rows(x)
    out = torch.empty(T, N)
    sizes = (T, K, N, x.stride(0), weight.stride(0), N)
    _native.linear_float(x.data_ptr(), weight.data_ptr(), 0, out.data_ptr(), sizes, torch.get_num_threads())
    return out


def heads_linear(
    x: Float[Tensor, "T heads inputs"], weight: Float[Tensor, "heads rows columns"], *, mixed: bool, out: Tensor
) -> None:
    """One matrix a head, as absorbed MLA needs them: W_UV, "thc,hvc->thv"; if `mixed` W_UK, "thn,hnc->thc".

    All three may be slices whose last dimension lies in one piece. A token has the same bits in every batch.
    """
    T, heads, num_inputs = x.shape
    num_outputs = weight.shape[2 if mixed else 1]
    assert weight.shape == ((heads, num_inputs, num_outputs) if mixed else (heads, num_outputs, num_inputs))
    assert out.shape == (T, heads, num_outputs), (out.shape, x.shape, weight.shape)
    for tensor in (x, weight, out):
        assert tensor.dtype == torch.float32 and tensor.is_cpu and tensor.stride(2) == 1
    strides = (x.stride(0), x.stride(1), weight.stride(0), weight.stride(1), out.stride(0), out.stride(1))
    sizes, addresses = (T, heads, num_inputs, num_outputs), (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    _native.heads_linear(*addresses, sizes, strides, mixed, torch.get_num_threads())


@experts.body("cpu_float", when=_has_float_weight, available=available)
def experts_float(
    x: Float[Tensor, "T D"],
    gate_up: ExpertWeight,
    down: ExpertWeight,
    indices: Int[Tensor, "T A"],
    weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T D"]:
    """All experts of up to 64 tokens in one parallel region. A token's experts are summed in ascending order: so it
    has the same bits in every batch."""
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    if len(x) > LARGEST_BATCH or not (_are_contiguous(gate_up, down) and weights.dtype == torch.float32):
        return experts.reference(x, gate_up, down, indices, weights)
    T, D = x.shape
    E, _, F = down.shape
    A = indices.shape[1]
    assert gate_up.shape == (E, 2 * F, D) and down.shape == (E, D, F) and weights.shape == indices.shape == (T, A)
    assert indices.dtype == torch.int64 and all(0 <= expert < E for expert in indices.flatten().tolist())
    x, indices, weights = _with_rows(x), indices.contiguous(), weights.contiguous()
    out = torch.empty(T, D)
    addresses = (x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), indices.data_ptr(), weights.data_ptr())
    _native.experts_float(*addresses, out.data_ptr(), (T, D, F, E, A, x.stride(0)), torch.get_num_threads())
    return out


@route.body("cpu_float", when=_is_float, available=available)
def route_float(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"],
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """One pass a token. Of equal scores the lower index is taken, where torch leaves it open."""
    assert bias.dtype == torch.float32 and bias.is_contiguous() and bias.shape == logits.shape[1:]
    return _route(logits, bias.data_ptr(), num_groups, topk_group, top_k, normalize, scale)


@route_softmax.body("cpu_float", when=_is_float, available=available)
def route_softmax_float(
    logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """As `route_float`."""
    return _route(logits, 0, num_groups, topk_group, top_k, False, scale)


def _route(
    logits: Tensor, bias: int, num_groups: int, topk_group: int, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    T, E = logits.shape
    assert 0 < top_k <= E and 0 < topk_group <= num_groups and E % num_groups == 0
    assert num_groups == 1 or not bias or 2 * num_groups <= E  # V3's groups are scored by their two best
    logits = logits.contiguous()
    indices, weights = torch.empty(T, top_k, dtype=torch.int64), torch.empty(T, top_k)
    addresses, sizes = (logits.data_ptr(), bias, indices.data_ptr(), weights.data_ptr()), (T, E, num_groups, topk_group)
    _native.route(*addresses, (*sizes, top_k), normalize, scale, torch.get_num_threads())
    return indices, weights


def _with_rows(x: Tensor) -> Tensor:
    """x itself if each of its rows lies in one piece, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _are_contiguous(*weights: Tensor) -> bool:
    return all(_rows_are_float(weight) and weight.is_contiguous() for weight in weights)


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


def _strides(cache: Tensor) -> tuple[int, int, int]:
    """Values from page to page, from slot to slot and from head to head."""
    return cache.stride(0), cache.stride(1), cache.stride(2)
