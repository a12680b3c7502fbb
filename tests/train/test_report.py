from __future__ import annotations

import html.parser
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import LogConfig
from porcelet.errors import InputError, MissingExtraError, ModelError
from porcelet.train.evaluate import Attempt, read_evaluation, save_evaluation, summarize
from porcelet.train.loop import train
from porcelet.train.records import read_record
from porcelet.train.rendering import make_tokenizer
from porcelet.train.report import PLOTS, write_report
from porcelet.train.stages import Stage, read_stages, run_stages
from porcelet.train.words import WORDS
from tests.train.test_stages import recipe
from tests.train.tiny_run import FIELDS, config

pytest.importorskip("matplotlib")

HOSTILE = "</pre><script>alert(1)</script>"


def run_folder(
    folder: Path, *, evaluated: bool = True, text: str = "", chat_format: str = "V3", **logged: float
) -> Path:
    """A finished run of 8 steps, that says `text` to each of 6 problems."""
    make_tokenizer(folder, chat_format)
    lines = [{"step": i, "reward": i / 8, "tokens": 1000, "seconds": 3.0, **logged} for i in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    session = {"step": 0, "time": "2026-01-02T03:04:05+0000", "device": "cpu", "threads": 3, "torch": "2.0"}
    (folder / "sessions.jsonl").write_text(json.dumps(session | {"matmul_flops_per_second": 5e10}) + "\n")
    (folder / "samples").mkdir()
    state = json.dumps({"recipe": {"seed": 7, "method": "sample"}})
    (folder / "samples" / "state.json").write_text(state, encoding="utf-8")
    if evaluated:
        groups = [
            [Attempt(f"{n} <b>?", text or "it is", is_right, 5, True) for is_right in (n % 2 == 0, False)]
            for n in range(6)
        ]
        save_evaluation(summarize(groups, 1.0), folder / "evaluation.json")
    return folder


class Outline(html.parser.HTMLParser):
    """A page as its tags with their attributes, and the text under each tag's name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.tags[-1][0] if self.tags else "", data.strip()))

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def all_of(self, attribute: str, *tags: str) -> list[str]:
        """An attribute's values, of these tags or of all."""
        return [own[attribute] for tag, own in self.tags if attribute in own and (not tags or tag in tags)]


def test_evaluation_is_saved_whole(tmp_path: Path) -> None:
    """pass@1 counts answers, pass@2 problems; what is read back equals what was written."""
    found = read_evaluation(run_folder(tmp_path / "sft") / "evaluation.json")
    assert (found.pass_at[1].value, found.pass_at[2].value) == (0.25, 0.5) and found.num_problems == 6
    save_evaluation(found, tmp_path / "again.json")
    assert read_evaluation(tmp_path / "again.json") == found


@pytest.mark.parametrize("language", WORDS)
def test_report_is_one_page_with_plots_and_no_script(tmp_path: Path, language: str) -> None:
    """Every stage has its row and its plots; a model's text, a question and a folder's name stay text; nothing is
    loaded from elsewhere; equal input gives equal bytes."""
    folders = [run_folder(tmp_path / "1-sft"), run_folder(tmp_path / "2 <i>&\"' $rl$", text=HOSTILE)]
    page = write_report(folders, tmp_path / "report.html", language)
    outline = Outline(page)
    names = outline.names()
    assert "script" not in names and all("class" in own for tag, own in outline.tags if tag == "i")
    assert names.count("svg") == 4 and names.count("tr") == 3 and names.count("article") == 12
    assert all(address.startswith("#") for address in outline.all_of("href") + outline.all_of("xlink:href"))
    assert not outline.all_of("src")
    assert ("pre", HOSTILE) in outline.texts and ("h3", "1. 0 <b>?") in outline.texts
    assert ("a", "2 <i>&\"' $rl$") in outline.texts and ("text", "2 <i>&\"' $rl$") in outline.texts
    assert ("h2", WORDS[language]["samples"]) in outline.texts
    before = page.read_bytes()
    assert write_report(folders, tmp_path / "report.html", language).read_bytes() == before


def test_page_can_be_heard(tmp_path: Path) -> None:
    """Headings skip no level, header cells say what they head, every plot says its first, last and best number, links
    and labels name what is there, and right and wrong are words."""
    outline = Outline(write_report([run_folder(tmp_path / "sft")], tmp_path / "report.html"))
    levels = [int(tag[1]) for tag in outline.names() if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [own["scope"] for tag, own in outline.tags if tag == "th"] == ["col"] * 8 + ["row"]
    labels = outline.all_of("aria-label", "svg")
    assert len(labels) == outline.names().count("svg") == 3 and set(outline.all_of("role", "svg")) == {"img"}
    assert labels[0].startswith("Problems solved, in %. pass@1: 25 at first, 25 at last, best 25 (sft); pass@2: 50")
    assert labels[2] == "Reward. mean reward: 0.125 at first, 1 at last, best 1 (step 8)"
    ids = outline.all_of("id")
    assert len(ids) == len(set(ids))
    assert {name.removeprefix("#") for name in outline.all_of("href") + outline.all_of("aria-labelledby")} <= set(ids)
    assert ("span", "✓ right") in outline.texts and ("span", "✗ wrong") in outline.texts


def test_head_says_how_it_was_made(tmp_path: Path) -> None:
    """Recipe, minutes, tokens and sessions of all stages; the machine's facts once."""
    folders = [run_folder(tmp_path / "1-sft"), run_folder(tmp_path / "2-rl")]
    texts = Outline(write_report(folders, tmp_path / "report.html")).texts
    facts = dict(zip([t for tag, t in texts if tag == "dt"], [t for tag, t in texts if tag == "dd"], strict=True))
    facts.pop("porcelet")
    assert facts == {
        "recipe": tmp_path.name,
        "minutes of steps": "0.8",
        "tokens": "16\u202f000",
        "seed": "7",
        "device": "cpu",
        "threads": "3",
        "matrix rate (GFLOP/s)": "50",
        "torch": "2.0",
        "begun": "2026-01-02T03:04:05+0000",
        "sessions": "2",
    }


def test_stage_without_a_model_has_a_row_with_blanks(tmp_path: Path) -> None:
    """A stage of sampling says how many answers it kept; a page without any evaluation has no shares."""
    sampled = run_folder(tmp_path / "2-sampled", evaluated=False, kept=5)
    outline = Outline(write_report([run_folder(tmp_path / "1-sft"), sampled], tmp_path / "report.html"))
    cells = [own for tag, own in outline.tags if tag == "td"]
    assert ("td", "40") in outline.texts and ("th", "Answers kept") in outline.texts and len(cells) == 2 * 8
    alone = Outline(write_report([sampled], tmp_path / "alone.html"))
    assert alone.names().count("svg") == 2 and not any(text.startswith("pass@") for _, text in alone.texts)


@pytest.mark.parametrize(
    ("chat_format", "text", "reasoning", "content"),
    [
        ("V3", "<think>\n1 + 1\n</think>\n\n2", "1 + 1", "2"),
        ("V3", "2", None, "2"),
        ("R1", "1 + 1</think>2", "1 + 1", "2"),  # every prompt ends with <think>
        ("R1", "for ever", "for ever", None),
    ],
)
def test_reasoning_is_told_from_the_answer(
    tmp_path: Path, chat_format: str, text: str, reasoning: str | None, content: str | None
) -> None:
    """Each in a block of its own, whether or not the prompt began the reasoning, and whether or not it ends."""
    folder = run_folder(tmp_path / "sft", text=text, chat_format=chat_format)
    outline = Outline(write_report([folder], tmp_path / "report.html"))
    blocks = [own["class"] for tag, own in outline.tags if tag == "pre"]
    wanted = [("reasoning", reasoning), ("answer", content)]
    assert blocks == [kind for kind, said in wanted if said] * 6
    assert [said for tag, said in outline.texts if tag == "pre"] == [said for _, said in wanted if said] * 6
    assert (("p", "no answer") in outline.texts) == (content is None)


def test_all_that_is_drawn_is_logged(tmp_path: Path) -> None:
    """Real runs, of reinforcement learning and distillation from a pre-trained model, have every plot, and the minutes
    of their steps."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    seen: list[dict[str, float]] = []
    changes: dict[str, Any] = {"method": "grpo", "model": str(start), "steps": 2, "group_size": 4, "max_new_tokens": 3}
    output = train(
        config(tmp_path / "rl", **changes), {}, seen.append, reward=lambda _, answer: float(len(answer.text))
    )
    changes |= {"method": "distill", "steps": 1, "teacher": str(start)}
    distilled = train(config(tmp_path / "distilled", **changes), {})
    stages = [read_record(folder) for folder in (start, output, distilled)]
    drawn = {name for stage in stages for line in stage.metrics for name in line}
    assert {name for names in PLOTS.values() for name in names} - {"kept"} <= drawn  # which sampling alone logs
    outlines = [Outline(write_report([folder], tmp_path / "report.html")) for folder in (start, output)]
    assert [outline.names().count("svg") for outline in outlines] == [4, 7]
    assert [stage.recipe["method"] for stage in stages] == ["pretrain", "grpo", "distill"]
    assert stages[1].minutes == pytest.approx(sum(line["seconds"] for line in seen) / 60)


def test_run_writes_its_report_after_every_stage(tmp_path: Path) -> None:
    """At the end of each stage the page shows the stages so far; a run that is finished already writes it again."""
    path, pages = recipe(tmp_path / "run"), list[bool]()
    stages, page = read_stages(path, ["log.report=fr", "again.log.report="]), tmp_path / "run" / "report.html"

    @contextmanager
    def watched(stage: Stage) -> Iterator[Callable[[dict[str, float]], None]]:
        pages.append(page.exists())
        yield lambda metrics: None

    run_stages(stages, watched)
    text = page.read_text(encoding="utf-8")
    assert pages == [False, True, True] and 'lang="fr"' in text and "<h1>Rapport d’entraînement : run</h1>" in text
    assert "02-reinforce" in text and "03-again" not in text
    wanted = [stage._replace(config=replace(stage.config, log=LogConfig(report="zh"))) for stage in stages]
    run_stages(wanted, watched, resume=True)
    assert "03-again" in page.read_text(encoding="utf-8") and len(pages) == 3


def test_missing_package_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra, and nothing was run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    stages = read_stages(recipe(tmp_path / "run"), ["log.report=en"])
    with pytest.raises(MissingExtraError, match=r"matplotlib is not installed.*porcelet\[train\]"):
        run_stages(stages, lambda stage: pytest.fail("a stage was begun"))
    assert not (tmp_path / "run" / "01-start").exists()


def test_languages_say_the_same(tmp_path: Path) -> None:
    """Each has every word that another has, and a recipe may name each, and no other."""

    def keys(words: dict[str, Any]) -> set[str]:
        inner = {f"{name}.{key}" for name, value in words.items() if isinstance(value, dict) for key in value}
        return inner | words.keys()

    english = keys(WORDS["en"])
    assert all(keys(words) == english for words in WORDS.values())
    assert {f"plots.{name}" for name in PLOTS} <= english
    assert [LogConfig(report=language).report for language in ("", *WORDS)] == ["", *WORDS]
    with pytest.raises(InputError, match="report is 'de'; it must be one of en, fr, zh"):
        LogConfig(report="de")


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """It is named, and so is a language that is not known, or a damaged line; one that is being written is not."""
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="known: en, fr, zh"):
        write_report([], tmp_path / "report.html", "de")
    with pytest.raises(InputError, match="give the output folders"):
        write_report([], tmp_path / "report.html")
    path = run_folder(tmp_path / "sft") / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "rew')
    assert read_record(tmp_path / "sft").num_steps == 8
    path.write_text("{\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"metrics\.jsonl cannot be read"):
        read_record(tmp_path / "sft")
