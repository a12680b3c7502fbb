"""The file in which a model's experts stay on disk: its layout, and whether its bytes are whole. weights/offload.py
writes and maps it; the command line lists, verifies and removes it, so this imports no torch.

    header     one JSON object, filled up with newlines to whole pages: from which checkpoint and in which layout
    records    layer by layer, one an expert: gate, up and down as the kernel streams them, filled up to whole pages
    checksums  the CRC-32 of every piece (a gate, up or down), in that order, four bytes each

A file belongs to a checkpoint by its path (the first part of the name) and by the names, sizes and times of its files.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from porcelet.errors import ModelError

FORMAT = 2  # of the file; another layout of packed weights is another format
SUFFIX, UNFINISHED = ".experts", ".part"
MAX_HEADER_BYTES = 1 << 24
CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class Stacks:
    """The name of a layer's `Experts`; shapes [E, rows, K] and [E, parts, tiles, groups, block] of its two stacks."""

    module: str
    gate_up: tuple[int, int, int]
    down: tuple[int, int, int]
    packed_gate_up: tuple[int, ...]
    packed_down: tuple[int, ...]


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts in the file; its first record begins `start` bytes behind the header, and its first piece
    has the number `first_piece`."""

    stacks: Stacks
    start: int
    first_piece: int

    @property
    def experts(self) -> int:
        return self.stacks.down[0]

    @property
    def pieces(self) -> tuple[int, ...]:
        """The bytes of a record's gate, up and down."""
        stacks = self.stacks.packed_gate_up, self.stacks.packed_down
        return tuple(size for packed in stacks for size in [prod(packed[2:])] * packed[1])

    @property
    def gate_up_bytes(self) -> int:
        return prod(self.stacks.packed_gate_up[1:])

    @property
    def used_bytes(self) -> int:
        """Of a record."""
        return sum(self.pieces)

    @property
    def record_bytes(self) -> int:
        return _whole_pages(self.used_bytes)


@dataclass(frozen=True)
class Layout:
    """Where everything lies. `made_from` are the checkpoint's files: path, size, time in nanoseconds."""

    made_from: tuple[tuple[str, int, int], ...]
    layers: tuple[ExpertLayer, ...]

    @classmethod
    def of(cls, made_from: Iterable[tuple[str, int, int]], stacks: Iterable[Stacks]) -> Layout:
        """Of layers in the order of a step."""
        layers: list[ExpertLayer] = []
        start = first_piece = 0
        for stack in stacks:
            layers.append(layer := ExpertLayer(stack, start, first_piece))
            start += layer.experts * layer.record_bytes
            first_piece += layer.experts * len(layer.pieces)
        return cls(tuple(made_from), tuple(layers))

    @cached_property
    def header(self) -> bytes:
        """What the file begins with, whole pages."""
        described = [dataclasses.astuple(layer.stacks) for layer in self.layers]
        text = json.dumps({"format": FORMAT, "made_from": self.made_from, "layers": described}).encode()
        return text.ljust(_whole_pages(len(text) + 1), b"\n")

    @property
    def num_pieces(self) -> int:
        return sum(layer.experts * len(layer.pieces) for layer in self.layers)

    @property
    def checksums_at(self) -> int:
        return len(self.header) + sum(layer.experts * layer.record_bytes for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        return self.checksums_at + CHECKSUM_BYTES * self.num_pieces

    def path(self, folder: Path, source: Path) -> Path:
        """Of the file for a checkpoint that is loaded from `source`."""
        return folder / f"{_digest(str(source.resolve()).encode())}-{_digest(self.header)}{SUFFIX}"


def checksum(piece: memoryview | bytes) -> int:
    return zlib.crc32(piece)


def checksum_table(checksums: Sequence[int]) -> bytes:
    """As they lie in the file."""
    return struct.pack(f"<{len(checksums)}I", *checksums)


def found(folder: Path, source: Path) -> list[Path]:
    """The files of a checkpoint that is, or was, loaded from `source`; at most one is in use."""
    return sorted(folder.glob(f"{_digest(str(source.resolve()).encode())}-*{SUFFIX}"))


def remove(folder: Path, source: Path) -> list[Path]:
    """Delete these files, and what a killed process left of one; which. A process that has one mapped keeps it until it
    ends, one that is writing goes on."""
    files = found(folder, source)
    for file in files:
        file.unlink(missing_ok=True)
    for left in folder.glob(f"{_digest(str(source.resolve()).encode())}-*{UNFINISHED}"):
        _remove_abandoned(left)
    return files


def read_layout(path: Path) -> Layout:
    """What the file's header says.

    Raises:
        ModelError: it cannot be read, is cut, or is no such file.
    """
    try:
        with path.open("rb") as file:
            size, text = os.fstat(file.fileno()).st_size, file.readline(MAX_HEADER_BYTES)
    except OSError as problem:
        raise ModelError(f"{path} cannot be read: {problem.strerror}") from problem
    try:
        said = json.loads(text)
        stacks = [Stacks(module, *map(tuple, shapes)) for module, *shapes in said["layers"]]
        layout = Layout.of(((str(name), int(size), int(time)) for name, size, time in said["made_from"]), stacks)
        # The format among the rest; and the name has the header's digest.
        is_ours = layout.header.startswith(text) and path.name.endswith(f"-{_digest(layout.header)}{SUFFIX}")
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        is_ours = False
    if not is_ours:
        raise ModelError(f"{path} is not a file of experts as this version writes them; {_AGAIN}")
    if size != layout.num_bytes:
        raise ModelError(f"{path} has {size} bytes of {layout.num_bytes}; {_AGAIN}")
    return layout


def verify(path: Path) -> int:
    """Compare every expert with the checksums made when it was written; how many there are.

    Raises:
        ModelError: the file cannot be read or is damaged, and where.
    """
    layout = read_layout(path)
    try:
        with path.open("rb") as file:
            file.seek(layout.checksums_at)
            checksums = struct.unpack(f"<{layout.num_pieces}I", file.read(CHECKSUM_BYTES * layout.num_pieces))
            for layer in layout.layers:
                for expert in range(layer.experts):
                    file.seek(len(layout.header) + layer.start + expert * layer.record_bytes)
                    first = layer.first_piece + expert * len(layer.pieces)
                    if any(checksum(file.read(size)) != checksums[first + i] for i, size in enumerate(layer.pieces)):
                        raise ModelError(f"{path}: expert {expert} of {layer.stacks.module} is damaged; {_AGAIN}")
    except (OSError, struct.error) as problem:
        raise ModelError(f"{path} cannot be read to its end: {problem}; {_AGAIN}") from problem
    return sum(layer.experts for layer in layout.layers)


_AGAIN = "delete it: the next start with expert_memory writes it again"


def _remove_abandoned(path: Path) -> None:
    """Unless a process is writing it."""
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(file)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
