"""What a model is, read from its files before any tensor is: the config. Imports no torch.

The command line, the planner and the loader all ask here, so what they count is one thing.
"""

from __future__ import annotations

import struct
from pathlib import Path

from porcelet.config import ModelConfig, read_file, read_gguf
from porcelet.errors import ModelError
from porcelet.weights import gguf
from porcelet.weights.gguf import GGUF

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's RoPE scaling, as GGUF stores it


def read_config(path: Path) -> ModelConfig:
    """The config of a model folder (its `config.json`) or of a GGUF file (its metadata).

    Raises:
        ModelError: as `read_file` and `read_gguf` of porcelet.config.
    """
    return read_file(path / "config.json") if path.is_dir() else gguf_config(gguf.read(path))


def gguf_config(file: GGUF) -> ModelConfig:
    """The config of a GGUF file that is open already."""
    return read_gguf(
        file.metadata,
        tied="output.weight" not in file.tensors,
        biased="blk.0.attn_q.bias" in file.tensors,
        rope_factors=_rope_factors(file),
        source=str(file.path),
    )


def _rope_factors(file: GGUF) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise ModelError(f"{file.path}: tensor {ROPE_FACTORS!r} is {tensor.type.name} of {list(tensor.shape)}, not F32")
    return struct.unpack(f"<{tensor.shape[0]}f", tensor.data)
