"""What a user may change: `EngineConfig` and `TrainConfig`, as `key=value` or TOML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from porcelet.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PAGE_SIZE = 64  # tokens a cache page holds; FlashMLA's block size
# Tokens up to which a step is replayed from its recording, and which guesses do not exceed; longer steps hold prompts,
# for which Python's time is little.
REPLAYED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine may use.

    `weights` "auto" is fp8 for an FP8 checkpoint, int8 for a quantised GGUF file where the native body exists, else
    float32; "float32", "int8" and "fp8" insist. `cache_memory` is the size of the paged cache: bytes ("2GB", "512MiB")
    or a fraction ("0.5") of the memory that is available once the model is loaded; where it is empty, `cache_tokens`
    says how many tokens fit. `cache_dtype` is float32 or float16, half as large. `prefix_cache` on finds what earlier
    requests computed. `max_batch_tokens` is the token budget of a step, `max_sequences` the most that run at once.

    `speculation` guesses tokens ahead: by the model's own MTP layer, or by looking the last tokens up in the text so
    far; "auto" takes the first of them that the model has, and guesses while that pays; "mtp" and "lookup" insist.
    """

    weights: str = "auto"
    cache_tokens: int = 16384
    cache_memory: str = ""
    cache_dtype: str = "float32"
    prefix_cache: str = "on"
    speculation: str = "auto"
    max_batch_tokens: int = 512
    max_sequences: int = 64
    threads: int = 0  # 0: as torch decides

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.cache_memory:
            parse_memory(self.cache_memory)
        if self.cache_tokens < PAGE_SIZE:
            raise InputError(f"cache_tokens is {self.cache_tokens}; a page holds {PAGE_SIZE}")
        if self.max_batch_tokens < 1 or self.max_sequences < 1 or self.threads < 0:
            raise InputError("max_batch_tokens and max_sequences must be at least 1, threads 0 or more")


_CHOICES = {
    "weights": ("auto", "float32", "int8", "fp8"),
    "cache_dtype": ("float32", "float16"),
    "prefix_cache": ("on", "off"),
    "speculation": ("auto", "off", "lookup", "mtp"),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_memory(text: str) -> float:
    """Bytes of "2GB", "512 MiB" or "1e9"; a fraction in (0, 1] as it stands.

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
        raise InputError(f"cache_memory is {text!r}; give bytes such as 2GB, or a fraction such as 0.5")
    return amount


Config = TypeVar("Config", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The methods differ in where samples come from (`data` or `task`) and in their weights.

    `model` is a folder to start from; without one, `ModelConfig` fields come from the recipe's [model] table. `output`
    receives `checkpoint/` (exact resume), `metrics.jsonl` and, at the end, the model in Hugging Face form.
    """

    method: str = "pretrain"  # pretrain | grpo
    task: str = "sums"
    model: str = ""
    output: str = "runs/run"
    steps: int = 300
    seed: int = 0
    samples_per_step: int = 64
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100
    threads: int = 0  # 0: as torch decides
    mtp_weight: float = 0.3  # lambda of the MTP loss, V3 report section 4.2
    bias_update_speed: float = 0.001  # gamma of the balancing rule, V3 report section 2.1.2
    max_number: int = 20  # operands of the task "sums" are below it
    group_size: int = 8  # G: rollouts a prompt (grpo)
    max_new_tokens: int = 8
    temperature: float = 1.0
    updates_per_rollout: int = 1  # mu of GRPO's algorithm 1; the clip acts from the second on
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.method not in ("pretrain", "grpo"):
            raise InputError(f"method is {self.method!r}; it must be pretrain or grpo")
        counts = "steps samples_per_step checkpoint_every group_size max_new_tokens max_number updates_per_rollout"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        not_negative = (
            "min_learning_rate warmup_steps weight_decay mtp_weight bias_update_speed clip_low clip_high seed"
        )
        for name in not_negative.split():
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.method == "grpo" and self.samples_per_step % self.group_size:
            raise InputError(
                f"samples_per_step {self.samples_per_step} is not a multiple of group_size {self.group_size}"
            )


def override(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """A copy of `config` with `values` set; strings are converted to the field's type.

    Raises:
        InputError: an unknown key (the nearest one is named) or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            raise InputError(f"{source}: unknown key {name!r}{hint}")
        converted[name] = _convert(value, str(fields[name].type), f"{source}: {name}")
    return dataclasses.replace(config, **converted)


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` words of a command line as a mapping for `override`.

    Raises:
        InputError: a word without "=".
    """
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"{setting!r} is not of the form key=value")
    return dict(setting.split("=", 1) for setting in settings)


def _convert(value: Any, kind: str, place: str) -> Any:
    converters = {"int": int, "float": float, "str": str}
    matches = {"int": (int,), "float": (int, float), "str": (str,)}[kind]
    if isinstance(value, bool) or not isinstance(value, (str, *matches)):
        raise InputError(f"{place} is {value!r}; a value of type {kind} was expected")
    try:
        return converters[kind](value)
    except (ValueError, OverflowError) as problem:
        raise InputError(f"{place} is {value!r}; a value of type {kind} was expected") from problem
