"""From files to a model and back.

    file → weights.files: names and shapes checked → (name, tensor) one by one → rename, stack → the parameter
    model → the same table backwards → config.json + safetensors

Parameter names are the checkpoint's. `RENAMES` is the whole list of exceptions; every row works both ways. A missing,
surplus or misshapen tensor is an error before any data is read, and leaves no half-loaded model behind. Beside what has
been loaded, only the tensor in hand takes memory.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.errors import InputError, ModelError
from porcelet.kernels import cpu
from porcelet.kernels.experts import PackedExperts, packed_shape
from porcelet.kernels.linear import (
    GROUP,
    TILE,
    FP8Weight,
    PackedHeads,
    PackedWeight,
    Weight,
    kind_of_block,
    kind_with,
)
from porcelet.models.attention import MLA
from porcelet.models.experts import Experts
from porcelet.models.layers import Embedding, Linear
from porcelet.models.transformer import Transformer, build
from porcelet.types import Progress
from porcelet.weights import files, quantize
from porcelet.weights.files import Checkpoint, KVBParts, Source, Stored, open_checkpoint
from porcelet.weights.gguf import GGUFTensor
from porcelet.weights.memory import check_fits
from porcelet.weights.offload import ExpertFile, Offload, Piece
from porcelet.weights.records import ExpertLayer, Stacks


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
EIGHT_BITS = ("model.embed_tokens", "lm_head")  # what int4 does not go below
EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

# Buffers that some old checkpoints stored and no model needs: they follow from the config.
DERIVED = ("rotary_emb.inv_freq",)

PACKED = ("int8", "int4", "stored")  # formats of `weights` that pack linear layers

log = logging.getLogger(__name__)


def no_progress(done: int, total: int) -> None:
    """Reports to nobody."""


def load(
    path: Path, weights: str = "float32", progress: Progress = no_progress, offload: Offload | None = None
) -> Transformer:
    """Read a GGUF file or a Hugging Face folder into a model.

    `weights`: "float32"; "int8" quantises linear layers and the embedding (lossless from Q4_0, Q4_1, Q5_0, Q5_1 and
    Q8_0), but for the gate and rows that are not whole groups of 32; "int4" the same
    to four bits (lossless from Q4_0 and Q4_1), but eight for embedding and head; "stored" takes the fewer of the two
    that hold a GGUF tensor as well as possible; "fp8" keeps the FP8 weights of a checkpoint as they are; "auto" is fp8
    for such a checkpoint, stored for a quantised GGUF file where the native body exists, and float32 otherwise.
    With `offload` packed experts stay on disk; its budget is all the memory that they take.

    Raises:
        InputError: there are no packed experts to stay on disk, or the budget is less than one takes.
        ModelError: what is wrong, with file and tensor.
        CapacityError: the machine's memory is too small for it, or its disk for the experts' file.
    """
    checkpoint = _without_absent_mtp(open_checkpoint(path))
    weights = chosen_format(weights, checkpoint)
    spared = _spared_bytes(checkpoint, weights, offload) if offload else 0
    check_fits(checkpoint.config, weights, str(path), sum(stored.num_bytes for stored in checkpoint.tensors), spared)
    model = build(checkpoint.config, device="meta")
    fill(model, checkpoint.tensors, str(path), weights, progress, offload)
    return model.eval()


def fill(
    model: Transformer,
    tensors: Sequence[Stored],
    source: str,
    weights: str = "float32",
    progress: Progress = no_progress,
    offload: Offload | None = None,
) -> None:
    """Put a checkpoint's tensors into a model built on the meta device; all of them or an error."""
    used = _matched(model, tensors, source)
    kinds = _expert_kinds(used) if weights == "stored" else {}
    file, to_write = None, list[Stored]()
    if offload:
        file = ExpertFile(offload, Path(source), used, _stacks(model, weights, kinds))
        experts = [stored for stored in used if EXPERT.fullmatch(stored.name)]
        used = [stored for stored in used if not EXPERT.fullmatch(stored.name)]
        to_write = [] if file.is_there else experts
    total, done = sum(stored.num_bytes for stored in (*to_write, *used)), 0

    def opened(tensors: Sequence[Stored]) -> Iterator[tuple[str, Source]]:
        nonlocal done
        for stored in tensors:
            with stored.open(as_stored=weights in PACKED) as tensor:  # what is quantised is read piece by piece later
                yield stored.name, tensor
                del tensor  # before the next one is read
            done += stored.num_bytes
            progress(done, total)

    if file:
        if to_write:
            file.write(_expert_pieces(opened(to_write), file.layers))
        for path, gate_up, down in file.open():
            module = model.get_submodule(path)
            _replace(module, "gate_up_proj", gate_up)
            _replace(module, "down_proj", down)
    for name, tensor in opened(used):
        _place(model, name, tensor, weights, kinds)
        del tensor
    if model.config.tie_word_embeddings:
        _set_weight(model.lm_head, model.model.embed_tokens.weight)


def _matched(model: Transformer, tensors: Sequence[Stored], source: str) -> list[Stored]:
    """The tensors that the model needs, once it is sure that they are exactly those."""
    wanted = _wanted(model)
    missing = dict(wanted)
    used = []
    for stored in tensors:
        if _is_shared_copy(model.config, stored.name) or stored.name.endswith(DERIVED):
            continue
        if stored.name not in missing:
            reason = "appears twice" if stored.name in wanted else "does not belong to this architecture"
            raise ModelError(f"{stored.path}: tensor {stored.name} {reason}")
        if stored.shape != missing.pop(stored.name):
            shape = wanted[stored.name]
            raise ModelError(
                f"{stored.path}: tensor {stored.name} has shape {stored.shape}; the config asks for {shape}"
            )
        used.append(stored)
    if missing:
        first = next(iter(missing))
        raise ModelError(f"{source}: {len(missing)} tensors are missing, the first is {first} {missing[first]}")
    return used


def _expert_kinds(used: Sequence[Stored]) -> dict[str, type[PackedWeight]]:
    """Stack of experts → the kind of weight that holds all of its tensors as stored: with the most bits that one of
    them needs, and symmetric if all are."""
    kinds: dict[str, type[PackedWeight]] = {}
    for stored in used:
        if match := EXPERT.fullmatch(stored.name):
            name = _stack_of(match)[0]
            with stored.open() as tensor:
                kind = quantize.kind_of(tensor)
            other = kinds.get(name, kind)
            kinds[name] = kind_with(max(kind.bits, other.bits), kind.symmetric and other.symmetric)
    return kinds


def _spared_bytes(checkpoint: Checkpoint, weights: str, offload: Offload) -> int:
    """Memory that experts on disk do not take, no more than they would."""
    config = checkpoint.config
    if not any(EXPERT.fullmatch(stored.name) for stored in checkpoint.tensors):
        raise InputError(f"{checkpoint.path} has no routed experts that could stay on disk; leave expert_memory out")
    if weights not in PACKED or config.hidden_size % GROUP or config.moe_intermediate_size % GROUP:
        raise InputError(
            f"{checkpoint.path}: experts that stay on disk are packed ones, and here they are {weights}, of widths "
            f"{config.hidden_size} and {config.moe_intermediate_size}; load it with weights=int4 or int8, widths being "
            f"multiples of {GROUP}"
        )
    experts = [stored for stored in checkpoint.tensors if EXPERT.fullmatch(stored.name)]
    if weights == "stored":
        num_bytes = sum(stored.num_bytes for stored in experts) * 5 // 4  # as check_fits counts them
    else:
        num_bytes = sum(prod(stored.shape) for stored in experts) * (int(weights.removeprefix("int")) + 1) // 8
    return max(num_bytes - offload.budget, 0)


def _stacks(model: Transformer, weights: str, kinds: Mapping[str, type[PackedWeight]]) -> list[Stacks]:
    """What a file of the model's experts holds, in the order of a step."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            shapes, packed = [], []
            for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                shape = getattr(module, name).shape
                shapes.append((shape[0], shape[1], shape[2]))
                packed.append(packed_shape(shapes[-1], parts, _expert_kind(weights, kinds, f"{path}.{name}")))
            found.append(Stacks(path, *shapes, *packed))
    return found


def _expert_kind(weights: str, kinds: Mapping[str, type[PackedWeight]], stack: str) -> type[PackedWeight]:
    """Of one stack: as `kinds` of "stored" weights has it, else as was asked for."""
    return kinds[stack] if kinds else kind_with(int(weights.removeprefix("int")), False)


def _expert_pieces(tensors: Iterable[tuple[str, Source]], layers: Sequence[ExpertLayer]) -> Iterator[Piece]:
    """Packed, each in its layer's format."""
    of = {layer.stacks.module: layer for layer in layers}
    for name, tensor in tensors:
        match = EXPERT.fullmatch(name)
        assert match
        stack, row = _stack_of(match)
        module, _, leaf = stack.rpartition(".")
        is_down, layer = leaf == "down_proj", of[module]
        kind = _kind_in(layer, is_down)
        packed = quantize.to_packed(_packable(tensor), kind.bits, name, kind).packed
        del tensor
        yield Piece(layer, int(match[2]), is_down, row.part, packed)


def _kind_in(layer: ExpertLayer, is_down: bool) -> type[PackedWeight]:
    """Of the weights of one of the stacks."""
    return kind_of_block((layer.stacks.packed_down if is_down else layer.stacks.packed_gate_up)[-1])


def _stack_of(match: re.Match[str]) -> tuple[str, Stacked]:
    """The parameter that an expert's tensor goes into, and its row of the table."""
    prefix, _, projection = match.groups()
    row = next(row for row in RENAMES if projection in row.checkpoint)
    return prefix + row.parameter, row


def _without_absent_mtp(checkpoint: Checkpoint) -> Checkpoint:
    """Tools that rewrite checkpoints drop the MTP layer but not its mention; such a model is whole without it."""
    config = checkpoint.config
    first = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(stored.name.startswith(first) for stored in checkpoint.tensors):
        return checkpoint
    log.warning("%s has no MTP layer, though its config counts one: loaded without", checkpoint.path)
    return dataclasses.replace(checkpoint, config=dataclasses.replace(config, num_nextn_predict_layers=0))


def chosen_format(weights: str, checkpoint: Checkpoint) -> str:
    """The format that `load` keeps a checkpoint's weights in where it is asked for `weights`."""
    quantised = any(stored.is_quantised for stored in checkpoint.tensors)
    has_fp8 = quantised and checkpoint.path.is_dir()
    if weights == "fp8" and not has_fp8:
        raise ModelError(f"{checkpoint.path} holds no FP8 weights to keep; load it with weights=float32 or int8")
    if weights == "auto":
        native = "stored" if cpu.available() else "float32"
        return "fp8" if has_fp8 else native if quantised else "float32"
    return weights


def quantized(model: Transformer) -> Transformer:
    """A copy of a full-precision model in 8 bits, as `load` would read it; what stays as it is shares its memory."""
    copy = build(model.config, device="meta")
    quantize_from(copy, model)
    return copy.eval()


def quantize_from(copy: Transformer, model: Transformer) -> None:
    """Bring a copy made by `quantized` to the model's parameters of this moment."""
    for name, tensor in checkpoint_tensors(model):
        _place(copy, name, tensor, "int8")
    if model.config.tie_word_embeddings:
        _set_weight(copy.lm_head, copy.model.embed_tokens.weight)


def save(model: Transformer, folder: Path) -> None:
    """Write config.json and model.safetensors under the checkpoint's names, as `load` and `transformers` read them.

    Raises:
        ModelError: a layer is quantised; only full-precision models are saved.
    """
    files.save(folder, model.config, checkpoint_tensors(model))


def checkpoint_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every parameter and buffer: `fill` backwards."""
    for name, module in model.named_modules():
        parts = (getattr(module, leaf, None) for leaf in ("weight", "gate_up_proj", "down_proj", "packed_w_uk"))
        if any(isinstance(part, (PackedWeight, PackedHeads, PackedExperts, FP8Weight)) for part in parts):
            raise ModelError(f"{name} is quantised; load the model with weights=float32 to save it")
    for name, tensor in _stored(model):
        rows = [row for row in RENAMES if name.endswith(f".mlp.{row.parameter}")]
        if not rows:
            yield name, tensor.detach()
            continue
        for row in rows:
            prefix = name.removesuffix(row.parameter)
            for expert, piece in enumerate(tensor.detach().chunk(row.num_parts, dim=1)[row.part]):
                yield prefix + row.checkpoint.format(expert), piece


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


def _place(
    model: Transformer,
    name: str,
    tensor: Source,
    weights: str,
    kinds: Mapping[str, type[PackedWeight]] | None = None,
) -> None:
    match = EXPERT.fullmatch(name)
    if match:
        stack, row = _stack_of(match)
        config = model.config
        if weights in PACKED and config.hidden_size % GROUP == config.moe_intermediate_size % GROUP == 0:
            _pack_expert(model, stack, row, int(match[2]), tensor, _expert_kind(weights, kinds or {}, stack))
        else:
            _place_expert(model, stack, row, int(match[2]), tensor, keep=weights == "fp8")
        return
    path, _, leaf = name.rpartition(".")
    if path.endswith(".kv_b_proj"):
        _place_kv_b(model.get_submodule(path.rpartition(".")[0]), name, tensor, weights)
        return
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = _dense(tensor)
    elif leaf == "bias":
        setattr(module, leaf, nn.Parameter(_dense(tensor)))
    else:
        _set_weight(module, _as_weight(module, path, name, tensor, weights))


def _place_kv_b(attention: nn.Module, name: str, tensor: Source, weights: str) -> None:
    """MLA's kv_b_proj, of which no slice is W_UK turned over. So a packed model has both parts by themselves instead,
    packed once: as they lie where the file has them so. In FP8, and where widths do not allow packing, it stays whole
    in float32."""
    assert isinstance(attention, MLA)
    H, N, V, C = attention.heads, attention.nope, attention.value, attention.latent
    if weights not in PACKED or N % GROUP or C % GROUP or V % TILE:
        assert attention.kv_b_proj is not None
        _set_weight(attention.kv_b_proj, nn.Parameter(_dense(tensor)))
        return
    if isinstance(tensor, KVBParts):
        w_uk, w_uv = (_packed(part, part.name, weights) for part in (tensor.w_uk, tensor.w_uv))
        values = w_uv.packed.unflatten(0, (H, -1))
    else:
        turned = _dense(tensor).unflatten(0, (H, -1))[:, :N].transpose(1, 2)  # [H, C, N]
        w_uk = _packed(turned.flatten(0, 1), name, weights)
        values = _packed(tensor, name, weights).packed.unflatten(0, (H, -1))[:, N // TILE :].clone()
    attention.kv_b_proj = None
    attention.packed_w_uk = PackedHeads(w_uk.packed.unflatten(0, (H, -1)), (H, C, N))
    attention.packed_w_uv = PackedHeads(values, (H, V, C))


def _as_weight(module: nn.Module, path: str, name: str, tensor: Source, weights: str) -> Weight:
    """The tensor in the format that was asked for, as far as this module can compute with it."""
    quantisable = isinstance(module, (Linear, Embedding))
    if weights == "fp8" and isinstance(tensor, FP8Weight) and quantisable and isinstance(module, Linear):
        return tensor
    if weights in PACKED and quantisable and tensor.shape[-1] % GROUP == 0:
        return _packed(tensor, name, "int8" if weights == "int4" and path in EIGHT_BITS else weights)
    return nn.Parameter(_dense(tensor))


def _packed(tensor: Source, name: str, weights: str) -> PackedWeight:
    """A weight in the bits that a format of `PACKED` gives it."""
    bits = quantize.bits_of(tensor) if weights == "stored" else int(weights.removeprefix("int"))
    return quantize.to_packed(_packable(tensor), bits, name)


def _packable(tensor: Source) -> Tensor | GGUFTensor:
    return tensor if isinstance(tensor, (Tensor, GGUFTensor)) else tensor.dequantize()


def _place_expert(model: Transformer, name: str, row: Stacked, expert: int, tensor: Source, *, keep: bool) -> None:
    if keep and isinstance(tensor, FP8Weight):
        stack = _fp8_stack(model, name, row.num_parts, tensor)
        stack.values[expert, row.part] = tensor.values
        stack.scale[expert, row.part] = tensor.scale
        return
    parameter = _materialize(model, name)
    if parameter is None:
        raise ModelError(f"{name}: some experts are FP8, expert {expert} is not; load the model with weights=float32")
    parameter.data[expert].chunk(row.num_parts)[row.part].copy_(_dense(tensor))


def _pack_expert(
    model: Transformer, name: str, row: Stacked, expert: int, tensor: Source, kind: type[PackedWeight]
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    stack = getattr(module, leaf)
    if not isinstance(stack, PackedExperts):
        E, rows, K = stack.shape
        shape = packed_shape((E, rows, K), row.num_parts, kind)
        stack = PackedExperts(torch.empty(shape, dtype=torch.uint8), (E, rows, K))
        _replace(module, leaf, stack)
    stack.packed[expert, row.part] = quantize.to_packed(_packable(tensor), kind.bits, name, kind).packed


def _fp8_stack(model: Transformer, name: str, num_parts: int, one: FP8Weight) -> FP8Weight:
    """The stack [E, parts, N, K] of that name, allocated on its first use."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found = getattr(module, leaf)
    if isinstance(found, FP8Weight):
        return found
    shape, blocks = (found.shape[0], num_parts, *one.shape), (found.shape[0], num_parts, *one.scale.shape)
    stack = FP8Weight(torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(blocks))
    _replace(module, leaf, stack)
    return stack


def _replace(module: nn.Module, leaf: str, stack: PackedExperts | FP8Weight) -> None:
    """Put a stack in the place of the registered parameter, which would admit nothing but a parameter."""
    delattr(module, leaf)
    setattr(module, leaf, stack)


def _set_weight(module: nn.Module, weight: Weight) -> None:
    """Put a weight in the place of the registered parameter, which would admit nothing but a parameter."""
    if not isinstance(weight, nn.Parameter):
        del module.weight
    setattr(module, "weight", weight)  # noqa: B010  as an attribute assignment it would have the type of a submodule


def _materialize(model: Transformer, name: str) -> Tensor | None:
    """The parameter of that name, allocated on its first use; None if an FP8 stack has taken its place."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(getattr(module, leaf), FP8Weight):
        return None
    parameter = module.get_parameter(leaf)
    if parameter.is_meta:
        setattr(module, leaf, nn.Parameter(torch.empty(parameter.shape)))
    return module.get_parameter(leaf)


def _dense(tensor: Source) -> Tensor:
    """The values in float32, in memory of our own."""
    source = _packable(tensor)
    return source.float() if isinstance(source, Tensor) else quantize.dequantize(source)
