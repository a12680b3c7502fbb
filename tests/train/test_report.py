from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from porcelet.errors import InputError
from porcelet.train.evaluate import Attempt, read_evaluation, save_evaluation, summarize
from porcelet.train.loop import train
from porcelet.train.report import PLOTS, TEXTS, read_stage, write_report
from tests.train.tiny_run import FIELDS, config

pytest.importorskip("matplotlib")


def run_folder(folder: Path, *, evaluated: bool) -> Path:
    folder.mkdir()
    lines = [{"step": i, "reward": i / 9, "tokens": 100, "seconds": 2.0} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if evaluated:
        groups = [
            [Attempt(f"{n} <b>?", f"it is {n}</pre><script>", is_right, 5, True) for is_right in (n % 2 == 0, False)]
            for n in range(6)
        ]
        save_evaluation(summarize(groups, 1.0), folder / "evaluation.json")
    return folder


def test_evaluation_is_saved_whole(tmp_path: Path) -> None:
    """pass@1 counts answers, pass@2 problems; what is read back equals what was written."""
    found = read_evaluation(run_folder(tmp_path / "sft", evaluated=True) / "evaluation.json")
    assert (found.pass_at[1].value, found.pass_at[2].value) == (0.25, 0.5) and found.num_problems == 6
    save_evaluation(found, tmp_path / "again.json")
    assert read_evaluation(tmp_path / "again.json") == found


class Outline(html.parser.HTMLParser):
    """The tags of a page, and every address it names."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]


@pytest.mark.parametrize("language", TEXTS)
def test_report_is_one_page_with_plots_and_no_script(tmp_path: Path, language: str) -> None:
    """Every stage has its row and its plots; a model's text stays text; nothing is loaded from elsewhere."""
    folders = [run_folder(tmp_path / "1-sft", evaluated=True), run_folder(tmp_path / "2-rl", evaluated=True)]
    page = write_report(folders, tmp_path / "report.html", language).read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert outline.tags.count("svg") == 2 and "script" not in outline.tags
    assert all(address.startswith("#") for address in outline.addresses)
    assert "1-sft" in page and "25.0% [" in page and TEXTS[language]["samples"] in page
    assert outline.tags.count("h3") == 6 and outline.tags.count("pre") == 12


def test_all_that_is_drawn_is_logged(tmp_path: Path) -> None:
    """A real run of reinforcement learning from a pre-trained model has every plot, and the minutes of its steps."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    seen: list[dict[str, float]] = []
    changes: dict[str, Any] = {"method": "grpo", "model": str(start), "steps": 2, "group_size": 4, "max_new_tokens": 3}
    output = train(
        config(tmp_path / "rl", **changes), {}, seen.append, reward=lambda _, answer: float(len(answer.text))
    )
    stages = [read_stage(start), read_stage(output)]
    drawn = {name for stage in stages for line in stage.metrics for name in line}
    assert {name for names in PLOTS for name in names} <= drawn
    assert (len(stages[0].plots), len(stages[1].plots)) == (2, 6)
    assert stages[1].minutes == pytest.approx(sum(line["seconds"] for line in seen) / 60)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """It is named, and so is a language that is not known."""
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="known: en, fr, zh"):
        write_report([], tmp_path / "report.html", "de")
