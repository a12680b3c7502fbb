from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from porcelet.config import OptimizerConfig, TrainConfig
from porcelet.errors import InputError
from porcelet.train.loop import train
from porcelet.train.schedule import at_step, learning_rate
from porcelet.train.stages import read_stages
from tests.train.tiny_run import FIELDS, config, metrics_of


def rates(steps: int = 100, **fields: Any) -> list[float]:
    """The rate of every step of a run with peak 1 and floor 0.1."""
    values = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_steps": 10} | fields
    run = TrainConfig(steps=steps, optimizer=OptimizerConfig(**values))
    return [learning_rate(step, run) for step in range(steps)]


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    """Linear to the peak, then down a cosine, half way at half the run, to the minimum in the last step."""
    cosine = rates(111)
    assert cosine[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert (cosine[10], cosine[60], cosine[-1]) == pytest.approx((1.0, 0.55, 0.1))
    assert rates(warmup_steps=0)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_warmup_stable_decay(shape: str, middle: float) -> None:
    """The peak until `decay_steps` before the end, then the shape's way down to the minimum in the last step."""
    wsd = rates(schedule="wsd", decay_steps=20, decay_shape=shape)
    assert wsd[10:80] == [1.0] * 70 and wsd[80] < 1
    assert wsd[89] == pytest.approx(0.1 + 0.9 * middle) and wsd[-1] == pytest.approx(0.1)


def test_schedule_of_v3() -> None:
    """Warm-up, constant to 10T of 14.8T tokens, a cosine over 4.3T, constant for the last 500B."""
    v3 = rates(1480, decay_steps=430, final_steps=50)
    assert v3[10:1000] == [1.0] * 990 and v3[1430:] == pytest.approx([0.1] * 50)
    assert v3[1214] == pytest.approx(0.55) and v3[1000:1430] == sorted(v3[1000:1430], reverse=True)


def test_schedule_of_v2_and_none() -> None:
    """Times 0.316 at 60 and at 90 % of the run; and a constant."""
    assert rates(schedule="step")[10:] == pytest.approx([1.0] * 50 + [0.316] * 30 + [0.316**2] * 10)
    assert rates(schedule="constant")[10:] == [1.0] * 90


def test_a_fall_longer_than_the_run_begins_behind_the_warm_up() -> None:
    """It still arrives at the minimum, and the warm-up is whole."""
    assert rates(schedule="wsd", decay_steps=500)[9] == 1.0
    assert rates(schedule="wsd", decay_steps=500)[-1] == pytest.approx(0.1)


def test_late_values_begin_at_their_share(tmp_path: Path) -> None:
    """V3 lowers the MTP weight and stops the biases late; the loop follows: the loss shows the weight."""
    late = {"mtp_late_from": 0.5, "mtp_weight_late": 0.1, "bias_late_from": 0.75}
    run = config(tmp_path, steps=8, **late)
    assert [at_step(run, step).mtp_weight for step in range(8)] == [0.3] * 4 + [0.1] * 4
    assert [at_step(run, step).bias_update_speed for step in range(8)] == [0.001] * 6 + [0.0] * 2
    assert at_step(config(tmp_path), 11) == config(tmp_path)
    train(run, FIELDS)
    weights = [(line["loss"] - line["cross_entropy"]) / line["mtp"] for line in metrics_of(tmp_path)]
    assert weights == pytest.approx([0.3] * 4 + [0.1] * 4, rel=1e-4)


def test_impossible_schedules_are_refused() -> None:
    """A decay without a length, a floor above the rate, an unknown shape, a share above 1."""
    with pytest.raises(InputError, match="decay_steps is 0"):
        OptimizerConfig(schedule="wsd")
    with pytest.raises(InputError, match=r"min_learning_rate is 0.0003; it must lie in 0..1e-05"):
        OptimizerConfig(learning_rate=1e-5, min_learning_rate=3e-4)
    with pytest.raises(InputError, match="decay_shape is 'round'"):
        OptimizerConfig(decay_shape="round")
    with pytest.raises(InputError, match=r"mtp_late_from is 1.5"):
        TrainConfig(mtp_late_from=1.5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_rate_that_is_set_alone_never_rises_again(schedule: str) -> None:
    """The floor that nobody gave is a tenth of the rate, however small that is."""
    found = rates(learning_rate=1e-5, min_learning_rate=-1.0, schedule=schedule, decay_steps=50)[10:]
    assert found == sorted(found, reverse=True) and (found[0], found[-1]) == pytest.approx((1e-5, 1e-6))


def test_schedule_longer_than_its_run_is_refused(tmp_path: Path) -> None:
    """Its parts are named, before anything is written, and in a recipe of stages before the first one runs."""
    parts = "warmup_steps 5 [+] decay_steps 4 [+] final_steps 4 are more than the 12 steps"
    with pytest.raises(InputError, match=parts):
        train(config(tmp_path / "run", warmup_steps=5, decay_steps=4, final_steps=4), FIELDS)
    assert not (tmp_path / "run").exists()
    path = tmp_path / "recipe.toml"
    path.write_text("[model]\nhidden_size = 8\n[optimizer]\nwarmup_steps = 400\n[[stage]]\nname = 'one'\n")
    with pytest.raises(InputError, match="warmup_steps 400 .* the 300 steps"):
        read_stages(path)
    assert read_stages(path, ["one.steps=500"])[0].config.steps == 500


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["steps=60"], (10, 20, 10)),
        (["steps=30"], (3, 6, 3)),
        (["steps=3"], (0, 1, 0)),
        (["steps=1"], (0, 1, 0)),
        (["one.steps=60", "optimizer.warmup_steps=9"], (9, 20, 10)),
        (["steps=100"], (10, 20, 10)),
        (["steps=1000"], (10, 20, 10)),
    ],
)
def test_fewer_steps_on_the_command_line_shorten_the_schedule(
    tmp_path: Path, words: list[str], parts: tuple[int, int, int]
) -> None:
    """A sixth for the warm-up, the rest only where it has no room, and never to another shape; what is said there too
    stands, and a longer run changes nothing."""
    path = tmp_path / "recipe.toml"
    optimizer = '[optimizer]\nschedule = "wsd"\nwarmup_steps = 10\ndecay_steps = 20\nfinal_steps = 10\n'
    path.write_text(f"[train]\nsteps = 100\n[model]\nhidden_size = 8\n{optimizer}[[stage]]\nname = 'one'\n")
    rates = read_stages(path, words)[0].config.optimizer
    assert (rates.warmup_steps, rates.decay_steps, rates.final_steps) == parts
