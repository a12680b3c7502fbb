"""How long the default model's GGUF file takes to become a model, beside `transformers`, and the memory that takes.

    python -m benchmarks.load [--rounds 3] [--with-transformers] [--append]

Each load runs in a process of its own, so that peak memory is its own; imports are not counted. `transformers` needs
most of a minute for this file, so it runs only when asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping

from benchmarks.harness import interleave, report
from porcelet import hub

MEASURE = """
import json, resource, sys, time
from pathlib import Path
import torch
{prepare}
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{load}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": seconds, "peak_megabytes": (peak - before) * 1024 / 1e6}}))
"""
OURS = "from porcelet.weights.load import load"
THEIRS = "from transformers import AutoModelForCausalLM"
VARIANTS = {
    "porcelet_int8": (OURS, "model = load(path, 'int8')"),
    "porcelet_float32": (OURS, "model = load(path, 'float32')"),
    "transformers_float32": (
        THEIRS,
        "model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-transformers", action="store_true")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    names = [name for name in VARIANTS if options.with_transformers or not name.startswith("transformers")]
    results, note = interleave({name: lambda name=name: measure(name) for name in names}, options.rounds)
    config = {"model": hub.DEFAULT_MODEL, **vars(options)}
    report("load", config, results, note, append=options.append)


def measure(name: str) -> Mapping[str, float]:
    """One load in a fresh process."""
    prepare, load = VARIANTS[name]
    program = MEASURE.format(prepare=prepare, load=load)
    command = [sys.executable, "-c", program, str(hub.resolve(hub.DEFAULT_MODEL))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
