"""Model files as a stream of (name, tensor), and back: a GGUF file, or a Hugging Face folder of safetensors.

Names are Hugging Face's whatever the file. Plain tensors come in their stored type, as views of the mapped file; a
GGUF's quantised ones come as `GGUFTensor`, for weights/quantize.py to unpack. GGUF keeps the rows of llama's q and k
projections in another order; they are put back here, so nobody above knows of it. Nothing is ever unpickled.

Left out: split GGUF files, FP8 blocks, slicing for a rank.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from porcelet.config import ModelConfig
from porcelet.errors import CapacityError, ModelError
from porcelet.weights import gguf, quantize
from porcelet.weights.gguf import GGUF, GGUFTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def config(path: Path) -> ModelConfig:
    """The model's config: a folder's `config.json`, or a GGUF's metadata.

    Raises:
        ModelError: as `ModelConfig.from_file` and `ModelConfig.from_gguf`.
    """
    if path.is_dir():
        return ModelConfig.from_file(path / "config.json")
    return _gguf_config(gguf.read(path))


def tensors(path: Path) -> Iterator[tuple[str, Tensor | GGUFTensor]]:
    """Every tensor of a GGUF file or a folder, one at a time, in the order of the file.

    Raises:
        ModelError: a file is missing or damaged, or an index and its shards disagree.
    """
    return _folder_tensors(path) if path.is_dir() else _gguf_tensors(gguf.read(path))


def save(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `config.json`. Each appears whole or not at all, the config last.

    Raises:
        CapacityError: the disk is full.
        ModelError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(config.to_hf(), indent=2) + "\n"
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        save_file(contiguous, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / WEIGHTS)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / "config.json")
    except (OSError, SafetensorError) as problem:
        raise _not_written(folder, problem) from problem
    finally:
        temporary.unlink(missing_ok=True)


def _not_written(folder: Path, problem: Exception) -> CapacityError | ModelError:
    # safetensors passes the system's error on as text alone.
    if os.strerror(errno.ENOSPC) in str(problem):
        return CapacityError(f"{folder}: the disk is full; free some space and save again")
    return ModelError(f"{folder} cannot be written: {problem}")


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def _gguf_config(file: GGUF) -> ModelConfig:
    return ModelConfig.from_gguf(file.metadata, tied="output.weight" not in file.tensors, source=str(file.path))


def _gguf_tensors(file: GGUF) -> Iterator[tuple[str, Tensor | GGUFTensor]]:
    config = _gguf_config(file)
    if file.metadata.get("split.count", 1) != 1:
        raise ModelError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them with llama-gguf-split first"
        )
    for tensor in file.tensors.values():
        name = gguf.hf_name(tensor.name, str(file.path))
        tensor = _unpermuted(tensor, name, config, file.path)
        values = quantize.plain(tensor)
        yield name, tensor if values is None else values


def _unpermuted(tensor: GGUFTensor, name: str, config: ModelConfig, path: Path) -> GGUFTensor:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    if len(tensor.shape) != 2 or tensor.shape[0] % (2 * heads):
        shape = list(tensor.shape)
        raise ModelError(f"{path}: tensor {tensor.name!r} has the shape {shape}; its rows are not {heads} heads")
    rows = quantize.unpermute(quantize.raw_bytes(tensor), heads)
    return dataclasses.replace(tensor, data=rows.numpy().data.cast("B"))


# ---- safetensors ----------------------------------------------------------------------------------------------------


def _folder_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    shards = _index(folder / INDEX) if (folder / INDEX).is_file() else {WEIGHTS: None}
    for file in shards:
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder / file} does not exist; a model folder needs {WEIGHTS} or {INDEX} with all its shards"
            )
    for file, names in shards.items():
        yield from _shard_tensors(folder / file, names)


def _shard_tensors(path: Path, promised: set[str] | None) -> Iterator[tuple[str, Tensor]]:
    name = "its header"
    try:
        with safe_open(path, framework="pt") as shard:
            names = shard.keys()
            if promised is not None:
                _check_promise(path, set(names), promised)
            for name in names:
                yield name, shard.get_tensor(name)
    except (OSError, SafetensorError, ValueError) as problem:
        raise ModelError(f"{path}: {name} cannot be read: {problem}; the file is damaged or incomplete") from problem


def _check_promise(path: Path, found: set[str], promised: set[str]) -> None:
    if missing := sorted(promised - found):
        raise ModelError(f"{path} lacks tensor {missing[0]!r}, which {INDEX} places there")
    if surplus := sorted(found - promised):
        raise ModelError(f"{path} holds tensor {surplus[0]!r}, which {INDEX} does not place there")


def _index(path: Path) -> dict[str, set[str] | None]:
    """The tensors of every shard. A shard is a file of the same folder, never a path out of it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str] | None] = {file: set() for file in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ModelError(f"{path} is not an index of safetensors shards: {problem!r}") from problem
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{path}: tensor {name!r} is placed in {file!r}, which is not a file name")
        names = shards[file]
        assert names is not None
        names.add(name)
    return shards
