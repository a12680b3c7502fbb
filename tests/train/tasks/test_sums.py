from __future__ import annotations

import pytest

from porcelet.errors import InputError
from porcelet.train.tasks import load_task
from porcelet.train.tasks.sums import sums, worked_sum


def test_stream_depends_on_the_position_alone_and_meets_no_held_out_problem() -> None:
    """Any position can be drawn at any time; all training problems come up, held-out ones never do."""
    task = sums(max_number=10)
    drawn = [task.draw(0, i) for i in range(2000)]
    assert drawn[777] == sums(max_number=10).draw(0, 777)
    assert set(drawn) == set(task.training)
    assert not set(drawn) & set(task.held_out) and len(task.training) + len(task.held_out) == 100
    assert [task.draw(1, i) for i in range(20)] != drawn[:20]


@pytest.mark.parametrize(("name", "number", "named"), [("sum", 20, "sums"), ("sums", 1, "max_number")])
def test_unusable_task_is_refused(name: str, number: int, named: str) -> None:
    """An unknown task names the known ones; a task too small to hold problems out names its size."""
    with pytest.raises(InputError, match=named):
        load_task(name, {"max_number": number})


def test_worked_sums_are_right_column_by_column() -> None:
    """Digits and carries are those of the addition; the last line's result is the answer."""
    assert worked_sum([27, 58]) == "27+58: 7+8=15 2+5+1=8 is 85"
    assert worked_sum([9, 99, 1]) == "9+99: 9+9=18 0+9+1=10 is 108\n108+1: 8+1=9 0+0=0 1+0=1 is 109"
    task = load_task("chain-sums", {"num_terms": 4, "max_number": 1000})
    for i in range(50):
        problem = task.draw(0, i)
        terms = [int(term) for term in problem.question.removesuffix("=").split("+")]
        assert len(terms) == 4 and sum(terms) == int(problem.answer)
        assert problem.trace.endswith(f" is {problem.answer}") and problem.trace.count("\n") == 2
