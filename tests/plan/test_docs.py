"""docs/planning.md says what the planner says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porcelet.cli import app

DOCUMENT = Path(__file__).parents[2] / "docs" / "planning.md"
TRAFFIC = "--prompt 2000 --hits 0.5 --answer 400 --thinking 4 --turns 6 --speed 15"
ROWS = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "…` |" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_table_is_what_the_planner_computes(row: str) -> None:
    """Each row's command gives its layout, people, speeds and costs, to the digits shown."""
    _, _, command, layout, *numbers, _ = (cell.strip() for cell in row.split("|"))
    arguments = shlex.split(command.strip("`").replace("…", TRAFFIC))
    planned = json.loads(CliRunner().invoke(app, ["plan", *arguments, "--json"]).output)
    figures, parts = planned["figures"], planned["layouts"][0]["layout"]
    words = (("PP", "pipeline"), ("DP", "data"), ("TP", "tensor"), ("EP", "expert"))
    assert layout == (" · ".join(f"{word}{parts[key]}" for word, key in words if parts[key] > 1) or "one device")
    keys = (("speed", "users"), ("speed", "written"), ("speed", "speed"), ("cost", "month"), ("cost", "api_month"))
    values = [figures[section][key]["value"] for section, key in keys]
    shown = [
        f"{value:.1f}" if key == "speed" else f"{value:,.0f}" for value, (_, key) in zip(values, keys, strict=True)
    ]
    assert numbers == shown


def test_the_table_is_there() -> None:
    """A row that the pattern misses would be checked by nobody."""
    assert len(ROWS) == 10 and all(TRAFFIC.split()[i] in DOCUMENT.read_text(encoding="utf-8") for i in (0, 2, 4))
