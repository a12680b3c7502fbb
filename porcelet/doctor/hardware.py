"""The machine itself: processor, memory, and how much of its time a hypervisor keeps."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from porcelet.doctor.finding import Finding
from porcelet.doctor.machine import ROOT, told_by

MUCH_STEAL = 0.05  # of all time; below, a measurement's own noise is larger
STEAL, LAST = 7, 8  # columns of /proc/stat's first line; what follows is in others already


def hardware(root: Path = ROOT) -> Finding:
    """Which processor, how many of them, how much memory."""
    total = memory_total(root)
    memory = f"{total / 1e9:.1f} GB of memory" if total else "memory unknown"
    system = f"{platform.system()} {platform.release()}"
    return Finding("hardware", "ok", f"{processor(root)}, {os.cpu_count() or 1} logical cores, {memory}, {system}")


def processor(root: Path = ROOT) -> str:
    """The processor's name as it gives it, else its architecture's."""
    for line in told_by(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine() or "an unknown processor"


def memory_total(root: Path = ROOT) -> int:
    """Bytes of the machine's memory; 0 where it does not tell."""
    for line in told_by(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def steal(root: Path = ROOT) -> Finding:
    """How much time this machine waited, since it started, for processors that its host gave to others."""
    times = [int(field) for field in told_by(root / "proc/stat").partition("\n")[0].split()[1:] if field.isdecimal()]
    if len(times) <= STEAL or not sum(times[:LAST]):
        return Finding("steal", "ok", "this system does not tell whether a host takes its time")
    share = times[STEAL] / sum(times[:LAST])
    cause = f"{share:.1%} of the time since the start went to other machines of the same host"
    if share > MUCH_STEAL:
        return Finding("steal", "note", cause, "speeds will vary; ask the host for cores of your own")
    return Finding("steal", "ok", cause)
