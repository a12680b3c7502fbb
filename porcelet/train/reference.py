"""The policy that the KL term holds on to: a frozen copy of the model, replaced every so many steps (R1: 400).

    output/reference/step-400.safetensors    parameters and buffers after 400 steps

The reference of step s is the model as it was at the last multiple of `every` up to s, or at step 0 if `every` is 0. It
is on the disk before anything is drawn against it, so a resumed run finds it, or makes it again from the same numbers.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from porcelet.errors import ModelError
from porcelet.models.transformer import Transformer
from porcelet.train import checkpoint
from porcelet.train.files import flush, writing


class Reference:
    """The reference of a run in `output`; `model` is the one in training."""

    def __init__(self, model: Transformer, output: Path, every: int) -> None:
        self.model, self.output, self.every = model, output, every
        self._frozen: Transformer | None = None
        self._made_at = -1

    def at(self, step: int) -> Transformer:
        """The reference of a step; steps come in order.

        Raises:
            ModelError: its file is missing or damaged.
            CapacityError: the disk is full, or a file is where its folder belongs.
        """
        wanted = step - step % self.every if self.every else 0
        if self._frozen is None or self._made_at != wanted:
            if wanted == step:
                self._write(step)
            self._frozen, self._made_at = self._read(wanted), wanted
        return self._frozen

    def _path(self, step: int) -> Path:
        return self.output / "reference" / f"step-{step}.safetensors"

    def _write(self, step: int) -> None:
        """Keep the model of this moment; drop those that no checkpoint needs any more."""
        path = self._path(step)
        unfinished = path.with_suffix(".unfinished")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            save_file({name: tensor.detach() for name, tensor in _tensors(self.model)}, unfinished)
            flush(unfinished)
            os.replace(unfinished, path)
            flush(path.parent)
        found = checkpoint.newest(self.output)
        done = int(found.name.removeprefix("step-")) if found else 0
        needed = done - done % self.every if self.every else 0
        for other in path.parent.glob("step-*.safetensors"):
            if int(other.stem.removeprefix("step-")) < needed:
                other.unlink()

    def _read(self, step: int) -> Transformer:
        frozen = copy.deepcopy(self.model).requires_grad_(False)
        try:
            tensors = load_file(self._path(step))
            with torch.no_grad():
                for name, tensor in _tensors(frozen):
                    tensor.copy_(tensors[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as problem:
            raise ModelError(
                f"reference {self._path(step)} cannot be read: {problem}; delete the run's folder to start over"
            ) from problem
        return frozen


def _tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """All that a model computes with; what is tied comes once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
