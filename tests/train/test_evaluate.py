from __future__ import annotations

from pathlib import Path

from porcelet.config import EngineConfig, EvaluateConfig
from porcelet.engine.engine import Engine
from porcelet.train.evaluate import evaluate, evaluate_folder, held_out_accuracy
from porcelet.train.loop import train
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Term
from porcelet.train.tasks import Problem, load_task
from tests.train.tiny_run import FIELDS, config


def test_held_out_accuracy_counts_the_held_out_problems(tmp_path: Path) -> None:
    """An untrained model answers none of about a tenth of the pairs."""
    run = config(tmp_path, steps=1, max_number=10)
    accuracy, count = held_out_accuracy(train(run, FIELDS), run)
    assert accuracy < 0.2 and 3 <= count <= 20


def test_several_answers_give_pass_at_k_of_what_the_reward_calls_right(tmp_path: Path) -> None:
    """pass@1 is the share of right answers, pass@k grows with k, and a second evaluation finds the same."""
    run = config(tmp_path, steps=1, num_problems=6, num_samples=8, max_new_tokens=3)
    folder = train(run, FIELDS)
    problems = load_task("sums", {}).held_out[:6]
    seen: list[tuple[str, str]] = []

    def lucky(problem: Problem, answer: Answer) -> float:
        seen.append((problem.question, answer.text))
        return float(len(answer.text) % 2)

    engine = Engine.load(folder, EngineConfig(weights="float32"))
    found = evaluate(engine, Renderer(folder), problems, [Term("lucky", lucky)], run.evaluate, 3)
    assert [question for question, _ in seen] == [problem.question for problem in problems for _ in range(8)]
    right = sum(len(text) % 2 for _, text in seen) / len(seen)
    assert 0 < right < 1 and abs(found.pass_at[1].value - right) < 1e-9 and list(found.pass_at) == [1, 2, 4, 8]
    assert found.pass_at[1].value < found.pass_at[4].value <= found.pass_at[8].value
    assert [shown.text for shown in found.shown] == [text for _, text in seen[::8]]
    again = evaluate(engine, Renderer(folder), problems, [Term("lucky", lucky)], run.evaluate, 3)
    assert again == found


def test_greedy_evaluation_has_one_answer_a_problem(tmp_path: Path) -> None:
    """Temperature 0 draws nothing, so more samples would be copies."""
    run = config(tmp_path, steps=1, evaluate=EvaluateConfig(num_problems=3, num_samples=8, temperature=0.0))
    found = evaluate_folder(train(run, FIELDS), run)
    assert (found.num_problems, found.num_samples, list(found.pass_at)) == (3, 1, [1])
