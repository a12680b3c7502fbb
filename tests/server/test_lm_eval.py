"""The evaluation harness lm-eval against our API, beside the same harness on transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'porcelet[eval]'"
    ),
]

QUESTIONS = [
    {"question": "What is 2+2?", "choices": ["3", "four", "22 of them"], "label": 1},
    {"question": "Die Hauptstadt von Österreich?", "choices": ["Wien", "Graz"], "label": 0},
    {"question": "猫?", "choices": ["🐈", "a dog", "鱼"], "label": 0},
]


def tasks(folder: Path) -> Path:
    """Two tasks over local data: the likeliest of some texts, and a text that goes on."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "num_fewshot": 0,
    }
    chosen = {"task": "ours_choice", "output_type": "multiple_choice", "doc_to_target": "label"}
    metric = {"metric_list": [{"metric": "acc"}], "doc_to_choice": "{{choices}}"}
    written = {
        "task": "ours_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (common | chosen | metric, common | written):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return folder


def run(folder: Path, name: str, model: str, arguments: str) -> dict[str, list[Any]]:
    """Each task's answers, by lm-eval's command line."""
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", "ours_choice,ours_text", "--include_path", str(folder), "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(folder / name)]
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = {}
    for path in (folder / name).rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        lines.sort(key=lambda line: line["doc_id"])
        answers["_".join(path.name.split("_")[1:3])] = [line["filtered_resps"] for line in lines]
    return answers


def test_lm_eval_finds_what_it_finds_with_transformers(server: Server, model_folder: Path, tmp_path: Path) -> None:
    """Log-likelihoods of every choice within 1e-3, the greedy flags and the greedy texts equal."""
    tasks(tmp_path)
    tokenizer = f"tokenizer_backend=huggingface,tokenizer={model_folder}"
    address = f"model={model_folder.name},base_url={server.url}/v1/completions"
    ours = run(tmp_path, "ours", "local-completions", f"{address},{tokenizer}")
    theirs = run(tmp_path, "theirs", "hf", f"pretrained={model_folder},dtype=float32")
    assert set(ours) == set(theirs) == {"ours_choice", "ours_text"}
    # The API shows special tokens that a model draws within its text; transformers' backend leaves them out.
    shown = [[re.sub(r"<\|\w+\|>", "", text) for text in texts] for texts in ours["ours_text"]]
    assert shown == theirs["ours_text"] and len(shown) == len(QUESTIONS)
    for mine, expected in zip(ours["ours_choice"], theirs["ours_choice"], strict=True):
        for (logprob, greedy), (wanted, is_greedy) in zip(mine, expected, strict=True):
            assert float(logprob) == pytest.approx(float(wanted), abs=1e-3)
            assert str(greedy) == str(is_greedy)
