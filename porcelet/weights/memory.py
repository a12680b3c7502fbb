"""How much memory there is, and whether a model's weights fit: told before they are read, not by the kernel's kill."""

from __future__ import annotations

import os
from pathlib import Path

from porcelet.config import ModelConfig
from porcelet.errors import CapacityError


def check_fits(config: ModelConfig, weights: str, source: str, stored_bytes: int = 0, spared: int = 0) -> None:
    """`weights` is the format they are kept in; for "stored", `stored_bytes` are the file's. `spared` bytes stay on
    disk.

    Raises:
        CapacityError: they need more memory than can be had; it says which format would fit.
    """
    available = available_memory()
    needed = weight_bytes(config, weights, stored_bytes) - spared
    if needed <= available:
        return
    fitting = [other for other in ("int8", "int4") if other != weights and weight_bytes(config, other) <= available]
    remedy = f"load it with weights={fitting[0]}" if fitting else "free some memory, or take a smaller model"
    if config.n_routed_experts:
        remedy += f", or {'lower' if spared else 'let experts stay on disk with'} expert_memory"
    raise CapacityError(
        f"{source} takes {needed / 1e9:.1f} GB as {weights}, and {available / 1e9:.1f} GB are available; {remedy}"
    )


def weight_bytes(config: ModelConfig, weights: str, stored_bytes: int = 0) -> int:
    """Memory of a model's weights without the MTP layer: float32, int8, int4, fp8, where what stays float32 is
    little, or stored, at most a quarter more than the file's `stored_bytes`."""
    if weights == "stored":
        return stored_bytes * 5 // 4
    if weights in ("int8", "int4"):
        return config.packed_bytes(int(weights.removeprefix("int")))
    return config.num_parameters() * (1 if weights == "fp8" else 4)


def total_memory() -> int:
    """The machine's memory in bytes, or its container's."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, _container_value("memory.max") or physical)


def available_memory() -> int:
    """What of it can be had without swapping, in bytes; all of it where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except FileNotFoundError:
        available = total_memory()
    if _container_value("memory.max") is None:
        return available
    return min(available, max(total_memory() - (_container_value("memory.current") or 0), 0))


def _container_value(name: str) -> int | None:
    """A number in bytes that cgroup v2 keeps for this container; None where there is none."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
