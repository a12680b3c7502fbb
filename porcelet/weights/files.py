"""Checkpoints on disk: what tensors there are, each read when asked for; and back to safetensors.

A checkpoint is a GGUF file or a Hugging Face folder of safetensors. Names are Hugging Face's whatever the file, and
what a format keeps in another way is put right here, so nobody above knows of it: GGUF's order of llama's q and k rows,
its stacked experts; the halves into which newer files cut MLA's kv_b_proj come together, as FP8 weights do with their
scales. Opening reads headers only, so a checkpoint can be checked as a whole before gigabytes are read. Nothing is ever
unpickled.

Left out: split GGUF files, slicing for a rank.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from porcelet.config import ModelConfig, read_file, write_hf
from porcelet.errors import CapacityError, ModelError
from porcelet.kernels.linear import FP8Weight
from porcelet.weights import gguf, quantize
from porcelet.weights.gguf import GGUF, GGUFTensor
from porcelet.weights.header import ROPE_FACTORS, gguf_config
from porcelet.weights.shards import Entry, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MAX_SHARD_BYTES = 5_000_000_000  # as transformers cuts
PIECE = 1 << 20  # values that are converted at once: they stay in the cache
SCALE_SUFFIX = "_scale_inv"
FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
DTYPES = {**FLOAT_TYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class KVBParts:
    """MLA's kv_b_proj as newer GGUF files cut it: W_UK [heads · C, N], a head's turned over, and W_UV
    [heads · value, C]."""

    heads: int
    w_uk: GGUFTensor
    w_uv: GGUFTensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, latent = self.w_uv.shape
        return self.heads * self.w_uk.shape[1] + rows, latent

    def dequantize(self) -> Tensor:
        """The whole in float32, [heads · (N + value), C]."""
        w_uk, w_uv = (quantize.dequantize(part).unflatten(0, (self.heads, -1)) for part in (self.w_uk, self.w_uv))
        return torch.cat((w_uk.transpose(1, 2), w_uv), dim=1).flatten(0, 1)


Source = Tensor | GGUFTensor | FP8Weight | KVBParts


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, not read yet: checkpoint name, shape, stored bytes and the file it lies in."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    path: Path
    is_quantised: bool
    _read: Callable[[bool], Source]
    _release: Callable[[], None] = lambda: None

    @contextmanager
    def open(self, *, as_stored: bool = True) -> Iterator[Source]:
        """The tensor in its stored type, or as float32 where that is a plain float type and not `as_stored`. A
        `GGUFTensor` is a view that ends with the block, as `KVBParts` are; all others are in memory of their own.

        Raises:
            ModelError: its bytes cannot be read.
        """
        try:
            yield self._read(as_stored)
        finally:
            self._release()


@dataclass(frozen=True)
class Checkpoint:
    """The config of a model and all its tensors, in the order of the files."""

    path: Path
    config: ModelConfig
    tensors: list[Stored]


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of a GGUF file or of a folder.

    Raises:
        ModelError: a file is missing or damaged, or an index and its shards disagree.
    """
    if path.is_dir():
        return Checkpoint(path, read_file(path / "config.json"), _folder_tensors(path))
    file = gguf.read(path)
    config = gguf_config(file)
    return Checkpoint(path, config, list(_gguf_tensors(file, config)))


def save(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors and `config.json`; above MAX_SHARD_BYTES, shards with an index. Tensors are taken one by one.

    A single file appears whole, in one step; while shards replace an older model the folder has no config, so that what
    an interruption leaves is refused rather than loaded.

    Raises:
        CapacityError: the disk is full.
        ModelError: the folder cannot be written.
    """
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        names = _write_shards(temporary, tensors)
        (temporary / "config.json").write_text(json.dumps(write_hf(config), indent=2) + "\n", encoding="utf-8")
        if INDEX in names:
            (folder / "config.json").unlink(missing_ok=True)  # until the new one is there, the folder is no model
        for name in names:
            os.replace(temporary / name, folder / name)
        for old in {INDEX, WEIGHTS, *(path.name for path in folder.glob("model-*-of-*.safetensors"))} - set(names):
            (folder / old).unlink(missing_ok=True)
        os.replace(temporary / "config.json", folder / "config.json")
    except (OSError, SafetensorError) as problem:
        raise _not_written(folder, problem) from problem
    finally:
        for left in temporary.glob("*"):
            left.unlink()
        if temporary.is_dir():
            temporary.rmdir()


def copy_text_files(source: Path, folder: Path) -> None:
    """Copy tokenizer and chat format from one model's folder to another's."""
    for name in TEXT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Write shards under numbers, then under the names that say how many there are; all file names."""
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}

    def write() -> None:
        save_file(waiting, folder / str(len(shards)), metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    total = 0
    for name, tensor in tensors:
        if waiting and sum(held.nbytes for held in waiting.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            write()
        waiting[name] = tensor.detach().contiguous()
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        os.replace(folder / "0", folder / WEIGHTS)
        return [WEIGHTS]
    files = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for number, file in enumerate(files):
        os.replace(folder / str(number), folder / file)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]


def _not_written(folder: Path, problem: Exception) -> CapacityError | ModelError:
    # safetensors passes the system's error on as text alone.
    if os.strerror(errno.ENOSPC) in str(problem):
        return CapacityError(f"{folder}: the disk is full; free some space and save again")
    return ModelError(f"{folder} cannot be written: {problem}")


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def _gguf_tensors(file: GGUF, config: ModelConfig) -> Iterator[Stored]:
    if file.metadata.get("split.count", 0) not in (0, 1):  # the tool that joins parts leaves a 0
        raise ModelError(
            f"{file.path} is one of {file.metadata['split.count']} parts; join them with llama-gguf-split first"
        )
    architecture = file.metadata["general.architecture"]
    named = {gguf.hf_name(tensor.name, architecture, str(file.path)): tensor for tensor in file.tensors.values()}
    for name, tensor in named.items():
        if name == ROPE_FACTORS:
            continue
        if name.endswith(".k_b_proj.weight"):
            yield _kv_b_parts(file, config, name, named)
        elif name.endswith(".v_b_proj.weight"):
            if name.replace(".v_b_", ".k_b_") not in named:
                raise ModelError(f"{file.path}: tensor {tensor.name!r} is there without its attn_k_b")
        elif ".mlp.experts." in name:
            yield from _experts(file, name, tensor)
        else:
            yield _gguf_stored(file, name, tensor, _permuted_heads(tensor, name, config, architecture, file.path))


def _gguf_stored(file: GGUF, name: str, tensor: GGUFTensor, permuted_heads: int | None = None) -> Stored:
    def read(as_stored: bool) -> Source:
        source = tensor if permuted_heads is None else _unpermuted(tensor, permuted_heads)
        values = quantize.plain(source)
        return source if values is None else values.clone()

    quantised = tensor.type.name not in quantize.PLAIN_TYPES
    return Stored(name, tensor.shape, len(tensor.data), file.path, quantised, read, lambda: file.release(tensor))


def _permuted_heads(tensor: GGUFTensor, name: str, config: ModelConfig, architecture: str, path: Path) -> int | None:
    """The heads over which llama's q and k rows lie in another order than in Hugging Face's files."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or architecture != "llama":
        return None
    if tensor.shape[0] % (2 * heads):
        shape = list(tensor.shape)
        raise ModelError(f"{path}: tensor {tensor.name!r} has the shape {shape}; its rows are not {heads} heads")
    return heads


def _unpermuted(tensor: GGUFTensor, heads: int) -> GGUFTensor:
    rows = torch.frombuffer(tensor.data, dtype=torch.uint8).view(tensor.shape[0], -1)
    return dataclasses.replace(tensor, data=quantize.unpermute(rows, heads).flatten().numpy().data)


def _experts(file: GGUF, name: str, tensor: GGUFTensor) -> Iterator[Stored]:
    """GGUF stacks a layer's experts; ours come one by one, as in Hugging Face's files."""
    if len(tensor.shape) != 3:
        raise ModelError(
            f"{file.path}: tensor {tensor.name!r} has the shape {list(tensor.shape)}; 3 dimensions expected"
        )
    size = len(tensor.data) // tensor.shape[0]
    for expert in range(tensor.shape[0]):
        begin = expert * size
        one = dataclasses.replace(
            tensor, shape=tensor.shape[1:], data=tensor.data[begin : begin + size], start=tensor.start + begin
        )
        yield _gguf_stored(file, name.replace(".experts.", f".experts.{expert}."), one)


def _kv_b_parts(file: GGUF, config: ModelConfig, name: str, named: dict[str, GGUFTensor]) -> Stored:
    """MLA's kv_b_proj, of whose two parts the file has keys [H, C, N], turned over, and values [H, value, C]."""
    keys, values = named[name], named.get(name.replace(".k_b_", ".v_b_"))
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    if values is None or keys.shape != (heads, latent, nope) or values.shape != (heads, value, latent):
        found = None if values is None else list(values.shape)
        raise ModelError(
            f"{file.path}: tensor {keys.name!r} has the shape {list(keys.shape)} and its attn_v_b {found}; "
            f"{[heads, latent, nope]} and {[heads, value, latent]} were expected"
        )

    def read(as_stored: bool) -> KVBParts:
        rows = (dataclasses.replace(part, shape=(prod(part.shape[:2]), part.shape[2])) for part in (keys, values))
        return KVBParts(heads, *rows)

    def release() -> None:
        file.release(keys)
        file.release(values)

    shape, num_bytes = (heads * (nope + value), latent), len(keys.data) + len(values.data)
    quantised = keys.type.name not in quantize.PLAIN_TYPES
    return Stored(name.replace(".k_b_", ".kv_b_"), shape, num_bytes, file.path, quantised, read, release)


# ---- safetensors ----------------------------------------------------------------------------------------------------


def _folder_tensors(folder: Path) -> list[Stored]:
    shards = _index(folder / INDEX) if (folder / INDEX).is_file() else {WEIGHTS: None}
    for file in shards:
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder / file} does not exist; a model folder needs {WEIGHTS} or {INDEX} with all its shards"
            )
    entries: dict[str, Entry] = {}
    for file, promised in shards.items():
        found = read_header(folder / file)
        if promised is not None:
            _check_promise(folder / file, set(found), promised)
        entries |= found
    return list(_stored(entries))


class _Scratch:
    """Memory for pieces that are only converted, one after another: its pages are touched once, and it leaves no holes
    in the heap."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor in the scratch, in the place of the one before."""
        num_bytes = count * dtype.itemsize
        if self._memory is None or len(self._memory) < num_bytes:
            self._memory = mmap.mmap(-1, num_bytes)
        return torch.frombuffer(self._memory, dtype=dtype, count=count)


def _stored(entries: dict[str, Entry]) -> Iterator[Stored]:
    scratch = _Scratch()
    for name, entry in entries.items():
        scale = entries.get(name + SCALE_SUFFIX)
        if entry.dtype == "F8_E4M3":
            yield _fp8_stored(entry, scale)
        elif name.endswith(SCALE_SUFFIX):
            weight = entries.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or weight.dtype != "F8_E4M3":
                raise ModelError(f"{entry.path}: tensor {name!r} scales no FP8 weight of this checkpoint")
        elif entry.dtype in FLOAT_TYPES:
            yield Stored(
                name,
                entry.shape,
                entry.num_bytes,
                entry.path,
                False,
                _float_reader(entry, scratch),
            )
        else:
            supported = f"{', '.join(FLOAT_TYPES)} and F8_E4M3 with scales"
            raise ModelError(f"{entry.path}: tensor {name!r} is of type {entry.dtype}; supported: {supported}")


def _fp8_stored(entry: Entry, scale: Entry | None) -> Stored:
    if scale is None:
        raise ModelError(f"{entry.path}: tensor {entry.name!r} is FP8 without {entry.name + SCALE_SUFFIX!r}")
    blocks = tuple(-(-size // 128) for size in entry.shape)
    if len(entry.shape) != 2 or scale.shape != blocks or scale.dtype not in ("F32", "F8_E8M0"):
        raise ModelError(
            f"{scale.path}: tensor {scale.name!r} is {scale.dtype} of the shape {list(scale.shape)}; for the weight of "
            f"{list(entry.shape)}, F32 or F8_E8M0 of {list(blocks)} was expected"
        )

    def read(as_stored: bool) -> FP8Weight:
        return FP8Weight(_read(entry), _read(scale).float())

    return Stored(entry.name, entry.shape, entry.num_bytes + scale.num_bytes, entry.path, True, read)


def _float_reader(entry: Entry, scratch: _Scratch) -> Callable[[bool], Tensor]:
    """Reads a tensor as it is stored, or converted to float32 piece by piece, which never holds it twice."""

    def read(as_stored: bool) -> Tensor:
        count, dtype = prod(entry.shape), DTYPES[entry.dtype]
        if as_stored or dtype == torch.float32:
            return _read(entry)
        values = torch.empty(count)
        with _opened(entry) as file:
            for start in range(0, count, PIECE):
                piece = scratch.tensor(min(PIECE, count - start), dtype)
                _read_into(piece, file, entry)
                values[start : start + PIECE] = piece
        return values.view(entry.shape)

    return read


def _read(entry: Entry) -> Tensor:
    """The tensor as it is stored."""
    values = torch.empty(prod(entry.shape), dtype=DTYPES[entry.dtype])
    with _opened(entry) as file:
        _read_into(values, file, entry)
    return values.view(entry.shape)


@contextmanager
def _opened(entry: Entry) -> Iterator[FileIO]:
    """The file, at the tensor's first byte."""
    try:
        with FileIO(entry.path) as file:
            file.seek(entry.start)
            yield file
    except OSError as problem:
        raise ModelError(f"{entry.path}: tensor {entry.name!r} cannot be read: {problem.strerror}") from problem


def _read_into(values: Tensor, file: FileIO, entry: Entry) -> None:
    target = values.view(torch.uint8).numpy().data
    read = 0
    while read < len(target):
        count = file.readinto(target[read:])
        if not count:
            ended = file.tell() - entry.start
            raise ModelError(
                f"{entry.path}: tensor {entry.name!r} ends after {ended} of {entry.num_bytes} bytes; fetch it again"
            )
        read += count


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
