from __future__ import annotations

import dataclasses
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from porcelet.config import RewardConfig, TrainConfig
from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.train import checkpoint
from porcelet.train.loop import train
from porcelet.train.optim import make_optimizer
from porcelet.train.rewards import Answer
from porcelet.train.tasks import Problem
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

    def by_length(problem: Problem, answer: Answer) -> float:
        return float(len(answer.text))

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


def header(step: int) -> checkpoint.Header:
    """The header of a run that does not matter."""
    return checkpoint.Header(step, {}, {}, 1, torch.__version__)


def test_unfinished_checkpoint_is_ignored_and_cleared(tmp_path: Path) -> None:
    """A crash while writing leaves a folder of another name; the previous checkpoint still counts."""
    network, run = model(), config(tmp_path)
    optimizer = make_optimizer(network, run.optimizer)
    checkpoint.save(tmp_path, network, optimizer, header(6))
    (tmp_path / "checkpoint" / "step-12.unfinished").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint" / "step-6"
    checkpoint.save(tmp_path, network, optimizer, header(18))
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-18"]


def test_as_many_checkpoints_stay_as_asked_for(tmp_path: Path) -> None:
    """The newest two by number, not by name."""
    network, run = model(), config(tmp_path)
    optimizer = make_optimizer(network, run.optimizer)
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, network, optimizer, header(step))
        checkpoint.prune(tmp_path, keep=2)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"step-10", "step-11"}


def test_resumed_run_takes_the_threads_of_its_checkpoint(tmp_path: Path) -> None:
    """Sums depend on the number of threads; where the recipe names none, the checkpoint's is used again."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        train(config(tmp_path, steps=1), FIELDS)
        torch.set_num_threads(2)
        train(config(tmp_path, steps=1), FIELDS, resume=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "place"), [(20_000, "step-12"), (1_000, "metrics.jsonl")])
def test_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, size: int, place: str) -> None:
    """Files may no longer grow: the place is named, no half file stays, and the resumed run is equal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(metrics: dict[str, float]) -> None:
        if metrics["step"] == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with pytest.raises(CapacityError, match=rf"{place} cannot be written: .*File too large.*resume"):
            train(config(tmp_path / "full"), FIELDS, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "full" / "checkpoint").iterdir()] == ["step-6"]
    train(config(tmp_path / "full"), FIELDS, resume=True)
    train(config(tmp_path / "whole"), FIELDS)
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def test_resume_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """The differing key is named with both values; settings that change no number may differ."""
    train(config(tmp_path, steps=2), FIELDS)
    with pytest.raises(InputError, match=r"optimizer.learning_rate=0.003, this run has 0.01; .* another output"):
        train(config(tmp_path, steps=2, learning_rate=0.01), FIELDS, resume=True)
    with pytest.raises(InputError, match=r"model.hidden_size=32"):
        train(config(tmp_path, steps=2), FIELDS | {"hidden_size": 64}, resume=True)
    train(config(tmp_path, steps=2, checkpoint_every=1), FIELDS, resume=True)


def test_what_a_method_does_not_read_may_change(tmp_path: Path) -> None:
    """Rollouts' settings where none are drawn, texts where all is drawn, the task beside texts; and nothing else."""
    file = tmp_path / "talk.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n', encoding="utf-8")

    def same(method: dict[str, Any], **changes: Any) -> bool:
        one, other = (config(tmp_path, **{**method, **more}) for more in ({}, changes))
        return checkpoint.recipe_of(one, FIELDS) == checkpoint.recipe_of(other, FIELDS)

    plain: dict[str, Any] = {"method": "pretrain"}
    texts, drawn = {"method": "sft", "conversations": (str(file),)}, {"method": "grpo", "model": "x"}
    rewards = (RewardConfig(name="format"),)
    assert same(plain, group_size=4, rewards=rewards) and not same(plain, max_number=7)
    assert same(texts, group_size=4, rewards=rewards, max_number=7) and not same(texts, context=64)
    assert same(drawn, context=64)
    assert not same(drawn, group_size=4) and not same(drawn, rewards=rewards) and not same(drawn, max_number=7)


def test_recipe_of_an_older_porcelet_goes_on(tmp_path: Path) -> None:
    """It said what its method never read; and what it did not know yet had its default."""
    wanted = checkpoint.recipe_of(config(tmp_path), FIELDS)
    older = {**wanted, "policy.group_size": 4, "rewards": [{"name": "format"}]}
    del older["lora.alpha"]
    checkpoint.check_recipe(older, wanted, tmp_path)
    with pytest.raises(InputError, match=r"lora.alpha=16.0, this run has 8.0"):
        checkpoint.check_recipe(older, {**wanted, "lora.alpha": 8.0}, tmp_path)


def test_files_of_tasks_and_rewards_are_inputs(tmp_path: Path) -> None:
    """Other problems or another judge behind the same name are named; a checkpoint that knows of neither goes on."""
    problems, judge = tmp_path / "problems.jsonl", tmp_path / "judge.py"
    rewards = (RewardConfig(name="exact"), RewardConfig(name=f"{judge}:taste"))
    options = {"task": "jsonl", "path": str(problems), "rewards": rewards}
    drawn = config(tmp_path, method="grpo", model="x", **options)
    for file in (problems, judge):
        file.write_text("one", encoding="utf-8")
    begun = checkpoint.recipe_of(drawn, {})
    for file in (problems, judge):
        file.write_text("other", encoding="utf-8")
        with pytest.raises(InputError, match=rf"was made with inputs\.{file}="):
            checkpoint.check_recipe(begun, checkpoint.recipe_of(drawn, {}), tmp_path)
        file.write_text("one", encoding="utf-8")
    judge.unlink()
    with pytest.raises(InputError, match=r"judge\.py cannot be read"):
        checkpoint.recipe_of(drawn, {})
    learnt = checkpoint.recipe_of(config(tmp_path, method="sft", **options), FIELDS)
    assert [name for name in learnt if name.startswith("inputs")] == [f"inputs.{problems}"]
    older = {name: value for name, value in begun.items() if not name.startswith("inputs")}
    checkpoint.check_recipe(older, begun, tmp_path)


def test_run_that_was_killed_for_its_memory_goes_on_with_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Smaller passes and other threads are allowed and told; the numbers are nearly those of the uninterrupted run."""
    threads = torch.get_num_threads()
    few = {"steps": 4, "checkpoint_every": 2, "threads": 1}
    whole, broken = config(tmp_path / "whole", **few), config(tmp_path / "broken", **few)
    try:
        train(whole, FIELDS)
        train_until(broken, FIELDS, 3)
        train(dataclasses.replace(broken, tokens_per_pass=64, threads=2), FIELDS, resume=True)
    finally:
        torch.set_num_threads(threads)
    for record, what in zip(caplog.records, ("threads 1, this is 2", "tokens_per_pass 0, this is 64"), strict=True):
        assert what in record.getMessage()
    losses = [[line["loss"] for line in metrics_of(tmp_path / name)] for name in ("broken", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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


def test_resume_with_other_inputs_is_refused(tmp_path: Path) -> None:
    """Conversations that changed behind their name, and another base under adapters: both are named."""
    train(config(tmp_path / "base", steps=1), FIELDS)
    file = tmp_path / "talk.jsonl"
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8, encoding="utf-8")
    run = config(tmp_path / "tuned", method="sft", model=str(tmp_path / "base"), conversations=(str(file),), rank=2)
    train_until(dataclasses.replace(run, steps=4, checkpoint_every=1), {}, 2)
    run = dataclasses.replace(run, steps=4, checkpoint_every=1)
    file.write_text('{"prompt": "1+1=", "completion": "3"}\n' * 8, encoding="utf-8")
    with pytest.raises(InputError, match=r"made with inputs.*talk\.jsonl='"):
        train(run, {}, resume=True)
    file.write_text('{"prompt": "1+1=", "completion": "2"}\n' * 8, encoding="utf-8")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"made with inputs.*base='"):
        train(run, {}, resume=True)
    file.unlink()
    with pytest.raises(InputError, match=r"talk\.jsonl does not exist"):
        train(run, {}, resume=True)
