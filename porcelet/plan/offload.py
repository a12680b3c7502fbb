"""Routed experts in a host's memory, all else on one card: how a workstation runs a model of hundreds of billions.

The card computes attention, dense layers and shared experts; the host's processors multiply the few experts a token
chose, in turn with the card (KTransformers' way of serving). What a layer's hidden states take over PCIe is little.
"""

from __future__ import annotations

from dataclasses import dataclass

from porcelet.plan.hardware import Device
from porcelet.plan.layout import Layout
from porcelet.plan.memory import Memory, device_memory
from porcelet.plan.model import PlannedModel
from porcelet.plan.work import Batch, kernel_time, step_kernels

ON_HOST = "routed experts"


@dataclass(frozen=True)
class Offloaded:
    """A step's seconds at the low end, usually and at the high end, and of the usual ones those on the host."""

    low: float
    seconds: float
    high: float
    on_host: float


def offloaded_time(
    model: PlannedModel, card: Device, host: Device, batch: Batch, *, experts: PlannedModel | None = None
) -> Offloaded:
    """The time of a step; `experts` is the model in the format its experts have on the host."""
    on_card = [kernel for kernel in step_kernels(model, Layout(), card, batch) if kernel.name != ON_HOST]
    kernels = step_kernels(experts or model, Layout(), host, batch)
    on_host = [kernel for kernel in kernels if kernel.name == ON_HOST]
    low, usual, high = (
        sum(kernel_time(kernel, card, at).seconds for kernel in on_card)
        + sum(kernel_time(kernel, host, at).seconds for kernel in on_host)
        for at in (-1, 0, 1)
    )
    return Offloaded(low, usual, high, sum(kernel_time(kernel, host, 0).seconds for kernel in on_host))


def offloaded_memory(model: PlannedModel, card: Device) -> tuple[Memory, float]:
    """What lies on the card, and the bytes of experts that the host must hold."""
    rest = PlannedModel(model.name, model.config, model.format, {**model.sizes, "experts": 0.0}, model.source)
    return device_memory(rest, Layout(), card), model.sizes["experts"]
