from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import EvaluateConfig
from porcelet.engine.engine import Engine
from porcelet.errors import ModelError
from porcelet.train.evaluate import (
    MAX_NEW_TOKENS,
    SETTINGS,
    asked,
    evaluate,
    evaluate_folder,
    held_out_accuracy,
    is_measured,
    read_evaluation,
    save_evaluation,
)
from porcelet.train.loop import train
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Term
from porcelet.train.tasks import Problem, load_task
from tests.train.tiny_run import FIELDS, config
from tests.weights import tiny_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was hardly trained."""
    return train(config(tmp_path_factory.mktemp("run"), steps=1), FIELDS)


def test_held_out_accuracy_counts_the_held_out_problems(tmp_path: Path) -> None:
    """An untrained model answers none of about a tenth of the pairs."""
    run = config(tmp_path, steps=1, max_number=10)
    accuracy, count = held_out_accuracy(train(run, FIELDS), run)
    assert accuracy < 0.2 and 3 <= count <= 20


def test_several_answers_give_pass_at_k_of_what_the_reward_calls_right(folder: Path) -> None:
    """pass@1 is the share of right answers, pass@k grows with k, and a second evaluation finds the same."""
    wanted = EvaluateConfig(num_problems=6, num_samples=8, max_new_tokens=3)
    problems = load_task("sums", {}).held_out[:6]
    seen: list[tuple[str, str]] = []

    def lucky(problem: Problem, answer: Answer) -> float:
        seen.append((problem.question, answer.text))
        return float(len(answer.text) % 2)

    engine = Engine.load(folder, SETTINGS)
    found = evaluate(engine, Renderer(folder), problems, [Term("lucky", lucky)], wanted)
    assert [question for question, _ in seen] == [problem.question for problem in problems for _ in range(8)]
    right = sum(len(text) % 2 for _, text in seen) / len(seen)
    assert 0 < right < 1 and abs(found.pass_at[1].value - right) < 1e-9 and list(found.pass_at) == [1, 2, 4, 8]
    assert found.pass_at[1].value < found.pass_at[4].value <= found.pass_at[8].value
    assert [shown.text for shown in found.shown] == [text for _, text in seen[::8]]
    again = evaluate(engine, Renderer(folder), problems, [Term("lucky", lucky)], wanted)
    assert again == found


def test_nothing_is_guessed(folder: Path) -> None:
    """Guesses follow the clock, and answers would with them: a model with an MTP layer drafts for others alone."""
    wanted = EvaluateConfig(num_problems=6, temperature=0.0, max_new_tokens=24)
    problems = load_task("sums", {}).held_out[:6]
    reward = Term("none", lambda problem, answer: 0.0)
    drafted = []
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, speculation="mtp")):
        engine = Engine.load(folder, settings)
        evaluate(engine, Renderer(folder), problems, [reward], wanted)
        drafted.append(engine.scheduler.num_drafted)
    assert drafted[0] == 0 < drafted[1]


def test_greedy_evaluation_has_one_answer_a_problem(folder: Path, tmp_path: Path) -> None:
    """Temperature 0 draws nothing, so more samples would be copies."""
    run = config(tmp_path, evaluate=EvaluateConfig(num_problems=3, num_samples=8, temperature=0.0))
    found = evaluate_folder(folder, run)
    assert (found.num_problems, found.num_samples, list(found.pass_at)) == (3, 1, [1])


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"method": "sft"}, MAX_NEW_TOKENS),
        ({"method": "sft", "group_size": 4}, 8),  # a [policy] table, for a later stage
        ({"method": "grpo"}, 8),
        ({"method": "sft", "evaluate": EvaluateConfig(max_new_tokens=5)}, 5),
        ({"method": "grpo", "evaluate": EvaluateConfig(max_new_tokens=5)}, 5),
    ],
)
def test_answers_are_as_long_as_the_recipe_says(tmp_path: Path, changes: dict[str, Any], tokens: int) -> None:
    """[evaluate] first, then [policy]; where neither says anything, not the 8 tokens that suit a policy on sums."""
    assert asked(config(tmp_path, **changes)).max_new_tokens == tokens


def test_answer_ends_where_the_context_does(folder: Path, tmp_path: Path) -> None:
    """256 tokens are more than the model reads: answers are cut, and nothing is refused."""
    found = evaluate_folder(folder, config(tmp_path, evaluate=EvaluateConfig(num_problems=4, num_samples=1)))
    assert found.asked.max_new_tokens == MAX_NEW_TOKENS
    assert found.finished < 1 and 8 < found.num_tokens < FIELDS["max_position_embeddings"]


def test_gguf_file_is_measured_as_a_folder_is(tmp_path: Path) -> None:
    """Its tokenizer and chat format are its own."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    found = evaluate_folder(path, config(tmp_path, num_problems=3, num_samples=2, max_new_tokens=4))
    assert (found.num_problems, found.num_samples) == (3, 2) and found.num_tokens <= 4


def test_kept_evaluation_says_what_was_asked(folder: Path, tmp_path: Path) -> None:
    """More problems than there are were still asked for; other settings, or a file that does not say, are not those."""
    run = config(tmp_path, max_number=4, num_problems=10_000, num_samples=2, max_new_tokens=2)
    path = tmp_path / "evaluation.json"
    assert not is_measured(path, run)
    save_evaluation(evaluate_folder(folder, run), path)
    assert read_evaluation(path).num_problems < 10_000 and is_measured(path, run)
    changes: list[dict[str, Any]] = [{"num_problems": 1}, {"num_samples": 4}, {"temperature": 0.5}]
    for change in [*changes, {"max_new_tokens": 3}]:
        other = dataclasses.replace(run.evaluate, **change)
        assert not is_measured(path, dataclasses.replace(run, evaluate=other)), change
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "asked"}), encoding="utf-8")
    assert read_evaluation(path).num_samples == 2 and not is_measured(path, run)
    path.write_text(json.dumps(values | {"asked": {"num_samples": 0}}), encoding="utf-8")
    with pytest.raises(ModelError, match="num_samples is 0; .* delete it to measure again"):
        read_evaluation(path)
