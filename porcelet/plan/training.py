"""Training on a fleet: operations, time, utilisation and memory.

Operations are those of the matrix products and of attention, forward once and backward twice; what is computed again to
save memory does not count. Time is operations over the share of the peak that whole training runs have reached, a
number with a wide range: see `REACHED`. Utilisation is told with attention and without, and attention by the pairs
causality allows or by the full square, as papers differ in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from porcelet.config import ModelConfig
from porcelet.errors import InputError
from porcelet.plan.figure import Figure, Number, weakest
from porcelet.plan.hardware import Fleet
from porcelet.plan.layout import Layout, divisors, layouts, shared_by
from porcelet.plan.memory import RESERVE, RUNTIME
from porcelet.plan.model import PlannedModel, part_values

# Of the dense BF16 peak, with causal attention: V2 0.25 (172.8K H800 hours a trillion tokens), DeepSeek-67B 0.39
# (300.6K), V3 0.39 (180K; its products are FP8), all counted with `operations` below.
REACHED = Number(
    0.36, "derived", "DeepSeek-V2 report, section 3.2.3, and DeepSeek-V3 report, table 1", "2024-12", 0.25, 0.4
)
ACTIVATION = 2  # bytes a value
WEIGHT, GRADIENT = 2, 4  # bytes a parameter: BF16 to compute with, FP32 to add up in
OPTIMIZER = {"adamw": 8, "adamw-fp32": 12}  # master in FP32 and two moments, in BF16 (V3 report, 3.3.1) or FP32


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: `tokens` in all, sequences of `sequence` tokens, `batch` of them a step."""

    tokens: float
    sequence: int = 4096
    batch: int = 15360
    optimizer: str = "adamw"
    recompute: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence", "batch"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.optimizer not in OPTIMIZER:
            raise InputError(f"optimizer is {self.optimizer!r}; the planner knows {', '.join(OPTIMIZER)}")


@dataclass(frozen=True)
class Operations:
    """Operations of one trained token: of the products, and of attention by causal pairs and by the full square."""

    products: float
    causal: float
    square: float


@dataclass(frozen=True)
class TrainingPlan:
    """How long a run takes on a fleet, how well it uses it, and the layouts that fit with the bytes of a device."""

    device_hours: Figure
    days: Figure
    utilisation: Figure
    without_attention: Figure
    layouts: list[tuple[Layout, float]]


def operations(config: ModelConfig, sequence: int, *, mtp: bool = False) -> Operations:
    """What one token of a sequence costs; `mtp` adds the MTP layer and its pass through the head."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers + (1 if mtp else 0)
    multiplied = sum(map(config.num_multiplied, range(layers))) + head * (2 if mtp else 1)
    pairs = (sequence + 1) / 2
    return Operations(
        6 * multiplied,
        3 * layers * config.attention_flops(1) * pairs,
        3 * layers * config.attention_flops(1) * sequence,
    )


def plan_training(model: PlannedModel, fleet: Fleet, run: Run) -> TrainingPlan:
    """Time, utilisation, and the layouts that fit, least memory first."""
    device, cost = fleet.device, operations(model.config, run.sequence)
    rate = device.rates.get("bf16") or device.rates["fp32"]
    sources = (rate.cited(f"{device.name} rate"), REACHED.cited("share of the peak"), model.source)
    label = weakest((rate.label, REACHED.label))
    total = run.tokens * (cost.products + cost.causal)
    hours = total / (rate.value * 3600)
    low, high = REACHED.range

    def over_share(amount: float, unit: str, formula: str) -> Figure:
        return Figure(amount / REACHED.value, unit, formula, label, sources, amount / high, amount / low)

    def of_peak(share: float, formula: str) -> Figure:
        return Figure(share * REACHED.value, "of peak", formula, label, sources, share * low, share * high)

    return TrainingPlan(
        over_share(hours, "device hours", "tokens x operations a token / (peak x share reached) / 3600"),
        over_share(hours / fleet.count / 24, "days", "device hours / devices / 24"),
        of_peak(1.0, "operations, attention's causal pairs among them / peak"),
        of_peak(cost.products / (cost.products + cost.causal), "operations of the products alone / peak"),
        sorted(_fitting(model, fleet, run), key=lambda row: row[1]),
    )


def reached(
    config: ModelConfig, run: Run, tokens_per_second: float, *, mtp: bool = False
) -> tuple[float, float, float]:
    """FLOP/s of a device that trains so many tokens a second: by the products alone, with causal attention, with the
    full square."""
    cost = operations(config, run.sequence, mtp=mtp)
    return tuple(tokens_per_second * (cost.products + more) for more in (0.0, cost.causal, cost.square))  # type: ignore[return-value]


# ---- memory ---------------------------------------------------------------------------------------------------------


def training_layouts(config: ModelConfig, num_devices: int, per_node: int) -> Iterator[Layout]:
    """As for serving, but experts may lie on fewer devices than a stage has, and then have replicas as well."""
    for layout in layouts(config, num_devices, per_node):
        if layout.expert == 1:
            yield layout
        else:
            stage = layout.data * layout.tensor
            sizes = (
                size
                for size in divisors(stage)
                if size > 1 and size % layout.tensor == 0 and config.n_routed_experts % size == 0
            )
            yield from (replace(layout, expert=size) for size in sizes)


def device_bytes(model: PlannedModel, layout: Layout, run: Run) -> float:
    """Memory of one device: parameters, gradients, its share of the optimizer's state (cut over replicas, ZeRO-1), and
    the activations of as many sequences as the pipeline has stages."""
    shares, values = shared_by(model.config, layout), part_values(model.config)
    ends = (values["embedding"] + values["head"]) / layout.tensor / min(2, layout.pipeline)
    stage = layout.data * layout.tensor
    states = ends * _state(run, layout.data)
    for part, share in shares.items():
        replicas = layout.data if part != "experts" or layout.expert == 1 else stage / layout.expert
        states += values[part] * share / layout.pipeline * _state(run, replicas)
    layers = model.config.num_hidden_layers / layout.pipeline
    kept = layout.pipeline * run.sequence * layers * _kept_values(model.config, layout, run)
    return states + ACTIVATION * kept + 4 * run.sequence * model.config.vocab_size / layout.tensor


def _state(run: Run, replicas: float) -> float:
    """Bytes a parameter."""
    return WEIGHT + GRADIENT + OPTIMIZER[run.optimizer] / replicas


def _kept_values(config: ModelConfig, layout: Layout, run: Run) -> float:
    """Values a token and layer that the backward pass wants: the layer's input alone if it is computed again; else
    what goes into its products, norms and gates."""
    if run.recompute:
        return 2 * config.hidden_size
    heads = config.num_attention_heads * (2 * config.head_dim + 2 * (config.v_head_dim or config.head_dim))
    active = config.num_experts_per_tok + config.n_shared_experts
    width = active * config.moe_intermediate_size if config.n_routed_experts else config.intermediate_size
    return 6 * config.hidden_size + (heads + 4 * width) / layout.tensor


def _fitting(model: PlannedModel, fleet: Fleet, run: Run) -> Iterator[tuple[Layout, float]]:
    room = fleet.device.memory.value * (1 - RESERVE.value) - RUNTIME[fleet.device.kind].value
    for layout in training_layouts(model.config, fleet.count, fleet.device.per_node):
        needed = device_bytes(model, layout, run)
        if needed <= room and layout.data * layout.pipeline <= run.batch:
            yield layout, needed
