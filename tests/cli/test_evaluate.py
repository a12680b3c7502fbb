from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from porcelet import hub
from porcelet.cli import app
from porcelet.errors import InputError
from porcelet.train.evaluate import read_evaluation
from porcelet.train.loop import train
from tests.train.tiny_run import FIELDS, config

RECIPE = """
[task]
name = "sums"
max_number = 6
[policy]
max_new_tokens = 3
"""
TABLE = """
[evaluate]
num_problems = 2
num_samples = 4
temperature = 0.5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + TABLE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was hardly one."""
    return train(config(tmp_path_factory.mktemp("run"), steps=1), FIELDS)


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def asked(*arguments: object) -> dict[str, Any]:
    """What one model was asked for."""
    done = evaluate(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout)["asked"])


def test_model_is_measured_by_its_name(recipe: Path) -> None:
    """One line a model, by the name that was given."""
    done = evaluate(recipe, hub.R1_MINI, "--problems", 1)
    assert done.exit_code == 0 and done.stdout.startswith(f"{hub.R1_MINI}: pass@1 "), done.output


def test_options_default_to_the_recipes_table(recipe: Path, folder: Path) -> None:
    """An option wins over [evaluate], 0 included; without either they are 200 problems, 16 answers, temperature 1."""
    table = {"num_problems": 2, "num_samples": 4, "temperature": 0.5, "max_new_tokens": 3}
    assert asked(recipe, folder) == table
    assert asked(recipe, folder, "--temperature", 0) == table | {"temperature": 0.0}
    assert asked(recipe, folder, "--problems", 1, "--samples", 2) == table | {"num_problems": 1, "num_samples": 2}
    assert asked(recipe, folder, "--set", "evaluate.max_new_tokens=2")["max_new_tokens"] == 2
    recipe.write_text(RECIPE, encoding="utf-8")
    assert asked(recipe, folder) == table | {"num_problems": 200, "num_samples": 16, "temperature": 1.0}


def test_result_is_kept_only_if_asked_for_and_only_in_a_run(recipe: Path, folder: Path) -> None:
    """What a recipe measured is not replaced by a try, and nothing is written beside a model of the package."""
    path = folder / "evaluation.json"
    assert evaluate(recipe, folder).exit_code == 0 and not path.exists()
    refused = evaluate(recipe, folder, hub.R1_MINI, "--keep")
    assert isinstance(refused.exception, InputError) and f"{hub.R1_MINI} is none" in str(refused.exception)
    assert not refused.stdout and not path.exists()
    kept = evaluate(recipe, folder, "--keep")
    assert kept.exit_code == 0 and read_evaluation(path).asked.num_problems == 2
