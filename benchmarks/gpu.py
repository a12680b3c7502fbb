"""The GPU kernels on this machine's GPU: called by `python -m benchmarks.kernels --device cuda`.

First what the device gives: the bandwidth of a large copy and the rate of a large product. Then each kernel's time,
with the caches emptied before every run, its bandwidth and rate as shares of these, and how much longer each rival
takes that is there: torch's own operators, and flash_mla and deep_gemm where they are installed. One JSON line for each
kernel, as it is measured.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.engine.gpu import Capture, GraphedSteps, capture
from porcelet.errors import InputError
from porcelet.kernels.experts import route
from porcelet.kernels.latent8 import to_latent8
from porcelet.kernels.linear import FP8_BLOCK, FP8Weight
from porcelet.kernels.loss import token_logprobs
from porcelet.kernels.pointwise import rms_norm, silu_mul
from porcelet.kernels.sample import sample
from porcelet.kernels.triton.contest import Timer, timed
from porcelet.kernels.triton.tasks import Task, fp8_experts, fp8_product, grouped_attention, latent_attention
from porcelet.models.experts import Experts, Gate
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer, build
from porcelet.types import Batch

Run = Callable[[], object]

# DeepGEMM's (N, K), of V3's layers, and rows.
PRODUCTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
ROWS = (1, 128, 4096)


@dataclass(frozen=True)
class Case:
    """What is measured: bytes that have to cross memory once, operations, and what else computes the same."""

    name: str
    run: Run
    num_bytes: float
    operations: float = 0.0
    rivals: Mapping[str, Run] = field(default_factory=dict)


def measure(minutes: float) -> Iterator[dict[str, Any]]:
    """Lines of all kernels, until the minutes are over.

    Raises:
        InputError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "--device cuda needs an NVIDIA GPU, and torch sees none; leave --device out to measure the CPU"
        )
    torch.manual_seed(0)
    end = time.monotonic() + 60 * minutes
    properties = torch.cuda.get_device_properties(0)
    copy, rate = copy_bandwidth(timed), product_rate(timed)
    yield {"device": properties.name, "torch": torch.__version__, "copy_gb_per_s": copy, "matmul_tflop_per_s": rate}
    yield slice_line(torch.device("cuda"), timed, kernel_seconds, copy, rate)
    torch.cuda.empty_cache()
    for case in cases(torch.device("cuda")):
        if time.monotonic() > end:
            yield {"stopped": f"{minutes:g} minutes are over before {case.name}"}
            return
        try:
            yield line(case, timed, copy, rate)
        except torch.OutOfMemoryError:
            yield {"kernel": case.name, "stopped": "it does not fit into this GPU's memory"}
        torch.cuda.empty_cache()


def line(case: Case, timer: Timer, copy: float, rate: float) -> dict[str, Any]:
    """What one kernel takes; `copy` in GB/s and `rate` in TFLOP/s are the device's."""
    seconds = timer(case.run)
    bandwidth, speed = case.num_bytes / seconds / 1e9, case.operations / seconds / 1e12
    return {
        "kernel": case.name,
        "microseconds": _short(seconds * 1e6),
        "gb_per_s": _short(bandwidth),
        "tflop_per_s": _short(speed),
        "of_copy": _short(bandwidth / copy),
        "of_matmul": _short(speed / rate),
        "times_faster_than": {name: _short(timer(rival) / seconds) for name, rival in case.rivals.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def copy_bandwidth(timer: Timer, num_bytes: int = 1 << 30) -> float:
    """GB/s that a copy reads and writes together."""
    source = torch.empty(num_bytes // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 2 * num_bytes / timer(lambda: target.copy_(source)) / 1e9


def product_rate(timer: Timer, size: int = 8192) -> float:
    """TFLOP/s of torch's bfloat16 product of large square matrices."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / timer(lambda: a @ b) / 1e12


def cases(device: torch.device, small: bool = False) -> Iterator[Case]:
    """All kernels on their models' shapes; `small` ones for a test."""
    dtype = torch.float16 if small else torch.bfloat16
    for parts in (_decoding, _prompts, _products, _experts, _rows, _choices):
        yield from parts(device, dtype, small)


# ---- a slice of V3 --------------------------------------------------------------------------------------------------

# Its first dense layer and one of experts, with weights in FP8.
SLICE = ModelConfig(
    architecture="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=2,
    num_attention_heads=128,
    num_key_value_heads=128,
    head_dim=192,
    max_position_embeddings=8192,
    rope_interleave=True,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=1,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
)


def slice_line(
    device: torch.device,
    timer: Timer,
    kernels: Timer,
    copy: float,
    rate: float,
    *,
    config: ModelConfig = SLICE,
    batch: int = 128,
    length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    capture: Capture = capture,
) -> dict[str, Any]:
    """A decoding step replayed as a graph beside the sum of its kernels' times, and that beside the sum of their
    floors: of each product and attention the longer of its bytes at `copy` GB/s and its operations at `rate`
    TFLOP/s."""
    model, each = random_fp8(config, device, dtype), -(-length // PAGE_SIZE)
    pages = batch * each + 1, PAGE_SIZE, 1, config.kv_lora_rank + config.qk_rope_head_dim
    cache = [(torch.zeros(pages, device=device, dtype=dtype),) for _ in range(config.num_hidden_layers)]
    steps = GraphedSteps(model, cache, batch, length, capture=capture)
    decode = Batch(
        request_ids=tuple(map(str, range(batch))),
        tokens=tuple(range(batch)),
        positions=(length - 1,) * batch,
        offsets=tuple(range(batch + 1)),
        lengths=(length,) * batch,
        tables=tuple(tuple(range(i * each, (i + 1) * each)) for i in range(batch)),
        expanded=(False,) * batch,
        sampled_rows=tuple(range(batch)),
        draws=(),
    )
    with torch.inference_mode():
        steps.run(decode)
        replay = steps.replay_of(batch)
        whole, alone = timer(replay), kernels(replay)
    floor = sum(max(moved / copy / 1e9, done / rate / 1e12) for moved, done in floors(config, batch, length))
    return {
        "slice": f"{config.num_hidden_layers} layers of V3, b{batch} s_k{length}",
        "replay_microseconds": _short(whole * 1e6),
        "kernels_microseconds": _short(alone * 1e6),
        "floor_microseconds": _short(floor * 1e6),
        "replay_over_kernels": _short(whole / alone),
        "kernels_over_floor": _short(alone / floor),
    }


def floors(config: ModelConfig, batch: int, length: int) -> Iterator[tuple[float, float]]:
    """Bytes and operations of each part of a decoding step."""
    D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    N, V, rank = config.qk_nope_head_dim, config.v_head_dim, config.q_lora_rank or D
    E, A, F = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        for values, size in (
            *((part, 1) for part in (rank * D, H * (N + R) * rank, (C + R) * D, H * V * D)),
            (H * (N + V) * C, 2),  # kv_b_proj, in half precision
        ):
            yield float(size * values), 2.0 * batch * values
        yield 2.0 * batch * length * (C + R), 2.0 * batch * H * length * (2 * C + R)
        dense = config.n_shared_experts * F if config.is_moe_layer(layer) else config.intermediate_size
        yield 3.0 * D * dense, 6.0 * batch * D * dense
        if config.is_moe_layer(layer):
            chosen = E * (1 - (1 - A / E) ** batch)  # of random gates
            yield 4.0 * E * D, 2.0 * batch * E * D
            yield chosen * 3.0 * D * F, 6.0 * batch * A * D * F
    yield 2.0 * config.vocab_size * D, 2.0 * batch * config.vocab_size * D


def random_fp8(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of random weights as V3's are stored: linear layers and experts in FP8, the rest in half precision."""
    model = build(config, device="meta").eval()
    for name, module in model.named_modules():
        own = dict(module._parameters)
        is_fp8 = isinstance(module, Linear) and not name.endswith(("kv_b_proj", "lm_head"))
        for leaf, parameter in own.items():
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            if isinstance(module, Experts):
                E, rows, K = shape
                shape = (E, 2, rows // 2, K) if leaf == "gate_up_proj" else (E, 1, rows, K)
            if is_fp8 or isinstance(module, Experts):
                del module._parameters[leaf]
                module.__dict__[leaf] = _fp8(shape, device)
            else:
                kind = torch.float32 if isinstance(module, Gate) else dtype
                values = torch.randn(shape, device=device, dtype=kind) * 0.02
                module._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.zeros(buffer.shape, device=device)
    return model


def kernel_seconds(run: Run, repeats: int = 5) -> float:
    """The sum of the times of the kernels that a run launches, by torch's profiler."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / repeats / 1e6


# ---- attention ------------------------------------------------------------------------------------------------------


def _decoding(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """MLA absorbed, by FlashMLA's grid, in half precision and 8 bits; grouped queries of Llama 3 8B."""
    from porcelet.kernels.triton.attention import attend

    batch, lengths = (2, (70,)) if small else (128, (4096, 8192, 32768))
    for heads, new, length in itertools.product((16,) if small else (16, 64, 128), (1, 2), lengths):
        cache, tables = _pages(batch, length, 1, 576, device, dtype)
        q = torch.randn(batch * new, heads, 576, device=device, dtype=dtype) / 10
        past = _past(batch, new, length, tables)
        operations = 2.0 * batch * new * heads * length * (576 + 512)
        moved = 2.0 * batch * (length * 576 + new * heads * (576 + 512))
        keys = cache[tables.long()].flatten(1, 3)  # gathered before the clock starts
        rivals = {"torch": _call(_plain, q.view(batch, -1, 576), keys, 576**-0.5)}
        if find_spec("flash_mla"):
            rivals["flash_mla"] = _flash_mla(q.view(batch, new, heads, 576), cache, tables, past[1])
        rivals |= _rivals(latent_attention, device, "gluon", q, cache, 512, *past, 576**-0.5)
        name = f"mla decode b{batch} h{heads} s_q{new} s_k{length}"
        yield Case(name, _call(attend, q, cache, 512, *past, 576**-0.5), moved, operations, rivals)
        if new == 1:
            bytes_of = to_latent8(cache[:, :, 0].float())[:, :, None]
            moved = batch * (length * 656.0 + 2 * heads * (576 + 512))
            yield Case(f"{name} 8 bits", _call(attend, q, bytes_of, 512, *past, 576**-0.5), moved, operations)
    length = lengths[0]
    (k, tables), (v, _) = (_pages(batch, length, 8, 128, device, dtype) for _ in range(2))
    q = torch.randn(batch, 32, 128, device=device, dtype=dtype)
    moved, operations = 2.0 * batch * length * 8 * 256, 4.0 * batch * 32 * length * 128
    keys, values = (pages[tables.long()].flatten(1, 2).transpose(1, 2) for pages in (k, v))
    sdpa = functional.scaled_dot_product_attention
    rivals = {"torch": _call(sdpa, q[:, :, None], keys, values, enable_gqa=True)}
    arguments = q, k, v, *_past(batch, 1, length, tables), 128**-0.5
    rivals |= _rivals(grouped_attention, device, "flashinfer", *arguments)
    run = _call(attend, *arguments)
    yield Case(f"grouped decode b{batch} h32/8 s_k{length}", run, moved, operations, rivals)


def _prompts(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Causal prompts: MLA's expanded form (16 of 128 heads at a time) and grouped queries."""
    from porcelet.kernels.triton.attention import attend

    length = 70 if small else 4096
    for name, heads, kv_heads, width, values in (("mla", 16, 16, 192, 128), ("grouped", 32, 8, 128, 128)):
        (k, tables), (v, _) = (_pages(1, length, kv_heads, size, device, dtype) for size in (width, values))
        q = torch.randn(length, heads, width, device=device, dtype=dtype)
        operations = float(heads) * length * length * (width + values)  # half of all pairs
        moved = 2.0 * length * (heads * (width + values) + kv_heads * (width + values))
        keys, wide = (torch.randn(1, kv_heads, length, size, device=device, dtype=dtype) for size in (width, values))
        sdpa = functional.scaled_dot_product_attention
        rival = _call(sdpa, q.transpose(0, 1)[None], keys, wide, is_causal=True, enable_gqa=heads != kv_heads)
        run = _call(attend, q, k, v, *_past(1, length, length, tables), width**-0.5)
        yield Case(f"{name} prompt of {length}", run, moved, operations, {"torch": rival})


def _pages(
    batch: int, length: int, heads: int, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Filled pages, in which a head's tokens lie together, and tables that name them in random order."""
    each = -(-length // 64)
    pages = (torch.randn(batch * each, heads, 64, width, device=device, dtype=dtype) / 10).transpose(1, 2)
    return pages, torch.randperm(batch * each, device=device).view(batch, each).int()


def _past(batch: int, new: int, length: int, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=tables.device) * new
    return offsets, torch.full((batch,), length, dtype=torch.int32, device=tables.device), tables


def _plain(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Absorbed MLA as torch's products compute it, all keys seen: its fused attention takes no heads of this width."""
    weights = (torch.bmm(q, keys.transpose(1, 2)) * scale).softmax(-1)
    return torch.bmm(weights, keys[..., :512])


def _rivals(task: Task[Any, Any], device: torch.device, name: str, *arguments: Any) -> dict[str, Run]:
    """That rival of a task's, where this machine has it."""
    return {name: _call(task.rivals[name].function, *arguments)} if name in task.names(device) else {}


def _flash_mla(q: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor) -> Run:
    import flash_mla

    metadata, splits = flash_mla.get_mla_metadata()
    past = cache, tables, lengths, 512, metadata, splits
    return _call(flash_mla.flash_mla_with_kvcache, q, *past, causal=True)


# ---- products -------------------------------------------------------------------------------------------------------


def _products(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """FP8 by FP8, half precision by FP8, and by packed weights, on V3's shapes."""
    from porcelet.kernels.triton.matmul import multiply, quantize_rows
    from porcelet.kernels.triton.packed import multiply_packed

    for (N, K), M in itertools.product([(160, 256)] if small else PRODUCTS, (3,) if small else ROWS):
        x, weight = torch.randn(M, K, device=device, dtype=dtype), _fp8((N, K), device)
        dense, rows = torch.randn(N, K, device=device, dtype=dtype), quantize_rows(x)
        operations, of = 2.0 * M * N * K, f"M{M} N{N} K{K}"
        linear = {"torch half": _call(functional.linear, x, dense)}
        rivals = dict(linear)
        if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
            ones = torch.ones((), device=device), torch.ones((), device=device)
            rivals["torch fp8"] = _call(torch._scaled_mm, rows.values, weight.values.t(), *ones, out_dtype=dtype)
        if find_spec("deep_gemm"):
            rivals["deep_gemm"] = _deep_gemm(rows.values, rows.scale, weight, M, N)
        rivals |= _rivals(fp8_product, device, "gluon", rows, weight, dtype)
        moved = M * K + N * K + 2.0 * M * N
        yield Case(f"fp8 {of}", _call(multiply, rows, weight, dtype=dtype), moved, operations, rivals)
        moved = 2.0 * M * K + N * K + 2.0 * M * N
        yield Case(f"fp8 weights {of}", _call(multiply, x, weight, dtype=dtype), moved, operations, linear)
        for bits in (8, 4):
            blocks = torch.zeros(-(-N // 16), K // 32, 16 * (4 * bits + 4), dtype=torch.uint8, device=device)
            run = _call(multiply_packed, x, blocks, N)
            yield Case(f"int{bits} {of}", run, 2.0 * M * (K + N) + blocks.numel(), operations, linear)


def _experts(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """DeepGEMM's groups: whole ones, and masked ones as decoding has them."""
    from porcelet.kernels.triton.matmul import ALIGNED, FP8Rows, multiply_contiguous, multiply_masked, quantize_rows

    shapes = [(2, 128, 96, 128)] if small else [(4, 8192, 4096, 7168), (8, 4096, 7168, 2048)]
    for E, each, N, K in shapes:
        weight, x = _fp8((E, N, K), device), torch.randn(E * each, K, device=device, dtype=dtype)
        rows, owners = quantize_rows(x), torch.arange(E, device=device, dtype=torch.int32).repeat_interleave(each)
        moved, operations = E * each * K + E * N * K + 2.0 * E * each * N, 2.0 * E * each * N * K
        run, rivals = _call(multiply_contiguous, rows, weight, owners, dtype=dtype), {}
        for name in ("gluon", "deep_gemm"):
            rivals |= _rivals(fp8_experts, device, name, rows, weight, owners, ALIGNED, dtype)
        yield Case(f"experts E{E} of {each} rows N{N} K{K}", run, moved, operations, rivals)
    E, most, mean, N, K = (2, 16, 5, 96, 128) if small else (32, 1024, 192, 4096, 7168)
    weight, x = _fp8((E, N, K), device), torch.randn(E * most, K, device=device, dtype=dtype)
    flat = quantize_rows(x)
    stacked = FP8Rows(flat.values.view(E, most, K), flat.scale.view(E, most, -1))
    counts = torch.full((E,), mean, device=device, dtype=torch.int32)
    moved, operations = E * (mean * K + N * K + 2.0 * mean * N), 2.0 * E * mean * N * K
    run = _call(multiply_masked, stacked, weight, counts, dtype=dtype)
    yield Case(f"masked experts E{E} of {mean} rows N{N} K{K}", run, moved, operations)


def _fp8(shape: tuple[int, ...], device: torch.device) -> FP8Weight:
    """Random bytes, all of them numbers; scales that keep what is multiplied with it small."""
    *stack, N, K = shape
    values = torch.randint(0, 0x70, shape, dtype=torch.uint8, device=device)
    values += 128 * torch.randint(0, 2, shape, dtype=torch.uint8, device=device)
    scale = torch.rand(*stack, -(-N // FP8_BLOCK), -(-K // FP8_BLOCK), device=device) / (K * 100)
    return FP8Weight(values.view(torch.float8_e4m3fn), scale)


def _deep_gemm(values: Tensor, scale: Tensor, weight: FP8Weight, M: int, N: int) -> Run:
    import deep_gemm

    out = torch.empty(M, N, device=values.device, dtype=torch.bfloat16)
    return _call(deep_gemm.fp8_gemm_nt, (values, scale), (weight.values, weight.scale), out)


# ---- rows and choices -----------------------------------------------------------------------------------------------


def _rows(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """Norms, gates, cache writes and log-probabilities of V3's widths."""
    from porcelet.kernels.triton import rows
    from porcelet.kernels.triton.loss import token_logprobs_triton

    T, D, F, V = (3, 256, 384, 300) if small else (4096, 7168, 18432, 129280)
    x, other = (torch.randn(T, D, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(D, device=device, dtype=dtype)
    torchs = {"torch": _call(rms_norm.reference, x, weight, 1e-6)}
    yield Case(f"norm {T} of {D}", _call(rows.norm, x, weight, 1e-6), 4.0 * T * D, rivals=torchs)
    yield Case(f"norm of a sum {T} of {D}", _call(rows.norm, x, weight, 1e-6, other), 8.0 * T * D)
    yield Case(f"norm to fp8 {T} of {D}", _call(rows.norm_quantized, x, weight, 1e-6), 3.0 * T * D)
    yield Case(f"norm backward {T} of {D}", _call(rows.norm_backward, x, weight, other, 1e-6), 6.0 * T * D)
    gate, up = torch.randn(T, 2 * F, device=device, dtype=dtype).chunk(2, dim=1)
    torchs = {"torch": _call(silu_mul.reference, gate, up)}
    yield Case(f"gate {T} of {F}", _call(rows.gate, gate, up), 6.0 * T * F, rivals=torchs)
    yield Case(f"gate to fp8 {T} of {F}", _call(rows.gate_quantized, gate, up), 5.0 * T * F)
    cache, latent = (
        torch.zeros(*shape, device=device, dtype=dtype) for shape in ((-(-T // 64), 64, 1, 576), (T, 1, 512))
    )
    turned, angles = torch.randn(T, 1, 64, device=device, dtype=dtype), torch.rand(2, T, 32, device=device)
    slots = torch.randperm(cache.shape[0] * 64, device=device)[:T]
    run = _call(rows.write_rotated, cache[..., :512], cache[..., 512:], latent, turned, *angles, True, slots)
    yield Case(f"rope and cache write {T} of 576", run, 4.0 * T * 576)
    few = T if small else 2048
    hidden, head = x[:few], torch.randn(V, D, device=device, dtype=dtype)
    targets = torch.randint(0, V, (few,), device=device)
    torchs = {"torch": _call(token_logprobs.reference, hidden, head, targets)}
    run = _call(token_logprobs_triton, hidden, head, targets)
    yield Case(f"log-probabilities {few} of {V}", run, 2.0 * V * D, 2.0 * few * V * D, torchs)


def _choices(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Case]:
    """V3's gate and draws from its vocabulary."""
    from porcelet.kernels.triton.select import draw, gate

    T, V, B = (3, 300, 2) if small else (4096, 129280, 128)
    logits, bias = torch.randn(T, 256, device=device), torch.rand(256, device=device)
    torchs = {"torch": _call(route.reference, logits, bias, 8, 4, 8, True, 2.5)}
    run = _call(gate, logits, bias, 8, 4, 8, 2.5, normalize=True)
    yield Case(f"gate of 256 experts, {T} tokens", run, 4.0 * T * 256, rivals=torchs)
    scores = torch.randn(B, V, device=device) * 3
    for name, top_k, top_p in (("plain", 0, 1.0), ("top-k 50, top-p 0.95", 50, 0.95)):
        columns = [torch.full((B,), value, device=device) for value in (1.0, top_k, top_p, 0.0)]
        wanted = torch.arange(B, device=device), *columns, torch.rand(B, device=device, dtype=torch.float64)
        torchs = {"torch": _call(sample.reference, scores, *wanted)}
        yield Case(f"draw {B} of {V}, {name}", _call(draw, scores, *wanted), 4.0 * B * V, rivals=torchs)


def _call(function: Callable[..., object], *args: Any, **kwargs: Any) -> Run:
    return lambda: function(*args, **kwargs)


def show(minutes: float) -> None:
    """Print the lines as they are measured."""
    for found in measure(minutes):
        print(json.dumps(found), flush=True)
