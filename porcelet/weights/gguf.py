"""A reader of GGUF files (version 2 and 3, little-endian): memory-mapped, bounds-checked, without torch.

A GGUF file is: magic, version, two counts, metadata pairs, a table of tensors, padding, tensor data. The reader walks
it once and copies nothing but the metadata; a tensor's `data` is a view of the mapped file. A file comes from outside,
so every count, length and offset is compared with the file's size before it is used: whatever the bytes, the answer is
a `GGUF` or one ModelError. The server's HTTP process reads the tokenizer from here, so bytes stay bytes;
weights/quantize.py makes tensors of them.

Left out: writing, big-endian files, version 1, arrays of arrays, the 2- and 3-bit K-quants, the I-quants.
Layout: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import mmap
import re
import struct
import sys
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from porcelet.errors import ModelError

MAX_ARRAY = 1 << 22  # values in one metadata array; the largest vocabularies have 2^18 tokens and twice as many merges
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
NO_RESERVE = 0x4000  # MAP_NORESERVE on x86, ARM and RISC-V; Python's mmap does not name it


@dataclass(frozen=True)
class TensorType:
    """A storage format: `block` neighbouring values of a row take `size` bytes."""

    name: str
    block: int
    size: int


TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
OTHER_TYPES = {10: "Q2_K", 11: "Q3_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. `shape` is in torch's order (rows first); `data` are its raw bytes, row after row."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: memoryview
    start: int = 0  # where `data` begins in the file


@dataclass(frozen=True)
class GGUF:
    """A parsed file. `metadata` holds str, bool, int, float and, for arrays, lists and tuples of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    buffer: mmap.mmap

    def release(self, tensor: GGUFTensor) -> None:
        """Let the system have back the memory through which a tensor was read; it can be read again."""
        first = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
        self.buffer.madvise(mmap.MADV_DONTNEED, first, tensor.start + len(tensor.data) - first)


def read(path: Path) -> GGUF:
    """Map and parse a GGUF file. The mapping lives as long as any tensor's `data` does.

    Raises:
        ModelError: the file is missing, truncated or damaged, or uses a feature listed above as left out.
    """
    cursor = _Cursor(path, _map(path))
    num_tensors, num_pairs = _header(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _value(cursor, key)
    return GGUF(path, metadata, _tensors(cursor, num_tensors, _alignment(cursor, metadata)), cursor.buffer)


def hf_name(name: str, architecture: str, source: str) -> str:
    """The Hugging Face name of a tensor: "blk.3.attn_q.weight" is "model.layers.3.self_attn.q_proj.weight".

    `architecture` is the file's general.architecture. What has no name there keeps one of ours: llama 3's RoPE factors
    are "rope_freqs.weight"; stacked experts [E, ...] are "mlp.experts.gate_proj.weight", without a number; and the two
    parts into which newer deepseek2 files cut kv_b_proj are "self_attn.k_b_proj.weight" [heads, latent rank, nope],
    transposed, and "self_attn.v_b_proj.weight" [heads, value width, latent rank].

    Raises:
        ModelError: a name outside the architecture's table.
    """
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    block = _BLOCK.fullmatch(name)
    table = _BLOCK_NAMES.get(architecture, {})
    if block is None or block[2] not in table:
        supported = ", ".join(_BLOCK_NAMES)
        raise ModelError(
            f"{source}: tensor {name!r} is not part of a {architecture} model as porcelet knows it; "
            f"supported architectures: {supported}"
        )
    return f"model.layers.{block[1]}.{table[block[2]]}"


# ---- header and metadata --------------------------------------------------------------------------------------------


class _Cursor:
    """A position in a mapped file; every read checks that its bytes exist."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.path}: {problem}; the file is damaged or incomplete")

    def take(self, num_bytes: int, what: str) -> int:
        """Step over `num_bytes` and return where they begin."""
        start, end = self.position, self.position + num_bytes
        if end > self.size:
            self.fail(f"{what} at byte {start} needs {num_bytes} bytes, past the end at {self.size}")
        self.position = end
        return start

    def number(self, format: struct.Struct, what: str) -> Any:
        return format.unpack_from(self.buffer, self.take(format.size, what))[0]

    def string(self, what: str) -> str:
        length = self.number(_U64, what)
        start = self.take(length, what)
        try:
            return self.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8")

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. This loop over a vocabulary is most of a read, so it is `string` written out."""
        buffer, size, position, unpack = self.buffer, self.size, self.position, _U64.unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                if position > size:
                    self.fail(f"{what}: string {len(found)} ends at byte {position}, past the end at {size}")
                found.append(buffer[start:position].decode())
        except struct.error:
            self.fail(f"{what}: {count} strings are promised, the file ends after {len(found)}")
        except UnicodeDecodeError:
            self.fail(f"{what}: string {len(found)} is not UTF-8")
        self.position = position
        return found


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy-on-write rather than read-only: torch wants writable memory, and nothing may reach the file. Linux
            # would want memory for all of it, were it not told that little is copied.
            flags = mmap.MAP_PRIVATE | (NO_RESERVE if sys.platform == "linux" else 0)
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except ValueError as problem:  # what mmap says of an empty file
        raise ModelError(f"{path} is empty; fetch the model again") from problem
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from problem


def _header(cursor: _Cursor) -> tuple[int, int]:
    start = cursor.take(4, "the magic")
    magic = cursor.buffer[start : start + 4]
    if magic != b"GGUF":
        raise ModelError(f"{cursor.path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'")
    version = cursor.number(_U32, "the version")
    if version not in (2, 3):
        raise ModelError(f"{cursor.path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian")
    return cursor.number(_U64, "the tensor count"), cursor.number(_U64, "the metadata count")


def _value(cursor: _Cursor, key: str) -> Any:
    what = f"metadata key {key!r}"
    kind = cursor.number(_U32, what)
    if kind == _ARRAY:
        return _array(cursor, what)
    if kind == _STRING:
        return cursor.string(what)
    if kind == _BOOL:
        return _bools(cursor, 1, what)[0]
    if kind not in _NUMBERS:
        cursor.fail(f"{what} has the unknown value type {kind}")
    return cursor.number(struct.Struct("<" + _NUMBERS[kind]), what)


def _array(cursor: _Cursor, what: str) -> Any:
    kind, count = cursor.number(_U32, what), cursor.number(_U64, what)
    if count > MAX_ARRAY:
        cursor.fail(f"{what} is an array of {count} values; at most {MAX_ARRAY} are read")
    if kind == _STRING:
        return cursor.strings(count, what)
    if kind == _BOOL:
        return _bools(cursor, count, what)
    if kind not in _NUMBERS:
        cursor.fail(f"{what} is an array of the unsupported value type {kind}")
    format = struct.Struct(f"<{count}{_NUMBERS[kind]}")
    return format.unpack_from(cursor.buffer, cursor.take(format.size, what))


def _bools(cursor: _Cursor, count: int, what: str) -> tuple[bool, ...]:
    start = cursor.take(count, what)
    values = cursor.buffer[start : start + count]
    if values.strip(b"\0\1"):
        cursor.fail(f"{what} is boolean but holds a byte other than 0 and 1")
    return tuple(map(bool, values))


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two of at least 8")
    return alignment


# ---- the table of tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A row of the table: what it says, before any of it is believed."""

    name: str
    dims: tuple[int, ...]
    kind: int
    offset: int

    @property
    def num_bytes(self) -> int:
        kind = TYPES[self.kind]
        return prod(self.dims) // kind.block * kind.size


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        entry = _entry(cursor)
        if entry.name in entries:
            cursor.fail(f"tensor {entry.name!r} occurs twice")
        entries[entry.name] = entry
    base = -(-cursor.position // alignment) * alignment
    _check_places(cursor, list(entries.values()), base, alignment)
    view = memoryview(cursor.buffer)
    return {name: _tensor(entry, view, base + entry.offset) for name, entry in entries.items()}


def _tensor(entry: _Entry, view: memoryview, start: int) -> GGUFTensor:
    return GGUFTensor(entry.name, TYPES[entry.kind], entry.dims[::-1], view[start : start + entry.num_bytes], start)


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.string("a tensor name")
    what = f"tensor {name!r}"
    num_dims = cursor.number(_U32, what)
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
    dims = struct.unpack_from(f"<{num_dims}Q", cursor.buffer, cursor.take(8 * num_dims, what))
    entry = _Entry(name, dims, cursor.number(_U32, what), cursor.number(_U64, what))
    if entry.kind not in TYPES:
        supported = ", ".join(kind.name for kind in TYPES.values())
        found = OTHER_TYPES.get(entry.kind, f"number {entry.kind}")
        raise ModelError(f"{cursor.path}: {what} has type {found}, which is not supported; supported: {supported}")
    block = TYPES[entry.kind].block
    if 0 in dims or dims[0] % block:
        cursor.fail(f"{what} has the shape {list(dims[::-1])}; its rows are not whole blocks of {block}")
    return entry


def _check_places(cursor: _Cursor, entries: list[_Entry], base: int, alignment: int) -> None:
    for entry in entries:
        if entry.offset % alignment:
            cursor.fail(f"tensor {entry.name!r} lies at offset {entry.offset}, which is not a multiple of {alignment}")
        end = base + entry.offset + entry.num_bytes
        if end > cursor.size:
            cursor.fail(f"tensor {entry.name!r} ends at byte {end}, past the end at {cursor.size}")
    for before, after in pairwise(sorted(entries, key=lambda entry: entry.offset)):
        if before.offset + before.num_bytes > after.offset:
            cursor.fail(f"tensors {before.name!r} and {after.name!r} overlap at offset {after.offset}")


_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "rope_freqs.weight",
}
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)", re.ASCII)

_DENSE = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_KEYS_AND_VALUES = {"attn_k.weight": "self_attn.k_proj.weight", "attn_v.weight": "self_attn.v_proj.weight"}
_BIASES = {f"attn_{letter}.bias": f"self_attn.{letter}_proj.bias" for letter in "qkv"}
_MLA = {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_k_b.weight": "self_attn.k_b_proj.weight",
    "attn_v_b.weight": "self_attn.v_b_proj.weight",
}
_MOE = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    **{f"ffn_{part}_exps.weight": f"mlp.experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
}
_BLOCK_NAMES = {
    "llama": {**_DENSE, **_KEYS_AND_VALUES, **_BIASES, "attn_output.bias": "self_attn.o_proj.bias"},
    "qwen2": {**_DENSE, **_KEYS_AND_VALUES, **_BIASES},
    "qwen3": {
        **_DENSE,
        **_KEYS_AND_VALUES,
        "attn_q_norm.weight": "self_attn.q_norm.weight",
        "attn_k_norm.weight": "self_attn.k_norm.weight",
    },
    "deepseek2": {**_DENSE, **_MLA, **_MOE},
}
