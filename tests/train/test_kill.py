from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.train import killed_run
from tests.train.tiny_run import metrics_of


@pytest.mark.parametrize(
    ("method", "killer", "stride"),
    [
        ("grpo", "events", 11),
        pytest.param("grpo", "chance", 7, marks=pytest.mark.slow),
        pytest.param("grpo", "events", 1, marks=pytest.mark.slow),
        pytest.param("pretrain", "events", 1, marks=pytest.mark.slow),
        pytest.param("grpo", "clock", 1, marks=pytest.mark.slow),
        pytest.param("pretrain", "clock", 1, marks=pytest.mark.slow),
    ],
)
def test_run_killed_again_and_again_equals_the_uninterrupted_one(
    tmp_path: Path, method: str, killer: str, stride: int
) -> None:
    """SIGKILL before and after whatever makes something durable, before and after updates, or at any time: in the end
    every file of the run equals, byte by byte, what the run that nobody killed has. So it does where rewards are never
    the same twice, given the same rollouts."""
    command = [sys.executable, killed_run.__file__, str(tmp_path), method, killer, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    one, other = tmp_path / "whole", tmp_path / "killed"
    assert files(one) == files(other)
    assert metrics_of(one) == metrics_of(other)
    assert len(list((other / "rollouts").glob("*"))) == (6 if method == "grpo" else 0)


def files(output: Path) -> dict[str, bytes]:
    """All that a run wrote but what it measured."""
    measured = ("metrics.jsonl", "sessions.jsonl")
    paths = [path for path in output.rglob("*") if path.is_file() and path.name not in measured]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}
