from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from porcelet.config import TrainConfig
from porcelet.errors import InputError, ModelError
from porcelet.train import checkpoint
from porcelet.train.loop import train
from porcelet.train.optim import make_optimizer
from tests.train.tiny_run import FIELDS, config, metrics_of, model, state_of


class Stopped(Exception):
    """Ends a run from its report."""


def train_until(run: TrainConfig, fields: dict[str, Any], step: int) -> None:
    """Train and break off in the report of `step`, before that step's checkpoint."""

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            raise Stopped

    with pytest.raises(Stopped):
        train(run, fields, report)


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: parameters, biases, optimizer, metrics, saved model."""
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert metrics_of(one) == metrics_of(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Twelve steps in one go, or broken off in step 8 and continued behind the checkpoint of step 6."""
    whole, broken = config(tmp_path / "whole", checkpoint_every=100), config(tmp_path / "broken")
    train(whole, FIELDS)
    train_until(broken, FIELDS, 8)
    seen: list[float] = []
    train(broken, FIELDS, lambda metrics: seen.append(metrics["step"]), resume=True)
    assert seen == [7, 8, 9, 10, 11, 12]
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resumed_reinforcement_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Rollouts repeat as well: their draws hash (seed, step), and the engine holds nothing of an earlier step."""
    start = str(train(config(tmp_path / "start", steps=30, learning_rate=1e-2), FIELDS))
    changes: dict[str, Any] = {"method": "grpo", "model": start, "steps": 4, "max_new_tokens": 3, "group_size": 4}

    def by_length(problem: object, text: str) -> float:
        return float(len(text))

    whole = config(tmp_path / "whole", **changes)
    broken = config(tmp_path / "broken", **changes, checkpoint_every=2)
    train(whole, {}, reward=by_length)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:
            raise Stopped

    with pytest.raises(Stopped):
        train(broken, {}, stop, reward=by_length)
    train(broken, {}, resume=True, reward=by_length)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert any(line["tokens"] for line in metrics_of(tmp_path / "whole"))


def test_killed_process_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """SIGKILL in step 8 of another process; what follows here equals the run that nobody killed."""
    program = (
        "import os, signal, sys; from pathlib import Path; from porcelet.train.loop import train\n"
        "from tests.train.tiny_run import FIELDS, config\n"
        "die = lambda metrics: os.kill(os.getpid(), signal.SIGKILL) if metrics['step'] == 8 else None\n"
        "train(config(Path(sys.argv[1])), FIELDS, die)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(metrics_of(tmp_path / "killed")) == 8
    train(config(tmp_path / "killed"), FIELDS, resume=True)
    train(config(tmp_path / "whole"), FIELDS)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_unfinished_checkpoint_is_ignored_and_cleared(tmp_path: Path) -> None:
    """A crash while writing leaves a folder of another name; the previous checkpoint still counts."""
    network, run = model(), config(tmp_path)
    optimizer = make_optimizer(network, run.optimizer)
    checkpoint.save(tmp_path, network, optimizer, 6, {})
    (tmp_path / "checkpoint" / "step-12.unfinished").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint" / "step-6"
    checkpoint.save(tmp_path, network, optimizer, 18, {})
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-18"]


def test_resume_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """The differing key is named with both values; settings that change no number may differ."""
    train(config(tmp_path, steps=2), FIELDS)
    with pytest.raises(InputError, match=r"optimizer.learning_rate=0.003, this run has 0.01; .* another output"):
        train(config(tmp_path, steps=2, learning_rate=0.01), FIELDS, resume=True)
    with pytest.raises(InputError, match=r"model.hidden_size=32"):
        train(config(tmp_path, steps=2), FIELDS | {"hidden_size": 64}, resume=True)
    train(config(tmp_path, steps=2, checkpoint_every=1), FIELDS, resume=True)


def test_run_is_never_overwritten_without_resume(tmp_path: Path) -> None:
    """A second start into the same output names the way out."""
    train(config(tmp_path, steps=2), FIELDS)
    with pytest.raises(InputError, match="--resume"):
        train(config(tmp_path, steps=2), FIELDS)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    """A cut file is a ModelError with its place and the remedy, not a traceback of a library."""
    train(config(tmp_path, steps=2), FIELDS)
    path = tmp_path / "checkpoint" / "step-2" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="step-2 cannot be read.*delete it"):
        train(config(tmp_path, steps=2), FIELDS, resume=True)
