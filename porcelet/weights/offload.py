"""Experts of a model that is larger than memory: written to a file once, mapped, and brought as they are chosen.

    checkpoint → packed expert by expert → one file → `PackedExperts` over the mapping → kernels/cpu/residency.cpp

What a token needs of an expert is one piece of the disk (weights/records.py has the layout). A file belongs to a
checkpoint by the names, sizes and times of its files: another checkpoint, format or layout gets another file, and takes
the old one's place. It appears whole, in one step. Its bytes are trusted like those of the checkpoint: only header and
size are looked at when it is opened, and `porcelet verify` reads them all.

Left out: experts in float32 and FP8, more than one file, O_DIRECT.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.kernels import cpu
from porcelet.kernels.experts import PackedExperts, Residence
from porcelet.weights.files import Stored
from porcelet.weights.records import UNFINISHED, ExpertLayer, Layout, Stacks, checksum, checksum_table, found

if TYPE_CHECKING:
    from jaxtyping import UInt8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offload:
    """Where expert files are kept, and how many bytes of them may be in memory."""

    folder: Path
    budget: int


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
        """Where it begins behind the header."""
        before = self.layer.gate_up_bytes if self.is_down else 0
        return self.layer.start + self.expert * self.layer.record_bytes + before + self.part * self.packed.numel()

    @property
    def number(self) -> int:
        """In the order of the file."""
        before = self.layer.stacks.packed_gate_up[1] if self.is_down else 0
        return self.layer.first_piece + self.expert * len(self.layer.pieces) + before + self.part


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
        files = sorted({stored.path.resolve() for stored in tensors})
        made_from = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        self._layout = Layout.of(made_from, stacks)
        largest = max(layer.record_bytes for layer in self.layers)
        if offload.budget < largest:
            raise InputError(
                f"expert_memory is {offload.budget / 1e6:.1f} MB, and one expert takes {largest / 1e6:.1f} MB; raise it"
            )
        self._source = source
        self.num_bytes = self._layout.num_bytes
        self.path = self._layout.path(offload.folder, source)

    @property
    def layers(self) -> tuple[ExpertLayer, ...]:
        return self._layout.layers

    @property
    def is_there(self) -> bool:
        """Whether the file is whole: of the right size, and beginning with the right header."""
        try:
            with self.path.open("rb") as file:
                size, header = os.fstat(file.fileno()).st_size, file.read(len(self._layout.header))
        except OSError:
            return False
        if size == self.num_bytes and header == self._layout.header:
            return True
        log.warning("%s is damaged, and written again", self.path)
        return False

    def write(self, pieces: Iterable[Piece]) -> None:
        """Write the file, unless another process has done so meanwhile.

        Raises:
            CapacityError: the disk has no room for it.
            ModelError: the folder cannot be written.
        """
        temporary = self.path.with_suffix(UNFINISHED)
        with self._alone(temporary) as file:
            if self.is_there:
                return
            for old in found(self.path.parent, self._source):
                old.unlink()
            os.ftruncate(file, 0)
            self._need_space()
            log.info("writing %.1f GB of experts to %s, once", self.num_bytes / 1e9, self.path)
            os.posix_fallocate(file, 0, self.num_bytes)
            header, checksums = self._layout.header, [0] * self._layout.num_pieces
            for piece in pieces:
                content = piece.packed.contiguous().numpy().data.cast("B")
                _write_at(file, content, len(header) + piece.place)
                checksums[piece.number] = checksum(content)
            _write_at(file, memoryview(checksum_table(checksums)), self._layout.checksums_at)
            _write_at(file, memoryview(header), 0)
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
            start, E, stacks = len(self._layout.header) + layer.start, layer.experts, layer.stacks
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


def _write_at(file: int, rest: memoryview, place: int) -> None:
    while rest:
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return file >= 0 and os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
