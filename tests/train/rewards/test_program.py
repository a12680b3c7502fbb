from __future__ import annotations

import os
import shutil

import pytest

from porcelet.config import RewardConfig
from porcelet.train.rewards import Judgement, judge, load_rewards
from porcelet.train.rewards.program import last_program
from porcelet.train.tasks import Problem
from tests.train.rewards.answers import said

MISSING = shutil.which("bwrap") is None and "CI" not in os.environ  # where CI runs, its absence is a failure
pytestmark = pytest.mark.skipif(MISSING, reason="bubblewrap is not installed (apt-get install bubblewrap)")
SQUARE = Problem("", "", data={"tests": "assert square(3) == 9\nassert square(-1) == 1"})
DOUBLE = Problem("", "", data={"cases": [{"input": str(i), "output": f"{2 * i}\n"} for i in (1, 2)]})


def judged(text: str, problem: Problem, **options: object) -> Judgement:
    terms = load_rewards([RewardConfig(name="code", options={"seconds": 10.0, **options})])
    return judge(terms, [problem], [said(text)])[0]


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("def square(x): return x * x", 1.0),
        ("def square(x): return abs(x) * 3", 0.0),
        ("def square(x): return", 0.0),
        ("", 0.0),
        ("raise SystemExit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("print('passed'); raise SystemExit(0)", 0.0),
        ("import __main__, os; print('\\n' + __main__.word, flush=True); os._exit(0)", 0.0),
        ("import sys; print('\\n' + sys.stdin.read()); raise SystemExit(0)", 0.0),
        ("import os; print(open(f'/proc/{os.getppid()}/fd/0').read(), flush=True); os._exit(0)", 0.0),
        (
            "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'ok')\n    except OSError: pass\nos._exit(0)",
            0.0,
        ),
        ("def square(x):\n    while True: pass", 0.0),
    ],
)
def test_tests_decide(program: str, value: float) -> None:
    """All must pass; ending the process before they ran is no way round them."""
    found = judged(f"Here:\n```python\n{program}\n```\nDone.", SQUARE, seconds=2.0)
    assert found.total == value and not found.failed


def test_cases_compare_what_is_printed() -> None:
    """White space at the ends of lines is forgiven; `partial` gives the share."""
    assert judged("print(2 * int(input()), ' ')", DOUBLE).total == 1.0
    assert judged("print(2)", DOUBLE).total == 0.0
    assert judged("print(2)", DOUBLE, partial=True).total == 0.5


def test_the_last_block_is_the_program() -> None:
    """A first try that was thought better of does not count."""
    text = "```python\nfirst\n```\nno,\n```py\nsecond\n```\n```text\nthird\n```"
    assert last_program(text) == "second\n"
    assert last_program("plain") == "plain"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx\n```\nThis prints\n```\n1\n```",
        "```python3\nx\n```",
        "  ```Python title=a.py\nx\n  ```",
        "```bash\npip install y\n```\nThen\n```python\nx\n```\nand run it.",
        "```\nfirst\n```\n```\nx\n```",
        "````py\nx\n````",
        "use ```one``` so\n```py\nx\n```\n```text\nout\n```",
    ],
)
def test_the_program_is_told_from_other_blocks(text: str) -> None:
    """Shell commands, example output and the prose between are none."""
    assert last_program(text) == "x\n"


def test_a_problem_without_tests_is_a_failure() -> None:
    """It is counted, not scored in silence."""
    assert judged("x", Problem("", "")).failed == ("code",)
