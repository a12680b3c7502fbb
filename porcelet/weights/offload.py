"""Experts of a model that is larger than memory: written to a file once, mapped, and brought as they are chosen.

    checkpoint → packed expert by expert → one file → `PackedExperts` over the mapping → kernels/cpu/residency.cpp

The file begins with a header that says from which checkpoint and in which layout it was made; then, layer by layer, one
record an expert: its gate, up and down projections as the kernel streams them, filled up to whole pages. So what a
token needs of an expert is one piece of the disk. A file belongs to a checkpoint by the names, sizes and times of its
files: another checkpoint, format or layout gets another file, and takes the old one's place. It appears whole, in one
step. Its bytes are trusted like those of the checkpoint: only header and size are looked at when it is opened.

Left out: experts in float32 and FP8, more than one file, O_DIRECT.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.kernels import cpu
from porcelet.kernels.experts import PackedExperts, Residence
from porcelet.kernels.linear import PackedWeight, kind_of_block
from porcelet.weights.files import Stored

if TYPE_CHECKING:
    from jaxtyping import UInt8

FORMAT = 1  # of the file; another layout of packed weights is another format
SUFFIX = ".experts"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offload:
    """Where expert files are kept, and how many bytes of them may be in memory."""

    folder: Path
    budget: int


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
    """One layer's experts in the file; its first record begins `start` bytes behind the header."""

    stacks: Stacks
    start: int

    @property
    def experts(self) -> int:
        return self.stacks.down[0]

    @property
    def gate_up_bytes(self) -> int:
        return prod(self.stacks.packed_gate_up[1:])

    @property
    def used_bytes(self) -> int:
        """Of a record."""
        return self.gate_up_bytes + prod(self.stacks.packed_down[1:])

    @property
    def record_bytes(self) -> int:
        return _whole_pages(self.used_bytes)

    def kind(self, is_down: bool) -> type[PackedWeight]:
        """Of the weights of one of the stacks."""
        return kind_of_block((self.stacks.packed_down if is_down else self.stacks.packed_gate_up)[-1])


@dataclass(frozen=True)
class Piece:
    """One packed projection of an expert: `part` of its layer's gate_up stack, or of down."""

    layer: ExpertLayer
    expert: int
    is_down: bool
    part: int
    packed: UInt8[Tensor, "tiles groups block"]

    @property
    def place(self) -> int:
        """Where it begins in the file."""
        before = self.layer.gate_up_bytes if self.is_down else 0
        return self.layer.start + self.expert * self.layer.record_bytes + before + self.part * self.packed.numel()


class ExpertFile:
    """The file of one checkpoint's experts in one layout; it need not be there yet.

    `stacks` are the layers in the order of a step.

    Raises:
        InputError: the budget is less than one expert takes.
        ModelError: the native module, which looks after what is in memory, was not built.
    """

    def __init__(
        self,
        offload: Offload,
        source: Path,
        tensors: Sequence[Stored],
        stacks: Sequence[Stacks],
    ) -> None:
        if not cpu.available():
            raise ModelError("expert_memory needs the native module, which was not built; install a C++ compiler first")
        self._budget = offload.budget
        self.layers: list[ExpertLayer] = []
        start = 0  # behind the header, whose length the layers decide
        for layer in stacks:
            self.layers.append(ExpertLayer(layer, start))
            start += self.layers[-1].experts * self.layers[-1].record_bytes
        largest = max(layer.record_bytes for layer in self.layers)
        if offload.budget < largest:
            raise InputError(
                f"expert_memory is {offload.budget / 1e6:.1f} MB, and one expert takes {largest / 1e6:.1f} MB; raise it"
            )
        files = sorted({stored.path.resolve() for stored in tensors})
        made_from = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        described = [dataclasses.astuple(layer) for layer in self.layers]
        self._header = json.dumps({"format": FORMAT, "made_from": made_from, "layers": described}).encode()
        self._first = _whole_pages(len(self._header) + 1)
        self.num_bytes = self._first + start
        origin, content = _digest(str(source.resolve()).encode()), _digest(self._header)
        self.path = offload.folder / f"{origin}-{content}{SUFFIX}"
        self._older = f"{origin}-*{SUFFIX}"

    @property
    def is_there(self) -> bool:
        """Whether the file is whole: of the right size, and beginning with the right header."""
        try:
            with self.path.open("rb") as file:
                size, header = os.fstat(file.fileno()).st_size, file.read(self._first)
        except OSError:
            return False
        if size == self.num_bytes and header == self._header.ljust(self._first, b"\n"):
            return True
        log.warning("%s is damaged, and written again", self.path)
        return False

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write the file, unless another process has done so meanwhile.

        Raises:
            CapacityError: the disk has no room for it.
            ModelError: the folder cannot be written.
        """
        temporary = self.path.with_suffix(".part")
        with self._alone(temporary) as file:
            if self.is_there:
                return
            for old in self.path.parent.glob(self._older):
                old.unlink()
            os.ftruncate(file, 0)
            self._need_space()
            log.info("writing %.1f GB of experts to %s, once", self.num_bytes / 1e9, self.path)
            os.posix_fallocate(file, 0, self.num_bytes)
            for piece in pieces:
                _write_at(file, piece.packed, self._first + piece.place)
            os.pwrite(file, self._header.ljust(self._first, b"\n"), 0)
            os.fsync(file)
            os.replace(temporary, self.path)

    def open(self) -> Iterator[tuple[str, PackedExperts, PackedExperts]]:
        """Map the file: every layer's module with its two stacks. Pages come when experts are chosen.

        Raises:
            ModelError: the file cannot be mapped.
        """
        try:
            residency = cpu.new_residency(self.path, self._budget)
        except RuntimeError as problem:
            raise ModelError(f"{problem}; remove the file, or leave expert_memory out") from problem
        memory = (ctypes.c_uint8 * self.num_bytes).from_address(residency.mapping())
        whole = torch.frombuffer(memory, dtype=torch.uint8)  # read-only in truth: a write to it ends the process
        for layer in self.layers:
            start, E, stacks = self._first + layer.start, layer.experts, layer.stacks
            residence = Residence(residency, residency.add_layer(start, layer.record_bytes, E))
            records = whole[start : start + E * layer.record_bytes].view(E, -1)
            gate_up = records[:, : layer.gate_up_bytes].unflatten(1, stacks.packed_gate_up[1:])
            down = records[:, layer.gate_up_bytes : layer.used_bytes].unflatten(1, stacks.packed_down[1:])
            yield (
                stacks.module,
                PackedExperts(gate_up, stacks.gate_up, residence),
                PackedExperts(down, stacks.down, residence),
            )

    @contextmanager
    def _alone(self, temporary: Path) -> Iterator[int]:
        """The temporary file, open, held by one process at a time; a killed one's is taken over."""
        file = -1
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            while not _is_at(file, temporary):  # who held it before us has finished it, or given it up
                if file >= 0:
                    os.close(file)
                file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        except OSError as problem:
            self._fail(problem)
        finally:
            if _is_at(file, temporary):
                temporary.unlink()
            if file >= 0:
                os.close(file)

    def _need_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.num_bytes:
            raise self._no_room(f"{free / 1e9:.1f} GB are free")

    def _fail(self, problem: OSError) -> NoReturn:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._no_room("the disk is full") from problem
        raise ModelError(
            f"{self.path.parent}: experts that stay on disk cannot be written there: {problem.strerror}; set "
            "PORCELET_HOME to a folder that can be written, or leave expert_memory out"
        ) from problem

    def _no_room(self, found: str) -> CapacityError:
        return CapacityError(
            f"{self.path.parent}: experts that stay on disk take {self.num_bytes / 1e9:.1f} GB, and {found}; free some "
            "space, or set PORCELET_HOME to a folder on another disk"
        )


def _write_at(file: int, packed: Tensor, place: int) -> None:
    rest = packed.contiguous().numpy().data.cast("B")
    while rest:
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return file >= 0 and os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
