"""llama.cpp's perplexity: what it makes of a text in windows of tokens, each computed from nothing.

Of a window the second half counts, but for what follows its last token. The tokens come from its own tokenizer and are
handed out, so that others can be measured on the same; the scores of the counted ones come from the file that it saves,
where they are rounded to a 65,535th of the span from the least to the greatest and end 16 below the greatest.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.rivals import environments


@dataclass(frozen=True)
class Judged:
    """`tokens` [windows, size], the log-probabilities [windows, counted] of those that count, and their perplexity."""

    tokens: Tensor
    logprobs: Tensor
    perplexity: float


def judge(model: Path, text: str, windows: int, size: int, threads: int, options: Sequence[str] = ()) -> Judged:
    """Measure a GGUF file. The text has to have at least twice `size` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text(text, encoding="utf-8")
        saved = Path(folder) / "scores"
        command = [environments.llama_program("llama-perplexity"), "-m", model, "-f", Path(folder) / "text"]
        command += ["-c", size, "-b", size, "-ub", size, "-t", threads, "--chunks", windows]
        command += ["--save-all-logits", saved, *options]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        assert found is not None, done.stdout[-1000:] + done.stderr[-1000:]
        return Judged(*_read(saved), perplexity=float(found[1]))


def counted(size: int) -> range:
    """Positions of a window whose next token counts."""
    return range(size // 2, size - 1)


def _read(saved: Path) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of the file: magic, size, V, windows, tokens; then a record for each counted token,
    of a step, a least log-probability (floats) and V numbers of 16 bits, rounded up to an even number."""
    with saved.open("rb") as file:
        assert file.read(8) == b"_logits_"
        size, V, windows = np.fromfile(file, np.int32, 3).tolist()
        tokens = np.fromfile(file, np.int32, windows * size).reshape(windows, size)
        records = np.fromfile(file, np.uint16).reshape(windows, len(counted(size)), 4 + V + V % 2)
    step, least = np.moveaxis(np.ascontiguousarray(records[..., :4]).view(np.float32), -1, 0)
    nexts = tokens[:, [position + 1 for position in counted(size)]]
    chosen = np.take_along_axis(records[..., 4:], nexts[..., None], -1)[..., 0]
    return torch.from_numpy(tokens).long(), torch.from_numpy(least + step * chosen)
