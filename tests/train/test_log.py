from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from porcelet.errors import MissingExtraError, ModelError
from porcelet.train.log import open_log
from porcelet.train.measure import MEASURED
from tests.train.test_checkpoint import train_until
from tests.train.tiny_run import FIELDS, config, metrics_of


def test_every_step_measures_itself(tmp_path: Path) -> None:
    """Phases add up to the step at most, utilisation is a share, memory is below its peak; sessions say the rate."""
    train_until(config(tmp_path), FIELDS, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        phases = line["seconds_draw"] + line["seconds_gradient"] + line["seconds_optimizer"]
        assert 0.5 * line["seconds"] < phases <= line["seconds"]
        assert 0 < line["utilisation"] < 1 and 1e7 < line["resident_bytes"] <= line["peak_bytes"]
        assert set(MEASURED) <= set(line)
    (session,) = map(json.loads, (tmp_path / "sessions.jsonl").read_text().splitlines())
    assert session["step"] == 0 and session["threads"] >= 1 and session["matmul_flops_per_second"] > 1e8


def written(tmp_path: Path, first: int, steps: range, **log: Any) -> None:
    """Log some steps of a run that has done `first`."""
    with open_log(config(tmp_path, **log), {"seed": 0}, first) as places:
        for step in steps:
            places.write({"step": step, "loss": 1.0 / step, "strange": math.nan})
        places.flush()


def test_metrics_file_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    """Steps behind it go, and so does half a line; what is not finite is no JSON and is left out."""
    written(tmp_path, 0, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    written(tmp_path, 3, range(4, 7))
    assert metrics_of(tmp_path) == [{"step": step, "loss": 1.0 / step} for step in range(1, 7)]


def test_lost_metrics_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that has less than the checkpoint counts is not passed over in silence."""
    written(tmp_path, 0, range(1, 3))
    written(tmp_path, 5, range(6, 7))
    assert "has 2 of the 5 steps" in caplog.text
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 6]


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path: Path) -> None:
    """Steps 1 to 5, then from the checkpoint of step 3 on again: its reader sees 1 to 7, each once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(tmp_path, 0, range(1, 6), tensorboard=True)
    written(tmp_path, 3, range(4, 8), tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (step, pytest.approx(1.0 / step)) for step in range(1, 8)
    ]


def test_trackio_is_sent_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run repeats steps; trackio has them already. A run that starts anew is a new run there."""
    calls: list[Any] = []
    stub = SimpleNamespace(
        init=lambda **options: calls.append(options["resume"]),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", stub)  # type: ignore[arg-type]
    written(tmp_path, 0, range(1, 4), trackio="project")
    written(tmp_path, 2, range(3, 5), trackio="project")
    written(tmp_path, 0, range(1, 2), trackio="project")
    one, two, three, four = ((step, {"loss": 1.0 / step}) for step in range(1, 5))
    assert calls == ["never", one, two, three, "finish", "allow", four, "finish", "never", one, "finish"]


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is asked for in one line, before the first step."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"trackio is not installed.*porcelet\[track\]"):
        written(tmp_path, 0, range(1, 2), trackio="project")


@pytest.mark.parametrize("damage", ["garbage\n", "[]\n", "{}\n"])
def test_damaged_metrics_are_named(tmp_path: Path, damage: str) -> None:
    """The file, how far it can be read, and the remedy; nothing of it is lost."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + damage, encoding="utf-8")
    with pytest.raises(ModelError, match=r"metrics.jsonl, behind line 1, cannot be read.*delete that line"):
        written(tmp_path, 2, range(3, 4))
    assert path.read_text(encoding="utf-8").endswith(damage)


def test_damaged_note_of_trackio_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one, as a machine that lost its power may leave."""
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace())  # type: ignore[arg-type]
    (tmp_path / "trackio.step").write_text("", encoding="ascii")
    with pytest.raises(ModelError, match=r"trackio.step cannot be read.*delete it"):
        written(tmp_path, 2, range(3, 4), trackio="project")
