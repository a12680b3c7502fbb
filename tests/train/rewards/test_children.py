from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from porcelet.config import RewardConfig
from porcelet.train.rewards import Answer, Judgement, judge, load_rewards
from porcelet.train.tasks import Problem, load_task
from tests.train.rewards.answers import said

USERS = """\
import os, sys, time, math

def value(problem, answer, *, factor=1.0):
    print("noise on standard output")
    return factor * len(answer.text) + problem.data.get("bonus", 0)

def misbehaves(problem, answer):
    match answer.text:
        case "raise": raise ValueError("as asked")
        case "hang":
            while True: time.sleep(1)
        case "compute": return float(9 ** 9 ** 9)
        case "grow": return float(len(bytearray(64 << 30)))
        case "die": os._exit(3)
        case "leave": sys.exit(3)
        case "nan": return math.nan
        case "text": return "1.0"
        case "fork":
            if os.fork() == 0: time.sleep(60)
            while True: time.sleep(1)
    return float(os.getpid())

def environment(problem, answer):
    return float("SECRET_KEY" in os.environ)
"""


def named(name: str, **options: object) -> RewardConfig:
    return RewardConfig(name=name, options=options)


@pytest.fixture
def users(tmp_path: Path) -> str:
    file = tmp_path / "rewards.py"
    file.write_text(USERS, encoding="utf-8")
    return str(file)


def judged(config: RewardConfig, answers: list[Answer], problem: Problem) -> list[Judgement]:
    return judge(load_rewards([config]), [problem] * len(answers), answers)


def test_a_users_function_runs_with_its_options(users: str) -> None:
    """Problem and answer arrive as they are, options as keywords, and what it prints disturbs nobody."""
    found = judged(named(f"{users}:value", factor=2.0), [said("abc"), said("")], Problem("", "", data={"bonus": 1}))
    assert [judgement.total for judgement in found] == [7.0, 1.0]


def test_a_users_file_replaces_no_module(tmp_path: Path) -> None:
    """Neither by its own name nor by its neighbours', which it can import all the same."""
    text = "import json, helper\ndef value(problem, answer): return float(json.loads(answer.text) + helper.ONE)"
    for name, body in (("json.py", text), ("helper.py", "ONE = 1"), ("socket.py", "")):
        (tmp_path / name).write_text(body, encoding="utf-8")
    assert judged(named(f"{tmp_path / 'json.py'}:value"), [said("2")] * 2, Problem("", ""))[1].total == 3.0


def test_a_misbehaving_function_costs_only_its_answer(users: str) -> None:
    """Whatever it does to its process, the answer is worth zero, the reason is told, and the next is judged."""
    texts = ["raise", "hang", "fine", "compute", "grow", "die", "leave", "nan", "text", "fine"]
    found = judged(named(f"{users}:misbehaves", seconds=1.0), [said(text) for text in texts], Problem("", ""))
    reasons = dict(zip(texts, ("".join(judgement.reasons) for judgement in found), strict=True))
    assert reasons.pop("fine") == "" and all(reasons.values())
    assert "as asked" in reasons["raise"] and "MemoryError" in reasons["grow"]
    assert "took more than 1 s" in reasons["hang"] and "took more than 1 s" in reasons["compute"]
    assert "exit code 3" in reasons["die"]
    assert "SystemExit(3)" in reasons["leave"] and "no finite number" in reasons["nan"]
    assert [judgement.total > 1 for judgement in found] == [text == "fine" for text in texts]


def test_a_process_is_used_again_until_it_hangs(users: str) -> None:
    """One answer after another is judged by the same process, and all of a hanging one's family ends."""
    terms = load_rewards([named(f"{users}:misbehaves", seconds=1.0)])

    def ask(text: str) -> Judgement:
        return judge(terms, [Problem("", "")], [said(text)])[0]

    first = ask("").total
    assert first > 1 and first == ask("").total
    assert ask("fork").failed
    assert ask("").total not in (first, 0.0)
    deadline = time.monotonic() + 10
    while group_lives(int(first)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not group_lives(int(first))


def group_lives(group: int) -> bool:
    """Whether a process of the group runs; one that nobody has waited for yet does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if int(found) == group and state not in "ZX":
            return True
    return False


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core judges one after another")
def test_hanging_answers_are_waited_for_side_by_side(users: str) -> None:
    """Two that hang cost one limit, not two."""
    terms = load_rewards([named(f"{users}:misbehaves", seconds=3.0)])
    began = time.monotonic()
    found = judge(terms, [Problem("", "")] * 2, [said("hang")] * 2)
    assert all(judgement.failed for judgement in found) and time.monotonic() - began < 5.5


def test_processes_end_with_their_reward(users: str) -> None:
    """A run that ends, or is killed, leaves none behind."""
    program = (
        "from porcelet.config import RewardConfig\n"
        "from porcelet.train.rewards import Answer, judge, load_rewards\n"
        "from porcelet.train.tasks import Problem\n"
        f"terms = load_rewards([RewardConfig(name={users + ':misbehaves'!r})])\n"
        "print(judge(terms, [Problem('', '')], [Answer('', '', '', True, 0)])[0].total, flush=True)\n"
        "import os; os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    child = int(float(done.stdout))
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def test_only_the_users_own_code_sees_the_environment(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward may call a service with a key; a verifier of a model's text gets none."""
    monkeypatch.setenv("SECRET_KEY", "sesame")
    assert judged(named(f"{users}:environment"), [said("")], Problem("", ""))[0].total == 1.0


def test_a_pattern_of_exponential_time_is_stopped() -> None:
    """A regular expression runs in a process too."""
    term = named("regex", pattern="^(a+)+$", seconds=1.0)
    good, bad = judged(term, [said("aaaa"), said("a" * 60 + "b")], Problem("", ""))
    assert good.total == 1.0 and bad.failed == ("regex",)


def test_equal_mathematics_counts_and_a_power_tower_is_survived() -> None:
    """Forms of one value are equal; what never ends is stopped by the clock and costs nothing but itself."""
    pytest.importorskip("math_verify", reason="math-verify comes with the extra [train]")
    cases = [
        ("3/4", r"so we get $\frac{6}{8}$", 1.0),
        (r"\frac{3}{4}", "it is 0.75", 1.0),
        ("33", r"thus \boxed{33}", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("3/4", "0.76", 0.0),
        ("33", "", 0.0),
        ("2", "9^9^9^9 is $9^{9^{9^9}}$", None),
        ("2", "$2$", 1.0),
    ]
    problems, answers = [Problem("", gold) for gold, _, _ in cases], [said(text) for _, text, _ in cases]
    found = judge(load_rewards([named("math", seconds=2.0)]), problems, answers)
    for (_, text, value), judgement in zip(cases, found, strict=True):
        assert judgement.failed == (("math",) if value is None else ()), text
        assert judgement.total == (value or 0.0), text


def test_a_family_of_reasoning_gym_scores_its_own_problems() -> None:
    """In its process the problem is made once more: also where many answers are right and data is no JSON."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym comes with the extra [train]")
    terms = load_rewards([named("reasoning-gym")])
    for family in ("chain_sum", "graph_color", "n_queens"):
        problem = load_task(f"reasoning-gym:{family}", {}).draw(0, 0)
        right, wrong = judge(terms, [problem] * 2, [said(problem.answer), said("none")])
        assert right.total == 1.0 and wrong.total < 0.1, family
