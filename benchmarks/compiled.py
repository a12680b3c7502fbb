"""What the GPU kernels compile to, without a GPU: registers, spilled bytes and shared memory of a block.

    python -m benchmarks.compiled [--arch 80 90 100] [--case mla_128]

Each case is launched as it would be, on tensors that have no memory, for a named architecture; compiling stops at
the machine code. One JSON line a case and architecture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from porcelet.kernels.linear import FP8Weight
from porcelet.kernels.triton import attention, hopper, hopper_products, matmul, packed, rows, select
from porcelet.kernels.triton.matmul import FP8Rows

ARCHS = (80, 90, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    for arch in options.arch:
        for name in options.case:
            if name in HOPPER_ONLY and arch != 90:
                continue
            for line in compiled(CASES[name], arch):
                print(json.dumps({"case": name, "arch": arch, **line}), flush=True)


def mla(heads: int, new: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    """Absorbed MLA of V2 and V3 over pages of 64, split."""
    B, width = 4, 656 if dtype == torch.uint8 else 576
    q = torch.empty(B * new, heads, 576, dtype=torch.bfloat16)
    attention.attend(q, torch.empty(64, 64, 1, width, dtype=dtype), 512, *past(B, new), 576**-0.5)


def mla_hopper(heads: int, new: int = 1) -> None:
    """The same by warps of different tasks; lengths and pages of 32 bits, as FlashMLA's callers have them, and of 64,
    as the engine has them."""
    B = 4
    q, cache = torch.empty(B * new, heads, 576, dtype=torch.bfloat16), torch.empty(64, 64, 1, 576, dtype=torch.bfloat16)
    for dtype in (torch.int32, torch.int64):
        hopper.attend(q, cache, *(one.to(dtype) for one in past(B, new)), 576**-0.5)


def grouped(heads: int, kv_heads: int, new: int, width: int = 128, values: int = 128) -> None:
    """Grouped queries, or with as many key heads MLA's expanded form."""
    B = 4
    q, k, v = (
        torch.empty(*shape, dtype=torch.bfloat16)
        for shape in ((B * new, heads, width), (64, 64, kv_heads, width), (64, 64, kv_heads, values))
    )
    attention.attend(q, k, v, *past(B, new), width**-0.5)


def past(B: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    tables = torch.empty(B, 64, dtype=torch.int32)
    return torch.empty(B + 1, dtype=torch.int32), torch.empty(B, dtype=torch.int32), tables


def product(M: int, *, rows: bool, weights: bool) -> None:
    """V3's down projection of a dense layer; `rows` and `weights` are in FP8."""
    N, K = 7168, 18432
    dtypes = (torch.float8_e4m3fn if fp8 else torch.bfloat16 for fp8 in (rows, weights))
    x, w = (torch.empty(size, K, dtype=dtype) for size, dtype in zip((M, N), dtypes, strict=True))
    a = FP8Rows(x, torch.empty(M, K // 128)) if rows else x
    matmul.multiply(a, FP8Weight(w, torch.empty(N // 128, K // 128)) if weights else w)


def product_hopper(M: int) -> None:
    """The same in FP8, by warps of different tasks."""
    N, K = 7168, 18432
    weight = FP8Weight(torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N // 128, K // 128))
    hopper_products.multiply_fp8(FP8Rows.empty(M, K, torch.device("cpu")), weight, torch.bfloat16)


def quantized(M: int) -> None:
    matmul.quantize_rows(torch.empty(M, 7168, dtype=torch.bfloat16))


def experts(masked: bool) -> None:
    """V3's gate and up projections of 32 experts."""
    E, M, N, K = 32, 128, 4096, 7168
    b = FP8Weight(torch.empty(E, N, K, dtype=torch.float8_e4m3fn), torch.empty(E, N // 128, K // 128))
    if masked:
        rows = FP8Rows(torch.empty(E, M, K, dtype=torch.float8_e4m3fn), torch.empty(E, M, K // 128))
        matmul.multiply_masked(rows, b, torch.empty(E, dtype=torch.int32))
        return
    flat = FP8Rows(torch.empty(E * M, K, dtype=torch.float8_e4m3fn), torch.empty(E * M, K // 128))
    matmul.multiply_contiguous(flat, b, torch.empty(E * M, dtype=torch.int32))


def packed_product(M: int, bits: int, *, of_experts: bool = False) -> None:
    """A product of V3's shapes over packed weights, or one over 32 experts."""
    N, K = (4096, 7168) if of_experts else (7168, 18432)
    x = torch.empty(M, K, dtype=torch.bfloat16)
    blocks = torch.empty(32, N // 16, K // 32, 16 * (4 * bits + 4), dtype=torch.uint8)
    if of_experts:
        packed.multiply_packed_contiguous(x, blocks, N, torch.empty(M, dtype=torch.int32))
    else:
        packed.multiply_packed(x, blocks[0], N)


def normed(width: int = 7168) -> None:
    x, weight = torch.empty(64, width, dtype=torch.bfloat16), torch.empty(width, dtype=torch.bfloat16)
    rows.norm(x, weight, 1e-6, x)
    rows.norm_quantized(x, weight, 1e-6, x)
    rows.norm_backward(x, weight, x, 1e-6)


def gated() -> None:
    gate, up = torch.empty(64, 36864, dtype=torch.bfloat16).chunk(2, dim=1)
    rows.gate(gate, up)
    rows.gate_quantized(gate, up)
    rows.gate_backward(gate, up, gate)


def rotated() -> None:
    """128 heads of V3, and what it caches."""
    T, half = 64, 32
    x, latent, cache = (
        torch.empty(*shape, dtype=torch.bfloat16) for shape in ((T, 128, 64), (T, 1, 512), (64, 64, 1, 576))
    )
    angles = torch.empty(T, half), torch.empty(T, half)
    rows.rotate(x, *angles, True)
    rows.rotate(x, *angles, True, backward=True)
    slots = torch.empty(T, dtype=torch.int64)
    rows.write_rotated(cache[..., :512], cache[..., 512:], latent, x[:, :1], *angles, True, slots)


def scored() -> None:
    """V3's vocabulary."""
    logits, targets = torch.empty(64, 129280, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int64)
    out, lse = rows.logprobs(logits, targets)
    rows.logprobs_backward_(logits, targets, lse, out)


def chosen() -> None:
    """V3's gate, V2's gate, and draws from V3's vocabulary."""
    select.gate(torch.empty(64, 256), torch.empty(256), 8, 4, 8, 2.5, normalize=True)
    select.gate(torch.empty(64, 160), None, 8, 3, 6, 16.0, normalize=False)
    count = 64
    logits, whole = torch.empty(count, 129280), torch.empty(count, dtype=torch.int64)
    select.draw(logits, whole, torch.empty(count), whole, *torch.empty(3, count))


CASES: dict[str, Callable[[], None]] = {
    "mla_16": lambda: mla(16),
    "mla_128": lambda: mla(128),
    "mla_128_drafts": lambda: mla(128, new=2),
    "mla_128_eight_bit": lambda: mla(128, dtype=torch.uint8),
    "mla_hopper_16": lambda: mla_hopper(16),
    "mla_hopper_128_drafts": lambda: mla_hopper(128, new=2),
    "grouped_decode": lambda: grouped(32, 8, 1),
    "grouped_prefill": lambda: grouped(32, 8, 64),
    "mla_prefill": lambda: grouped(16, 16, 64, width=192),
    "fp8_4096": lambda: product(4096, rows=True, weights=True),
    "fp8_1": lambda: product(1, rows=True, weights=True),
    "fp8_hopper_4096": lambda: product_hopper(4096),
    "fp8_hopper_1": lambda: product_hopper(1),
    "fp8_weights_4096": lambda: product(4096, rows=False, weights=True),
    "fp8_weights_1": lambda: product(1, rows=False, weights=True),
    "bf16_4096": lambda: product(4096, rows=False, weights=False),
    "experts_contiguous": lambda: experts(masked=False),
    "experts_masked": lambda: experts(masked=True),
    "quantize": lambda: quantized(64),
    "int8_4096": lambda: packed_product(4096, 8),
    "int4_4096": lambda: packed_product(4096, 4),
    "int8_1": lambda: packed_product(1, 8),
    "int4_1": lambda: packed_product(1, 4),
    "int4_experts": lambda: packed_product(4096, 4, of_experts=True),
    "norm": normed,
    "gate": gated,
    "rope": rotated,
    "logprobs": scored,
    "choose": chosen,
}


HOPPER_ONLY = ("mla_hopper_16", "mla_hopper_128_drafts", "fp8_hopper_4096", "fp8_hopper_1")


def compiled(case: Callable[[], None], arch: int) -> Iterator[dict[str, Any]]:
    """What each kernel that `case` launches needs on `arch`."""
    kernels: list[tuple[str, Any, float]] = []

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        start = time.perf_counter()
        kernels.append(
            (self.__name__, run(self, *args, grid=grid, warmup=True, **options), time.perf_counter() - start)
        )

    run = JITFunction.run
    driver.set_active(Machine(arch))
    named = [patch.object(module, "arch_of", lambda device: arch) for module in (attention, matmul)]
    named += [patch.object(module, "multiprocessors", lambda device: 132) for module in (hopper, hopper_products)]
    with patch.object(JITFunction, "run", compile_only), ExitStack() as patches:
        for name in named:
            patches.enter_context(name)
        case()
    for name, kernel, seconds in kernels:
        yield {
            "kernel": name,
            **usage(kernel.asm["cubin"]),
            "shared": kernel.metadata.shared,
            "seconds": round(seconds, 2),
        }


class Machine:
    """What Triton asks a driver for until it has machine code."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes a thread has outside of them: what did not fit."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


if __name__ == "__main__":
    main()
