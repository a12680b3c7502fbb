"""The benchmarks of training's kernels: what they are asked for, what they count and what they report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import attention, gradients, harness, recipe, rl
from porcelet.config import TrainConfig
from porcelet.kernels import cpu
from porcelet.train.evaluate import Attempt, save_evaluation, summarize
from porcelet.train.stages import Stage
from tests.kernels.test_cpu import NO_COMPILER


@pytest.mark.parametrize(
    ("benchmark", "words"),
    [
        (attention, ["--only", "nonsense"]),
        (gradients, ["--tokens", "600"]),
        (gradients, ["--tokens", "0"]),
    ],
)
def test_what_cannot_be_measured_is_refused(
    benchmark: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown workload and tokens that fill no sequence end in a line that names them."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert words[-1] in capsys.readouterr().err


@pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")
def test_the_bodies_of_attention_agree() -> None:
    """What is timed side by side computes the same."""
    segments = attention.groups(5, 4, 3, 2)
    q, k, v = (torch.randn(segments.offsets[-1], 2, width) for width in (8, 8, 6))
    outs = [attend(q, k, v, segments, 0.3) for attend in attention.BODIES.values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-5)


def test_a_whole_step_runs() -> None:
    """One sequence forward and backward, timed and set against the processor's rate."""
    measured = gradients.whole_step(gradients.SEQUENCE)()
    assert measured["tokens_per_second"] > 0 and measured["percent_of_matmul"] > 0


def test_each_workload_reports_what_disturbed_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds, and time that others took, stand beside every workload, not for the last alone."""
    words = ["--ablate", "--model", "tiny", "--workload", "XS", "M", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["rl", *words, "--max-stolen", "1"])
    threads = torch.get_num_threads()
    try:
        rl.main()
    finally:
        torch.set_num_threads(threads)
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes.keys() == {"XS", "M"} and all(note["rounds"] == 1 for note in notes.values())


def test_a_stage_is_summed_up(tmp_path: Path) -> None:
    """Seconds of all steps, shares in percent, and what was collected; what a stage lacks is left out."""
    stage = Stage("one", TrainConfig(output=str(tmp_path), steps=2), {})
    assert recipe.summary(stage) == {"steps": 2.0}
    (tmp_path / "metrics.jsonl").write_text('{"seconds": 1.25}\n{"seconds": 2.5}\n')
    (tmp_path / "samples.jsonl").write_text("{}\n{}\n{}\n")
    attempts = [[Attempt("?", f"{i}", is_right=i % 4 == 0, num_tokens=i, finished=True) for i in range(16)]]
    save_evaluation(summarize(attempts, 1.0), tmp_path / "evaluation.json")
    found = recipe.summary(stage)
    assert found["seconds"] == 3.8 and found["samples"] == 3.0
    assert found["pass_1_value"] == 25.0 and found["pass_16_value"] == 100.0 and found["answer_tokens"] == 7.5


def test_results_name_no_folder_of_this_machine() -> None:
    """A path from the root is recorded by its last part, a run's folder not at all, other words as they were typed."""
    words = ["/a/b/run", "--append", "runs/x", "--folder", "/c/d", "--seeds", "3"]
    assert harness.portable(words) == ["run", "runs/x", "--seeds", "3"]
