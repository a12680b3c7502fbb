"""Exact checkpoints of a run: parameters, buffers, optimizer state and the step, as safetensors and JSON.

There is no random state to save: every random choice of a run hashes (seed, position). A checkpoint is a folder that
appears under its name once it is complete and on the disk, and only then do older ones go, so a crash at any moment
leaves one that is whole.

    output/checkpoint/step-120/state.safetensors   parameter.NAME, buffer.NAME, optimizer.NAME.KEY
    output/checkpoint/step-120/state.json          `Header`
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from porcelet.config import TrainConfig
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer
from porcelet.train.files import flush, writing
from porcelet.train.folders import portable
from porcelet.train.inputs import input_hashes, unread
from porcelet.train.optim import Optimizer

# Settings that a resumed run may change: they do not touch the numbers of a run, or they are the remedy for one that
# was stopped.
FREE_TO_CHANGE = (
    *("output", "checkpoint_every", "keep_checkpoints", "log", "evaluate"),
    *("on_spike", "spike_window", "spike_deviations", "spike_limit"),
)
# Free too, as the remedy for a run that was killed for its memory. Sums are then rounded otherwise: to say so, they are
# kept.
ROUNDING = ("tokens_per_pass", "threads")


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself. A run that goes on from it equals an uninterrupted one on as many threads, by
    equal passes and one torch."""

    step: int  # steps done
    recipe: Mapping[str, Any]
    spikes: Mapping[str, Any]  # the rule's state
    threads: int
    torch: str


def recipe_of(config: TrainConfig, model_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides a run's numbers, as flat JSON values under the names of a recipe; tables that its method
    does not read are left out.

    Raises:
        InputError: a file that the recipe names is not there.
    """
    idle = {*FREE_TO_CHANGE, *unread(config)}
    tables = {name: value for name, value in dataclasses.asdict(config).items() if name not in idle}
    tables |= {"model": tables["model"] or dict(model_fields), "inputs": input_hashes(config)}
    return portable(_plain(tables), Path(config.output))


def _plain(tables: Mapping[str, Any]) -> dict[str, Any]:
    """As a file has it: flat, with lists in the place of tuples."""
    return json.loads(json.dumps(dict(_flat(tables))))


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return next(reversed(_complete(output)), None)


def save(output: Path, model: Transformer, optimizer: Optimizer, header: Header) -> int:
    """Write the state after `header.step` steps; its bytes.

    Raises:
        CapacityError: the disk is full. Earlier checkpoints are intact.
    """
    folder = folder_of(output, header.step)
    unfinished = folder.with_suffix(".unfinished")
    tensors = {name: tensor.detach() for name, tensor in _state(model, optimizer).items()}
    if not folder.exists():  # a run that pauses where it was resumed changed nothing
        try:
            with writing(folder):
                _write(unfinished, tensors, header)
                unfinished.rename(folder)
                flush(folder.parent)
                flush(output)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return sum(tensor.nbytes for tensor in tensors.values())


def prune(output: Path, keep: int) -> None:
    """Drop what was left unfinished, and all but the newest `keep` checkpoints."""
    for folder in (*_complete(output)[:-keep], *(output / "checkpoint").glob("*.unfinished")):
        shutil.rmtree(folder)


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return output / "checkpoint" / f"step-{step}"


def read_header(folder: Path, recipe: Mapping[str, Any], output: Path) -> Header:
    """What a checkpoint of the run in `output` says of itself.

    Raises:
        InputError: it belongs to another recipe.
        ModelError: the file is damaged.
    """
    try:
        header = Header(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        check_recipe(portable(header.recipe, output), recipe, folder)
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise ModelError(f"checkpoint {folder} cannot be read: {problem}; delete it to start over") from problem
    return header


def restore(folder: Path, model: Transformer, optimizer: Optimizer) -> None:
    """Put a checkpoint's state into a freshly built model and optimizer.

    Raises:
        ModelError: its files are damaged.
    """
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"checkpoint {folder} cannot be read: {problem}; delete it to start over") from problem
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if own:
            optimizer.state[parameter] = {key: torch.empty_like(t, device=parameter.device) for key, t in own.items()}
    with torch.no_grad():
        for name, tensor in _state(model, optimizer).items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise ModelError(f"checkpoint {folder}: {name} is missing or misshapen; delete it to start over")
            tensor.copy_(tensors[name])


def _write(folder: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "state.safetensors")
    text = json.dumps(dataclasses.asdict(header), indent=2)
    (folder / "state.json").write_text(text, encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def _complete(output: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first."""
    folders = [path for path in (output / "checkpoint").glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _state(model: Transformer, optimizer: Optimizer) -> dict[str, Tensor]:
    """The live tensors of a run under the names they have in the file; what is frozen is the base's, in its folder."""
    state: dict[str, Tensor] = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state[f"parameter.{name}"] = parameter
        state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return state


def check_recipe(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on in `folder` with another recipe than the one it was begun with.

    What `wanted` has no word of does not count. A setting that is not in `saved`, as porcelet did not have it then, had
    its default; an input that is not was not looked at, and goes by a name that is compared.

    Raises:
        InputError: names the first difference.
    """
    defaults = _plain(dataclasses.asdict(TrainConfig()))
    read = {name.partition(".")[0] for name in wanted} - {*ROUNDING}
    known = saved.keys() | {name for name in wanted if not name.startswith("inputs.")}
    for name in sorted(known, key=lambda name: (name.startswith("inputs."), name)):
        before, now = saved.get(name, defaults.get(name)), wanted.get(name, defaults.get(name))
        if name.partition(".")[0] in read and before != now:
            raise InputError(
                f"{folder} was made with {name}={before!r}, this run has {now!r}; "
                f"restore {name}, or choose another output"
            )
