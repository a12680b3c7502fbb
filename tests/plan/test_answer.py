"""The whole answer: verdicts that advise against as well as for, each change tried, and one page in three languages."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from porcelet.cli import app
from porcelet.errors import InputError
from porcelet.plan import plan, text
from porcelet.plan.answer import Answer, Question, answer
from porcelet.plan.cost import Supply
from porcelet.plan.hardware import devices, parse_fleet
from porcelet.plan.model import find_model
from porcelet.plan.report import page, write_report
from porcelet.plan.search import changes_that_fit, smallest_fleet
from porcelet.plan.serve import Traffic, options, users
from porcelet.plan.training import Run
from porcelet.plan.verdicts import verdicts
from porcelet.plan.words import WORDS

LANGUAGES = sorted(WORDS)


def asked(model: str = "r1", on: str = "8xH20", **more: Any) -> Answer:
    return answer(Question(model=find_model(model), fleet=parse_fleet(on), **more))


def test_library_gives_the_same_answer() -> None:
    """`porcelet.plan.plan` takes names as the command does."""
    found = plan("r1", on="16xH800", users=100)
    assert found.figure("speed", "users") == asked(on="16xH800", users=100).figure("speed", "users")


def keys(found: Answer) -> list[str]:
    return [one.key for one in verdicts(found)]


def test_what_cannot_fit_names_three_changes_that_do() -> None:
    """R1 on eight cards of 80 GB: fewer bits, more cards, other cards; each of them does fit when tried."""
    found = asked(on="8xH100")
    assert keys(found) == ["does_not_fit", "change_weights", "change_devices", "change_hardware"]
    assert len(found.changes) == 3 and found.best is None
    for change in found.changes:
        assert options(change.model, change.fleet, change.traffic)


def test_a_request_that_is_too_long_may_be_shortened() -> None:
    """Where the weights fit and one request's cache does not, shorter requests come first; they fit."""
    model, fleet = find_model("r1-distill-qwen-7b"), parse_fleet("4090")
    traffic = Traffic(prompt=100_000)
    first = changes_that_fit(model, fleet, traffic, devices())[0]
    assert first.kind == "context" and first.traffic.prompt < 100_000
    assert options(model, fleet, first.traffic)


def test_buy_less_where_fewer_serve_as_many() -> None:
    """64 cards for a thousand people are too many; the number named serves them, and half of it would not."""
    found = asked(on="64xH800", users=1000, traffic=Traffic(thinking=4))
    assert "buy_less" in keys(found) and found.smallest is not None
    device, model, traffic = found.smallest.device, found.question.model, found.question.traffic
    again = smallest_fleet(model, device, traffic, 1000)
    assert again is not None and again[0].count == found.smallest.count
    assert again[1].best is not None and users(again[1].best, traffic) >= 1000


def test_not_enough_names_what_would_be() -> None:
    """For more people than a fleet serves, the plan says how many devices serve them."""
    found = asked(on="16xH800", users=20_000, traffic=Traffic(thinking=4))
    assert "not_enough" in keys(found) and found.smallest is not None and found.smallest.count > 16


def test_stay_on_an_api_for_little_use() -> None:
    """Ten people do not pay for eight cards, at any end of what these cost; a card that is owned and full does."""
    assert "stay_on_api" in keys(asked(users=10, traffic=Traffic(prompt=8000)))
    own = asked("r1-distill-qwen-7b", "4090", supply=Supply(way="owned"))
    assert "own_is_cheaper" in keys(own)


def test_too_slow_is_said() -> None:
    """A promise that even a lone answer breaks is a verdict of its own."""
    assert "too_slow" in keys(asked(on="2x EPYC 9654", traffic=Traffic(speed=500)))


def test_training_is_planned_too() -> None:
    """V3's run on its 2,048 cards takes about two months; on eight it does not fit."""
    plenty = asked(on="2048xH800", train=Run(tokens=14.8e12))
    assert "trains" in keys(plenty)
    days = plenty.figure("training", "days")
    assert days is not None and days.range[0] < 54.2 < days.range[1]  # 2,664K hours
    assert "cannot_train" in keys(asked(on="8xH20", train=Run(tokens=1e9)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_figure_has_a_name_a_formula_and_a_range(language: str) -> None:
    """In each language; and every verdict's sentence has all its values."""
    found = asked(users=100, train=Run(tokens=1e9))
    said = WORDS[language]
    for section in found.sections:
        assert said["sections"][section.key]
        for key, figure in section.rows.items():
            assert said["rows"][key] and figure.formula and figure.unit
            low, high = figure.range
            assert low <= figure.value <= high
    for verdict in verdicts(found):
        assert "{" not in text.sentence(verdict, language)
    assert len(list(text.lines(found, language))) > 30


def test_languages_have_the_same_words() -> None:
    """A sentence that one language lacks would fail when it is needed; placeholders agree, too."""

    def flat(value: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {path: sorted(set(re.findall(r"\{(\w+)", value)))}
        return {name: part for key, inner in value.items() for name, part in flat(inner, f"{path}/{key}").items()}

    english = flat(WORDS["en"])
    for language in LANGUAGES:
        assert flat(WORDS[language]) == english


class Outline(HTMLParser):
    """What a page holds: its tags with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.mark.parametrize("language", LANGUAGES)
def test_page_is_whole_by_itself(language: str, tmp_path: Path) -> None:
    """One file in the page's language: three plots that say what they show, every source in it, nothing loaded."""
    found = asked(users=100)
    html = write_report(found, tmp_path / "a" / "plan.html", language).read_text(encoding="utf-8")
    outline = Outline(html)
    assert ("html", {"lang": language}) in outline.tags
    drawings = [attributes for tag, attributes in outline.tags if tag == "svg"]
    assert len(drawings) == 3 and all(one.get("aria-label") for one in drawings)
    assert not any("src" in attributes or tag in ("script", "link") for tag, attributes in outline.tags)
    assert "FlashMLA on H800" in html and "DeepEP" in html
    assert page(found, language) == html  # equal answers, equal bytes
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["plan.html"]


def test_page_without_a_fit() -> None:
    """It says so, and draws nothing."""
    html = page(asked(on="8xH100"))
    assert "<svg" not in html and "--weights int4" in html


def test_command_line() -> None:
    """Text, JSON and their refusals: exit code 2 with value and remedy in one line."""
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", "v2-lite", "--on", "4090", "--weights", "int4"])
    assert shown.exit_code == 0 and "fits on 1 x RTX 4090" in shown.output
    printed = json.loads(runner.invoke(app, ["plan", "r1", "--json", "--train", "1e12"]).output)
    assert printed["question"]["parameters"] == 671_026_419_200
    assert printed["figures"]["memory"]["weights"]["sources"]
    assert {"value", "low", "high", "unit", "formula", "label", "sources"} == set(printed["figures"]["cost"]["month"])
    for arguments in (
        ["--on", "8xH2000"],
        ["--language", "de"],
        ["--cache-bits", "3"],
        ["--tariff", "x"],
        ["--users", "-3"],
        ["--busy-hours", "25"],
        ["--hits", "2"],
    ):
        refused = runner.invoke(app, ["plan", "r1", *arguments])
        assert isinstance(refused.exception, InputError) and ";" in str(refused.exception)
