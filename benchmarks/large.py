"""A random model of DeepSeek-V2-Lite's true shape (15.7 B parameters) in four bits: does it fit, and how fast is it?

    python -m benchmarks.large --folder FOLDER [--budgets 8 6 4] [--skewed] [--append]

The GGUF file (8.9 GB, Q4_0; the head Q8_0) is written into the folder unless it is there, and beside it the file of
experts on disk (9 GB). Every load runs in a process of its own. `peak_anonymous` is the most memory of its own that it
had while loading, seen every 50 ms; `steady_pss` its share of all memory after the last answer (smaps_rollup),
mapped files included. Prompts of random tokens and decoding go through the engine, alone and with 4 sequences, drawn at
temperature 1 and without guesses. Budgets are gigabytes (10^9) of experts in memory, 0 is all of them and no file;
`hit_rate` and `read_per_token` (megabytes) are those of the decoding alone.

A random gate sends tokens about evenly to all experts, and two that follow each other to unrelated ones: the worst for
a cache of experts. With --skewed the gates' rows get lengths from 2 to 1/2, so that some experts are chosen often; such
results are called so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from gguf import GGMLQuantizationType, GGUFWriter

from benchmarks.harness import processor_times, report, stolen_share

WIDTH, LAYERS, HEADS, VOCABULARY = 2048, 27, 16, 102400
DENSE, EXPERT, EXPERTS, SHARED, ACTIVE = 10944, 1408, 64, 2, 6
LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
BLOCK = 32
PIECE = 1 << 24  # values made at once
PROMPT, NEW = 256, 32
POLL_SECONDS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is written; 20 GB")
    parser.add_argument("--budgets", type=float, nargs="*", default=[8.0, 6.0, 4.0], help="gigabytes; 0 is no offload")
    parser.add_argument("--skewed", action="store_true", help="gates that prefer some experts")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    path = options.folder / f"v2-lite-shape{'-skewed' if options.skewed else ''}.gguf"
    if options.child is not None:
        print(json.dumps(measure(path, options.child, options.sequences)))
        return
    write(path, options.skewed)
    before, results = processor_times(), {}
    for budget in options.budgets:
        name = f"{'skewed_' if options.skewed else ''}{f'{budget:g}GB' if budget else 'memory'}"
        results[name] = run(options, f"{budget:g}GB" if budget else "")
        print(name, json.dumps(results[name]), file=sys.stderr)
    note = {"stolen_percent": round(100 * stolen_share(before, processor_times()), 2)}
    config = {"model": "V2-Lite's shape, random", "prompt": PROMPT, "new": NEW, "file": path.stat().st_size}
    report("large", config, results, note, append=options.append)


def run(options: argparse.Namespace, budget: str) -> dict[str, float]:
    """One load and its answers in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.large", "--folder", str(options.folder), "--child", budget]
    command += ["--skewed"] * options.skewed + ["--sequences", *map(str, options.sequences)]
    environment = os.environ | {"PORCELET_HOME": str(options.folder)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(path: Path, budget: str, sequences: list[int]) -> dict[str, float]:
    """Seconds, gigabytes and tokens a second of this process."""
    from porcelet.config import EngineConfig
    from porcelet.engine.engine import Engine
    from porcelet.types import SamplingParams

    os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    config = EngineConfig(expert_memory=budget, cache_tokens=4096, prefix_cache="off", speculation="off")
    with Peak() as peak:
        start = time.perf_counter()
        engine = Engine.load(path, config)
        found = {"load_seconds": time.perf_counter() - start}
    found["peak_anonymous"] = peak.anonymous / 1e9
    engine.generate([[1]], SamplingParams(max_tokens=2, ignore_eos=True))  # makes the recording
    for number in sequences:
        found |= answer(engine, number)
    rollup = memory()
    return found | {"steady_pss": rollup["Pss"] / 1e9, "steady_anonymous": rollup["Anonymous"] / 1e9}


def answer(engine: Any, number: int) -> dict[str, float]:
    """Rates of so many sequences; what decoding found in memory and read."""
    from porcelet.types import Request, SamplingParams

    random = numpy.random.default_rng(number)
    params = SamplingParams(max_tokens=NEW + 1, temperature=1, seed=number, ignore_eos=True)
    for index in range(number):
        prompt = tuple(random.integers(100, VOCABULARY, PROMPT).tolist())
        engine.submit(Request(id=f"{number}-{index}", prompt=prompt, params=params))
    start = time.perf_counter()
    begun: set[str] = set()
    while len(begun) < number:
        begun |= {output.request_id for output in engine.step()}
    first, before, count = time.perf_counter(), engine.stats(), 0
    while engine.has_work:
        outputs = engine.step()
        if len(outputs) < number:  # the first one begun has ended
            break
        count, end, after = count + number, time.perf_counter(), engine.stats()
    while engine.has_work:
        engine.step()
    found = {f"prefill_{number}": number * PROMPT / (first - start), f"decode_{number}": count / (end - first)}
    if "num_expert_hits" in after:
        hits, misses, read = (
            after[name] - before[name] for name in ("num_expert_hits", "num_expert_misses", "num_expert_bytes_read")
        )
        found |= {f"hit_rate_{number}": hits / (hits + misses), f"read_per_token_{number}": read / count / 1e6}
    return found


class Peak:
    """The most anonymous memory of this process while it is entered, as seen now and then."""

    def __init__(self) -> None:
        self.anonymous = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            status = Path("/proc/self/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+)", status)
            assert found
            self.anonymous = max(self.anonymous, int(found[1]) * 1024)


def memory() -> dict[str, int]:
    """Bytes by their names in smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


# ---- the file -------------------------------------------------------------------------------------------------------


def write(path: Path, skewed: bool) -> None:
    """The whole model, tensor by tensor and piece by piece; it appears when it is complete."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    writer = GGUFWriter(temporary, "deepseek2")
    _write_metadata(writer)
    kinds = {name: _kind(name, shape) for name, shape in shapes().items()}
    for name, shape in shapes().items():
        kind = kinds[name]
        row = shape[-1] // BLOCK * SIZES[kind] if kind in SIZES else shape[-1] * 4
        dtype = numpy.dtype(numpy.uint8 if kind in SIZES else numpy.float32)
        stored = (*shape[:-1], row) if kind in SIZES else shape
        writer.add_tensor_info(name, stored, dtype, numpy.prod(stored).item() * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    random = numpy.random.default_rng(0)
    with temporary.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        for name, shape in shapes().items():
            file.write(bytes(-file.tell() % writer.data_alignment))
            for piece in pieces(random, name, shape, kinds[name], skewed):
                file.write(piece)
        file.write(bytes(-file.tell() % writer.data_alignment))
    temporary.rename(path)


SIZES = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q8_0: 34}


def pieces(
    random: numpy.random.Generator, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, skewed: bool
) -> Iterator[bytes]:
    """A tensor's bytes. Weights have a standard deviation of about 1 / sqrt(inputs), so that nothing grows."""
    spread = shape[-1] ** -0.5
    if kind not in SIZES:
        values = numpy.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * spread
        if skewed and "gate_inp" in name:
            values *= 2.0 ** numpy.linspace(1, -1, EXPERTS)[random.permutation(EXPERTS), None]
        yield values.astype(numpy.float32).tobytes()
        return
    size = SIZES[kind]
    largest = 4.6 if size == 18 else 73.6  # the standard deviation of numbers drawn evenly from 16 and from 256
    blocks = numpy.prod(shape).item() // BLOCK
    for start in range(0, blocks, PIECE // BLOCK):
        made = random.integers(0, 256, (min(PIECE // BLOCK, blocks - start), size), numpy.uint8)
        # Of both signs: Q4_0's numbers are -8 to 7, and a mean of -1/2 in every weight would make all tokens alike.
        scales = random.uniform(0.5, 1.5, len(made)) * random.choice([-1, 1], len(made)) * spread / largest
        made[:, :2] = scales.astype("<f2")[:, None].view(numpy.uint8)
        yield made.tobytes()


def _kind(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
    if len(shape) == 1 or "gate_inp" in name:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if name == "output.weight" else GGMLQuantizationType.Q4_0


def shapes() -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of V2-Lite."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        attention = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (HEADS * (NOPE + ROPE), WIDTH),
            "attn_kv_a_mqa.weight": (LATENT + ROPE, WIDTH),
            "attn_kv_a_norm.weight": (LATENT,),
            "attn_kv_b.weight": (HEADS * (NOPE + VALUE), LATENT),
            "attn_output.weight": (WIDTH, HEADS * VALUE),
            "ffn_norm.weight": (WIDTH,),
        }
        routed = {f"ffn_{name}_exps.weight": (EXPERTS, *shape) for name, shape in _mlp(EXPERT).items()}
        shared = {f"ffn_{name}_shexp.weight": shape for name, shape in _mlp(SHARED * EXPERT).items()}
        dense = {f"ffn_{name}.weight": shape for name, shape in _mlp(DENSE).items()}
        experts = {"ffn_gate_inp.weight": (EXPERTS, WIDTH), **routed, **shared}
        own = attention | (experts if layer else dense)
        found |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    return found | {"output_norm.weight": (WIDTH,), "output.weight": (VOCABULARY, WIDTH)}


def _mlp(inner: int) -> dict[str, tuple[int, int]]:
    return {"gate": (inner, WIDTH), "up": (inner, WIDTH), "down": (WIDTH, inner)}


def _write_metadata(writer: GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(163840)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(DENSE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(ROPE)
    writer.add_kv_lora_rank(LATENT)
    writer.add_key_length(NOPE + ROPE)
    writer.add_value_length(VALUE)
    writer.add_leading_dense_block_count(1)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_expert_shared_count(SHARED)
    writer.add_expert_feed_forward_length(EXPERT)
    writer.add_expert_weights_scale(1.0)


if __name__ == "__main__":
    main()
