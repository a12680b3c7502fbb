"""Code's reward: the answer's program passes the problem's tests, in the sandbox.

    data["cases"] = [{"input": ..., "output": ...}, ...]    standard input and what the program should print
    data["tests"] = "assert add(1, 2) == 3 ..."             Python that runs after the answer's, in the same process

Cases are compared here, outside, so a program cannot fake them. Tests share their process with the answer: one that
goes looking through frames or changes what tests rest on could report success untrue, though an early exit does not
count as one, and the verdict is another process's.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

from porcelet.train.rewards.answer import Answer, Reward, RewardError
from porcelet.train.sandbox import PYTHON, Limits, Run, check_limits, require_sandbox, run
from porcelet.train.tasks.problem import Problem

FENCE = re.compile(r"\s*(?P<ticks>`{3,})\s*(?P<tag>[^\s`]*)[^`]*")
PYTHON_TAGS = ("python", "python3", "py")
# A child runs answer and tests, and leaves a mark at their end. The word that says "all tests ran" is for its parent
# alone, which reads it from standard input when the child has ended.
HARNESS = """\
import ctypes, os, sys

def main():
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no look into the parent by /proc
    mark = os.urandom(16)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        space = {"__name__": "solution"}
        for name in ("answer.py", "tests.py"):
            exec(compile(open(name).read(), name, "exec"), space)
        sys.stdout.flush()
        os.write(write, mark)
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    if status == 0 and os.read(read, 17) == mark:
        print("\\n" + sys.stdin.read())

main()
"""


def programs(
    *, seconds: float = 5.0, memory_mb: int = 512, partial: bool = False, unsafe_sandbox: bool = False
) -> Reward:
    """1 if all tests pass; with `partial`, the share of the cases that do. `seconds` and `memory_mb` hold for each.

    Raises:
        InputError: there is no sandbox here, or the limits are none.
    """
    check_limits(seconds, memory_mb, "reward code")
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
    """The last fenced block of Python, or else the last one without a language, or else the whole text."""
    found = list(blocks(text))
    for wanted in (PYTHON_TAGS, ("",)):
        programs = [body for tag, body in found if tag in wanted]
        if programs:
            return programs[-1]
    return text


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and body of each fenced block; one that was never closed counts for nothing."""
    tag: str | None = None
    ticks, body = 0, list[str]()
    for line in text.split("\n"):
        fence = FENCE.fullmatch(line)
        if fence and tag is None:
            tag, ticks, body = fence["tag"].lower(), len(fence["ticks"]), []
        elif fence and tag is not None and not fence["tag"] and len(fence["ticks"]) >= ticks:
            yield tag, "".join(body)
            tag = None
        else:
            body.append(line + "\n")


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
