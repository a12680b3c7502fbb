"""Devices for tests: round numbers, so that times can be said by hand."""

from __future__ import annotations

from porcelet.plan.figure import Number
from porcelet.plan.hardware import Device


def given(value: float, low: float | None = None, high: float | None = None) -> Number:
    return Number(value, "assumed", "a test", "2026-11", low, high)


def device(**changes: object) -> Device:
    """100 GB, 1 TB/s, 100 TFLOP/s in BF16 and 200 in FP8, 100 GB/s to its neighbours, 10 GB/s beyond; ideal kernels."""
    fields: dict[str, object] = {
        "name": "test",
        "kind": "gpu",
        "memory": given(100e9),
        "bandwidth": given(1e12),
        "rates": {"bf16": given(1e14), "fp8": given(2e14)},
        "link": given(1e11),
        "network": given(1e10),
        "per_node": 8,
        "power": given(1000),
        "price": given(20000),
        "rent": given(2),
        "compute_share": given(1.0),
        "bandwidth_share": given(1.0),
        "launch": given(0.0),
    }
    return Device(**fields | changes)  # type: ignore[arg-type]
