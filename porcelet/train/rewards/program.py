"""Code's reward: the answer's program passes the problem's tests, in the sandbox.

    data["cases"] = [{"input": ..., "output": ...}, ...]    standard input and what the program should print
    data["tests"] = "assert add(1, 2) == 3 ..."             Python that runs after the answer's, in the same process

Cases are compared here, outside, so a program cannot fake them. Tests share their process with the answer: one that
goes looking for them could report success untrue, though an early exit does not count as one.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from porcelet.errors import InputError
from porcelet.train.rewards.answer import Answer, Reward, RewardError
from porcelet.train.sandbox import PYTHON, Limits, Run, require_sandbox, run
from porcelet.train.tasks.problem import Problem

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
# The word that says "all tests ran" comes in by standard input, after which the answer finds nothing there.
HARNESS = """\
import sys
word = sys.stdin.read()
space = {"__name__": "solution"}
exec(compile(open("answer.py").read(), "answer.py", "exec"), space)
exec(compile(open("tests.py").read(), "tests.py", "exec"), space)
print("\\n" + word)
"""


def code(*, seconds: float = 5.0, memory_mb: int = 512, partial: bool = False, unsafe_sandbox: bool = False) -> Reward:
    """1 if all tests pass; with `partial`, the share of the cases that do. `seconds` and `memory_mb` hold for each.

    Raises:
        InputError: there is no sandbox here, or no positive limits were given.
    """
    if seconds <= 0 or memory_mb <= 0:
        raise InputError(f"reward code: seconds is {seconds} and memory_mb {memory_mb}; both must be positive")
    require_sandbox(unsafe_sandbox)
    limits = Limits(seconds=seconds, memory=memory_mb << 20)

    def reward(problem: Problem, answer: Answer) -> float:
        program = last_program(answer.content)
        if "tests" in problem.data:
            return _tested(program, problem.data["tests"], limits, unsafe_sandbox)
        if not problem.data.get("cases"):
            raise RewardError('the problem has neither "tests" nor "cases"')
        return _compared(program, problem.data["cases"], partial, limits, unsafe_sandbox)

    return reward


def last_program(text: str) -> str:
    """The last fenced block of Python, or the whole text if there is none."""
    blocks = FENCE.findall(text)
    return blocks[-1] if blocks else text


def _tested(program: str, tests: str, limits: Limits, unsafe: bool) -> float:
    word = secrets.token_hex(16)
    files = {"main.py": HARNESS, "answer.py": program, "tests.py": tests}
    done = run([PYTHON, "-B", "main.py"], files, stdin=word, limits=limits, unsafe=unsafe)
    return float(_ended_well(done) and done.output.endswith(f"\n{word}\n"))


def _compared(program: str, cases: Any, partial: bool, limits: Limits, unsafe: bool) -> float:
    passed = 0
    for case in cases:
        files = {"main.py": program}
        done = run([PYTHON, "-B", "main.py"], files, stdin=str(case["input"]), limits=limits, unsafe=unsafe)
        right = _ended_well(done) and _lines(done.output) == _lines(str(case["output"]))
        if not right and not partial:
            return 0.0
        passed += right
    return passed / len(cases)


def _ended_well(done: Run) -> bool:
    return done.ended == "exit" and done.exit_code == 0


def _lines(text: str) -> list[str]:
    """Lines without the white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
