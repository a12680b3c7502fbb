"""Low-rank adapters in training: W + alpha / r · B·A with W frozen (Hu et al. 2021).

A layer with an adapter still multiplies with one matrix, the merged one, which `refresh` computes after each step of
the optimizer. So trainer, engine and the saved model compute alike, bit for bit; model code and engine know of no
adapter; and step 0 is the base, for B begins as zeros. The backward pass never forms the gradient of W: with g = dL/dy,

    dA = s · (g·B)ᵀ·x        dB = s · gᵀ·(x·Aᵀ)        s = alpha / r

costs r / min(inputs, outputs) of that product. The price is a second copy of each adapted weight. The merge is made
anew from the base each time, so nothing drifts. Left out: dropout on x, which would make trainer and sampler two
models; adapters of routed experts, head and embedding; a quantised base.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from porcelet.config import LoraConfig, TrainConfig
from porcelet.errors import InputError
from porcelet.kernels.pointwise import add
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer
from porcelet.train.hashing import hashed
from porcelet.weights.adapters import Adapter, check_fits, find_targets, merged, peft_loads, read_adapter, write_adapter
from porcelet.weights.load import save

if TYPE_CHECKING:
    from jaxtyping import Float

log = logging.getLogger(__name__)


class Adapted(Linear):
    """A linear layer with an adapter. `weight` is the merged one, `base` the frozen one; both have no gradient."""

    def __init__(self, layer: Linear, rank: int, scale: float, seed: int) -> None:
        nn.Module.__init__(self)
        assert isinstance(layer.weight, nn.Parameter), "a model to train is in full precision"
        num_outputs, num_inputs = layer.weight.shape
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        self.base = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        generator, bound = torch.Generator().manual_seed(seed), 1.0 / math.sqrt(num_inputs)
        self.lora_A = nn.Parameter(torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, rank))

    def forward(self, x: Float[Tensor, "T num_inputs"]) -> Float[Tensor, "T num_outputs"]:
        if not torch.is_grad_enabled():
            return super().forward(x)
        out: Tensor = _Product.apply(x, self.weight, self.lora_A, self.lora_B, self.scale)  # type: ignore[no-untyped-call]
        return out if self.bias is None else add(out, self.bias)

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge anew, in place: a recorded step of the engine reads the weight where it lies."""
        assert isinstance(self.weight, Tensor)
        self.weight.copy_(merged(self.base, self.lora_A, self.lora_B, self.scale))


class _Product(torch.autograd.Function):
    """x · weightᵀ, with the gradients of the two factors in the place of the weight's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        (g,), (x, weight, a, b) = gradients, ctx.saved_tensors
        to_a = (g @ b).t() @ x  # [r, inputs]
        to_b = g.t() @ (x @ a.t())  # [outputs, r]
        to_x = g @ weight if ctx.needs_input_grad[0] else None
        return to_x, None, to_a * ctx.scale, to_b * ctx.scale, None


def add_adapters(model: Transformer, config: LoraConfig, seed: int) -> None:
    """Freeze a model and give its target layers adapters, new ones or those in the folder `config.adapter`.

    Raises:
        InputError: a target that is no layer, or settings that are not the folder's.
        ModelError: the folder cannot be read, or belongs to another model.
    """
    layers = find_targets(model, config.targets)
    if any(not peft_loads(model, name) for name in layers):
        log.warning("peft cannot load adapters of this architecture's MLPs; the merged model and porcelet can")
    given = _given(model, config, set(layers)) if config.adapter else None
    model.requires_grad_(False)
    for name, layer in layers.items():
        adapted = Adapted(layer, config.rank, config.alpha / config.rank, hashed(seed, "lora", name))
        if given:
            for parameter, matrix in zip((adapted.lora_A, adapted.lora_B), given.matrices[name], strict=True):
                parameter.data.copy_(matrix)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted)
    refresh(model)


def _given(model: Transformer, config: LoraConfig, layers: set[str]) -> Adapter:
    found = read_adapter(Path(config.adapter))
    check_fits(model, found, config.adapter)
    if (found.rank, found.alpha) != (config.rank, config.alpha):
        raise InputError(
            f"[lora] adapter {config.adapter} has rank={found.rank} and alpha={found.alpha}, the recipe {config.rank} "
            f"and {config.alpha}; set the folder's"
        )
    if layers != found.matrices.keys():
        one = min(layers ^ found.matrices.keys())
        raise InputError(f"[lora] targets and the layers of adapter {config.adapter} differ, for one in {one}")
    return found


def adapted_layers(model: Transformer) -> dict[str, Adapted]:
    """The layers with an adapter, by name; none in a model that is trained whole."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def refresh(model: Transformer) -> None:
    """Merge all adapters anew: after each step of the optimizer, and after a checkpoint was restored."""
    for layer in adapted_layers(model).values():
        layer.refresh()


def save_result(model: Transformer, config: TrainConfig, output: Path) -> None:
    """What a run leaves behind: the model; of a run with adapters those in `adapter/`, and the merged model if asked
    for. The model's layers are plain ones afterwards."""
    layers = adapted_layers(model)
    if layers:
        targets = () if config.lora.targets == ("all-linear",) else config.lora.targets
        matrices = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
        write_adapter(output / "adapter", Adapter(config.lora.rank, config.lora.alpha, matrices, targets, config.model))
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _plain(layer))
    if config.lora.merge or not layers:
        save(model, output)


def _plain(layer: Adapted) -> Linear:
    with torch.device("meta"):
        plain = Linear(1, 1)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain
