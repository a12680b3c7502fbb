from __future__ import annotations

import json
from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.train.tasks import FiniteTask, load_task


def test_problems_of_a_file_keep_all_their_fields(tmp_path: Path) -> None:
    """Question, answer and trace are the problem's; the rest is its data. Every line is drawn or held out."""
    file = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i}?\u2028\x85", "answer": str(i), "trace": "so", "tests": [i]} for i in range(60)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n\r\n".join(lines), encoding="utf-8")
    task = load_task("jsonl", {"path": str(file)})
    assert isinstance(task, FiniteTask)
    found = sorted(task.training + task.held_out, key=lambda problem: int(problem.answer))
    assert [(p.question, p.answer, p.trace, p.data) for p in found] == [
        (row["question"], row["answer"], "so", {"tests": row["tests"]}) for row in rows
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"question": "1"', "bad.jsonl:1: not JSON"),
        ('\n{"question": "1"}', "bad.jsonl:2: the fields are question; a problem has question and answer"),
        ('{"question": "1", "answer": null}', "the fields are question; a problem"),
        ("[1]", r"bad.jsonl:1: \[1\] is not a JSON object"),
        ('{"question": "1", "answer": 1}', "answer is 1; it must be a string"),
        ('{"question": "1", "answer": "1"}', "1 problems are too few"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path: Path, text: str, named: str) -> None:
    """The message says which line and what is wrong with it."""
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=named):
        load_task("jsonl", {"path": str(tmp_path / "bad.jsonl")})


def test_a_missing_file_and_a_missing_option_are_named(tmp_path: Path) -> None:
    """Both before training begins."""
    with pytest.raises(InputError, match="does not exist"):
        load_task("jsonl", {"path": str(tmp_path / "none.jsonl")})
    with pytest.raises(InputError, match="'path' is missing"):
        load_task("jsonl", {})
