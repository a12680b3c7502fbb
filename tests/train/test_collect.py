from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from porcelet.config import TrainConfig
from porcelet.errors import InputError
from porcelet.train.collect import Collector, collect, is_collected, shortest
from porcelet.train.loop import train
from porcelet.train.pause import Paused
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.train.rewards import Answer
from porcelet.train.sampler import make_engine
from porcelet.train.stages import read_stages
from porcelet.train.tasks import load_task
from tests.train.test_stages import run
from tests.train.tiny_run import FIELDS, config, metrics_of, model


def answer(text: str) -> Answer:
    return Answer(text=text, reasoning="", content=text, finished=True, num_tokens=len(text))


@pytest.fixture(scope="module")
def adder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows some sums of numbers below 4."""
    run = config(tmp_path_factory.mktemp("adder"), steps=24, samples_per_step=32, max_number=4, learning_rate=1e-2)
    return train(run, FIELDS)


def sampling(adder: Path, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"method": "sample", "model": str(adder), "steps": 3, "samples_per_step": 16}
    values |= {"group_size": 8, "max_new_tokens": 3, "max_number": 4, "threads": 1}
    return config(output, **(values | changes))


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_shortest_distinct_right_answers_are_kept() -> None:
    """What was said already is not; equally long ones stay in their order."""
    answers = [answer("long one"), answer("b"), answer("b"), answer("a")]
    assert [one.text for one in shortest(answers, 2)] == ["b", "a"]
    assert [one.text for one in shortest(answers, 9)] == ["b", "a", "long one"]
    assert not shortest([], 1)


def test_only_what_can_be_learnt_is_kept(tmp_path: Path) -> None:
    """Of answers that a reward calls right: those that ended, say something, and have a thought where all begin one."""
    for chat_format, thoughtless in (("R1", False), ("V3", True)):
        folder = tmp_path / chat_format
        make_tokenizer(folder, chat_format)
        run = config(folder, method="sample", model="x", group_size=4)
        draw = Collector(make_engine(model(), run.policy), load_task("sums", {}), Renderer(folder), run, ())
        whole = Answer(text="a", reasoning="so", content="3", finished=True, num_tokens=3)
        assert draw.is_lesson(whole) and not draw.is_lesson(replace(whole, finished=False))
        assert not draw.is_lesson(replace(whole, content=" "))
        assert draw.is_lesson(replace(whole, reasoning="")) is thoughtless


def test_kept_answers_are_right_and_can_be_learnt(tmp_path: Path, adder: Path) -> None:
    """Each line is a training problem with its exact answer, at most one a problem; a run of fine-tuning takes them."""
    path = collect(sampling(adder, tmp_path / "samples"))
    lines, metrics = lines_of(path), metrics_of(path.parent)
    held_out = {problem.question for problem in load_task("sums", {"max_number": 4}).held_out}
    for line in lines:
        left, right = line["question"].rstrip("=").split("+")
        assert int(line["answer"]) == int(left) + int(right) and line["question"] not in held_out
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert len(lines) == len({line["question"] for line in lines}) <= sum(line["kept"] for line in metrics) <= 3 * 2
    assert 0 < sum(line["right"] for line in metrics) < 3
    assert all(line["reward"] == line["right"] for line in metrics)
    tuned = config(tmp_path / "tuned", method="sft", model=str(adder), steps=2, conversations=(str(path),))
    assert (train(tuned, {}) / "model.safetensors").exists()


def test_a_run_in_pieces_gives_the_same_lines(tmp_path: Path, adder: Path) -> None:
    """No time at all: each call takes one step and pauses; at the end all is as if it had never paused."""
    whole, split = sampling(adder, tmp_path / "whole"), sampling(adder, tmp_path / "split")
    collect(whole)
    for step in (1, 2):
        with pytest.raises(Paused, match=f"paused after step {step} of 3.*--resume"):
            collect(split, resume=True, minutes=0)
        assert not is_collected(split)
    collect(split, resume=True, minutes=0)
    assert is_collected(split) and metrics_of(tmp_path / "split") == metrics_of(tmp_path / "whole")
    first, second = (tmp_path / name / "samples.jsonl" for name in ("whole", "split"))
    assert first.read_bytes() == second.read_bytes()
    assert lines_of(first) != lines_of(collect(sampling(adder, tmp_path / "other", seed=1)))


def test_another_recipe_or_model_is_not_mixed_in(tmp_path: Path, adder: Path) -> None:
    """Neither without --resume, nor with other settings, nor with another model behind the same name, nor in the
    folder of a model or of another method's run."""
    untrained = tmp_path / "model"
    train(config(untrained, steps=1, max_number=4), FIELDS)
    recipe = sampling(untrained, tmp_path / "run", steps=2)
    with pytest.raises(Paused):
        collect(recipe, minutes=0)
    with pytest.raises(InputError, match="holds a run; continue it with --resume"):
        collect(recipe)
    with pytest.raises(InputError, match=r"was made with policy\.keep=1, this run has 3"):
        collect(sampling(untrained, tmp_path / "run", steps=2, keep=3), resume=True)
    with pytest.raises(InputError, match="holds samples"):
        train(config(tmp_path / "run", steps=1), FIELDS)
    before = (adder / "metrics.jsonl").read_bytes()
    for output in (untrained, adder):
        with pytest.raises(InputError, match="holds a run that trains a model"):
            collect(sampling(adder, output))
    copied = tmp_path / "copied"
    shutil.copytree(adder, copied, ignore=shutil.ignore_patterns("checkpoint"))
    with pytest.raises(InputError, match="is the model to draw from"):
        collect(sampling(copied, copied))
    assert (adder / "metrics.jsonl").read_bytes() == before
    (untrained / "model.safetensors").write_bytes((adder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="was made with inputs"):
        collect(recipe, resume=True)


def test_a_mistake_leaves_the_folder_free(tmp_path: Path, adder: Path) -> None:
    """What is refused when the run begins can be put right in the same folder."""
    with pytest.raises(InputError, match="max_new_tokens is 64"):
        collect(sampling(adder, tmp_path / "run", max_new_tokens=64))
    assert collect(sampling(adder, tmp_path / "run")).exists()


def test_texts_and_gpus_are_not_for_sampling(tmp_path: Path, adder: Path) -> None:
    """Both are refused before anything is drawn."""
    with pytest.raises(InputError, match="conversations is for method = 'sft'; this is 'sample'"):
        collect(sampling(adder, tmp_path / "texts", conversations=("x.jsonl",), max_number=4))
    with pytest.raises(InputError, match="device is cuda"):
        collect(sampling(adder, tmp_path / "gpu", device="cuda"))


def test_nothing_right_is_an_error_and_not_an_empty_file(tmp_path: Path) -> None:
    """An untrained model's answers to large sums are all wrong; the remedy is named."""
    untrained = train(config(tmp_path / "model", steps=1), FIELDS)
    with pytest.raises(InputError, match="not one of 48 answers was right.*draw more"):
        collect(sampling(untrained, tmp_path / "run", max_number=200, max_new_tokens=2))
    assert not (tmp_path / "run" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ""}, "draws from a model that exists"),
        ({"samples_per_step": 12}, "samples_per_step 12 is not a multiple of group_size 8"),
        ({"teacher": "x"}, "distillation needs one, and nothing else does"),
        ({"keep": 0}, "keep is 0"),
        ({"rank": 2}, "trains nothing; leave .lora., dtype"),
        ({"dtype": "bfloat16"}, "trains nothing; leave .lora., dtype"),
        ({"method": "distill", "teacher": "x", "overlong_buffer": 1}, "overlong_buffer needs rewards"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Before anything is read."""
    with pytest.raises(InputError, match=named):
        sampling(tmp_path, tmp_path / "run", **changes)


def test_a_stage_of_sampling_needs_no_optimizer(tmp_path: Path) -> None:
    """Its steps may be fewer than a warm-up's, which it does not have."""
    path = tmp_path / "recipe.toml"
    path.write_text('[train]\nmethod = "sample"\nmodel = "x"\nsteps = 2\n', encoding="utf-8")
    assert read_stages(path)[0].config.steps == 2


RECIPE = """
[train]
output = "{output}"
samples_per_step = 16
steps = 20
threads = 1
[task]
name = "sums"
max_number = 4
[policy]
max_new_tokens = 3
[optimizer]
warmup_steps = 2
learning_rate = 1e-2
[model]
{model}
[[stage]]
name = "start"
[[stage]]
name = "sampled"
[stage.train]
method = "sample"
steps = 2
[[stage]]
name = "tuned"
[stage.train]
method = "sft"
steps = 2
[stage.data]
conversations = ["@sampled/samples.jsonl"]
[[stage]]
name = "small"
[stage.train]
method = "distill"
steps = 2
[stage.policy]
teacher = "@start"
"""


def four_stages(folder: Path, output: Path) -> Path:
    """A recipe in `folder` whose stages refer to each other in all ways."""
    table = "\n".join(f"{name} = {value!r}" for name, value in FIELDS.items())
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(output=output, model=table), encoding="utf-8")
    return path


def test_a_sampling_stage_hands_on_the_model_it_drew_from(tmp_path: Path) -> None:
    """The next stage starts from that model and learns the file; a teacher may be an earlier stage, too."""
    path = four_stages(tmp_path, tmp_path / "run")
    with pytest.raises(InputError, match="'@sampled' is a stage that makes samples"):
        read_stages(path, ["small.model=@sampled"])
    with pytest.raises(InputError, match="tuned: .*'@sampled/kept.jsonl'.*; write '@sampled/samples.jsonl'"):
        read_stages(path, ["tuned.data.conversations=@sampled/kept.jsonl"])
    with pytest.raises(InputError, match="stage 'tuned' has model=.* and a .model. table"):
        read_stages(path, ["tuned.model.hidden_size=64", "tuned.model=@start"])
    start, sampled, tuned, small = (stage.config for stage in read_stages(path))
    assert sampled.model == tuned.model == start.output and small.model == tuned.output
    assert tuned.data.conversations == (f"{sampled.output}/samples.jsonl",) and small.policy.teacher == start.output
    seen: list[tuple[str, float]] = []
    folder = run(path, seen)
    assert seen[-6:] == [(name, step) for name in ("sampled", "tuned", "small") for step in (1, 2)]
    again: list[tuple[str, float]] = []
    assert run(path, again, resume=True) == folder and not again
    distances = [line["distance"] for line in metrics_of(folder)]
    assert len(distances) == 2 and all(distance > 0 for distance in distances)


def test_run_may_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its finished stages are found again, by whatever path; so are, in place, those that name each other by theirs, as
    an older porcelet wrote them; and the stage that is meant still counts."""
    run(four_stages(tmp_path, tmp_path / "run"), [])
    monkeypatch.chdir(tmp_path)
    states = {path: path.read_text(encoding="utf-8") for path in Path("run").rglob("state.json")}
    assert len(states) == 4 and sum('"@01-start"' in text for text in states.values()) == 3
    seen: list[tuple[str, float]] = []
    for older in (True, False):
        for path, text in states.items():
            path.write_text(text.replace("@0", f"{tmp_path}/run/0") if older else text, encoding="utf-8")
        for output in (Path("run"), tmp_path / "run"):
            run(four_stages(tmp_path, output), seen, resume=True)
    Path("run").rename("moved")
    path = four_stages(tmp_path, Path("moved"))
    run(path, seen, resume=True)
    assert not seen
    path.write_text(path.read_text(encoding="utf-8").replace('teacher = "@start"', 'teacher = "@tuned"'))
    with pytest.raises(InputError, match=r"policy.teacher='@01-start', this run has '@03-tuned'"):
        run(path, seen, resume=True)
