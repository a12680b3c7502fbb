"""Exact checkpoints of a run: parameters, buffers, optimizer state and the step, as safetensors and JSON.

There is no random state to save: every random choice of a run hashes (seed, position). A checkpoint is a folder that
appears under its name when it is complete, so a crash at any moment leaves the previous one; the newest alone is kept.

    output/checkpoint/step-120/state.safetensors   parameter.NAME, buffer.NAME, optimizer.NAME.{step,exp_avg,exp_avg_sq}
    output/checkpoint/step-120/state.json          step and recipe
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from porcelet.config import TrainConfig
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer

FREE_TO_CHANGE = ("output", "checkpoint_every", "log")  # settings that do not touch the numbers of a run


def recipe_of(config: TrainConfig, model_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides a run's numbers, as flat JSON values under the names of a recipe."""
    tables = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_TO_CHANGE}
    return json.loads(json.dumps(dict(_flat({**tables, "model": tables["model"] or dict(model_fields)}))))


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    folders = [path for path in (output / "checkpoint").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return max(folders, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def save(
    output: Path, model: Transformer, optimizer: torch.optim.Optimizer, step: int, recipe: Mapping[str, Any]
) -> None:
    """Write the state after `step` steps, then drop older checkpoints."""
    folder = output / "checkpoint" / f"step-{step}"
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = {name: tensor.detach() for name, tensor in _state(model, optimizer).items()}
    save_file(tensors, unfinished / "state.safetensors")
    (unfinished / "state.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=2), encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    _flush(folder.parent)
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other)


def restore(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any]) -> int:
    """Put a checkpoint's state into a freshly built model and optimizer; the number of steps it had done.

    Raises:
        InputError: it belongs to another recipe.
        ModelError: its files are damaged.
    """
    try:
        header = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        saved, step = dict(header["recipe"]), int(header["step"])
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise ModelError(f"checkpoint {folder} cannot be read: {problem}; delete it to start over") from problem
    _check_recipe(saved, recipe, folder)
    for name, parameter in model.named_parameters():
        names = [key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] == f"optimizer.{name}"]
        if names:
            optimizer.state[parameter] = {key: tensors[f"optimizer.{name}.{key}"] for key in names}
    with torch.no_grad():
        for name, tensor in _state(model, optimizer).items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ModelError(f"checkpoint {folder}: {name} is missing or misshapen; delete it to start over")
            tensor.copy_(tensors[name])
    return step


def _state(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The live tensors of a run under the names they have in the file."""
    state: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        state[f"parameter.{name}"] = parameter
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return state


def _check_recipe(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise InputError(
                f"checkpoint {folder} was made with {name}={saved.get(name)!r}, this run has {wanted.get(name)!r}; "
                f"restore {name}, or choose another output"
            )


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
