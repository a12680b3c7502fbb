"""The model that comes with the package: it thinks in the open, ends, and solves the problems that its card shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from porcelet import hub
from porcelet.chat.builtin import R1_TEMPLATE
from porcelet.config import EngineConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.train.answers import ask
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer
from porcelet.train.rewards.arithmetic import solves
from porcelet.train.stages import read_stages
from porcelet.train.tasks import Problem, load_task
from porcelet.types import SamplingParams

RECIPE = Path(__file__).parents[1] / "recipes" / "r1_mini.toml"
EXPRESSION = re.compile(r"[\d+*/() -]+")
NUM_SAMPLES = 16


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the package has it. Its absence is a failure."""
    return hub.resolve(hub.R1_MINI)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.load(folder, EngineConfig(threads=1))


def answers(engine: Engine, folder: Path, problems: list[Problem], params: SamplingParams) -> list[list[Answer]]:
    return ask(engine, Renderer(folder), problems, [params] * len(problems))


def problem(question: str) -> Problem:
    """A problem as a person types it."""
    numbers, _, target = question.partition(" = ")
    return Problem(question=question, answer="", data={"numbers": [*map(int, numbers.split())], "target": int(target)})


def test_it_is_what_the_recipe_says(folder: Path) -> None:
    """Its config holds the recipe's [model] table, its chat form is R1's, and its tokens are bytes and numbers."""
    stage = read_stages(RECIPE)[0]
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in stage.model_fields} == stage.model_fields
    assert stage.config.chat_format == "R1" and Renderer(folder).opens_reasoning
    assert config["vocab_size"] == 3 + 256 + 90 + 4


def test_it_thinks_then_answers(engine: Engine, folder: Path) -> None:
    """Asked what it was never trained on, it reasons in steps, and mostly ends with an expression."""
    problems = list(load_task("countdown", {}).held_out[:32])
    greedy = [one for (one,) in answers(engine, folder, problems, SamplingParams(max_tokens=256, temperature=0.0))]
    assert all("=" in one.reasoning for one in greedy)
    assert sum(one.finished for one in greedy) >= 28
    assert sum(bool(EXPRESSION.fullmatch(one.content.strip())) for one in greedy) >= 28


def test_it_solves_what_its_card_shows(engine: Engine, folder: Path) -> None:
    """Of the answers to each problem that the page offers, at a chat's temperature, more than half are right."""
    problems = [problem(question) for question in hub.examples_of(folder)]
    params = SamplingParams(max_tokens=256, temperature=0.6, top_p=0.95, n=NUM_SAMPLES, seed=1)
    for one, found in zip(problems, answers(engine, folder, problems, params), strict=True):
        assert sum(solves(one, answer) for answer in found) > NUM_SAMPLES / 2, one.question


def test_each_question_stands_by_itself(folder: Path) -> None:
    """A conversation's last question makes the prompt it would make alone; the model was trained on no other."""
    tokenizer, form = open_codec(folder)
    question = {"role": "user", "content": "3 7 12 = 33"}
    earlier = [{"role": "user", "content": "2 5 9 = 19"}, {"role": "assistant", "content": "2*5+9"}]
    alone = form.render([question], tokenizer)
    assert alone.opens_reasoning and form.render([*earlier, question], tokenizer).tokens == alone.tokens
    assert alone.tokens == replace(form, template=R1_TEMPLATE).render([question], tokenizer).tokens
    assert form.thinking(tokenizer) == "always"


# ---- on the command line --------------------------------------------------------------------------------------------


def porcelet(*arguments: str, stdin: str = "") -> str:
    command = [sys.executable, "-m", "porcelet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_shows_its_thinking(folder: Path) -> None:
    """The greeting says what it can be asked; the reasoning stands between its two marks, each on a line."""
    told, first, second, _ = porcelet("chat", "-m", hub.R1_MINI, stdin="4 6 10 = 34\n5 8 13 = 16\n").split("> ")
    assert hub.examples_of(folder)[0] in told
    for said in (first, second):
        assert re.fullmatch(r"<think>\n.*=.*\n</think>\n\n.+\n", said, re.DOTALL)
    generated = porcelet("generate", "3 7 12 = 33", "-m", hub.R1_MINI)
    assert generated.startswith("<think>\n") and generated.count("</think>") == 1


def test_chat_with_the_default_model_names_it(default_model: Path) -> None:
    """Without --model the default model answers, and the greeting tells of the other one."""
    told = porcelet("chat", stdin="/exit\n")
    assert told.startswith(hub.DEFAULT_MODEL) and f"porcelet chat --model {hub.R1_MINI}" in told
