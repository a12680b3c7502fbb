"""What a user may change of the engine, and how `key=value` words and TOML tables set the fields of any config."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from porcelet.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PAGE_SIZE = 64  # tokens a cache page holds; FlashMLA's block size
# Tokens that a recorded step has room for at least, and that guesses do not go beyond.
REPLAYED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine may use.

    `device` "cuda" computes on an NVIDIA GPU, in bfloat16 where weights are not packed or FP8. There `activations`
    "fp8" rounds what FP8 weights are multiplied with, as DeepSeek-V3 does; "half" does not.
    `weights` "auto" is fp8 for an FP8 checkpoint, the stored four or eight bits of a quantised GGUF file where the
    native body exists, else float32; "float32", "int8", "int4" and "fp8" insist. `cache_memory` is the size of the
    paged cache: bytes ("2GB", "512MiB") or a fraction ("0.5") of the memory that is available once the model is loaded;
    where it is empty, `cache_tokens` says how many tokens fit. `expert_memory`, given alike, is how much of the routed
    experts' weights may be in memory: they stay on disk, in a file that is written once, and come as they are chosen;
    where it is empty, all are in memory. `cache_dtype` is float32 or float16, half as large;
    "auto" is float16 beside packed weights, which round more.
    `prefix_cache` on finds what earlier requests computed. `max_batch_tokens` is the token budget of a step,
    `max_sequences` the most that run at once.

    `speculation` guesses tokens ahead: by the model's own MTP layer, or by looking the last tokens up in the text so
    far; "auto" takes the first of them that the model has, and guesses while that pays; "mtp" and "lookup" insist.
    """

    device: str = "cpu"
    activations: str = "half"
    weights: str = "auto"
    cache_tokens: int = 16384
    cache_memory: str = ""
    cache_dtype: str = "auto"
    expert_memory: str = ""
    prefix_cache: str = "on"
    speculation: str = "auto"
    max_batch_tokens: int = 512
    max_sequences: int = 64
    threads: int = 0  # 0: as torch decides

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("cache_memory", "expert_memory"):
            if getattr(self, name):
                parse_memory(getattr(self, name), name)
        if self.activations == "fp8" and self.device == "cpu":
            raise InputError("activations is fp8, which is for GPUs; choose device=cuda, or leave activations half")
        if self.cache_tokens < PAGE_SIZE:
            raise InputError(f"cache_tokens is {self.cache_tokens}; a page holds {PAGE_SIZE}")
        if self.max_batch_tokens < 1 or self.max_sequences < 1 or self.threads < 0:
            raise InputError("max_batch_tokens and max_sequences must be at least 1, threads 0 or more")


_CHOICES = {
    "device": ("cpu", "cuda"),
    "activations": ("half", "fp8"),
    "weights": ("auto", "float32", "int8", "int4", "fp8"),
    "cache_dtype": ("auto", "float32", "float16"),
    "prefix_cache": ("on", "off"),
    "speculation": ("auto", "off", "lookup", "mtp"),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str, name: str = "cache_memory") -> float:
    """Bytes of "2GB", "512 MiB" or "1e9"; a fraction in (0, 1] as it stands. `name` is the setting's.

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    try:
        amount = float(match[1]) * _UNITS[unit] if match else 0.0
    except (ValueError, KeyError):
        amount = 0.0
    if not 0 < amount < math.inf or (unit and amount <= 1):
        raise InputError(f"{name} is {text!r}; give bytes such as 2GB, or a fraction such as 0.5")
    return amount


Config = TypeVar("Config", bound="DataclassInstance")


def override(config: Config, values: Mapping[str, Any], source: str, **ready: Any) -> Config:
    """A copy of `config` with `values` set, strings converted to the field's type; `ready` is set as it is.

    Raises:
        InputError: an unknown key (the nearest one is named) or a value of the wrong type.
    """
    kinds = get_type_hints(type(config))
    converted = {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(kinds)}"
            raise InputError(f"{source}: unknown key {name!r}{hint}")
        converted[name] = _convert(value, kinds[name], f"{source}: {name}")
    return dataclasses.replace(config, **converted, **ready)


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` words of a command line as a mapping for `override`.

    Raises:
        InputError: a word without "=".
    """
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"{setting!r} is not of the form key=value")
    return dict(setting.split("=", 1) for setting in settings)


def _convert(value: Any, kind: Any, place: str) -> Any:
    if get_origin(kind) is tuple:
        items = list(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value
        item_kind = get_args(kind)[0]
        wanted, noun = ((str,), "texts") if item_kind is str else ((str, int, float), "numbers")
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, wanted) for item in items):
            raise InputError(f"{place} is {value!r}; a list of {noun} was expected")
        return tuple(_convert(item, item_kind, place) for item in items)
    accepted = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}[kind]
    known = isinstance(value, (str, *accepted)) and (kind is bool or not isinstance(value, bool))
    try:
        if known:
            return _TRUTH[value] if kind is bool and isinstance(value, str) else kind(value)
    except (ValueError, KeyError, OverflowError):
        pass
    raise InputError(f"{place} is {value!r}; a value of type {kind.__name__} was expected")


_TRUTH = {"true": True, "false": False}
