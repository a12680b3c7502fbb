"""What one step asks of a device: for each kernel its operations, the bytes it moves and those it sends, and the time.

A kernel's time is the larger of operations over the rate and bytes over the bandwidth that such kernels reach, plus
what starting it costs (Williams et al. 2009, the roofline). Rates are shares of the published peaks; each share is a
number with a range, so a time has a range too. Matrix products count 2 operations a multiplication; attention counts
the pairs that causality allows. Left out: the sampler, the imbalance of pipeline stages, wave quantisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from porcelet.config import ModelConfig
from porcelet.plan.figure import Figure, Label, Number, weakest
from porcelet.plan.hardware import Device
from porcelet.plan.layout import Layout, cache_on_device, shared_by
from porcelet.plan.model import PlannedModel

# How much of the traffic between experts hides behind computing: two halves of a batch take turns (DeepSeek-V3 report,
# section 3.4); nothing hides in the worst case, all of the shorter one in the best.
OVERLAP = Number(0.3, "derived", "usual where DeepSeek and SGLang publish their speeds (G7, G11)", "2025-05", 0.0, 1.0)
# The fullest of the devices that share the experts has this many times the mean's tokens.
IMBALANCE = Number(1.15, "assumed", "balanced by redundant experts (EPLB)", "2025-02", 1.0, 1.5)
# What a message costs before its first byte arrives: between the devices of a node, and between nodes.
LATENCY = Number(1e-5, "assumed", "a small all-reduce over NVLink", "2025-05", 5e-6, 2.5e-5)
FAR_LATENCY = Number(3e-5, "assumed", "a message over InfiniBand that kernels send themselves", "2025-05", 1.5e-5, 6e-5)
PASSES = 14  # times a layer's pointwise kernels read or write the hidden state: norms, residuals, rounding, rotation
ACTIVATION = 2  # bytes a value between kernels
DISPATCHED, COMBINED = 1, 2  # bytes a value sent to experts in FP8, and back in BF16


@dataclass(frozen=True)
class Batch:
    """What one attention replica computes in a step: `sequences` with `new` tokens each, behind `cached` ones."""

    sequences: float
    new: float
    cached: float

    @property
    def tokens(self) -> float:
        return self.sequences * self.new

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key in one layer."""
        return self.tokens * (self.cached + (self.new + 1) / 2)


@dataclass(frozen=True)
class Kernel:
    """`count` equal launches on one device, each with its `flops`, `bytes` of memory and `sent` bytes over the link of
    a node, or the network between nodes. `rates` are the formats it may be computed in."""

    name: str
    count: float
    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    over_network: bool = False
    rates: tuple[str, ...] = ("bf16", "fp16", "fp32")
    launches: int = 1  # that make it up
    hides: bool = False  # its sending may hide behind computing
    uneven: bool = False  # the busiest device has IMBALANCE times this


@dataclass(frozen=True)
class KernelTime:
    """A kernel's share of a step in seconds, all launches together, and what bounds it."""

    kernel: Kernel
    seconds: float
    limit: str  # "compute", "memory", "link" or "network"


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the device, with range, and how they come about."""

    seconds: float
    low: float
    high: float
    kernels: Sequence[KernelTime]

    @property
    def limit(self) -> str:
        """What most of the time is bound by."""
        totals: dict[str, float] = {}
        for row in self.kernels:
            totals[row.limit] = totals.get(row.limit, 0.0) + row.seconds
        return max(totals, key=totals.__getitem__)


def step_time(model: PlannedModel, layout: Layout, device: Device, batch: Batch, cache_bytes: float = 2) -> StepTime:
    """The time of one stage's step; with a pipeline, of the mean one."""
    kernels = list(step_kernels(model, layout, device, batch, cache_bytes))
    low, value, high = (_seconds(kernels, device, at) for at in (-1, 0, 1))
    return StepTime(value, low, high, [kernel_time(kernel, device, 0) for kernel in kernels])


def step_kernels(
    model: PlannedModel, layout: Layout, device: Device, batch: Batch, cache_bytes: float = 2
) -> Iterator[Kernel]:
    """All kernels of a step on one device of a stage."""
    config, tokens = model.config, batch.tokens
    layers = config.num_hidden_layers / layout.pipeline
    rates = model.format.rates
    share = shared_by(config, layout)
    passed = PASSES * tokens * config.hidden_size * ACTIVATION
    yield Kernel("pointwise", layers, 0.0, passed, launches=6)
    projected = 2 * tokens * config.num_attention_weights() * share["attention"]
    moved = model.sizes["attention"] / config.num_hidden_layers * share["attention"]
    yield Kernel("projections", layers, projected, moved, rates=rates, launches=6 if config.is_mla else 2)
    yield _attention(config, layout, batch, layers, cache_bytes)
    yield from _feed_forward(model, layout, device, tokens, rates)
    head = config.vocab_size * config.hidden_size / layout.tensor / layout.pipeline
    head_bytes = (model.sizes["head"] or model.sizes["embedding"]) / layout.tensor / layout.pipeline
    yield Kernel("head", 1, 2 * batch.sequences * head, head_bytes, rates=rates)
    if layout.tensor > 1:
        sent = 2 * (layout.tensor - 1) / layout.tensor * tokens * config.hidden_size * ACTIVATION
        yield Kernel("all-reduce", 2 * layers, sent=sent, over_network=layout.tensor > device.per_node)
    if layout.pipeline > 1:
        hidden = tokens * config.hidden_size * ACTIVATION / layout.tensor
        yield Kernel("next stage", 1, sent=hidden, over_network=layout.num_devices > device.per_node)


def _attention(config: ModelConfig, layout: Layout, batch: Batch, layers: float, cache_bytes: float) -> Kernel:
    """Scores and sums over the cache, in whichever form of MLA has fewer operations."""
    held = (batch.cached + batch.new) * batch.sequences
    moved = held * cache_on_device(config, layout, cache_bytes) / layers
    flops = config.attention_flops(1) * batch.pairs
    if config.is_mla and batch.new < config.absorbed_below():
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        flops = 2 * config.num_attention_heads * width * batch.pairs
    elif config.is_mla:
        expand = config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        flops += 2 * batch.sequences * batch.cached * expand
    return Kernel("attention", layers, flops / layout.tensor, moved, launches=2)


def _feed_forward(
    model: PlannedModel, layout: Layout, device: Device, tokens: float, rates: tuple[str, ...]
) -> Iterator[Kernel]:
    """The dense layers', the shared and the routed experts' products, and what the last send."""
    config, share = model.config, shared_by(model.config, layout)
    moe = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    dense = config.num_hidden_layers - moe
    if dense:
        flops = 6 * tokens * config.hidden_size * config.intermediate_size * share["dense"]
        yield Kernel(
            "dense MLP",
            dense / layout.pipeline,
            flops,
            model.sizes["dense"] / dense * share["dense"],
            rates=rates,
            launches=2,
        )
    if not moe:
        return
    layers, expert = moe / layout.pipeline, 3 * config.hidden_size * config.moe_intermediate_size
    shared = 2 * tokens * config.n_shared_experts * expert * share["shared"]
    yield Kernel(
        "shared experts", layers, shared, model.sizes["shared"] / moe * share["shared"], rates=rates, launches=2
    )
    active, total = config.num_experts_per_tok, config.n_routed_experts
    everyone = tokens * layout.expert / layout.tensor if layout.expert > 1 else tokens  # who share these experts
    hit = 1 - (1 - active / total) ** everyone
    routed = 2 * everyone * active * expert * share["experts"]
    moved = model.sizes["experts"] / moe * share["experts"] * hit
    yield Kernel("routed experts", layers, routed, moved, rates=rates, launches=5, uneven=layout.expert > 1)
    if layout.expert > 1:
        yield _exchange(config, layout, device, tokens, layers)


def _exchange(config: ModelConfig, layout: Layout, device: Device, tokens: float, layers: float) -> Kernel:
    """What a device sends to experts elsewhere and gets back: across nodes at most one copy a node and token, where the
    gate limits a token's nodes (DeepSeek-V3 report, section 3.2.2); few tokens go to each expert by themselves."""
    width = config.hidden_size * (DISPATCHED + COMBINED)
    own = tokens / layout.tensor  # each device of a replica sends its part of the tokens
    nodes = -(-layout.expert // device.per_node)
    if nodes == 1:
        sent = own * config.num_experts_per_tok * width * (1 - 1 / layout.expert)
        return Kernel("exchange", layers, sent=sent, launches=2, hides=True, uneven=True)
    copies = min(config.num_experts_per_tok, config.topk_group if config.n_group > 1 else nodes, nodes)
    if own <= FEW_TOKENS:
        copies = config.num_experts_per_tok
    return Kernel(
        "exchange",
        layers,
        sent=own * copies * width * (1 - 1 / nodes),
        over_network=True,
        launches=2,
        hides=True,
        uneven=True,
    )


FEW_TOKENS = 512  # up to which DeepEP's low-latency kernels send a copy an expert


# ---- time -----------------------------------------------------------------------------------------------------------


def _seconds(kernels: Sequence[Kernel], device: Device, at: int) -> float:
    """All kernels' time at the low (-1), usual (0) or high (1) end of the ranges."""
    own = sum(kernel_time(kernel, device, at).seconds for kernel in kernels if not kernel.hides)
    hiding = sum(kernel_time(kernel, device, at).seconds for kernel in kernels if kernel.hides)
    return own + hiding - _end(OVERLAP, -at) * min(own, hiding)


def kernel_time(kernel: Kernel, device: Device, at: int) -> KernelTime:
    """All launches of a kernel at the low (-1), usual (0) or high (1) end of the device's ranges."""
    fullest = _end(IMBALANCE, at) if kernel.uneven else 1.0
    if kernel.sent:
        number = device.network if kernel.over_network else device.link
        latency = _end(FAR_LATENCY if kernel.over_network else LATENCY, at) * kernel.launches
        seconds = fullest * kernel.sent / _end(number, -at) + latency
        return KernelTime(kernel, kernel.count * seconds, "network" if kernel.over_network else "link")
    rate = next((device.rates[name] for name in kernel.rates if name in device.rates), None)
    assert rate is not None, f"{device.name} has no rate among {kernel.rates}"
    compute = fullest * kernel.flops / (rate.value * _end(device.compute_share, -at))
    memory = kernel.bytes / (device.bandwidth.value * _end(device.bandwidth_share, -at))
    seconds = max(compute, memory) + kernel.launches * _end(device.launch, at)
    return KernelTime(kernel, kernel.count * seconds, "compute" if compute > memory else "memory")


def _end(number: Number, at: int) -> float:
    """A number at its low end (-1), its value (0) or its high end (1)."""
    low, high = number.range
    return (low, number.value, high)[at + 1]


def sources(device: Device) -> tuple[str, ...]:
    """Where the numbers are from that a time on this device is computed with."""
    numbers = {f"{device.name} {name}": rate for name, rate in device.rates.items()}
    named = ("bandwidth", "link", "network", "compute_share", "bandwidth_share", "launch")
    numbers |= {f"{device.name} {name}": getattr(device, name) for name in named}
    return tuple(number.cited(name) for name, number in numbers.items())


def label(device: Device) -> Label:
    """The weakest label among the numbers that times on this device are computed with."""
    return weakest((*(rate.label for rate in device.rates.values()), device.compute_share.label, OVERLAP.label))


def seconds_figure(time: StepTime, device: Device) -> Figure:
    """A step's time with its formula and sources."""
    formula = "sum over kernels of max(operations / rate, bytes / bandwidth) + launch, exchange half hidden"
    return Figure(time.seconds, "s", formula, label(device), sources(device), time.low, time.high)
