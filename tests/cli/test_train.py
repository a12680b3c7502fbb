from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from porcelet import hub
from porcelet.cli import app
from porcelet.cli.train import summary
from porcelet.train.sandbox import require_sandbox
from tests.train.test_stages import recipe
from tests.weights import tiny_gguf

SETTINGS = ("task.max_number=4", "reinforce.samples_per_step=8", "again.log.report=en")


def test_run_pauses_by_the_minute_and_resumes(tmp_path: Path) -> None:
    """Exit code 0 with the way to continue on standard error; then lines with the stage's name, as there is no
    terminal, what the model can do, and where its report is."""
    path = str(recipe(tmp_path / "run"))
    paused = CliRunner().invoke(app, ["train", path, *SETTINGS, "--minutes", "0.0001"])
    assert paused.exit_code == 0, paused.output
    assert "time is over: paused after step 1 of 3" in paused.stderr and "--resume" in paused.stderr
    assert not paused.stdout
    done = CliRunner().invoke(app, ["train", path, *SETTINGS, "--resume"])
    assert done.exit_code == 0, done.output
    for line in ("start 2/3  loss", "start 3/3  loss", "reinforce 2/2  reward", "again 3/3  loss"):
        assert any(shown.startswith(line) for shown in done.stderr.splitlines()), done.stderr
    assert "held-out sums answered exactly" in done.stdout and "03-again" in done.stdout
    assert f"report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    lines = (tmp_path / "run" / "01-start" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_summary_says_the_numbers_that_matter() -> None:
    """Loss and reward where there are such, speed, memory, time left; skipped steps once there are any."""
    metrics = {"loss": 2.0, "step": 3.0, "tokens_per_second": 99.6, "peak_bytes": 2.6e9, "skipped": 0.0}
    assert summary(metrics, 3725.4) == "loss 2.000  100 tokens/s  2.6 GB  1:02:05 left"
    assert "failed rewards 3" in summary(metrics | {"reward_failures": 3.0}, 1.0)
    assert "failed" not in summary(metrics | {"reward_failures": 0.0}, 1.0)
    assert "skipped 2" in summary(metrics | {"skipped": 2.0}, 1.0)


def test_code_without_a_sandbox_must_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no bubblewrap, a recipe with a code reward is refused, and the option in the message lets it."""
    path = recipe(tmp_path / "run")
    text = path.read_text(encoding="utf-8").split('[[stage]]\nname = "again"')[0].replace('"exact"', '"code"')
    path.write_text(text, encoding="utf-8")
    monkeypatch.setenv("PATH", "/nowhere")
    require_sandbox.cache_clear()
    try:
        refused = CliRunner().invoke(app, ["train", str(path), "task.max_number=4"])
        assert "--unsafe-sandbox" in str(refused.exception)
        done = CliRunner().invoke(app, ["train", str(path), "task.max_number=4", "--resume", "--unsafe-sandbox"])
        assert done.exit_code == 0 and "held-out sums" in done.stdout, done.output
    finally:
        require_sandbox.cache_clear()


@pytest.mark.parametrize("setting", ["device=cuda", "device=tpu"])
def test_unusable_device_is_refused(tmp_path: Path, setting: str) -> None:
    """A device that is not there, or that there is not."""
    path = str(recipe(tmp_path / "run"))
    refused = CliRunner().invoke(app, ["train", path, setting])
    assert refused.exit_code != 0 and "device is" in str(refused.exception)


REINFORCE = """
[train]
method = "grpo"
model = "{model}"
output = "{output}"
steps = 1
samples_per_step = 8
threads = 1
[optimizer]
warmup_steps = 0
[task]
max_number = 4
[policy]
max_new_tokens = 2
group_size = 4
"""


def reinforced(folder: Path, model: object, *words: str) -> str:
    """What a run says that reinforces a model for a step."""
    path = folder / "recipe.toml"
    path.write_text(REINFORCE.format(model=model, output=folder / "run"), encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(path), *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def gguf(folder: Path) -> Path:
    tiny_gguf.write(folder / "tiny.gguf")
    return folder / "tiny.gguf"


def test_model_by_its_name_is_measured_before_and_after(tmp_path: Path) -> None:
    """A name is as good a start as a folder, to the last line."""
    said = reinforced(tmp_path, hub.R1_MINI)
    assert "held-out sums answered exactly" in said and "(before: " in said and "talk to it" in said


def test_gguf_file_is_measured_before_and_after(tmp_path: Path) -> None:
    """The run leaves a folder; what it began with is a file."""
    assert "(before: " in reinforced(tmp_path, gguf(tmp_path))


def test_adapter_alone_says_how_it_becomes_a_model(tmp_path: Path) -> None:
    """The base's folder where it was a name, and the command that is shown works; a GGUF file cannot be merged."""
    words = ("lora.rank=2", "lora.merge=false")
    (tmp_path / "name").mkdir()
    said = reinforced(tmp_path / "name", hub.R1_MINI, *words)
    shown = re.search("porcelet (merge .*) FOLDER", said)
    assert shown and str(hub.resolve(hub.R1_MINI)) in shown[1]
    merged = CliRunner().invoke(app, [*shown[1].split(), str(tmp_path / "merged")])
    assert merged.exit_code == 0, merged.output
    said = reinforced(tmp_path, gguf(tmp_path), *words)
    assert "takes no GGUF file" in said and "lora.merge=true" in said and "porcelet merge " not in said
