"""Recipes: a training run as a TOML file, with `table.key=value` on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from porcelet.config import RewardConfig, TaskConfig, TrainConfig, override, parse_settings
from porcelet.errors import InputError
from porcelet.train.schedule import shortened

NESTED = ("data", "optimizer", "policy", "lora", "log", "evaluate")  # tables whose keys are the fields of a config
TABLES = ("train", *NESTED, "task", "reward", "model")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[TrainConfig, dict[str, Any]]:
    """A recipe of one run as a config, and its [model] table. An override without a table's name is one of [train].

    Raises:
        InputError: the file is missing or malformed, or a key is unknown (the nearest one is named).
    """
    return combine((read_tables(path), str(path)), words=tables_of(parse_settings(overrides)))


def read_tables(path: Path) -> dict[str, Any]:
    """What the file says.

    Raises:
        InputError: it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"recipe {path} cannot be read: {problem}") from problem


def combine(*layers: tuple[Mapping[str, Any], str], words: Mapping[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """A config and its [model] table from layers of (tables, where they are from), of which later ones win, and the
    `words` of a command line over all. Where these ask for fewer steps, the schedule is shortened with them.

    Raises:
        InputError: a key is unknown, or a value cannot be used.
    """
    config = TrainConfig()
    model_fields: dict[str, Any] = {}
    for tables, source in layers:
        config = _apply(config, tables, source)
        model_fields |= tables.get("model", {})
    told = _apply(config, words, "command line")
    if told.steps < config.steps:
        told = _apply(shortened(config, told.steps), words, "command line")
    return told, model_fields | words.get("model", {})


def tables_of(settings: Mapping[str, str]) -> dict[str, Any]:
    """`policy.group_size=8` → {"policy": {"group_size": "8"}}; values of free options are read as TOML would."""
    tables: dict[str, Any] = {}
    for key, value in settings.items():
        table, _, name = key.rpartition(".")
        free = table in ("task", "model")
        tables.setdefault(table or "train", {})[name] = _literal(value) if free else value
    return tables


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def check_tables(tables: Mapping[str, Any], source: str) -> None:
    """Refuse what is no table of a recipe.

    Raises:
        InputError: names it and its place.
    """
    for name, table in tables.items():
        if name not in TABLES:
            near = difflib.get_close_matches(name, TABLES, n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"known: {', '.join(TABLES)}"
            raise InputError(f"{source}: unknown table {name!r}; {hint}")
        if not isinstance(table, list if name == "reward" else dict):
            wanted = "[[reward]]" if name == "reward" else f"[{name}]"
            raise InputError(f"{source}: {name} is {str(table)[:40]!r}; it must be a table {wanted}")


def _apply(config: TrainConfig, tables: Mapping[str, Any], source: str) -> TrainConfig:
    check_tables(tables, source)
    changes: dict[str, Any] = {
        name: override(getattr(config, name), tables[name], f"{source} [{name}]") for name in NESTED if name in tables
    }
    if "task" in tables:
        changes["task"] = _task(config.task, tables["task"])
    if "reward" in tables:
        changes["rewards"] = tuple(_reward(table, f"{source} [[reward]]") for table in tables["reward"])
        if not changes["rewards"]:
            raise InputError(f"{source}: reward is an empty list; write a table [[reward]], or nothing")
    own = tables.get("train", {})
    nested = {"task", "rewards", *NESTED} & own.keys()
    if nested:
        raise InputError(f"{source} [train]: {sorted(nested)[0]!r} is a table of its own; write [{sorted(nested)[0]}]")
    return override(config, own, f"{source} [train]", **changes)


def _task(config: TaskConfig, table: Mapping[str, Any]) -> TaskConfig:
    options = {name: value for name, value in table.items() if name != "name"}
    name = table.get("name", config.name)
    kept = config.options if name == config.name else {}
    return TaskConfig(name=str(name), options={**kept, **options})


def _reward(table: Any, place: str) -> RewardConfig:
    if not isinstance(table, dict):
        raise InputError(f"{place} is {str(table)[:40]!r}; it must be a table")
    options = {name: value for name, value in table.items() if name not in ("name", "weight")}
    known = {name: value for name, value in table.items() if name in ("name", "weight")}
    return dataclasses.replace(override(RewardConfig(), known, place), options=options)
