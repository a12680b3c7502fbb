"""From files to a model and back.

    file → weights.files: (name, tensor) → rename, stack → the parameter of that name
    model → the same table backwards → config.json + model.safetensors

Parameter names are the checkpoint's. `RENAMES` is the whole list of exceptions; every row works both ways. A
missing, surplus or misshapen tensor is an error and leaves no half-loaded model behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.errors import ModelError
from porcelet.kernels import cpu
from porcelet.kernels.linear import GROUP, Int8Weight, Weight
from porcelet.models.layers import Embedding, Linear
from porcelet.models.transformer import Transformer, build
from porcelet.weights import files, quantize
from porcelet.weights.gguf import GGUFTensor


@dataclass(frozen=True)
class Stacked:
    """A parameter that gathers one checkpoint tensor an expert: rows [first, first + 1) / parts of
    `parameter[expert]`."""

    parameter: str
    checkpoint: str
    part: int
    num_parts: int


# Parameter (prefix of a layer's mlp) ← checkpoint name, for the experts that we keep stacked.
RENAMES = (
    Stacked("experts.gate_up_proj", "experts.{}.gate_proj.weight", 0, 2),
    Stacked("experts.gate_up_proj", "experts.{}.up_proj.weight", 1, 2),
    Stacked("experts.down_proj", "experts.{}.down_proj.weight", 0, 1),
)
# The MTP layer's copies of the embedding and the head: not kept, as they equal the main model's.
SHARED_WITH_MAIN = ("embed_tokens.weight", "shared_head.head.weight")
# The absorbed form of MLA multiplies with parts of this weight, which only full precision offers.
NEVER_QUANTISED = ("kv_b_proj",)
EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

Source = Tensor | GGUFTensor


def load(path: Path, weights: str = "float32") -> Transformer:
    """Read a GGUF file or a Hugging Face folder into a model.

    `weights`: "float32"; "int8" quantises linear layers and the embedding (lossless from Q4_0, Q4_1, Q8_0), but for
    routed experts, the gate, MLA's kv_b_proj and rows that are not whole groups of 32; "auto" is int8 for a quantised
    GGUF file where the native body exists, and float32 otherwise.

    Raises:
        ModelError: what is wrong, with file and tensor.
    """
    config = files.config(path)
    if weights == "auto":
        weights = "int8" if cpu.available() and path.suffix == ".gguf" and _is_quantised(path) else "float32"
    model = build(config, device="meta")
    fill(model, files.tensors(path), str(path), int8=weights == "int8")
    return model.eval()


def fill(model: Transformer, stream: Iterable[tuple[str, Source]], source: str, *, int8: bool = False) -> None:
    """Put a stream of (checkpoint name, tensor) into a model built on the meta device; all of it or an error."""
    wanted = _wanted(model)
    missing = {name: shape for name, shape in wanted.items()}
    for name, tensor in stream:
        if _is_shared_copy(model.config, name):
            continue
        if name not in missing:
            reason = "appears twice" if name in wanted else "does not belong to this architecture"
            raise ModelError(f"{source}: tensor {name} {reason}")
        if tuple(tensor.shape) != missing.pop(name):
            raise ModelError(
                f"{source}: tensor {name} has shape {tuple(tensor.shape)}; the config asks for {wanted[name]}"
            )
        _place(model, name, tensor, int8)
    if missing:
        first = next(iter(missing))
        raise ModelError(f"{source}: {len(missing)} tensors are missing, the first is {first} {missing[first]}")
    if model.config.tie_word_embeddings:
        _set_weight(model.lm_head, model.model.embed_tokens.weight)


def save(model: Transformer, folder: Path) -> None:
    """Write config.json and model.safetensors under the checkpoint's names, as `load` and `transformers` read them.

    Raises:
        ModelError: a layer is quantised; only full-precision models are saved.
    """
    files.save(folder, model.config, dict(checkpoint_tensors(model)))


def checkpoint_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every parameter and buffer: `fill` backwards."""
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)) and isinstance(module.weight, Int8Weight):
            raise ModelError(f"{name} is quantised to int8; load the model with weights=float32 to save it")
    for name, tensor in _stored(model):
        rows = [row for row in RENAMES if name.endswith(f".mlp.{row.parameter}")]
        if not rows:
            yield name, tensor.detach()
            continue
        for row in rows:
            prefix = name.removesuffix(row.parameter)
            for expert, piece in enumerate(tensor.detach().chunk(row.num_parts, dim=1)[row.part]):
                yield prefix + row.checkpoint.format(expert), piece.contiguous()


def _stored(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _wanted(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Checkpoint name → shape of everything the model needs."""
    wanted: dict[str, tuple[int, ...]] = {}
    for name, tensor in _stored(model):
        rows = [row for row in RENAMES if name.endswith(f".mlp.{row.parameter}")]
        if not rows:
            wanted[name] = tuple(tensor.shape)
        for row in rows:
            prefix = name.removesuffix(row.parameter)
            shape = (tensor.shape[1] // row.num_parts, tensor.shape[2])
            wanted |= {prefix + row.checkpoint.format(expert): shape for expert in range(tensor.shape[0])}
    return wanted


def _is_shared_copy(config: ModelConfig, name: str) -> bool:
    copies = [f"model.layers.{config.num_hidden_layers + i}" for i in range(config.num_nextn_predict_layers)]
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    return name in tied or any(name == f"{layer}.{suffix}" for layer in copies for suffix in SHARED_WITH_MAIN)


def _place(model: Transformer, name: str, tensor: Source, int8: bool) -> None:
    match = EXPERT.fullmatch(name)
    if match:
        prefix, expert, projection = match.groups()
        row = next(row for row in RENAMES if projection in row.checkpoint)
        stack = _materialize(model, prefix + row.parameter)
        stack.data[int(expert)].chunk(row.num_parts)[row.part].copy_(_dense(tensor))
        return
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = _dense(tensor)
        return
    quantisable = isinstance(module, (Linear, Embedding)) and tensor.shape[-1] % GROUP == 0
    quantisable &= not path.endswith(NEVER_QUANTISED)
    _set_weight(module, quantize.to_int8(tensor, name) if int8 and quantisable else nn.Parameter(_dense(tensor)))


def _set_weight(module: nn.Module, weight: Weight) -> None:
    """Put a weight in the place of the registered parameter, which would admit nothing but a parameter."""
    del module.weight
    setattr(module, "weight", weight)  # noqa: B010  as an attribute assignment it would have the type of a submodule


def _materialize(model: Transformer, name: str) -> Tensor:
    """The parameter of that name, allocated on its first use."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module.get_parameter(leaf)
    if parameter.is_meta:
        setattr(module, leaf, nn.Parameter(torch.empty(parameter.shape)))
    return module.get_parameter(leaf)


def _dense(tensor: Source) -> Tensor:
    """Float32 memory of our own, never a view of the file."""
    if isinstance(tensor, Tensor):
        return tensor.to(torch.float32, copy=True)
    return quantize.dequantize(tensor)


def _is_quantised(path: Path) -> bool:
    return any(isinstance(tensor, GGUFTensor) for _, tensor in files.tensors(path))
