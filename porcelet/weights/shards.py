"""The header of a safetensors file, read without torch and believed only where it is consistent.

A file is: 8 bytes of header length, a JSON object of name → {dtype, shape, data_offsets}, the data. We read it
ourselves, as strictly as the `safetensors` library (a test compares the verdicts), for three reasons: an error can name
tensor and number, a tensor's bytes can be read into its final memory instead of being mapped (a mapping keeps the whole
file in the process's memory until its last tensor is gone), and the command line learns a model's types without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from porcelet.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
# Bytes of one value; the library's types below one byte a value are not for us.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: where its bytes begin in the file and how many they are."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of its data.

    Raises:
        ModelError: the file is missing, truncated or damaged, or its header lies; with file, tensor and number.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                _fail(path, f"its header of {length} bytes does not fit into a file of {size}")
            text = file.read(length)
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from problem
    base = 8 + length
    entries = [_entry(path, name, row, base) for name, row in _table(path, text).items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.start, entry.start + entry.num_bytes))
    end = base
    for entry in entries:
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            _fail(
                path,
                f"tensor {entry.name!r} begins at byte {entry.start - base} and {kind}, which ends at {end - base}",
            )
        end += entry.num_bytes
        if end > size:
            _fail(path, f"tensor {entry.name!r} ends at byte {end}, past the end at {size}")
    if end != size:
        _fail(path, f"its tensors end at byte {end}, the file at {size}")
    return {entry.name: entry for entry in entries}


def _fail(path: Path, problem: str) -> NoReturn:
    raise ModelError(f"{path}: {problem}; the file is damaged or incomplete")


def _table(path: Path, text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:
        _fail(path, f"its header is not JSON: {problem}")
    if not isinstance(table, dict) or not text.startswith(b"{"):
        _fail(path, f"its header is a JSON {type(table).__name__}, not an object")
    metadata = table.get("__metadata__", {})
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        _fail(path, "its __metadata__ is not an object of strings")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _entry(path: Path, name: str, row: Any, base: int) -> Entry:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not _are_counts(shape):
        _fail(path, f"tensor {name!r} has the shape {shape!r}")
    if not _are_counts(offsets) or len(offsets) != 2:
        _fail(path, f"tensor {name!r} has the data_offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelError(
            f"{path}: tensor {name!r} has the type {dtype!r}, which is not supported; supported: "
            f"{', '.join(DTYPE_BYTES)}"
        )
    num_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        _fail(
            path, f"tensor {name!r} has {offsets[1] - offsets[0]} bytes; {dtype} of the shape {shape} takes {num_bytes}"
        )
    return Entry(path, name, dtype, tuple(shape), base + offsets[0], num_bytes)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
