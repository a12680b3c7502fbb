from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.train.folders import portable


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("runs/r1/01-start", "@01-start"),
        ("runs/r1/../r1/03-made/samples.jsonl", "@03-made/samples.jsonl"),
        ("@01-start", "@01-start"),
        ("runs/r2/01-start", "runs/r2/01-start"),
        ("runs/r1/talk.jsonl", "runs/r1/talk.jsonl"),
        ("runs/r1", "runs/r1"),
        ("a-model-of-the-store", "a-model-of-the-store"),
        ("", ""),
    ],
)
def test_what_is_in_another_stage_is_named_from_the_run_on(path: str, kept: str) -> None:
    """Values, lists and names of inputs; other paths and other settings stay, and so does all of a run alone."""
    recipe = {"model": path, "data.conversations": [path], f"inputs.{path}": "x", "lora.adapter": path, "steps": 3}
    wanted = {"model": kept, "data.conversations": [kept], f"inputs.{kept}": "x", "lora.adapter": path, "steps": 3}
    assert portable(recipe, Path("runs/r1/02-next")) == portable(recipe, Path("runs/r1/02-next").absolute()) == wanted
    assert portable(recipe, Path("runs/r1/next")) == recipe
