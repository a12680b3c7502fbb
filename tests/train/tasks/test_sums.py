from __future__ import annotations

import pytest

from porcelet.errors import InputError
from porcelet.train.tasks import load_task
from porcelet.train.tasks.sums import sums


def test_stream_depends_on_the_position_alone_and_meets_no_held_out_problem() -> None:
    """Any position can be drawn at any time; all training problems come up, held-out ones never do."""
    task = sums(10)
    drawn = [task.draw(0, i) for i in range(2000)]
    assert drawn[777] == sums(10).draw(0, 777)
    assert set(drawn) == set(task.training)
    assert not set(drawn) & set(task.held_out) and len(task.training) + len(task.held_out) == 100
    assert [task.draw(1, i) for i in range(20)] != drawn[:20]


@pytest.mark.parametrize(("name", "number", "named"), [("sum", 20, "sums"), ("sums", 1, "max_number")])
def test_unusable_task_is_refused(name: str, number: int, named: str) -> None:
    """An unknown task names the known ones; a task too small to hold problems out names its size."""
    with pytest.raises(InputError, match=named):
        load_task(name, {"max_number": number})
