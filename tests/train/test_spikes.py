from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from porcelet.errors import ModelError, PorceletError
from porcelet.train import checkpoint, journal, loop, step
from porcelet.train.loop import train
from porcelet.train.measure import Stopwatch
from porcelet.train.sources import Answers
from porcelet.train.spikes import SpikeRule
from porcelet.train.step import gradients
from porcelet.train.types import Metrics
from porcelet.types import Sample
from tests.train.test_checkpoint import assert_same_run, train_until
from tests.train.tiny_run import FIELDS, config, metrics_of, state_of


def poison(monkeypatch: pytest.MonkeyPatch, weights: dict[int, float], source: type = Answers) -> None:
    """Have the samples of some steps, counted from 1, weigh the last token by what makes a bad step of them."""
    draw = source.__call__

    def poisoned(self: Any, step: int) -> tuple[list[Sample], Metrics]:
        samples, metrics = draw(self, step)
        if step + 1 in weights:
            first = samples[0]
            samples[0] = Sample(tokens=first.tokens, weights=(*first.weights[:-1], weights[step + 1]))
        return samples, metrics

    monkeypatch.setattr(source, "__call__", poisoned)


def test_skipped_step_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3's loss is NaN: parameters, optimizer and biases stay those of two steps; its batch is kept."""
    train_until(config(tmp_path / "clean", checkpoint_every=2), FIELDS, 3)
    poison(monkeypatch, {3: math.nan})
    run = config(tmp_path / "skipped", checkpoint_every=3, on_spike="skip")
    train_until(run, FIELDS, 4)
    before, after = state_of(tmp_path / "clean"), state_of(tmp_path / "skipped")
    assert all((before[name] == after[name]).all() for name in before.keys() | after.keys())
    line = metrics_of(tmp_path / "skipped")[2]
    assert line["skipped"] == 1 and line["updates"] == 0 and "loss" not in line
    kept = journal.read(tmp_path / "skipped" / "spikes" / "step-3.jsonl")
    assert kept.note == "step 3, update 1: the loss is nan" and len(kept.samples) == 8
    assert math.isnan(kept.samples[0].weights[-1]) and kept.samples[1].tokens[0] == 0


def test_kept_batch_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept samples, put through the model of the checkpoint, give the loss that was refused."""
    poison(monkeypatch, {5: 1e6})
    with pytest.raises(PorceletError, match="above"):
        train(config(tmp_path, **JUMPY), FIELDS)
    kept = journal.read(tmp_path / "spikes" / "step-5.jsonl")
    run = loop.begin(config(tmp_path, **JUMPY), FIELDS, resume=True, reward=lambda problem, answer: 0.0)
    parts, _ = gradients(run, kept.samples, run.config, Stopwatch())
    assert run.step == 4 and parts["loss"] == kept.metrics["loss"]


JUMPY: dict[str, Any] = {"spike_window": 4, "spike_deviations": 6.0}


def test_stop_says_what_to_change_and_that_lets_the_run_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped at its spike and resumed with on_spike=skip equals the one that skipped from the start."""
    poison(monkeypatch, {5: 1e6})
    with pytest.raises(PorceletError, match=r"step 5: the gradient norm .*step-5.jsonl. Resume with on_spike=skip"):
        poisoned = JUMPY | {"max_grad_norm": 5.0}
        train(config(tmp_path / "stopped", **poisoned), FIELDS)
    assert checkpoint.newest(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint" / "step-4"
    train(config(tmp_path / "stopped", **poisoned, on_spike="skip"), FIELDS, resume=True)
    train(config(tmp_path / "whole", **poisoned, on_spike="skip"), FIELDS)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_rule_is_exact_under_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 8 and 10 jump; a run broken off in step 9 refuses both as the whole one does."""
    poison(monkeypatch, {8: 1e6, 10: 1e6})
    run = JUMPY | {"on_spike": "skip"}
    train(config(tmp_path / "whole", **run), FIELDS)
    train_until(config(tmp_path / "broken", **run), FIELDS, 9)
    train(config(tmp_path / "broken", **run), FIELDS, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert [line["skipped"] for line in metrics_of(tmp_path / "whole")][6:] == [0, 1, 1, 2, 2, 2]


def test_too_many_in_a_row_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may be skipped; the third in a row ends the run with the reason, behind a checkpoint of what came before."""
    poison(monkeypatch, dict.fromkeys((4, 5, 6), math.nan))
    run = config(tmp_path, on_spike="skip", spike_limit=2)
    with pytest.raises(PorceletError, match=r"step 6: the loss is nan.*spike_limit above 2"):
        train(run, FIELDS)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint" / "step-5"


@pytest.fixture
def _second_update_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other loss is NaN, from now on: with two updates a step, the second's."""
    train(config(tmp_path / "start", steps=1), FIELDS)
    calls = itertools.count(1)

    def bad(*arguments: Any) -> Any:
        parts, routing = gradients(*arguments)
        return (parts | {"loss": math.nan} if next(calls) % 2 == 0 else parts), routing

    monkeypatch.setattr(step, "gradients", bad)


@pytest.mark.usefixtures("_second_update_fails")
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"on_spike": "skip", "spike_limit": 2}, r"step 4: .*spike_limit above 2, behind .*/step-2, or"),
        ({"on_spike": "stop"}, r"step 1: .*on_spike=skip, from the first step, as there is no checkpoint yet, or"),
    ],
)
def test_fault_in_a_later_update_is_not_hidden_by_the_first(tmp_path: Path, rule: dict[str, Any], text: str) -> None:
    """Steps in a row are counted though each began well; the message says what stands, and where resume continues."""
    start = str(tmp_path / "start")
    rollouts: dict[str, Any] = {"method": "grpo", "model": start, "updates_per_rollout": 2, "group_size": 4}
    run = config(tmp_path / "run", checkpoint_every=2, max_new_tokens=3, **rollouts, **rule)
    with pytest.raises(PorceletError, match="the loss is nan, so the rest of the step, behind update 1, .*") as stop:
        train(run, {}, reward=lambda problem, answer: float(len(answer.text)))
    assert re.match(text, str(stop.value))


def test_rule_judges_by_the_last_steps_taken() -> None:
    """No judgement before half a window; then mean + k deviations; what is refused changes no statistic."""
    rule = SpikeRule(window=4, deviations=2.0)
    assert not rule.objection(1e9, 1e9)
    for value in (1.0, 3.0):
        rule.take(value, 1.0)
    assert not rule.objection(4.0, 1.0) and "loss is 4.1, above 4 " in rule.objection(4.1, 1.0)
    assert "gradient norm is 1.1" in rule.objection(2.0, 1.1)
    assert rule.objection(2.0, math.inf) == "the gradient norm is inf"
    other = SpikeRule(window=4, deviations=2.0)
    other.restore(rule.state())
    assert other == rule and other.losses == [1.0, 3.0]
    with pytest.raises(ModelError, match=r"state\.json is damaged: spikes has no 'losses'"):
        other.restore({})
    for value in (5.0, 5.0, 5.0):
        rule.take(value, 1.0)
    assert rule.losses == [3.0, 5.0, 5.0, 5.0]
