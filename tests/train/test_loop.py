from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from porcelet.config import TaskConfig
from porcelet.errors import InputError, ModelError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.train.loop import train
from porcelet.train.measure import MEASURED
from porcelet.train.recipe import read_recipe
from porcelet.train.rendering import Renderer
from porcelet.train.stages import read_stages
from porcelet.train.tasks import Problem
from porcelet.train.tasks.problem import is_held_out
from porcelet.weights.load import load
from tests.train.tiny_run import FIELDS, config, metrics_of, model


def test_training_lowers_the_loss_and_logs_every_step(tmp_path: Path) -> None:
    """Every step has a line with the loss by parts, balance, norm, rate and tokens, in order."""
    run = config(tmp_path, steps=40, learning_rate=1e-2, samples_per_step=16)
    seen: list[dict[str, float]] = []
    train(run, FIELDS, seen.append)
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 41)) and len(seen) == 40
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    wanted = {"loss", "cross_entropy", "mtp", "gradient_norm", "learning_rate", "max_violation", "tokens", "step"}
    wanted |= {"updates", "skipped", "mean_violation"}
    assert all(set(line) == wanted for line in lines) and set(MEASURED) <= set(seen[0])
    assert lines[0]["loss"] == pytest.approx(lines[0]["cross_entropy"] + 0.3 * lines[0]["mtp"], rel=1e-5)


def test_transformers_computes_the_same_from_the_saved_model(tmp_path: Path) -> None:
    """Same logits within 2e-5 of their size, and its MTP layer and biases come back in ours."""
    transformers = pytest.importorskip("transformers")
    output = train(config(tmp_path, learning_rate=1e-2, bias_update_speed=0.05), FIELDS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    tokens = torch.tensor(Renderer(output).prompt("12+7="))
    ours = load(output)
    with torch.no_grad():
        mine = ours.logits(ours(tokens, torch.arange(len(tokens)), PackedView(Segments.of(len(tokens)))))
        expected = theirs(tokens[None]).logits[0]
    assert (mine - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert set(dict(ours.named_parameters())) == set(dict(model().named_parameters()))
    assert theirs.config.eos_token_id == 1 and theirs.config.bos_token_id == 0


def test_settings_of_rollouts_change_nothing_else(tmp_path: Path) -> None:
    """Pre-training takes one update a step on all samples, whatever [policy] says."""
    train(config(tmp_path / "plain", steps=3), FIELDS)
    train(config(tmp_path / "policy", steps=3, updates_per_rollout=3, minibatches=2), FIELDS)
    assert metrics_of(tmp_path / "plain") == metrics_of(tmp_path / "policy")


RECIPES_REFUSED = {
    "[trian]": r"'trian'; did you mean \[train\]",
    "[optimizer]\nlearning_rat = 1": "'learning_rate'",
    "[optimizer]\nschedule = 'cosin'": "schedule is 'cosin'",
    "[train]\noptimizer = 1": r"'optimizer' is a table of its own",
    "reward = 1": r"a table \[\[reward\]\]",
    "[train]\nmethod = 'grpo'\nsamples_per_step = 9\n[policy]\ngroup_size = 2": "samples_per_step 9",
    "[lora]\nrank = true": "rank is True",
    "[lora]\ntargets = [1]": r"targets is \[1\]",
}


def test_recipe_file_and_overrides(tmp_path: Path) -> None:
    """Tables become config and model fields; words of the command line win; unknown keys name the nearest."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[train]\nsteps = 7\nseed = 3\n[model]\nhidden_size = 32\n", encoding="utf-8")
    run, fields = read_recipe(
        recipe, ["steps=9", "optimizer.learning_rate=0.1", "task.max_number=7", "model.hidden_size=64"]
    )
    assert (run.steps, run.seed, run.optimizer.learning_rate) == (9, 3, 0.1)
    assert fields == {"hidden_size": 64} and run.task == TaskConfig(name="sums", options={"max_number": 7})
    with pytest.raises(InputError, match="'steps'"):
        read_recipe(recipe, ["step=9"])
    for text, named in RECIPES_REFUSED.items():
        recipe.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=named):
            read_recipe(recipe)
    with pytest.raises(InputError, match="absent.toml"):
        read_recipe(tmp_path / "absent.toml")


def test_recipes_of_the_repository_are_valid() -> None:
    """Every recipe reads, and its model builds."""
    for path in (Path(__file__).parents[2] / "recipes").glob("*.toml"):
        for name, run, fields in read_stages(path):
            assert bool(run.model) != bool(fields), (path, name)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (FIELDS | {"hiden_size": 3}, "'hidden_size'"),
        (FIELDS | {"vocab_size": 100}, "vocab_size is 100"),
        ({}, r"\[model\]"),
    ],
)
def test_unusable_model_table_is_refused(tmp_path: Path, fields: dict[str, object], named: str) -> None:
    """A mistyped field, a vocabulary smaller than the tokenizer's, or no model at all."""
    with pytest.raises(InputError, match=named):
        train(config(tmp_path), fields)


def test_absent_start_model_is_named(tmp_path: Path) -> None:
    """A folder that is not there is an error about that folder."""
    with pytest.raises(ModelError, match="nowhere"):
        train(config(tmp_path, model=str(tmp_path / "nowhere")), {})


@pytest.mark.parametrize("num_long", [1, 60])
def test_worked_solutions_beyond_the_model_are_refused(tmp_path: Path, num_long: int) -> None:
    """Before the first step, even if it is one of many; a model is not trained where it cannot read."""
    questions = [f"{i}?" for i in range(80)]
    kept = [question for question in questions if not is_held_out(Problem(question, "1"))]
    rows = [
        {"question": question, "answer": "1", "trace": "so " * (40 if question in kept[-num_long:] else 1)}
        for question in questions
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match=r"worked solution are \d+ tokens; the model has max_position_embeddings 64"):
        train(config(tmp_path / "run", method="sft", chat_format="R1", task="jsonl", path=str(file)), FIELDS)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
