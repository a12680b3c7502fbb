from __future__ import annotations

import pytest

from porcelet.errors import InputError
from porcelet.train.tasks import Problem, load_task
from porcelet.train.tasks.problem import GeneratedTask, is_held_out


def test_a_generated_stream_is_a_function_of_the_position_and_meets_no_held_out_problem() -> None:
    """Same seed and position, same problem; another seed, others; held-out ones are the same for every run."""
    task = load_task("countdown", {})
    drawn = [task.draw(3, i) for i in range(300)]
    assert load_task("countdown", {}).draw(3, 77) == drawn[77]
    assert [task.draw(4, i) for i in range(10)] != drawn[:10]
    assert not any(map(is_held_out, drawn)) and all(map(is_held_out, task.held_out))
    assert len({problem.question for problem in task.held_out}) == 200
    assert load_task("countdown", {}).held_out == task.held_out


def test_a_task_with_few_problems_ends() -> None:
    """Held-out ones are as many as there are; if all or none are held out, that is said."""
    few = GeneratedTask(lambda seed, position: Problem(str(position % 100), ""), num_held_out=50)
    assert 1 <= len(few.held_out) < 50
    held_out = few.held_out[0]
    with pytest.raises(InputError, match="all that were drawn are held out"):
        GeneratedTask(lambda seed, position: held_out, 1).draw(0, 0)
    with pytest.raises(InputError, match="too few problems to hold any out"):
        _ = GeneratedTask(lambda seed, position: few.draw(0, 0), 1).held_out
    with pytest.raises(InputError, match="num_held_out is 0"):
        GeneratedTask(lambda seed, position: held_out, 0)
