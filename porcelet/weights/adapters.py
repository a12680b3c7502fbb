"""Low-rank adapters (LoRA, Hu et al. 2021) as files in PEFT's format, and merged into a model.

    folder/adapter_config.json                 rank, alpha, the names of adapted layers, the base model
    folder/adapter_model.safetensors           base_model.model.NAME.lora_A.weight [r, in] and .lora_B.weight [out, r]

A layer's weight becomes W + alpha / r · B·A. NAME is the layer's name in the checkpoint, so nothing is renamed. What
PEFT knows besides (DoRA, rank-stabilised scales, ranks by layer, whole modules, routed experts) changes the numbers,
so it is refused by name.

PEFT 0.21 takes gate_proj, up_proj and down_proj of a DeepSeek model for its routed experts, so it cannot load adapters
of that model's dense MLPs and shared experts. Ours can have them, but "all-linear" means attention alone there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from porcelet.errors import InputError, ModelError
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer
from porcelet.weights.files import copy_text_files
from porcelet.weights.load import load, save

if TYPE_CHECKING:
    from jaxtyping import Float

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
# Settings of PEFT that change the numbers, with the values under which they do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ([], None)),
    **dict.fromkeys(
        ("layer_replication", "trainable_token_indices", "megatron_config", "arrow_config"), ([], {}, None)
    ),
    "alora_invocation_tokens": (None,),
    # The others begin by changing the base.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
}

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # layer → A [r, in], B [out, r]


@dataclass(frozen=True)
class Adapter:
    """An adapter's matrices by layer; `base` says which model it belongs to, `targets` are PEFT's target_modules."""

    rank: int
    alpha: float
    matrices: Matrices
    targets: tuple[str, ...] = ()
    base: str = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adaptable(model: Transformer) -> Iterator[tuple[str, Linear]]:
    """Linear layers of attention, dense MLPs and shared experts, by name; the MTP layer's are not among them, as
    `transformers` has none."""
    for number in range(model.config.num_hidden_layers):
        for name, module in model.model.layers[number].named_modules():
            if isinstance(module, Linear):
                yield f"model.layers.{number}.{name}", module


def find_targets(model: Transformer, targets: Sequence[str]) -> dict[str, Linear]:
    """The layers whose names are one of `targets` or end with one behind a dot; "all-linear" is all that PEFT can load.

    Raises:
        InputError: a target that fits no layer, or fits what has no adapter here, or "all-linear" beside others.
    """
    layers = dict(adaptable(model))
    if tuple(targets) == (ALL_LINEAR,):
        return {name: layer for name, layer in layers.items() if peft_loads(model, name)}
    if ALL_LINEAR in targets:
        others = ", ".join(target for target in targets if target != ALL_LINEAR)
        raise InputError(f"target {ALL_LINEAR!r} stands alone; it was given with {others or 'itself'}: name either")
    found: dict[str, Linear] = {}
    for target in targets:
        fitting = {name: layer for name, layer in layers.items() if _fits(name, target)}
        if not fitting:
            _refuse(model, target, layers)
        found |= fitting
    return {name: layer for name, layer in layers.items() if name in found}


def peft_loads(model: Transformer, name: str) -> bool:
    """Whether `peft` gives an adapter in this layer of `transformers`' model its place."""
    return not (model.config.is_mla and ".mlp." in name)


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _refuse(model: Transformer, target: str, layers: Mapping[str, Linear]) -> None:
    known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    there = any(_fits(name, target) for name, _ in model.named_modules())
    reason = "cannot have an adapter here" if there or "experts." in target else "is the name of no layer"
    raise InputError(f"target {target!r} {reason}; this model has {known}, or {ALL_LINEAR}")


def merged(
    base: Float[Tensor, "outputs inputs"], a: Float[Tensor, "r inputs"], b: Float[Tensor, "outputs r"], scale: float
) -> Float[Tensor, "outputs inputs"]:
    """The weight with its adapter: base + scale · B·A."""
    return torch.addmm(base, b, a, alpha=scale)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter as PEFT's `PeftModel.from_pretrained` and `read_adapter` read it.

    Raises:
        ModelError: the folder cannot be written.
    """
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(adapter.targets or {name.rpartition(".")[2] for name in adapter.matrices}),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": matrix.detach().contiguous()
        for name, pair in adapter.matrices.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"{folder} cannot be written: {problem}") from problem


def read_adapter(folder: Path) -> Adapter:
    """Read a folder in PEFT's format.

    Raises:
        ModelError: it is missing or damaged, is no LoRA adapter, or uses what is not supported, by name.
    """
    values = _read_config(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as problem:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {problem}") from problem
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not (_is_positive(rank) and isinstance(rank, int) and _is_positive(alpha)):
        raise ModelError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; two positive numbers expected")
    matrices = _pairs(tensors, rank, folder / WEIGHTS)
    return Adapter(rank, float(alpha), matrices, base=str(values.get("base_model_name_or_path") or ""))


def _is_positive(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a positive, finite number; true is one to Python alone."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{path} cannot be read: {problem}; an adapter's folder needs it") from problem
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
        raise ModelError(f"{path}: peft_type is {found!r}; only LORA is supported")
    for name, allowed in PLAIN.items():
        if values.get(name) not in allowed:
            raise ModelError(f"{path}: {name} is {values[name]!r}, which is not supported; merge the adapter with peft")
    return values


def _pairs(tensors: Mapping[str, Tensor], rank: int, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Both matrices of every layer."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX) or rest not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ModelError(f"{path}: tensor {name!r} of shape {list(tensor.shape)} is not supported")
        if tensor.shape["AB".index(rest[0])] != rank:
            raise ModelError(f"{path}: tensor {name!r} has the shape {list(tensor.shape)}; its rank must be {rank}")
        halves.setdefault(layer, {})[rest[0]] = tensor.float()
    for layer, pair in halves.items():
        if len(pair) != 2:
            raise ModelError(f"{path}: {layer} has lora_{next(iter(pair))} alone; it needs lora_A and lora_B")
    return {layer: (pair["A"], pair["B"]) for layer, pair in halves.items()}


# ---- merging --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply_adapter(model: Transformer, adapter: Adapter, source: str) -> None:
    """Add an adapter to the weights of a model in full precision.

    Raises:
        ModelError: it belongs to another model.
    """
    layers = check_fits(model, adapter, source)
    for name, (a, b) in adapter.matrices.items():
        weight = layers[name].weight
        assert isinstance(weight, nn.Parameter), "the model is in full precision"
        weight.copy_(merged(weight, a, b, adapter.scale))


def check_fits(model: Transformer, adapter: Adapter, source: str) -> dict[str, Linear]:
    """The model's adaptable layers, once it is sure that the adapter's are among them.

    Raises:
        ModelError: a layer that the model has not, or has in another shape.
    """
    layers = dict(adaptable(model))
    for name, (a, b) in adapter.matrices.items():
        if name not in layers:
            raise ModelError(f"{source}: the model has no linear layer {name}; the adapter belongs to {adapter.base!r}")
        if tuple(layers[name].weight.shape) != (len(b), a.shape[1]):
            shape = list(layers[name].weight.shape)
            raise ModelError(f"{source}: the adapter of {name} is for {[len(b), a.shape[1]]}; the model has {shape}")
    return layers


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write the model in the folder `base` with an adapter in it, as a model of its own.

    Raises:
        InputError: `output` is one of the other two or holds something, or `base` is no folder.
        ModelError: model or adapter cannot be read, or they do not belong together.
    """
    if output.resolve() in (base.resolve(), adapter.resolve()):
        raise InputError(f"output {output} is what is to be merged; choose another")
    if not base.is_dir():
        raise InputError(f"base {base} is not a folder; a run that starts from another form merges by [lora] merge")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output {output} exists; delete it or choose another")
    read = read_adapter(adapter)
    model = load(base)
    apply_adapter(model, read, str(adapter))
    save(model, output)
    copy_text_files(base, output)
