"""Native bodies for the CPU, in C++: for AVX-512 VNNI, AVX-512, AVX2 or any processor, chosen at run time.

Each is written once, as a function that appends an instruction to a program. As an op's instruction it appends to the
step under way (kernels/record.py); as an op's body, to a program of its own that runs at once.

Importing this package registers them on their ops. An installation that found no C++ compiler has no native module and
keeps the torch bodies. PORCELET_ISA in the environment names a lesser instruction set, for tests and comparison.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

# torch first: it brings its own libgomp.so.1, which the native module then shares; else there were two thread pools.
import torch
from torch import Tensor

from porcelet.kernels import Key, Op
from porcelet.kernels.attention import attention_paged, attention_suffix, cache_read, cache_write
from porcelet.kernels.experts import ExpertWeight, experts, route, route_softmax
from porcelet.kernels.linear import (
    GROUP,
    Int8Weight,
    TableWeight,
    Weight,
    embedding,
    heads_linear,
    linear,
    take_rows,
)
from porcelet.kernels.pointwise import add, concat, rms_norm, rope, rotary_angles, silu_mul
from porcelet.kernels.record import Tape
from porcelet.kernels.sample import allow, sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8

# A module that is there and does not load raises here; only one that was never built is done without.
_BUILT = importlib.util.find_spec("porcelet.kernels.cpu._native") is not None
if _BUILT:
    from porcelet.kernels.cpu import _native

P = ParamSpec("P")
R = TypeVar("R")

WORTH_THREADS = 1 << 15  # values or products below which entering a parallel region costs more than it saves
LARGEST_BATCH = 64  # more tokens go to torch's GEMM, which packs its operands: that pays from about here
MOST_NEW = 8  # new tokens a sequence up to which attention token by token beats torch's, which suits prompts


def available() -> bool:
    """Whether the native module was built."""
    return _BUILT


def isa() -> str:
    """The instruction set in use. InputError if `PORCELET_ISA` names an unknown one or one this processor lacks."""
    assert _BUILT
    return _native.isa()


def new_program() -> _native.Program:
    """What a `Tape` records to."""
    assert _BUILT
    return _native.Program()


class AtOnce:
    """A program of one instruction. It keeps scratch and copies alive until it has run."""

    def __init__(self) -> None:
        self.program = _native.Program()
        self._kept: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        self._kept.append(made)
        return made

    def dense(self, x: Tensor) -> Tensor:
        if x.stride(-1) == 1:
            return x
        self._kept.append(x.contiguous())
        return self._kept[-1]


Target = Tape | AtOnce  # where an instruction goes


def at_once(
    function: Callable[Concatenate[Target, P], R], rows: int, work: int, *args: P.args, **kwargs: P.kwargs
) -> R:
    """Append to a program of its own and run it, on one thread where the work, in values or products, is little."""
    target = AtOnce()
    out = function(target, *args, **kwargs)
    target.program.run(rows, 0, torch.get_num_threads() if work >= WORTH_THREADS else 1)
    return out


def native(
    an_op: Op[P, R],
    name: str,
    when: Callable[[Key], bool],
    *,
    tokens: int = 0,
    work: Callable[[Tensor], int] = Tensor.numel,
) -> Callable[[Callable[Concatenate[Target, P], R]], Callable[P, R]]:
    """Register a function as the op's instruction, and run at once as its body.

    Argument number `tokens` has as many rows as there are tokens; `work` tells from it how much there is to do.
    """

    def register(function: Callable[Concatenate[Target, P], R]) -> Callable[P, R]:
        @wraps(function)
        def body(*args: P.args, **kwargs: P.kwargs) -> R:
            rows = args[tokens]
            assert isinstance(rows, Tensor)
            return at_once(function, len(rows), work(rows), *args, **kwargs)

        an_op.instruction(when=when, available=available)(function)
        an_op.body(name, when=when, available=available)(body)
        return body

    return register


def _on_cpu(key: Key) -> bool:
    return key.device == "cpu" and not key.needs_grad


def _is_float(key: Key) -> bool:
    return _on_cpu(key) and key.dtype == torch.float32


def _is_int8(key: Key) -> bool:
    return _on_cpu(key) and key.format == "Int8Weight"


def _is_plain(key: Key) -> bool:
    return _on_cpu(key) and key.format in ("Tensor", "Parameter")


def _is_float_twice(key: Key) -> bool:
    return _is_plain(key) and _is_float(key)


@native(linear, "cpu_int8", lambda key: _is_int8(key) and _is_float(key), work=lambda x: WORTH_THREADS)
def linear_int8(target: Target, x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ with x quantised to 16 bits a token and group of 32: within 1e-4 of the reference's largest value.

    The result is the same bit for bit whatever the instruction set, the number of threads and the other tokens. A token
    that holds NaN or infinity gets NaN in all its outputs.
    """
    assert isinstance(weight, Int8Weight) and x.dtype == torch.float32 and weight.packed.dtype == torch.uint8
    T, K = x.shape
    N = weight.shape[0]
    assert weight.shape[1] == K and K % GROUP == 0, (x.shape, weight.shape)
    assert x.is_cpu and weight.packed.is_cpu and weight.packed.is_contiguous()
    out, records = target.empty(T, N), target.empty(T, _native.linear_int8_record_bytes(K), dtype=torch.uint8)
    addresses = weight.packed.data_ptr(), records.data_ptr(), out.data_ptr()
    target.program.linear_int8(_rows(target.dense(x)), *addresses, K, N)
    return out


def _linear_float(target: Target, x: Tensor, weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor) and weight.dtype == torch.float32 and weight.is_cpu and weight.stride(-1) == 1
    (T, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), (x.shape, weight.shape)
    out = target.empty(T, N)
    target.program.linear_float(_rows(target.dense(x)), _rows(weight), out.data_ptr(), K, N)
    return out


linear.instruction(when=_is_float_twice, available=available)(_linear_float)


@linear.body("cpu_float", when=_is_float_twice, available=available)
def linear_float(x: Float[Tensor, "T D"], weight: Weight) -> Float[Tensor, "T N"]:
    """x · weightᵀ from the parameter as it lies, up to 64 tokens, each with the same bits in every batch and on any
    number of threads. More tokens, and weights whose rows do not lie in one piece, go to torch."""
    assert isinstance(weight, Tensor)
    if len(x) > LARGEST_BATCH or weight.stride(-1) != 1:
        return linear.reference(x, weight)
    return at_once(_linear_float, len(x), x.numel() * len(weight), x, weight)


def _heads_linear(target: Target, x: Tensor, weight: Tensor) -> Tensor:
    """`weight` may be a slice of kv_b_proj, or that transposed."""
    T, heads, num_inputs = x.shape
    num_outputs = weight.shape[1]
    assert weight.shape == (heads, num_outputs, num_inputs) and weight.dtype == torch.float32, (x.shape, weight.shape)
    mixed = weight.stride(2) != 1
    stored = weight.transpose(1, 2) if mixed else weight
    assert stored.stride(2) == 1 and weight.is_cpu
    out = target.empty(T, heads, num_outputs)
    sizes = heads, num_inputs, num_outputs
    target.program.heads_linear(_heads(target.dense(x)), _heads(stored), out.data_ptr(), *sizes, mixed)
    return out


heads_linear.instruction(when=_is_float, available=available)(_heads_linear)


@heads_linear.body("cpu_float", when=_is_float, available=available)
def heads_linear_float(x: Float[Tensor, "T H I"], weight: Float[Tensor, "H O I"]) -> Float[Tensor, "T H O"]:
    """One matrix a head from where it lies; up to 64 tokens, each with the same bits in every batch."""
    if len(x) > LARGEST_BATCH or 1 not in weight.stride()[1:]:
        return heads_linear.reference(x, weight)
    return at_once(_heads_linear, len(x), x.numel() * weight.shape[1], x, weight)


def _experts(
    target: Target, x: Tensor, gate_up: ExpertWeight, down: ExpertWeight, indices: Tensor, weights: Tensor
) -> Tensor:
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    (T, D), (E, _, F), A = x.shape, down.shape, indices.shape[1]
    assert gate_up.shape == (E, 2 * F, D) and down.shape == (E, D, F) and weights.shape == indices.shape == (T, A)
    for tensor in (gate_up, down, weights):
        assert tensor.is_contiguous() and tensor.dtype == torch.float32
    out, hidden = target.empty(T, D), target.empty(T * A, F)
    starts, order = target.empty(E + 1, dtype=torch.int64), target.empty(T * A, dtype=torch.int64)
    target.program.experts_float(
        _rows(target.dense(x)),
        (gate_up.data_ptr(), down.data_ptr()),
        (_indices(indices), weights.data_ptr()),
        (starts.data_ptr(), order.data_ptr(), hidden.data_ptr()),
        out.data_ptr(),
        (D, F, E, A),
    )
    return out


experts.instruction(when=_is_float_twice, available=available)(_experts)


@experts.body("cpu_float", when=_is_float_twice, available=available)
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
    if len(x) > LARGEST_BATCH or not (gate_up.is_contiguous() and down.is_contiguous()):
        return experts.reference(x, gate_up, down, indices, weights)
    assert all(0 <= expert < len(down) for expert in indices.flatten().tolist())
    work = indices.numel() * down[0].numel() * 3
    return at_once(_experts, len(x), work, x, gate_up, down, indices.contiguous(), weights.contiguous())


@native(route, "cpu_float", _is_float, work=lambda logits: 16 * logits.numel())
def route_float(
    target: Target,
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
    return _route(target, logits, bias.data_ptr(), num_groups, topk_group, top_k, normalize, scale)


@native(route_softmax, "cpu_float", _is_float, work=lambda logits: 16 * logits.numel())
def route_softmax_float(
    target: Target, logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """As `route_float`."""
    return _route(target, logits, 0, num_groups, topk_group, top_k, False, scale)


def _route(
    target: Target,
    logits: Tensor,
    bias: int,
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, E = logits.shape
    assert 0 < top_k <= E and 0 < topk_group <= num_groups and E % num_groups == 0
    assert num_groups == 1 or not bias or 2 * num_groups <= E  # V3's groups are scored by their two best
    assert logits.is_contiguous()
    indices, weights = target.empty(T, top_k, dtype=torch.int64), target.empty(T, top_k)
    addresses = indices.data_ptr(), weights.data_ptr(), target.empty(T, 2 * E + num_groups).data_ptr()
    sizes = E, num_groups, topk_group, top_k
    target.program.route(logits.data_ptr(), bias, *addresses, sizes, normalize, scale)
    return indices, weights


@native(embedding, "cpu_int8", _is_int8)
def embedding_int8(target: Target, tokens: Int[Tensor, "T"], weight: TableWeight) -> Float[Tensor, "T D"]:
    """Rows of a packed table, to the bits of the definition."""
    assert isinstance(weight, Int8Weight) and weight.packed.is_contiguous()
    out = target.empty(len(tokens), weight.shape[1])
    target.program.take_int8_rows(weight.packed.data_ptr(), _indices(tokens), out.data_ptr(), weight.shape[1])
    return out


@embedding.instruction(when=_is_plain, available=available)
def embedding_float(target: Target, tokens: Int[Tensor, "T"], weight: TableWeight) -> Float[Tensor, "T D"]:
    assert isinstance(weight, Tensor)
    return _take(target, weight, tokens)


@take_rows.instruction(when=_is_float, available=available)
def take_rows_float(target: Target, x: Float[Tensor, "T D"], rows: Int[Tensor, "taken"]) -> Float[Tensor, "taken D"]:
    target.program.narrow()
    return _take(target, x, rows)


@rotary_angles.instruction(when=_on_cpu, available=available)
def rotary_angles_table(
    tape: Tape, positions: Int[Tensor, "T"], frequencies: Float[Tensor, "half"], factor: float
) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
    """Rows of a table of all positions: torch's cosine, to the bit."""
    with tape.paused():
        cos, sin = rotary_angles.reference(torch.arange(tape.max_length), frequencies, factor)
    return _take(tape, tape.keep(cos), positions), _take(tape, tape.keep(sin), positions)


@native(rms_norm, "cpu_float", _is_float)
def rms_norm_float(
    target: Target, x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float
) -> Float[Tensor, "*rows W"]:
    """One pass a row."""
    assert weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape == x.shape[-1:]
    out = target.empty(*x.shape)
    heads = _heads(target.dense(x))
    target.program.rms_norm(heads, weight.data_ptr(), out.data_ptr(), _num_heads(x), x.shape[-1], eps)
    return out


@native(rope, "cpu_float", _is_float)
def rope_float(
    target: Target,
    x: Float[Tensor, "T heads R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
) -> Float[Tensor, "T heads R"]:
    """One pass a head, from any strides: MLA's rotary parts are slices."""
    T, heads, R = x.shape
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (T, R // 2)
    out = target.empty(T, heads, R)
    addresses = cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    target.program.rope(_heads(target.dense(x)), *addresses, heads, R // 2, interleaved)
    return out


@native(silu_mul, "cpu_float", _is_float)
def silu_mul_float(target: Target, gate: Float[Tensor, "T F"], up: Float[Tensor, "T F"]) -> Float[Tensor, "T F"]:
    """One pass, with an exponential good to 1e-7."""
    assert up.dtype == torch.float32 and gate.shape == up.shape
    out = target.empty(*gate.shape)
    target.program.silu_mul(_rows(target.dense(gate)), _rows(target.dense(up)), out.data_ptr(), gate.shape[1])
    return out


@add.instruction(when=_is_float, available=available)
def add_float(target: Target, first: Float[Tensor, "T W"], second: Float[Tensor, "*T W"]) -> Float[Tensor, "T W"]:
    assert second.dtype == torch.float32 and first.shape[1] == second.shape[-1]
    out = target.empty(*first.shape)
    second = target.dense(second).expand(first.shape)  # a bias has the stride 0 from row to row
    target.program.add(_rows(target.dense(first)), _rows(second), out.data_ptr(), first.shape[1])
    return out


@concat.instruction(when=_is_float, available=available)
def concat_float(
    target: Target, first: Float[Tensor, "*rows A"], second: Float[Tensor, "*rows B"]
) -> Float[Tensor, "*rows AB"]:
    assert second.dtype == torch.float32 and first.shape[:-1] == second.shape[:-1]
    widths = first.shape[-1], second.shape[-1]
    out = target.empty(*first.shape[:-1], sum(widths))
    parts = _heads(target.dense(first)), _heads(target.dense(second))
    target.program.concat(*parts, out.data_ptr(), _num_heads(first), *widths)
    return out


@native(cache_write, "cpu", lambda key: _on_cpu(key) and key.dtype in (torch.float32, torch.float16), tokens=1)
def cache_write_cpu(
    target: Target,
    cache: Float[Tensor, "P page *width"],
    values: Float[Tensor, "T *width"],
    slots: Int[Tensor, "T"],
) -> None:
    """One copy a token, into the whole of a slot or, where `cache` is a slice, into a part of it."""
    assert values.dtype == torch.float32 and cache.shape[2:] == values.shape[1:] and len(slots) == len(values)
    assert cache.dim() == 4 and cache.stride(0) == cache.shape[1] * cache.stride(1)
    slot, rows = cache[0, 0].flatten(), target.dense(values).flatten(1)
    assert slot.data_ptr() == cache.data_ptr() and rows.data_ptr() == values.data_ptr(), "heads must lie together"
    target.program.cache_write(_cache(cache), _rows(rows), _indices(slots), rows.shape[1])


@attention_paged.instruction(when=_is_float, available=available)
def attention_native(
    target: Target,
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Pages are read in place, every new token by itself."""
    return _attend(target, q, k_cache, v_cache, offsets, lengths, tables, scale, 1 << 62)


@attention_paged.body("cpu_paged", when=_is_float, available=available)
def attention_float(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """Decoding and verification of drafts as in a recorded step, to the bit; prompts by torch's SDPA."""
    if not len(q):
        return q.new_zeros(0, q.shape[1], v_cache.shape[3])
    past = k_cache, v_cache, offsets, lengths, tables
    out = at_once(_attend, len(q), WORTH_THREADS, q.contiguous(), *past, scale, MOST_NEW)
    for row in (offsets.diff() > MOST_NEW).nonzero()[:, 0].tolist():
        first, end = offsets[row : row + 2].tolist()
        k, v = (cache_read(cache, tables[row], int(lengths[row])).to(q.dtype) for cache in (k_cache, v_cache))
        out[first:end] = attention_suffix(q[first:end], k, v, scale)
    return out


def _attend(
    target: Target,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
    most: int,
) -> Tensor:
    """Attention of all sequences with at most `most` new tokens; the rows of the others are left as they are."""
    (T, H, k_width), (_, page_size, K, v_width) = q.shape, v_cache.shape
    assert q.is_contiguous() and tables.is_contiguous() and k_cache.stride(3) == v_cache.stride(3) == 1
    assert k_width == k_cache.shape[3] and H % K == 0 and k_cache.dtype == v_cache.dtype
    out = target.empty(T, H, v_width)
    max_pages = tables.shape[1]
    parts = -(-max_pages * page_size // _native.attention_part(H // K, k_width, v_width, page_size))
    partials = target.empty(T * H * parts * (v_width + 2) if parts > 1 else 0)
    target.program.attention(
        q.data_ptr(),
        _cache(k_cache),
        _cache(v_cache),
        (_indices(offsets), _indices(lengths), _indices(tables)),
        partials.data_ptr(),
        out.data_ptr(),
        (H, K, k_width, v_width, page_size, max_pages),
        most,
        scale,
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


def _take(target: Target, table: Tensor, index: Tensor) -> Tensor:
    assert table.dtype == torch.float32 and table.stride(1) == 1
    out = target.empty(len(index), table.shape[1])
    target.program.take_rows(_rows(table), _indices(index), out.data_ptr(), table.shape[1])
    return out


def _rows(x: Tensor) -> tuple[int, int]:
    """Address, and values from row to row."""
    return x.data_ptr(), x.stride(0)


def _heads(x: Tensor) -> tuple[int, int, int]:
    """Address, values from row to row and from head to head; two dimensions are one head a row."""
    assert x.dim() in (2, 3)
    return x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _num_heads(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def _cache(cache: Tensor) -> tuple[int, bool, int, int, int]:
    """Address, whether in half precision, values from page to page, from slot to slot and from head to head."""
    assert cache.dtype in (torch.float32, torch.float16)
    page, slot, head = cache.stride()[:3]
    return cache.data_ptr(), cache.dtype == torch.float16, page, slot, head


def _indices(x: Tensor) -> int:
    assert x.dtype == torch.int64 and x.is_contiguous()
    return x.data_ptr()
