"""Attention of packed training batches, forward and backward: the native body beside torch's in four layouts.

    python -m benchmarks.attention [--rounds 5] [--threads 2] [--only documents group_l] [--append]

    native     the C++ body
    buckets    SDPA over buckets of about equal lengths, prefixes expanded (where there is no native module)
    loop       SDPA segment by segment: the definition
    padded     what most trainers do: prompts repeated, one SDPA padded to the longest, with a mask

`floor_percent` is the time that the products of the causal pairs alone, made by torch's matrix product at its measured
rate, would take, in percent of the time measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Run, interleave, report
from porcelet.kernels import cpu
from porcelet.kernels.attention import Segments, attention_bucketed, attention_packed
from porcelet.train.flops import num_pairs

Widths = tuple[int, int, int, int]  # heads, key heads, width of keys, of values
Attend = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]
GQA, MLA, SMALL = (8, 2, 64, 64), (8, 8, 96, 64), (8, 8, 32, 16)


def groups(prompt: int, answer: int, size: int, count: int) -> Segments:
    """`count` prompts, each behind it `size` answers of about `answer` tokens."""
    lengths, prefixes = [], []
    for _ in range(count):
        first = len(lengths)
        lengths += [prompt, *(max(1, answer - 3 * i % (answer // 2)) for i in range(size))]
        prefixes += [-1] + [first] * size
    return Segments(Segments.of(*lengths).offsets, tuple(prefixes))


DOCUMENTS = Segments.of(512, 64, 377, 130, 256, 91, 448, 170)
WORKLOADS: dict[str, tuple[Segments, Widths]] = {
    "documents": (DOCUMENTS, MLA),
    "documents_gqa": (DOCUMENTS, GQA),
    "documents_small": (DOCUMENTS, SMALL),
    "group_l": (groups(128, 32, 16, 4), MLA),
    "group_m": (groups(64, 64, 8, 4), MLA),
    "group_s": (groups(32, 128, 8, 2), MLA),
    "long": (Segments.of(2048), MLA),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), help="workloads")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    runs: dict[str, Run] = {"matmul": matmul_rate}
    for name in options.only:
        for body, attend in BODIES.items():
            runs[f"{name}_{body}"] = step(attend, *WORKLOADS[name])
    results, note = interleave(runs, options.rounds)
    rate = results["matmul"]["gflop_per_s"]
    for name, metrics in results.items():
        if name != "matmul":
            metrics["floor_percent"] = float(f"{100 * metrics['gflop_per_s'] / rate:.3g}")
    report("attention", {"isa": cpu.isa(), **vars(options)}, results, note, append=options.append)


def step(attend: Attend, segments: Segments, widths: Widths) -> Run:
    """Forward and backward of one layer."""
    heads, kv_heads, width, value_width = widths
    T = segments.offsets[-1]
    leaves = [
        torch.randn(T, count, size).requires_grad_()
        for count, size in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    ]
    gradient = torch.randn(T, heads, value_width)
    operations = 2 * heads * num_pairs(segments) * (4 * width + 3 * value_width)

    def run() -> Mapping[str, float]:
        start = time.perf_counter()
        out = attend(*leaves, segments, width**-0.5)
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, gradient)
        end = time.perf_counter()
        return {
            "milliseconds": (end - start) * 1e3,
            "forward_milliseconds": (middle - start) * 1e3,
            "gflop_per_s": operations / (end - start) / 1e9,
        }

    return run


def padded(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
    """Every sequence whole, prompt and all, padded to the longest, with a mask."""
    readers = set(segments.prefixes)
    chosen = [b for b in range(len(segments.lengths)) if b not in readers]
    rows = [_sequence(segments, b) for b in chosen]
    longest = max(map(len, rows))
    filled = torch.zeros(len(rows), longest, dtype=torch.bool)
    index = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)], index[i, : len(row)] = True, row
    mask = (torch.ones(longest, longest, dtype=torch.bool).tril() & filled[:, None])[:, None]
    q, k, v = (t[index].transpose(1, 2) for t in (q, k, v))
    # A row of padding sees nothing and would be NaN: it may see the first key.
    mask = mask | functional.one_hot(torch.zeros(longest, dtype=torch.int64), longest).bool()
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    # The rows of a prompt were computed once for each of its readers; the first one's are as good as any.
    first = torch.empty(len(segments.prefixes) and segments.offsets[-1], dtype=torch.int64)
    flat = index.flatten()[filled.flatten()]
    first[flat.flip(0)] = torch.arange(len(flat)).flip(0)
    return out.transpose(1, 2)[filled][first]


def _sequence(segments: Segments, segment: int) -> Tensor:
    """The rows that a segment's last token reads, in order."""
    parts = [segments.prefixes[segment], segment]
    own = (segments.rows(part) for part in parts if part >= 0)
    return torch.cat([torch.arange(rows.start, rows.stop) for rows in own])


def matmul_rate(size: int = 768) -> Mapping[str, float]:
    """torch's matrix product of two squares."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    return {"gflop_per_s": 10 * 2 * size**3 / (time.perf_counter() - start) / 1e9}


BODIES: dict[str, Attend] = {
    "native": cpu.attention_packed_float,
    "buckets": attention_bucketed,
    "loop": attention_packed.reference,
    "padded": padded,
}


if __name__ == "__main__":
    main()
