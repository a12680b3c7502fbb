"""What `porcelet serve` may be told: models, aliases, efforts and limits, from a TOML file and the command line.

    [server]
    max_waiting = 256                # requests in flight a model; the next one is told to come back
    [models.small]
    source = "smollm2-135m-instruct" # a name in the store, a GGUF file or a model folder
    weights = "int8"                 # and any other engine setting
    [aliases.deepseek-reasoner]
    model = "small"
    thinking = true
    [efforts]
    low = 1024                       # tokens of reasoning; 0: no limit

Without an [aliases] table, DeepSeek's names stand for the first model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porcelet.config.settings import EngineConfig, override
from porcelet.errors import InputError


@dataclass(frozen=True)
class Alias:
    """Another name for a served model, with or without thinking; None leaves that to the request."""

    model: str
    thinking: bool | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A model to serve: where it is, how its engine is to run, and what the page suggests to ask it."""

    source: str
    engine: EngineConfig = EngineConfig()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Efforts:
    """How many tokens of reasoning each effort allows; 0 sets no limit."""

    low: int = 1024
    high: int = 8192
    max: int = 0

    def __post_init__(self) -> None:
        if min(self.low, self.high, self.max) < 0:
            raise InputError(f"efforts are {self.low}, {self.high}, {self.max}; each must be 0 (no limit) or more")

    def budget(self, effort: str) -> int | None:
        """The limit of "low", "high" or "max"."""
        return {"low": self.low, "high": self.high, "max": self.max}[effort] or None


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and times of the server; times in seconds.

    A silent answer sends a comment every `keep_alive`. A request that has waited `queue_timeout` for its first token
    is given up. After SIGTERM the answers under way have `drain` to end. `database` is an SQLAlchemy URL; empty is
    SQLite in this user's folder (server/store.py).
    """

    max_waiting: int = 256
    keep_alive: float = 10.0
    queue_timeout: float = 600.0
    drain: float = 30.0
    database: str = ""

    def __post_init__(self) -> None:
        if self.max_waiting < 1:
            raise InputError(f"max_waiting is {self.max_waiting}; it must be at least 1")
        for name in ("keep_alive", "queue_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)} s; it must be positive")
        if not 0 <= self.drain < float("inf"):
            raise InputError(f"drain is {self.drain} s; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All of it. The first of `models` is the default one."""

    models: Mapping[str, ModelEntry]
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    efforts: Efforts = Efforts()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        for name, alias in self.aliases.items():
            if alias.model not in self.models:
                known = ", ".join(self.models)
                raise InputError(f"alias {name!r} stands for {alias.model!r}, which is not served; served: {known}")
            if name in self.models:
                raise InputError(f"{name!r} is the name of a model and of an alias; rename one of them")


def preset_aliases(model: str, taken: Mapping[str, ModelEntry]) -> dict[str, Alias]:
    """DeepSeek's names for one model, but for those that models have already."""
    preset = {
        "deepseek-chat": Alias(model, thinking=False),
        "deepseek-reasoner": Alias(model, thinking=True),
        "deepseek-flash": Alias(model),
    }
    return {name: alias for name, alias in preset.items() if name not in taken}


def read_serve_config(path: Path, engine: Mapping[str, Any]) -> ServeConfig:
    """A TOML file's configuration; `engine` are settings for every model, which the file's own override.

    Raises:
        InputError: the file cannot be read, or holds something that is not known.
    """
    values = _read_toml(path)
    models = _table(values, "models", path)
    if not models:
        raise InputError(f'{path} names no model; add a table [models.NAME] with source = "smollm2-135m-instruct"')
    entries = {name: _model_entry(_table(models, name, path), engine, f"{path}: models.{name}") for name in models}
    aliases = {
        name: _alias(_table(values["aliases"], name, path), f"{path}: aliases.{name}")
        for name in _table(values, "aliases", path)
    }
    for table in values:
        if table not in ("models", "aliases", "efforts", "server"):
            raise InputError(f"{path}: unknown table [{table}]; known: models, aliases, efforts, server")
    return ServeConfig(
        models=entries,
        aliases=aliases if "aliases" in values else preset_aliases(next(iter(entries)), entries),
        efforts=override(Efforts(), _table(values, "efforts", path), f"{path}: efforts"),
        server=override(ServerConfig(), _table(values, "server", path), f"{path}: server"),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:  # UnicodeDecodeError among them
        raise InputError(f"{path} is not TOML: {problem}") from problem


def _table(values: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, Mapping):
        raise InputError(f"{path}: {name} is {table!r}; a table was expected")
    return table


def _model_entry(values: Mapping[str, Any], engine: Mapping[str, Any], place: str) -> ModelEntry:
    source = values.get("source")
    if not isinstance(source, str) or not source:
        raise InputError(f"{place}: source is {source!r}; name a model of the store, a GGUF file or a folder")
    own = {name: value for name, value in values.items() if name != "source"}
    return ModelEntry(source, override(EngineConfig(), {**engine, **own}, place))


def _alias(values: Mapping[str, Any], place: str) -> Alias:
    if unknown := set(values) - {"model", "thinking"}:
        raise InputError(f"{place}: unknown key {sorted(unknown)[0]!r}; known: model, thinking")
    model, thinking = values.get("model"), values.get("thinking")
    if not isinstance(model, str):
        raise InputError(f"{place}: model is {model!r}; name a served model")
    if thinking is not None and not isinstance(thinking, bool):
        raise InputError(f"{place}: thinking is {thinking!r}; it must be true or false, or absent")
    return Alias(model, thinking)
