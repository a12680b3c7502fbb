"""Countdown: reach a target with +, -, * and / from numbers that must all be used once, as in `3 7 12 = 33`.

Problems are made backwards, by combining numbers at random, so each can be solved; many answers are right, and the
reward evaluates them. Worked solutions come as a model may be meant to think:

    optimal       3*7=21,12 21+12=33=33               the solution alone
    self-correct  3*7=21,12 21-12=9<33                a wrong turn, noticed; then the solution
    search        3+7=10,12 10+12=22 10*12=120>33     dead ends, one a line, then the line that finds it
    mixed         any of the three
    play          3+12=15,7 7+15=22<33                lines at random until one hits or patience ends

Behind a step stand the numbers that are left besides its result, behind a line how its end compares with the target:
what comes next can be read off there. A line of a search is a path from the start: the steps until two numbers are
left, then all that these two give. Depth first or breadth first, and by which order the steps are tried, is chosen by
hash ("Stream of Search", arXiv:2404.03683). Lines stand for themselves, so a trace that is too long loses some of its
dead ends, never the solution. Play knows the moves and what they come to, and neither aim nor patience: most players
answer with their first line, right or wrong, and few try for long. Left out: steps through negative numbers, fractions
and values above twice the greatest target; an answer may use them all the same.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from porcelet.errors import InputError
from porcelet.train.hashing import hashed, pick, shuffled
from porcelet.train.tasks.problem import GeneratedTask, Problem

SOLVING = ("optimal", "self-correct", "search")  # what "mixed" mixes
TRACES = ("none", *SOLVING, "play")
MAX_TRIES = 1000  # random combinations to find a target within bounds
REACH = 2  # times the greatest target: what no step exceeds
MAX_BREADTH = 4  # numbers
HASTE = 20  # a player's patience is max_trace * u ** HASTE characters, u uniform in 0 ... 1
MAX_PATHS = 64  # dead ends that a search goes through before it is led to the solution


@dataclass(frozen=True)
class Step:
    """a sign b = value."""

    a: int
    sign: str
    b: int
    value: int

    def __str__(self) -> str:
        return f"{self.a}{self.sign}{self.b}={self.value}"


Path = tuple[Step, ...]


def countdown(
    *,
    num_numbers: int = 3,
    max_number: int = 20,
    max_target: int = 50,
    trace: str = "mixed",
    max_trace: int = 96,
    num_training: int = 0,
    num_held_out: int = 200,
) -> GeneratedTask:
    """`num_numbers` numbers up to `max_number`, a target up to `max_target`; a trace has at most `max_trace` characters
    unless the solution alone is longer. A problem that is played has its player's answer, right or wrong. Training
    draws from `num_training` problems again and again, as where worked solutions are few; 0: from all there are."""
    if not 2 <= num_numbers <= 8:
        raise InputError(f"num_numbers is {num_numbers}; it must lie in 2 ... 8")
    if max_number < 2 or max_target < 1:
        raise InputError(f"max_number is {max_number} and max_target {max_target}; at least 2 and 1 are needed")
    if trace not in (*TRACES, "mixed"):
        raise InputError(f"trace is {trace!r}; known: {', '.join((*TRACES, 'mixed'))}")

    limit = max(REACH * max_target, max_number)

    def generate(seed: int, position: int) -> Problem:
        key = hashed(seed, position)
        numbers, solution = _solvable(key, num_numbers, max_number, max_target, limit)
        target = solution[-1].value
        mode = pick(SOLVING, key, "mode") if trace == "mixed" else trace
        if mode == "play":
            thought, solution = _played(numbers, target, max_trace, key, limit)
        else:
            thought = write_trace(numbers, solution, mode, max_trace, key, limit)
        return Problem(
            question=f"{' '.join(map(str, numbers))} = {target}",
            answer=to_expression(solution),
            trace=thought,
            data={"numbers": list(numbers), "target": target},
        )

    return GeneratedTask(generate, num_held_out, num_training)


def _solvable(key: int, num_numbers: int, max_number: int, max_target: int, limit: int) -> tuple[tuple[int, ...], Path]:
    """Numbers in order (an order would let a held-out problem be trained on in another), and a way to a target."""
    for attempt in range(MAX_TRIES):
        numbers = tuple(sorted(1 + hashed(key, attempt, i) % max_number for i in range(num_numbers)))
        path = _at_random(numbers, limit, key, attempt, "step")
        if 1 <= path[-1].value <= max_target:
            return numbers, path
    raise InputError(
        f"no target up to max_target {max_target} in {MAX_TRIES} tries of {num_numbers} numbers up to {max_number}; "
        f"raise max_target"
    )


def _at_random(numbers: tuple[int, ...], limit: int, *key: int | str) -> Path:
    """Steps by hash until one number is left."""
    path: Path = ()
    while len(numbers) > 1:
        step = pick(steps(numbers, limit), *key, len(numbers))
        path, numbers = (*path, step), remaining(numbers, step)
    return path


def steps(numbers: tuple[int, ...], limit: int) -> list[Step]:
    """All that two of the numbers give within 0 ... limit, a number each; the greater one stands first, save in a sum
    and a product. A difference is always among them."""
    found = []
    for small, large in sorted(set(itertools.combinations(sorted(numbers), 2))):
        found += [Step(small, "+", large, small + large), Step(small, "*", large, small * large)]
        found.append(Step(large, "-", small, large - small))
        if small and large % small == 0:
            found.append(Step(large, "/", small, large // small))
    return [step for step in found if step.value <= limit]


def remaining(numbers: tuple[int, ...], step: Step) -> tuple[int, ...]:
    """The numbers after a step, in order."""
    rest = list(numbers)
    rest.remove(step.a)
    rest.remove(step.b)
    return tuple(sorted([*rest, step.value]))


def to_expression(path: Path) -> str:
    """The steps as one expression, with the parentheses it needs."""
    made: list[tuple[int, str, str]] = []  # values that steps have made: value, text, outermost sign
    for step in path:
        left, right = _operand(made, step.a), _operand(made, step.b)
        made.append((step.value, _joined(left, step.sign, right), step.sign))
    (_, text, _) = made[-1]
    return text


def _operand(made: list[tuple[int, str, str]], value: int) -> tuple[str, str]:
    """Text and outermost sign: an earlier step's if one made this value, or else the number itself."""
    for i, (result, text, sign) in enumerate(made):
        if result == value:
            del made[i]
            return text, sign
    return str(value), ""


def _joined(left: tuple[str, str], sign: str, right: tuple[str, str]) -> str:
    loose_left = sign in "*/" and left[1] and left[1] in "+-"
    loose_right = right[1] and (sign == "/" or (sign in "-*" and right[1] in "+-"))
    return (
        f"({left[0]})" * bool(loose_left)
        + left[0] * (not loose_left)
        + sign
        + (f"({right[0]})" if loose_right else right[0])
    )


def write_trace(numbers: tuple[int, ...], solution: Path, mode: str, max_trace: int, key: int, limit: int) -> str:
    """The thought that leads to `solution`, in one of the modes."""
    if mode == "none":
        return ""
    if mode == "search":
        return "\n".join(_searched(numbers, solution, max_trace, key, limit))
    target = solution[-1].value
    last = _written(numbers, solution) + _compared(target, target)
    if mode == "optimal":
        return last
    wrong = _wrong_turn(numbers, target, key, limit)
    return f"{wrong}\n{last}" if wrong and len(wrong) + 1 + len(last) <= max_trace else last


def _wrong_turn(numbers: tuple[int, ...], target: int, key: int, limit: int) -> str:
    """A path, taken at random, that ends beside the target; empty if it hit."""
    path = _at_random(numbers, limit, key, "wrong")
    return "" if path[-1].value == target else _written(numbers, path) + _compared(path[-1].value, target)


def _played(numbers: tuple[int, ...], target: int, max_trace: int, key: int, limit: int) -> tuple[str, Path]:
    """Lines at random, none twice, half the thoughts with all that the last two numbers give; with the last path."""
    played: dict[str, Path] = {}
    whole = bool(hashed(key, "whole lines") % 2)
    patience = max_trace * (hashed(key, "patience") % 1000 / 1000) ** HASTE
    for attempt in range(MAX_PATHS):
        path = _at_random(numbers, limit, key, "play", attempt)
        line = _written(numbers, path) + _compared(path[-1].value, target)
        if whole:
            line, path = _line(numbers, path[:-1], target, limit)
        if played and sum(map(len, played)) + len(played) + len(line) > patience:
            break
        played[line] = path
        if path[-1].value == target:
            break
    return "\n".join(played), played[next(reversed(played))]


def _written(numbers: tuple[int, ...], path: Path) -> str:
    """A path's steps, each but the last with what is left besides its result."""
    texts = []
    for step in path:
        numbers = remaining(numbers, step)
        others = list(numbers)
        others.remove(step.value)
        texts.append(",".join([str(step), *map(str, others)]))
    return " ".join(texts)


def _searched(numbers: tuple[int, ...], solution: Path, max_trace: int, key: int, limit: int) -> list[str]:
    """Lines of a search up to the first that finds the target, thinned to `max_trace` characters."""
    lines, last, target = [], "", solution[-1].value
    for path in itertools.islice(_paths(numbers, target, key, limit), MAX_PATHS):
        line, tried = _line(numbers, path, target, limit)
        if tried[-1].value == target:
            last = line
            break
        lines.append(line)
    if not last or len(last) > max_trace:
        last = _written(numbers, solution) + _compared(target, target)
    return [*_thinned(lines, max_trace - len(last), key), last]


def _line(numbers: tuple[int, ...], path: Path, target: int, limit: int) -> tuple[str, Path]:
    """The path, then what its last two numbers give, up to the target; and the path to the last of these."""
    texts = [_written(numbers, path)] if path else []
    for step in path:
        numbers = remaining(numbers, step)
    for step in steps(numbers, limit):
        texts.append(str(step))
        if step.value == target:
            break
    return " ".join(texts) + _compared(step.value, target), (*path, step)


def _compared(value: int, target: int) -> str:
    """Sign and target. A model learns to compare in half the steps that a mere yes or no takes."""
    return f"{'<' if value < target else '>' if value > target else '='}{target}"


def _thinned(lines: list[str], room: int, key: int) -> list[str]:
    """As many lines as fit, chosen by hash, in their order."""
    kept: set[int] = set()
    for i in shuffled(range(len(lines)), key, "thin"):
        if len(lines[i]) + 1 <= room:
            kept.add(i)
            room -= len(lines[i]) + 1
    return [line for i, line in enumerate(lines) if i in kept]


def _paths(numbers: tuple[int, ...], target: int, key: int, limit: int) -> Iterator[Path]:
    """Paths that leave two numbers, depth first or breadth first; of many numbers the breadth is too great."""
    nodes: deque[tuple[Path, tuple[int, ...]]] = deque([((), numbers)])
    depth_first = len(numbers) > MAX_BREADTH or bool(hashed(key, "depth first") % 2)
    while nodes:
        path, rest = nodes.pop() if depth_first else nodes.popleft()
        if len(rest) == 2:
            yield path
            continue
        ordered = _ordered(steps(rest, limit), target, key)
        for step in reversed(ordered) if depth_first else ordered:
            nodes.append(((*path, step), remaining(rest, step)))


def _ordered(found: list[Step], target: int, key: int) -> list[Step]:
    """By nearness of the result to the target, by size, or in any order: the heuristic of this trace."""
    heuristic = hashed(key, "heuristic") % 3
    if heuristic == 0:
        return sorted(found, key=lambda step: abs(target - step.value))
    if heuristic == 1:
        return sorted(found, key=lambda step: step.value)
    return shuffled(found, key, "order", len(found))
