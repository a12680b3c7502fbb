"""How a model is laid out over devices, and what then lies on one of them.

A layout has `pipeline` stages of layers. In a stage, `data` replicas of attention each serve their own sequences, each
cut over `tensor` devices by heads; the routed experts lie whole on groups of `expert` devices (with 1, every expert is
cut over a replica's `tensor` devices instead). So a stage has data · tensor devices, and MLA's cache, which has one
head, lies whole on each device of a replica: the reason why DeepSeek serves it with data, not tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from porcelet.config import ModelConfig
from porcelet.plan.model import PlannedModel

MAX_TENSOR = 16  # devices that share heads; beyond, they wait for one another more than they compute


@dataclass(frozen=True)
class Layout:
    """Sizes of the four ways of parallelism; `expert` is 1, or divides data · tensor and is a
    multiple of tensor."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.data * self.tensor

    def __str__(self) -> str:
        words = (("PP", self.pipeline), ("DP", self.data), ("TP", self.tensor), ("EP", self.expert))
        return " · ".join(f"{word}{size}" for word, size in words if size > 1) or "one device"


def layouts(config: ModelConfig, num_devices: int, per_node: int) -> Iterator[Layout]:
    """Every layout of exactly `num_devices`: heads are cut within a node, for 16 at most, and divide; stages have a
    layer at least; experts divide, or have at most one redundant copy each."""
    for pipeline in divisors(num_devices):
        if pipeline > config.num_hidden_layers:
            continue
        stage = num_devices // pipeline
        for tensor in divisors(stage):
            if tensor > min(per_node, MAX_TENSOR) or config.num_attention_heads % tensor:
                continue
            yield Layout(pipeline, stage // tensor, tensor)
            if config.n_routed_experts and 1 < stage <= 2 * config.n_routed_experts:
                yield Layout(pipeline, stage // tensor, tensor, stage)


def divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def weights_on_device(model: PlannedModel, layout: Layout, *, mtp: bool = False) -> float:
    """Bytes of weights on the fullest device: the first or the last stage, whichever has more."""
    return max(sum(stage.values()) for stage in _stages(model, layout, mtp=mtp))


def _stages(model: PlannedModel, layout: Layout, *, mtp: bool) -> Iterator[dict[str, float]]:
    """Bytes of each part on a device of the first, an inner and the last stage."""
    shares = shared_by(model.config, layout)
    layers = {part: model.sizes[part] * share / layout.pipeline for part, share in shares.items()}
    tied = not model.sizes["head"]
    head = (model.sizes["embedding"] if tied else model.sizes["head"]) / layout.tensor
    draft = model.sizes["mtp"] / max(layout.expert, layout.tensor) if mtp else 0.0
    embedding = model.sizes["embedding"] / layout.tensor
    if layout.pipeline == 1:
        yield layers | {"embedding": embedding, "head": 0.0 if tied else head, "mtp": draft}
        return
    yield layers | {"embedding": embedding}
    yield layers | {"head": head, "mtp": draft}


def shared_by(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """What share of each part of its layers a device of a stage holds. MLA's down-projections are on every one."""
    cut = 1 / layout.tensor
    replicated = 0.0
    if config.is_mla:
        down = config.hidden_size * ((config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim)
        replicated = down / config.num_attention_weights()
    attention = replicated + (1 - replicated) * cut
    experts = 1 / layout.expert if layout.expert > 1 else cut
    return {"attention": attention, "dense": cut, "router": 1.0, "shared": cut, "experts": experts, "norms": 1.0}


def cache_on_device(config: ModelConfig, layout: Layout, bytes_a_value: float) -> float:
    """Bytes of cache a token of one of the device's own sequences takes there. MLA's latent has no heads to cut."""
    values = config.cache_values_per_token() / layout.pipeline
    if not config.is_mla:
        values /= min(layout.tensor, config.num_key_value_heads)
    return values * bytes_a_value
