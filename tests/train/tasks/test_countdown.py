from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.errors import InputError
from porcelet.train.tasks import Problem, load_task
from porcelet.train.tasks.countdown import remaining, steps, to_expression
from porcelet.train.tasks.expression import evaluate

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)((?:,\d+)*)")
END = re.compile(r"=(\d+)([<=>])(\d+)$")


def drawn(count: int = 100, **options: object) -> list[Problem]:
    task = load_task("countdown", options)
    return [task.draw(0, i) for i in range(count)]


@pytest.mark.parametrize("num_numbers", [2, 3, 4, 6, 8])
def test_every_problem_has_a_solution_within_its_bounds(num_numbers: int) -> None:
    """The answer given uses each number once and is exactly the target; question and data say the same."""
    for problem in drawn(num_numbers=num_numbers, max_number=12, max_target=60):
        numbers, target = problem.data["numbers"], problem.data["target"]
        value, used = evaluate(problem.answer)
        assert value == target and sorted(used) == numbers and len(numbers) == num_numbers
        assert 1 <= target <= 60 and all(1 <= number <= 12 for number in numbers)
        assert problem.question == f"{' '.join(map(str, numbers))} = {target}"


@settings(deadline=None)
@given(st.data())
def test_parentheses_keep_the_value(data: st.DataObject) -> None:
    """Any path of steps, written as one expression, has the value of its last step."""
    rest = tuple(sorted(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=6))))
    numbers, path = rest, []
    while len(rest) > 1:
        path.append(data.draw(st.sampled_from(steps(rest, 10**9))))
        rest = remaining(rest, path[-1])
    value, used = evaluate(to_expression(tuple(path)))
    assert value == rest[0] and sorted(used) == list(numbers)


@pytest.mark.parametrize("mode", ["optimal", "self-correct", "search", "mixed", "play"])
def test_traces_say_what_is_true(mode: str) -> None:
    """Every step is right arithmetic on numbers that are there; a line ends with how it compares with the target, and
    is the last if it hits; all but play end so."""
    for problem in drawn(200, trace=mode):
        lines = problem.trace.split("\n")
        ends = [END.findall(line)[0] for line in lines]
        assert "=" not in {sign for _, sign, _ in ends[:-1]} and (ends[-1][1] == "=" or mode == "play")
        for line in lines:
            found = STEP.findall(line)
            (a, sign, b, c, left), *_ = found
            there = Counter(problem.data["numbers"])
            assert not Counter([int(a), int(b)]) - there
            there = there - Counter([int(a), int(b)])
            assert Counter(map(int, left.split(",")[1:])) == there
            there += Counter([int(c)])
            for x, _, y, _, _ in found[1:]:  # of three numbers, two are left: these are what they give
                assert Counter([int(x), int(y)]) == there
            assert all(evaluate(x + s + y)[0] == int(z) <= 2 * 50 for x, s, y, z, _ in found)
        for value, sign, target in ends:
            assert evaluate(f"{value}-{target}")[0] * {"<": -1, "=": 1, ">": 1}[sign] >= (sign != "=")
            assert (value == target) == (sign == "=") and int(target) == problem.data["target"]


def test_a_search_tries_before_it_finds_and_a_correction_errs_once() -> None:
    """Dead ends are in most searches, in several orders; a correction has one wrong line unless the turn was right."""
    searches = [problem.trace for problem in drawn(200, trace="search")]
    assert sum("\n" in trace for trace in searches) > 100
    corrections = [problem.trace.count("\n") for problem in drawn(200, trace="self-correct", max_trace=200)]
    assert set(corrections) == {0, 1} and corrections.count(1) > 150
    assert all(problem.trace.count("\n") == 0 for problem in drawn(trace="optimal"))
    assert {problem.trace for problem in drawn(5, trace="none")} == {""}


def test_play_answers_with_its_last_line() -> None:
    """Right or wrong, but what the thought came to; longer thoughts hit more often."""
    hits = {}
    for room in (24, 96, 384):
        played = drawn(300, trace="play", max_trace=room)
        for problem in played:
            value, used = evaluate(problem.answer)
            assert value == int(STEP.findall(problem.trace)[-1][3]) and sorted(used) == problem.data["numbers"]
            lines = problem.trace.split("\n")
            assert len(problem.trace) <= room or len(lines) == 1
            assert len(set(lines)) == len(lines)
        hits[room] = sum(evaluate(problem.answer)[0] == problem.data["target"] for problem in played) / 300
    assert 0.15 < hits[24] < hits[96] < hits[384] < 0.5


def test_worked_problems_may_be_few() -> None:
    """All seeds draw from the same ones, again and again; what is held out stays as it was, and is none of them."""
    few, all_of_them = load_task("countdown", {"num_training": 50}), load_task("countdown", {})
    drawn = {few.draw(seed, i) for seed in (0, 1) for i in range(1000)}
    assert 45 <= len(drawn) <= 50 and few.held_out == all_of_them.held_out
    assert not {problem.question for problem in drawn} & {problem.question for problem in few.held_out}
    with pytest.raises(InputError, match="number of training problems is -1"):
        load_task("countdown", {"num_training": -1})


@pytest.mark.parametrize("num_numbers", [3, 6])
def test_traces_are_bounded(num_numbers: int) -> None:
    """A trace that is too long loses dead ends, never its solution."""
    for problem in drawn(num_numbers=num_numbers, trace="search", max_trace=100):
        assert len(problem.trace) <= 100 or "\n" not in problem.trace


def test_the_order_of_numbers_gives_no_new_problem() -> None:
    """Numbers stand in order, so no held-out problem is trained on in another order."""
    task = load_task("countdown", {"max_number": 6, "max_target": 20})
    held_out = {problem.question for problem in task.held_out}
    training = {task.draw(0, i).question for i in range(2000)}
    assert held_out and not held_out & training
    assert all(problem.data["numbers"] == sorted(problem.data["numbers"]) for problem in task.held_out)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_numbers": 1}, "num_numbers"),
        ({"max_number": 1}, "max_number"),
        ({"trace": "long"}, "optimal"),
        ({"max_numbers": 3}, "max_number"),
        ({"max_number": 2.5}, "int"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, object], named: str) -> None:
    """The message names what would do."""
    with pytest.raises(InputError, match=named):
        load_task("countdown", options)
