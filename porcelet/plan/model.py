"""What the planner knows of a model: its config and how many bytes each part of it takes.

Where the files are at hand, the bytes are those of their headers; else values are counted from the config and take the
bytes of a format. Named models (models.toml) need no files at all. Nothing is read but headers.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from porcelet import hub
from porcelet.config import ModelConfig, read_file, read_hf
from porcelet.errors import InputError, ModelError
from porcelet.weights import gguf
from porcelet.weights.header import gguf_config
from porcelet.weights.shards import read_header

# Parts of a model, in the order of a token's way. `mtp` is the whole MTP layer, `norms` all norms and biases.
PARTS = ("embedding", "attention", "dense", "router", "shared", "experts", "norms", "head", "mtp")


@dataclass(frozen=True)
class Format:
    """How weights lie in memory: bytes a value of the products' weights, of embedding and head, of all that is little;
    `rates` are the formats a product may be computed in, the fastest first, as Device.rates calls them."""

    name: str
    product: float
    embedding: float
    rest: float
    rates: tuple[str, ...]

    def bytes_of(self, part: str) -> float:
        """Bytes a value of a part takes."""
        if part in ("embedding", "head"):
            return self.embedding
        return self.rest if part in ("norms", "router") else self.product


# An FP8 block of 128 x 128 has a float32 scale; int8 and int4 are ours, a scale and a minimum for 32 values.
FORMATS = {
    "float32": Format("float32", 4, 4, 4, ("fp32",)),
    "bf16": Format("bf16", 2, 2, 2, ("bf16", "fp16", "fp32")),
    "fp8": Format("fp8", 1 + 4 / 128**2, 2, 2, ("fp8", "bf16", "fp16", "int8", "fp32")),
    "int8": Format("int8", 9 / 8, 9 / 8, 4, ("int8", "bf16", "fp16", "fp32")),
    "int4": Format("int4", 5 / 8, 9 / 8, 4, ("int8", "bf16", "fp16", "fp32")),
}


@dataclass(frozen=True)
class PlannedModel:
    """A model as the planner sees it. `sizes` are bytes of each part; `source` says what they were read or counted
    from."""

    name: str
    config: ModelConfig
    format: Format
    sizes: Mapping[str, float]
    source: str

    @property
    def num_bytes(self) -> float:
        """All stored bytes, the MTP layer's too."""
        return sum(self.sizes.values())

    def converted(self, name: str) -> PlannedModel:
        """The model with its weights in another format, by counting."""
        return counted(self.name, self.config, find_format(name))


def find_format(name: str) -> Format:
    """Raises InputError for a format that is not known."""
    if name not in FORMATS:
        raise InputError(f"weights are {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def counted(name: str, config: ModelConfig, format: Format, source: str = "") -> PlannedModel:
    """A model of which only the config is known."""
    sizes = {part: format.bytes_of(part) * values for part, values in part_values(config).items()}
    return PlannedModel(name, config, format, sizes, f"{source or 'config'}, counted as {format.name}")


def part_values(config: ModelConfig) -> dict[str, int]:
    """How many values each part holds; together they are `num_parameters(mtp=True)`."""
    width, embedding = config.hidden_size, config.vocab_size * config.hidden_size
    moe = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    expert = 3 * width * config.moe_intermediate_size
    values = {
        "embedding": embedding,
        "attention": config.num_hidden_layers * config.num_attention_weights(),
        "dense": (config.num_hidden_layers - moe) * 3 * width * config.intermediate_size,
        "router": moe * config.n_routed_experts * (width + config.has_gate_bias),
        "shared": moe * config.n_shared_experts * expert,
        "experts": moe * config.n_routed_experts * expert,
        "head": 0 if config.tie_word_embeddings else embedding,
        "mtp": config.num_parameters(mtp=True) - config.num_parameters(),
    }
    values["norms"] = config.num_parameters(mtp=True) - sum(values.values())
    return {part: values[part] for part in PARTS}


# ---- finding --------------------------------------------------------------------------------------------------------


def find_model(name: str, weights: str = "") -> PlannedModel:
    """A GGUF file, a folder with `config.json` (and its safetensors, if they are there), a model of models.toml or of
    the store. `weights` asks for another format than it is stored in.

    Raises:
        InputError: nothing is called so (near names are told), or the format is not known.
        ModelError: its files are damaged or not supported.
    """
    path = Path(name)
    named = _named().get(name.lower())
    if path.exists():
        model = read_model(path)
    elif named is not None:
        model = _from_table(named)
    else:
        model = read_model(_stored_path(name))
    return model.converted(weights) if weights and weights != model.format.name else model


def known_models() -> list[str]:
    """The names of models.toml."""
    return [*_table()]


def read_model(path: Path) -> PlannedModel:
    """A GGUF file or a folder. Without safetensors the bytes are counted from `config.json`.

    Raises:
        ModelError: a header or the config is missing, damaged or not supported.
    """
    config_file = path if path.name.endswith(".json") else path / "config.json"
    if path.is_file() and config_file != path:
        file = gguf.read(path)
        rows = [(_gguf_part(tensor.name), tensor.type.name, len(tensor.data)) for tensor in file.tensors.values()]
        return _measured(path.stem, gguf_config(file), rows, f"headers of {path.name}")
    config = read_file(config_file)
    shards = [] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not shards:
        return counted(config_file.parent.name, config, FORMATS[_promised_format(config_file)], config_file.name)
    entries = [entry for shard in shards for entry in read_header(shard).values()]
    rows = [(_part(entry.name, config), entry.dtype, entry.num_bytes) for entry in entries]
    return _measured(path.name, config, rows, f"headers of {len(shards)} safetensors files")


def _measured(name: str, config: ModelConfig, rows: list[tuple[str, str, int]], source: str) -> PlannedModel:
    """A model of which every tensor's part, type and bytes are known."""
    sizes = Counter[str]()
    types = Counter[str]()
    for part, kind, num_bytes in rows:
        sizes[part] += num_bytes
        types[kind] += num_bytes
    format = FORMATS[_format_of(types.most_common(1)[0][0])] if rows else FORMATS["bf16"]
    return PlannedModel(name, config, format, {part: float(sizes[part]) for part in PARTS}, source)


def _format_of(kind: str) -> str:
    """The format whose products a tensor type is computed with."""
    if kind.startswith(("Q4", "Q5")):
        return "int4" if kind.startswith("Q4") else "int8"
    return {"F8_E4M3": "fp8", "F32": "float32", "Q8_0": "int8", "Q6_K": "int8"}.get(kind, "bf16")


def _promised_format(config: Path) -> str:
    """What a `config.json` says of the weights: its quantisation, else its dtype."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("quantization_config"):
        return "fp8"
    return "float32" if (values.get("dtype") or values.get("torch_dtype")) == "float32" else "bf16"


def _part(name: str, config: ModelConfig) -> str:
    """The part that a tensor of a Hugging Face checkpoint belongs to."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "mtp"
    for pattern, part in _HF_PARTS:
        if pattern in name:
            return part
    return "norms"


_HF_PARTS = (
    ("norm", "norms"),
    (".bias", "norms"),
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
    ("mlp.experts.", "experts"),
    ("mlp.shared_experts.", "shared"),
    ("mlp.gate.", "router"),
    ("mlp.", "dense"),
    ("self_attn.", "attention"),
)


def _gguf_part(name: str) -> str:
    """The part that a tensor of a GGUF file belongs to."""
    for pattern, part in _GGUF_PARTS:
        if pattern in name:
            return part
    return "norms"


_GGUF_PARTS = (
    ("norm", "norms"),
    (".bias", "norms"),
    ("token_embd", "embedding"),
    ("attn_", "attention"),
    ("output.weight", "head"),
    ("_exps", "experts"),
    ("_shexp", "shared"),
    ("ffn_gate_inp", "router"),
    ("exp_probs", "router"),
    ("ffn_", "dense"),
)


def _stored_path(name: str) -> Path:
    try:
        return hub.resolve(name)
    except (InputError, ModelError) as problem:
        near = difflib.get_close_matches(name.lower(), _named(), n=3, cutoff=0.5)
        known = f"; near: {', '.join(near)}" if near else f"; known by name: {', '.join(_table())}"
        raise InputError(f"there is no model {name!r} here{known}; or name a folder with config.json") from problem


@cache
def _table() -> dict[str, dict[str, Any]]:
    table = tomllib.loads(files("porcelet.plan").joinpath("models.toml").read_text(encoding="utf-8"))
    return {name: table.get(row.get("base", ""), {}) | row | {"called": name} for name, row in table.items()}


@cache
def _named() -> dict[str, dict[str, Any]]:
    return dict(_names())


def _names() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in _table().items():
        yield name, row
        yield from ((other.lower(), row) for other in row["names"])


def _from_table(row: Mapping[str, Any]) -> PlannedModel:
    own = ("names", "source", "parameters", "active", "format", "base", "called")
    values = {"q_lora_rank": None} | {name: value for name, value in row.items() if name not in own}
    return counted(row["called"], read_hf(values, row["called"]), FORMATS[row["format"]], row["source"])
