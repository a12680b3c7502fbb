"""Stages: several runs one after another, each from the model that the one before made.

    [train]                       what holds for all stages
    output = "runs/r1"
    [[stage]]                     any table again, for this stage alone
    name = "cold-start"           output: runs/r1/01-cold-start
    [stage.train]
    method = "sft"

A stage may name the output of an earlier one: `model = "@cold-start"`, `conversations = ["@sampled/samples.jsonl"]`.

A stage is a run of its own, with checkpoint, metrics and model in a folder of its own, and ends by its steps, never by
the clock. On the command line `cold-start.steps=3` is for one stage and `steps=3` for all; where that is fewer than the
recipe says, a warm-up is shortened to a sixth of it, and what then has no room likewise (`schedule.shortened`).
`seed=7` is added to the seed of a stage that has one of its own, since stages with equal seeds meet the same problems,
and is that of all others; `cold-start.seed=7` stands as it is.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from porcelet.config import TrainConfig, parse_settings
from porcelet.errors import InputError
from porcelet.page.draw import require_packages
from porcelet.train import checkpoint
from porcelet.train.collect import collect, is_collected
from porcelet.train.evaluate import evaluate_folder, is_measured, save_evaluation
from porcelet.train.folders import stage_folder
from porcelet.train.kept import RESULT
from porcelet.train.loop import check_device, train
from porcelet.train.pause import Paused
from porcelet.train.recipe import TABLES, check_tables, combine, read_tables, tables_of
from porcelet.train.report import write_report
from porcelet.train.schedule import check_room
from porcelet.train.sources import check_reads
from porcelet.train.types import Metrics


class Stage(NamedTuple):
    """One run of a recipe; a recipe without stages is one run without a name."""

    name: str
    config: TrainConfig
    model_fields: dict[str, Any]


Report = Callable[[Metrics], None]


def read_stages(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """A recipe's runs in order.

    Raises:
        InputError: the file is missing or malformed, or a key is unknown (the nearest one is named).
    """
    stages = _read(path, overrides)
    for stage in stages:  # not in TrainConfig, as a table for all stages may go without their steps
        if stage.config.method != "sample":
            check_room(stage.config)
        if stage.config.model and stage.model_fields:
            raise InputError(
                f"{path}: stage {stage.name!r} has model={stage.config.model} and a [model] table; drop one"
            )
    _refuse_lone_adapters(stages, path)
    return stages


def _refuse_lone_adapters(stages: Sequence[Stage], path: Path) -> None:
    """Refuse to measure a stage that leaves an adapter and no model, or to go on from it."""
    lone = {one.config.output: one.name for one in stages if one.config.lora.rank and not one.config.lora.merge}
    for name, config in ((stage.name, stage.config) for stage in stages):
        place = f"{path}: stage {name!r}" if name else str(path)
        if config.evaluate.num_problems and config.output in lone:
            raise InputError(
                f"{place}: [lora] merge = false leaves no model for [evaluate] to measure; set merge = true, or "
                "num_problems = 0"
            )
        for model in (config.model, config.policy.teacher):
            if model in lone:
                raise InputError(
                    f"{place} needs the model of stage {lone[model]!r}, whose [lora] merge = false leaves none; set "
                    "merge = true there"
                )


def _read(path: Path, overrides: Sequence[str]) -> list[Stage]:
    tables, settings = read_tables(path), parse_settings(overrides)
    if "stage" not in tables:
        return [Stage("", *combine((tables, str(path)), words=tables_of(settings)))]
    listed = tables.pop("stage")
    names = _names(listed, path)
    stages: list[Stage] = []
    for name, table in zip(names, listed, strict=True):
        place = f"{path} [[stage]] {name}"
        own = {key: value for key, value in table.items() if key != "name"}
        check_tables(own, place)
        words = tables_of(_settings_of(name, names, settings))
        shared = dict(tables)
        names_a_model = "model" in own.get("train", {}) or "model" in words.get("train", {})
        if "model" not in own and (stages or names_a_model):  # it goes on from a model that exists
            shared.pop("model", None)
        if "model" not in own and stages:
            shared["train"] = {**shared.get("train", {}), "model": _model_after(stages[-1])}
        config, fields = combine((shared, str(path)), (own, place), words=words)
        config = _found(_seeded(config, name, own, settings), stages, place)
        output = stage_folder(config.output, len(stages) + 1, name)
        stages.append(Stage(name, dataclasses.replace(config, output=output), fields))
    return stages


def _seeded(config: TrainConfig, name: str, own: Mapping[str, Any], settings: Mapping[str, str]) -> TrainConfig:
    """With the command line's seed for all stages added to the stage's own: stages with one seed meet one another's
    problems."""
    for_all, for_it = ([f"{prefix}{key}" for key in ("seed", "train.seed")] for prefix in ("", f"{name}."))
    if settings.keys().isdisjoint(for_all) or not settings.keys().isdisjoint(for_it):
        return config
    return dataclasses.replace(config, seed=config.seed + int(own.get("train", {}).get("seed", 0)))


def _model_after(stage: Stage) -> str:
    """The model that there is after a stage: its own, or the one it drew from."""
    return stage.config.model if stage.config.method == "sample" else stage.config.output


def _found(config: TrainConfig, stages: Sequence[Stage], place: str) -> TrainConfig:
    """With the folders of earlier stages in the place of their names: "@cold-start", "@sampled/samples.jsonl"."""
    outputs = {stage.name: stage.config.output for stage in stages}
    drawn = {f"@{stage.name}": f"@{stage.name}/{RESULT}" for stage in stages if stage.config.method == "sample"}
    for text in config.data.conversations:
        made = drawn.get(text.partition("/")[0], text)
        if text != made:
            raise InputError(f"{place}: conversations names {text!r}, which that stage does not make; write {made!r}")
    for name in (config.model, config.policy.teacher):
        if name in drawn:
            raise InputError(f"{place}: {name!r} is a stage that makes samples and no model; name another")

    def found(text: str) -> str:
        name, slash, rest = text[1:].partition("/")
        if not text.startswith("@"):
            return text
        if name not in outputs:
            raise InputError(f"{place}: {text!r} names no earlier stage; there are: {', '.join(outputs) or 'none'}")
        return outputs[name] + slash + rest

    data = dataclasses.replace(config.data, conversations=tuple(map(found, config.data.conversations)))
    policy = dataclasses.replace(config.policy, teacher=found(config.policy.teacher))
    return dataclasses.replace(config, model=found(config.model), data=data, policy=policy)


def run_stages(
    stages: Sequence[Stage],
    watched: Callable[[Stage], AbstractContextManager[Report]],
    *,
    resume: bool = False,
    minutes: float = math.inf,
    unsafe_sandbox: bool = False,
) -> Path:
    """Run the stages that are not finished; the last one's model. `watched` opens the report of one stage;
    `unsafe_sandbox` lets rewards run code without a sandbox. With `[log] report` a page about all that is finished is
    written after each.

    Raises what `train` raises, and MissingExtraError before the first step where the page cannot be drawn.
    """
    end, num_run = time.monotonic() + 60 * minutes, 0
    if any(stage.config.log.report for stage in stages):
        require_packages("train")
    _check(stages, unsafe_sandbox)
    for i, stage in enumerate(stages, 1):
        if resume and is_finished(stage):
            _evaluate(stage, unsafe_sandbox)
            continue
        left = max(0.0, end - time.monotonic()) / 60
        if num_run and not left:
            raise Paused(f"time is over before stage {stage.name}; continue with --resume", asked=True)
        with watched(stage) as report:
            run = collect if stage.config.method == "sample" else partial(train, model_fields=stage.model_fields)
            run(stage.config, report=report, resume=resume, minutes=left, unsafe_sandbox=unsafe_sandbox)
        _evaluate(stage, unsafe_sandbox)
        _report(stages[:i])
        num_run += 1
    if not num_run:  # it was killed before its last page, or a page is wanted only now
        _report(stages)
    return Path(stages[-1].config.output)


def _check(stages: Sequence[Stage], unsafe_sandbox: bool) -> None:
    """What can be known beforehand is not to come up after hours.

    Raises:
        InputError: names the stage.
    """
    for i, stage in enumerate(stages):
        try:
            check_device(stage.config)
            made = [Path(earlier.config.output) for earlier in stages[:i]]
            check_reads(stage.config, made, unsafe_sandbox=unsafe_sandbox)
        except InputError as problem:
            if not stage.name:
                raise
            raise InputError(f"stage {stage.name!r}: {problem}") from problem


def is_finished(stage: Stage) -> bool:
    """Whether a stage's last step was taken, by this recipe, and its model saved.

    Raises:
        InputError: it was run by another recipe.
    """
    if stage.config.method == "sample":
        return is_collected(stage.config)
    output = Path(stage.config.output)
    found = checkpoint.newest(output)
    if not found:
        return False
    header = checkpoint.read_header(found, checkpoint.recipe_of(stage.config, stage.model_fields), output)
    saved = output.glob("model*.safetensors") if stage.config.lora.merge else output.glob("adapter/*.safetensors")
    return header.step == stage.config.steps and any(saved)


def _evaluate(stage: Stage, unsafe_sandbox: bool) -> None:
    """Measure a finished stage's model, unless it has been as [evaluate] says now."""
    folder, config = Path(stage.config.output), stage.config
    path = folder / "evaluation.json"
    if config.evaluate.num_problems and config.method != "sample" and not is_measured(path, config):
        save_evaluation(evaluate_folder(folder, config, unsafe_sandbox=unsafe_sandbox), path)


def report_path(stage: Stage) -> Path:
    """Where the page about a recipe's stages is written."""
    output = Path(stage.config.output)
    return (output.parent if stage.name else output) / "report.html"


def _report(finished: Sequence[Stage]) -> None:
    """Write the page about the stages up to the last of these, if that one's recipe wants it."""
    path, language = report_path(finished[-1]), finished[-1].config.log.report
    if language:
        write_report([Path(stage.config.output) for stage in finished], path, language, path.resolve().parent.name)


def _names(listed: Any, path: Path) -> list[str]:
    """The names of the stages, which become folders."""
    if not isinstance(listed, list) or not listed or not all(isinstance(table, dict) for table in listed):
        raise InputError(f"{path}: stage is {str(listed)[:40]!r}; it must be a list of tables [[stage]]")
    names = [str(table.get("name", "")) for table in listed]
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or names.count(name) > 1:
            raise InputError(f"{path}: a stage's name is {name!r}; each needs its own, of small letters, digits and -")
        if name in TABLES:
            raise InputError(f"{path}: a stage's name is {name!r}, which is a table's; choose another")
    return names


def _settings_of(name: str, names: Sequence[str], settings: Mapping[str, str]) -> dict[str, str]:
    """The words of the command line that are for a stage: those for all, then those under its name."""
    bare = next((key for key in settings if key in names), None)
    if bare:
        raise InputError(f"command line: {bare!r} is a stage; write {bare}.KEY=VALUE")
    shared = {key: value for key, value in settings.items() if key.split(".")[0] not in names}
    own = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
    return shared | own
