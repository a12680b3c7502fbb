"""Published shapes: what is compared is comparable, and a verdict says what the seeds said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks.claims import value_at
from benchmarks.shapes import experts, mtp, muon, traces
from benchmarks.shapes.trials import HERE, Claim, Setting, Shape, results, run, table, take_turns
from porcelet.config import ModelConfig, read_hf
from porcelet.train.recipe import read_recipe
from porcelet.train.rendering import Renderer


def _claim(*values: float) -> Claim:
    return Claim("gain", "what is gained", "1", values, lambda gain: gain > 0)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 2.0, 0.5), "holds"),
        ((3.0, -1.0, 1.0), "holds in the mean, in 2 of 3 seeds"),
        ((1.0, -3.0, 1.0), "does not hold: in 2 of 3 seeds"),
        ((-1.0, -3.0, 0.0), "does not hold: in 0 of 3 seeds"),
    ],
)
def test_a_verdict_tells_every_seed_from_the_mean(values: tuple[float, ...], verdict: str) -> None:
    """A direction that one seed denies is not said to hold."""
    assert _claim(*values).verdict == verdict


def test_seeds_and_variants_take_turns(tmp_path: Path) -> None:
    """Every variant runs once a seed, in an order that turns, and values stand in the order of the seeds."""
    order: list[str] = []

    def trial(name: str, seed: int, folder: Path) -> dict[str, float]:
        assert not list(folder.iterdir())
        order.append(f"{name}{seed}")
        return {"seed": seed}

    measured = take_turns(Setting(tmp_path, seeds=2), {name: partial(trial, name) for name in "abc"})
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1"]
    assert all(values["seed"] == [0, 1] for values in measured.values())


def test_results_can_be_cited() -> None:
    """The figures of variants and claims are found by the paths that texts name."""
    shape = Shape({"one": {"loss": [1.0, 3.0]}}, [_claim(1.0, 2.0)])
    line = json.loads(json.dumps({"results": results(shape)}))
    assert value_at(line, "one.loss.mean") == 2.0 and value_at(line, "one.loss.high") == 3.0
    assert value_at(line, "claims.gain.mean") == 1.5
    assert "| what is gained | 1 | 1.5 (1 to 2) | holds |" in table(shape)


@pytest.mark.parametrize(("goal", "share"), [(3.0, 0.5), (2.0, 0.5), (1.75, 0.6), (1.5, 0.7), (1.0, 1.0), (0.5, 1.0)])
def test_the_share_of_steps_lies_on_a_line(goal: float, share: float) -> None:
    """Between two lengths the loss is taken to fall evenly; beyond the shortest and the longest nothing is made up."""
    assert muon.crossing((0.5, 0.7, 1.0), (2.0, 1.5, 1.0), goal) == pytest.approx(share)


def test_experts_are_compared_at_equal_compute() -> None:
    """Active parameters are equal within 3 %, and those of the two mixtures in all within 1 %."""
    dense, gshard, ours = (_architecture(name) for name in experts.VARIANTS)
    active = [shape.num_active_parameters() for shape in (dense, gshard, ours)]
    assert max(active) <= 1.03 * min(active)
    assert gshard.num_parameters() == pytest.approx(ours.num_parameters(), rel=0.01)
    assert dense.n_routed_experts == 0 and gshard.n_shared_experts == 0


def _architecture(name: str) -> ModelConfig:
    words = [f"model.{key}={value}" for key, value in experts.VARIANTS[name].items()]
    _, fields = read_recipe(HERE / "text.toml", [*words, "model.first_k_dense_replace=0"])
    return read_hf({"vocab_size": 512, "eos_token_id": 1, **fields}, name)


def test_a_trained_model_is_asked_for_its_guesses(tmp_path: Path) -> None:
    """A recipe runs, and acceptance is a share of guesses that were made."""
    output, _ = run("worked_sums.toml", ["steps=1", "samples_per_step=2"], tmp_path / "run")
    share = mtp.acceptance(output, [Renderer(output).prompt("1+2=")], temperature=0.0)
    assert 0 <= share <= 1


def test_searches_are_longer_than_solutions() -> None:
    """At equal tokens fewer of them are seen."""
    lengths = [traces.tokens_per_step(f'task.trace="{trace}"') for trace in traces.VARIANTS]
    assert lengths == sorted(lengths) and lengths[-1] > 1.5 * lengths[0]
