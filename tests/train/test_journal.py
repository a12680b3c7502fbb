from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from porcelet.errors import ModelError
from porcelet.train import journal
from porcelet.train.loop import train
from porcelet.types import Sample
from tests.train.test_checkpoint import Stopped, assert_same_run
from tests.train.tiny_run import FIELDS, config

SAMPLES = [
    Sample(tokens=(0, 5, 1), advantages=(0.0, 0.1, 0.3), old_logprobs=(0.0, -0.1, -1e-40), num_prompt=1),
    Sample(tokens=(7, 8), weights=(0.0, 1.0)),
]


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    """Samples, metrics and note, floats included; empty fields stay empty."""
    entry = journal.Entry(3, "abc", {"reward": 1 / 3, "count": 2}, SAMPLES, "why")
    assert journal.read(journal.write(tmp_path, entry)) == entry
    assert [path.name for path in tmp_path.iterdir()] == ["step-3.jsonl"]


def test_journalled_step_is_not_drawn_again(tmp_path: Path) -> None:
    """The second call reads what the first drew; another recipe's rollout is drawn anew."""
    calls = itertools.count()
    source = journal.Journal(lambda step: (SAMPLES, {"call": next(calls)}), tmp_path, "one")
    assert source(2) == source(2) == (SAMPLES, {"call": 0})
    assert journal.Journal(source.source, tmp_path, "two")(2) == (SAMPLES, {"call": 1})


def test_old_journals_go(tmp_path: Path) -> None:
    """Those up to a step, and no others."""
    for step in (1, 9, 10, 11):
        journal.write(tmp_path, journal.Entry(step, "", {}, []))
    journal.prune(tmp_path, 9)
    assert {path.name for path in tmp_path.iterdir()} == {"step-10.jsonl", "step-11.jsonl"}


def test_damaged_journal_is_named(tmp_path: Path) -> None:
    """A cut file is an error with its remedy."""
    path = journal.write(tmp_path, journal.Entry(1, "", {}, SAMPLES))
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ModelError, match=r"step-1.jsonl cannot be read.*delete it"):
        journal.read(path)


def test_run_resumes_exactly_where_rewards_differ_from_call_to_call(tmp_path: Path) -> None:
    """The steps behind the checkpoint repeat from their journals: equal to a run that found all of them there."""
    start = str(train(config(tmp_path / "start", steps=30, learning_rate=1e-2), FIELDS))
    changes: dict[str, Any] = {"method": "grpo", "model": start, "steps": 4, "max_new_tokens": 3, "group_size": 4}
    counter = itertools.count()

    def reward(problem: object, answer: object) -> float:
        return float(next(counter) * 7919 % 101)

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 3:
            raise Stopped

    broken, whole = (config(tmp_path / name, **changes, checkpoint_every=2) for name in ("broken", "whole"))
    with pytest.raises(Stopped):
        train(broken, {}, stop, reward=reward)
    train(broken, {}, resume=True, reward=reward)
    assert next(counter) == 4 * 8  # step 3 was drawn once
    shutil.copytree(tmp_path / "broken" / "rollouts", tmp_path / "whole" / "rollouts")
    (tmp_path / "whole" / "sessions.jsonl").touch()
    train(whole, {}, resume=True, reward=reward)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_run_that_starts_anew_uses_no_old_rollout(tmp_path: Path) -> None:
    """Without --resume, what an earlier start left behind is cleared, as the reward may have been mended since."""
    start = str(train(config(tmp_path / "start", steps=1), FIELDS))
    changes: dict[str, Any] = {"method": "grpo", "model": start, "steps": 2, "max_new_tokens": 2, "group_size": 4}
    run = config(tmp_path / "run", **changes)

    def stop(metrics: dict[str, float]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(run, {}, stop, reward=lambda problem, answer: 0.0)
    seen: list[float] = []
    train(run, {}, lambda metrics: seen.append(metrics["reward"]), reward=lambda problem, answer: 1.0)
    assert seen == [1.0, 1.0]
