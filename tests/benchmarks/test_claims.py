"""No figure without a source: the README and the docs say what results.jsonl holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import claims, harness
from benchmarks.claims import Claim


@pytest.mark.parametrize("page", claims.PAGES, ids=lambda page: page.name)
def test_every_figure_follows_from_a_result(page: Path) -> None:
    """Each marked figure rounds to its result's number, and no speed or ratio stands unmarked."""
    lines = claims.newest_lines()
    problems = [claims.mismatch(claim, lines) for claim in claims.claims_of(page)]
    assert [*filter(None, problems), *claims.unmarked(page)] == []


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("80", 84.0, True),  # a figure that ends in a zero claims its tens only
        ("80", 86.0, False),
        ("84", 84.4, True),
        ("84", 84.6, False),
        ("2.5", 2.54, True),
        ("2.5", 2.56, False),
        ("1,200", 1249.0, True),
        ("-0.2", -0.24, True),
        ("-0.2", 0.2, False),
    ],
)
def test_rounding(text: str, value: float, holds: bool) -> None:
    """A figure is right to the digits it is written with."""
    lines = {"b": {"results": {"x": {"y": value}}}}
    assert (claims.mismatch(Claim("page:1", text, "b", "x.y"), lines) is None) == holds


def test_missing_source_and_unmarked_figure_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark that leads nowhere is reported, and so is a speed without a mark; marked and plain numbers are not."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("80<!-- b:x.y --> tokens/s\n81 tokens/s\n3.5× faster\n2 cores, 135 M parameters\n")
    (claim,) = claims.claims_of(page)
    assert "no b:x.y" in (claims.mismatch(claim, {}) or "")
    assert len(list(claims.unmarked(page))) == 2


def test_a_sign_belongs_to_its_figure_and_a_dash_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences may be negative; the end of a range is not."""
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("-0.3<!-- b:x -->, (-7<!-- b:x --> and 5-8<!-- b2:x -->\n")
    assert [claim.text for claim in claims.claims_of(page)] == ["-0.3", "-7", "8"]


def test_interleave_drops_disturbed_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that lost time to others are repeated; medians come from the undisturbed ones."""
    shares = iter([0.5, 0.0] + [0.0] * 10)
    monkeypatch.setattr(harness, "stolen_share", lambda before, after: next(shares))
    counts = iter(range(100))
    results, note = harness.interleave({"a": lambda: {"n": next(counts)}, "b": lambda: {"n": -1.0}}, rounds=3)
    assert note == {"rounds": 3, "dropped_rounds": 1, "stolen_percent": 0.0}
    assert results == {"a": {"n": 3.0}, "b": {"n": -1.0}}  # 0 warmed up, 1 was dropped, then 2, 3, 4
