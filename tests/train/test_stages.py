from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.train.evaluate import read_evaluation
from porcelet.train.pause import Paused
from porcelet.train.report import write_report
from porcelet.train.stages import Stage, read_stages, run_stages
from porcelet.train.tasks import load_task
from tests.train.test_checkpoint import assert_same_run
from tests.train.tiny_run import FIELDS

RECIPE = """
[train]
output = "{output}"
steps = 3
samples_per_step = 8
threads = 1
[optimizer]
warmup_steps = 1
[policy]
max_new_tokens = 2
group_size = 4
[model]
{model}
[[stage]]
name = "start"
[[stage]]
name = "reinforce"
[stage.train]
method = "grpo"
steps = 2
[[stage.reward]]
name = "exact"
weight = 2.0
[[stage]]
name = "again"
[stage.optimizer]
learning_rate = 1e-4
"""


def recipe(folder: Path) -> Path:
    """A recipe of three stages under `folder`."""
    folder.mkdir()
    model = "\n".join(f"{name} = {value!r}" for name, value in FIELDS.items())
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(output=folder, model=model), encoding="utf-8")
    return path


def run(path: Path, seen: list[tuple[str, float]], *, resume: bool = False, minutes: float = 60.0) -> Path:
    """Run it; `seen` receives each stage's steps."""

    @contextmanager
    def watched(stage: Stage) -> Iterator[Callable[[dict[str, float]], None]]:
        yield lambda metrics: seen.append((stage.name, metrics["step"]))

    return run_stages(read_stages(path), watched, resume=resume, minutes=minutes)


def test_tables_of_a_stage_win_over_those_of_all(tmp_path: Path) -> None:
    """Names, outputs, where each starts, and words of the command line for all stages or for one."""
    path = recipe(tmp_path / "run")
    start, reinforce, again = read_stages(path, ["reinforce.steps=9", "again.optimizer.beta1=0.5"])
    assert [stage.name for stage in (start, reinforce, again)] == ["start", "reinforce", "again"]
    assert start.model_fields == FIELDS and not reinforce.model_fields and not start.config.model
    assert start.config.output == f"{tmp_path}/run/01-start" and again.config.output == f"{tmp_path}/run/03-again"
    assert reinforce.config.model == start.config.output and again.config.model == reinforce.config.output
    assert (start.config.steps, reinforce.config.steps, again.config.steps) == (3, 9, 3)
    assert (start.config.optimizer.beta1, again.config.optimizer.beta1) == (0.9, 0.5)
    assert again.config.optimizer.learning_rate == 1e-4 and again.config.optimizer.warmup_steps == 1
    assert reinforce.config.rewards[0].weight == 2.0 and not again.config.rewards


def test_seed_of_all_stages_keeps_them_apart(tmp_path: Path) -> None:
    """It is added to a stage's own and stands in for none; one for a stage alone replaces its own."""
    path = recipe(tmp_path / "run")
    path.write_text(path.read_text(encoding="utf-8") + "[stage.train]\nseed = 2\n", encoding="utf-8")

    def seeds(*words: str) -> list[int]:
        return [stage.config.seed for stage in read_stages(path, words)]

    assert seeds() == [0, 0, 2] and seeds("seed=7") == seeds("train.seed=7") == [7, 7, 9]
    assert seeds("seed=7", "again.seed=3", "start.train.seed=4") == [4, 7, 3] and seeds("again.seed=3") == [0, 0, 3]


def test_stage_may_start_from_what_it_names(tmp_path: Path) -> None:
    """A folder, or a new model by a [model] table of its own, in the place of the previous stage's model."""
    path = recipe(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    path.write_text(text + '[stage.train]\nmodel = "other"\n', encoding="utf-8")
    assert read_stages(path)[2].config.model == "other" and not read_stages(path)[2].model_fields
    path.write_text(text + "[stage.model]\nhidden_size = 64\n", encoding="utf-8")
    assert read_stages(path)[2].config.model == "" and read_stages(path)[2].model_fields["hidden_size"] == 64
    assert read_stages(recipe(tmp_path / "words"), ["again.model=mine"])[2].config.model == "mine"


def test_stage_may_name_the_output_of_an_earlier_one(tmp_path: Path) -> None:
    """Its model, or a file in its folder; adapters go on the model of the stage before; a later stage is refused."""
    path = recipe(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    own = '[stage.train]\nmethod = "sft"\nmodel = "@start"\n[stage.data]\nconversations = ["@reinforce/a.jsonl"]\n'
    path.write_text(text + own + "[stage.lora]\nrank = 2\n", encoding="utf-8")
    start, reinforce, again = (stage.config for stage in read_stages(path))
    assert again.model == start.output and again.data.conversations == (f"{reinforce.output}/a.jsonl",)
    path.write_text(text + "[stage.lora]\nrank = 2\n", encoding="utf-8")
    assert read_stages(path)[2].config.model == reinforce.output
    path.write_text(text + '[stage.train]\nmodel = "@again"\n', encoding="utf-8")
    with pytest.raises(InputError, match="'@again' names no earlier stage; there are: start, reinforce"):
        read_stages(path)


def test_recipe_without_stages_is_one_run(tmp_path: Path) -> None:
    """It has no name, and its output is the recipe's."""
    path = tmp_path / "recipe.toml"
    path.write_text('[train]\noutput = "here"\n[model]\nhidden_size = 8\n', encoding="utf-8")
    (stage,) = read_stages(path, ["steps=30"])
    assert stage.name == "" and stage.config.output == "here" and stage.config.steps == 30
    assert stage.model_fields == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stage = 3", "it must be a list"),
        ("[[stage]]\n", "name is ''"),
        ('[[stage]]\nname = "a"\n[[stage]]\nname = "a"', "name is 'a'"),
        ('[[stage]]\nname = "a/b"', "name is 'a/b'"),
        ('[[stage]]\nname = "a"\n[stage.trian]\nsteps = 1', r"\[\[stage\]\] a: unknown table 'trian'"),
        ('[[stage]]\nname = "a"\nsteps = 1', "unknown table 'steps'"),
        ('[[stage]]\nname = "policy"', "which is a table's"),
        ("stage = []", "it must be a list"),
        ('[[stage]]\nname = "a"\ntrain = 3', r"\[\[stage\]\] a: train is .3.; it must be a table \[train\]"),
        ('reward = [3]\n[[stage]]\nname = "a"', r"\[\[reward\]\] is .3."),
        ('reward = []\n[[stage]]\nname = "a"', "reward is an empty list"),
    ],
)
def test_malformed_stage_is_named(tmp_path: Path, text: str, named: str) -> None:
    """Each mistake is one line with its place."""
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=named):
        read_stages(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "[stage.task]\nmax_numbr = 3",
            "stage 'again': task sums: unknown option 'max_numbr'; did you mean 'max_number'",
        ),
        ('[[stage.reward]]\nname = "exakt"', "stage 'again': reward 'exakt' is not known; did you mean 'exact'"),
        (
            '[stage.train]\nmethod = "sft"\n[stage.data]\nconversations = ["absent.jsonl"]',
            "stage 'again': absent.jsonl",
        ),
        (
            '[stage.train]\nmethod = "sft"\n[stage.data]\nconversations = ["@start/any.jsonl"]\n'
            '[stage.evaluate]\nnum_problems = 2\n[stage.task]\nname = "sms"',
            "stage 'again': task is 'sms'; did you mean 'sums'",
        ),
    ],
)
def test_mistake_in_a_later_stage_is_told_before_the_first(tmp_path: Path, text: str, named: str) -> None:
    """What a stage or its evaluation is to read and to be judged by is tried before anything is run."""
    path = recipe(tmp_path / "run")
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    with pytest.raises(InputError, match=named):
        run(path, [])
    assert not (tmp_path / "run" / "01-start").exists()


def test_word_that_is_a_stage_alone_is_refused(tmp_path: Path) -> None:
    """`again=3` sets nothing."""
    with pytest.raises(InputError, match=r"'again' is a stage; write again\.KEY=VALUE"):
        read_stages(recipe(tmp_path / "run"), ["again=3"])


def test_stages_resume_at_the_first_unfinished_one(tmp_path: Path) -> None:
    """Paused in the middle of the second stage: finished ones are not run again, and the end is that of one go."""
    whole: list[tuple[str, float]] = []
    last = run(recipe(tmp_path / "whole"), whole)
    assert whole == [*(("start", i) for i in (1, 2, 3)), *(("reinforce", i) for i in (1, 2)), *whole[5:]]
    assert last == tmp_path / "whole" / "03-again" and [step for name, step in whole[5:]] == [1, 2, 3]
    path, seen = recipe(tmp_path / "split"), list[tuple[str, float]]()
    for _ in range(7):  # each call takes one step; the ends of two stages are pauses too
        with pytest.raises(Paused):
            run(path, seen, resume=True, minutes=0)
    run(path, seen, resume=True, minutes=0)
    assert seen == whole
    again: list[tuple[str, float]] = []
    run(path, again, resume=True)
    assert again == []
    for name in ("01-start", "02-reinforce", "03-again"):
        one, other = tmp_path / "whole" / name, tmp_path / "split" / name
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert_same_run(tmp_path / "whole" / "01-start", tmp_path / "split" / "01-start")


def test_finished_stage_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """A finished stage is skipped only after its recipe was compared."""
    path = recipe(tmp_path / "run")
    run(path, [])
    path.write_text(path.read_text(encoding="utf-8").replace("warmup_steps = 1", "warmup_steps = 2"), encoding="utf-8")
    with pytest.raises(InputError, match=r"01-start.*optimizer.warmup_steps=1, this run has 2"):
        run(path, [], resume=True)


def test_finished_stage_does_not_mind_what_it_never_read(tmp_path: Path) -> None:
    """Settings of rollouts may change behind a stage without any."""
    path, seen = recipe(tmp_path / "run"), list[tuple[str, float]]()
    run_stages(read_stages(path)[:1], lambda stage: nullcontext(lambda metrics: None))
    path.write_text(path.read_text(encoding="utf-8").replace("group_size = 4", "group_size = 2"), encoding="utf-8")
    run(path, seen, resume=True)
    assert {name for name, _ in seen} == {"reinforce", "again"}


def test_stages_are_measured_once_and_reported(tmp_path: Path) -> None:
    """Every finished stage has its evaluation; a resumed run makes what is missing or wanted otherwise, and no other;
    the report has all."""
    path = recipe(tmp_path / "run")
    words = ["evaluate.num_problems=4", "evaluate.num_samples=2"]

    def again(resume: bool) -> None:
        run_stages(read_stages(path, words), lambda stage: nullcontext(lambda metrics: None), resume=resume)

    again(resume=False)
    folders = sorted(path.parent.glob("0*"))
    files = [folder / "evaluation.json" for folder in folders]
    assert len(files) == 3 and all(read_evaluation(file).num_problems == 4 for file in files)
    written, text = files[0].stat().st_mtime_ns, files[1].read_text(encoding="utf-8")
    files[1].unlink()
    again(resume=True)
    assert files[0].stat().st_mtime_ns == written and files[1].read_text(encoding="utf-8") == text
    words[0] = "evaluate.num_problems=1000"  # more than there are
    again(resume=True)
    every = len(load_task("sums", {}).held_out)
    assert all(read_evaluation(file).num_problems == every < 1000 for file in files)
    written = files[0].stat().st_mtime_ns
    again(resume=True)
    assert files[0].stat().st_mtime_ns == written
    page = write_report(folders, path.parent / "report.html").read_text(encoding="utf-8")
    assert all(folder.name in page for folder in folders) and "pass@2" in page


def test_stage_that_leaves_an_adapter_alone_is_a_dead_end(tmp_path: Path) -> None:
    """Its model is neither measured nor gone on from, by order, by name or as a teacher; with one beside it, it is."""
    path = recipe(tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    alone = ["reinforce.lora.rank=2", "reinforce.lora.merge=false"]
    named = "'again' needs the model of stage 'reinforce', whose .* merge = false leaves none; set merge = true there"
    with pytest.raises(InputError, match=named):
        read_stages(path, alone)
    elsewhere = [*alone, "again.model=@start"]
    assert read_stages(path, elsewhere)[2].config.model.endswith("01-start")
    with pytest.raises(InputError, match=named):
        read_stages(path, [*elsewhere, "again.method=distill", "again.policy.teacher=@reinforce"])
    with pytest.raises(InputError, match=r"'reinforce': .* no model for \[evaluate\] to measure; set merge = true"):
        read_stages(path, [*elsewhere, "reinforce.evaluate.num_problems=4"])
    assert read_stages(path, [*elsewhere, "start.evaluate.num_problems=4"])
    assert read_stages(path, ["reinforce.lora.rank=2", "evaluate.num_problems=4"])
    path.write_text(text.split("[model]")[0] + "[evaluate]\nnum_problems = 4\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"recipe.toml: \[lora\] merge = false"):
        read_stages(path, ["model=base", "lora.rank=2", "lora.merge=false"])
