"""How long a model's files take to become a model, beside `transformers` on the same files, and the memory that takes.

    python -m benchmarks.load [--rounds 3] [--with-gguf] [--append]

The default model, once as the safetensors folder (bfloat16) that is written for the occasion, and from its GGUF file.
Each load runs in a process of its own, so that peak memory (VmHWM, mapped files included) is its own; imports and one
load of a tiny model before it are not counted. `over_file` and `over_model` divide the peak by the file's and by the
loaded model's size. `transformers` needs most of a minute for the GGUF file, so that runs only when asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.harness import interleave, report
from porcelet import hub
from porcelet.config import ModelConfig
from porcelet.models.transformer import build, initialize
from porcelet.weights import files
from porcelet.weights.load import checkpoint_tensors, load

MAX_STOLEN = 0.15  # a round takes half a minute; hardly one is undisturbed

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
{prepare}
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
path = Path(sys.argv[2])
{load}
path = Path(sys.argv[1])
before = peak()
start = time.perf_counter()
{load}
print(json.dumps({{"seconds": time.perf_counter() - start, "peak": peak() - before}}))
"""
OURS = "from porcelet.weights.load import load"
THEIRS = "from transformers import AutoModelForCausalLM"
FOLDER = {
    "porcelet_float32": (OURS, "model = load(path, 'float32')", 4.0),
    "porcelet_int8": (OURS, "model = load(path, 'int8')", 1.125),
    "transformers_float32": (THEIRS, "model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)", 4.0),
}
GGUF = {
    "porcelet_gguf_float32": (OURS, "model = load(path, 'float32')", 4.0),
    "porcelet_gguf_int8": (OURS, "model = load(path, 'int8')", 1.125),
    "transformers_gguf_float32": (
        THEIRS,
        "model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)"
        " if path.suffix == '.gguf' else None",
        4.0,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-gguf", action="store_true", help="transformers on the GGUF file, too")
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    gguf = hub.resolve(hub.DEFAULT_MODEL)
    with tempfile.TemporaryDirectory() as temporary:
        folder, tiny = Path(temporary) / "model", Path(temporary) / "tiny"
        num_parameters = write_folders(gguf, folder, tiny)
        variants = {name: (folder, *rest) for name, rest in FOLDER.items()}
        variants |= {name: (gguf, *rest) for name, rest in GGUF.items() if options.with_gguf or "porcelet" in name}
        runs = {
            name: lambda path=path, prepare=prepare, code=code, width=width: measure(
                path, tiny, prepare, code, width * num_parameters
            )
            for name, (path, prepare, code, width) in variants.items()
        }
        results, note = interleave(runs, options.rounds, max_stolen=MAX_STOLEN)
    config = {"model": hub.DEFAULT_MODEL, "parameters": num_parameters, **vars(options)}
    report("load", config, results, note, append=options.append)


def write_folders(gguf: Path, folder: Path, tiny: Path) -> int:
    """The model of a GGUF file as a bfloat16 folder, and a tiny one; the number of its parameters."""
    model = load(gguf)
    files.save(folder, model.config, ((name, value.bfloat16()) for name, value in checkpoint_tensors(model)))
    config = ModelConfig(
        architecture="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    files.save(tiny, config, checkpoint_tensors(initialize(build(config), seed=0)))
    return model.config.num_parameters()


def measure(path: Path, tiny: Path, prepare: str, code: str, model_bytes: float) -> Mapping[str, float]:
    """One load in a fresh process."""
    program = MEASURE.format(prepare=prepare, load=code)
    command = [sys.executable, "-c", program, str(path), str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {
        "seconds": found["seconds"],
        "peak_megabytes": found["peak"] / 1e6,
        "file_megabytes": size / 1e6,
        "over_file": found["peak"] / size,
        "over_model": found["peak"] / model_bytes,
    }


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
