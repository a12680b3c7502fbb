"""What lies in a device's memory while it serves: weights, cache, activations, the runtime; and how much cache fits.

The formulas hold for any engine that keeps MLA's latent once a token (docs/planning.md lists what others keep). What
porcelet itself takes on this machine is in local.py, byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass

from porcelet.plan.figure import Figure, Number, weakest
from porcelet.plan.hardware import Device
from porcelet.plan.layout import Layout, cache_on_device, weights_on_device
from porcelet.plan.model import PlannedModel

# What driver, libraries, graphs and communication buffers take on a card; what Python and torch take on a CPU.
RUNTIME = {
    "gpu": Number(2.5e9, "assumed", "CUDA context, graphs, communication buffers", "2025-05", 1e9, 4e9),
    "npu": Number(2.5e9, "assumed", "as on a GPU", "2025-05", 1e9, 4e9),
    "cpu": Number(0.25e9, "measured", "porcelet's process without a model", "2026-11-23", 0.22e9, 0.3e9),
}
RESERVE = Number(0.05, "assumed", "left free: fragments, peaks", "2025-05", 0.03, 0.1)
CHUNK = 8192  # tokens of prompts a device computes in one step, at most


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device of a layout. `room` are tokens of cache that fit beside all else; each of them is one
    of the device's own sequences'."""

    weights: float
    activations: float
    runtime: float
    reserve: float
    token: float
    available: float

    @property
    def fixed(self) -> float:
        """All but the cache."""
        return self.weights + self.activations + self.runtime + self.reserve

    @property
    def room(self) -> float:
        return max(0.0, (self.available - self.fixed) / self.token)

    @property
    def fits(self) -> bool:
        return self.fixed < self.available

    def with_cache(self, tokens: float) -> float:
        """Bytes with so many cached tokens."""
        return self.fixed + tokens * self.token


def device_memory(
    model: PlannedModel, layout: Layout, device: Device, *, cache_bytes: float = 2, mtp: bool = False
) -> Memory:
    """What the fullest device of a layout holds, for prompts in chunks of `CHUNK` tokens."""
    return Memory(
        weights=weights_on_device(model, layout, mtp=mtp),
        activations=_activations(model, layout, CHUNK),
        runtime=RUNTIME[device.kind].value,
        reserve=RESERVE.value * device.memory.value,
        token=cache_on_device(model.config, layout, cache_bytes),
        available=device.memory.value,
    )


def memory_figures(memory: Memory, model: PlannedModel, device: Device) -> dict[str, Figure]:
    """The parts in GB with their formulas and sources."""
    own = (model.source,)
    runtime, reserve = RUNTIME[device.kind], RESERVE
    total = (device.memory.cited(f"{device.name} memory"),)
    label = weakest((device.memory.label, runtime.label))
    return {
        "weights": Figure(memory.weights, "B", "bytes of each part x the share of it on a device", "derived", own),
        "activations": Figure(memory.activations, "B", "what one step of 8,192 tokens keeps at its widest", "derived"),
        "runtime": _ranged(runtime, memory.runtime, "driver, libraries, graphs"),
        "reserve": Figure(memory.reserve, "B", "5 % of the memory", label, (reserve.cited("reserve"), *total)),
        "cache token": Figure(memory.token, "B", "values a token x bytes / (stages x heads cut)", "derived", own),
        "available": Figure(memory.available, "B", "memory of a device", device.memory.label, total),
        "cache tokens": Figure(memory.room, "tokens", "(available - all else) / cache token", label, total),
    }


def _ranged(number: Number, value: float, formula: str) -> Figure:
    low, high = number.range
    return Figure(value, "B", formula, number.label, (number.cited(formula),), low, high)


def _activations(model: PlannedModel, layout: Layout, tokens: int) -> float:
    """Bytes that a step keeps at once: the hidden states, the widest layer's insides, the logits of a few rows."""
    config = model.config
    heads = config.num_attention_heads / layout.tensor
    attention = heads * (2 * config.head_dim + (config.v_head_dim or config.head_dim))
    dense = 2 * config.intermediate_size / layout.tensor
    routed = 0.0
    if config.n_routed_experts:
        spread = layout.data / layout.expert if layout.expert > 1 else 1 / layout.tensor
        routed = config.num_experts_per_tok * spread * (2 * config.moe_intermediate_size + 2 * config.hidden_size)
    widest = max(attention, dense, routed)
    return 2 * tokens * (4 * config.hidden_size + widest) + 4 * 256 * config.vocab_size / layout.tensor
