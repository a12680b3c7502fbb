"""What a process takes, by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of a process by part: at its peak while it works, and while it loads. Both begin with its `runtime`:
    Python, torch and our libraries, with what of them is mapped and touched."""

    working: Mapping[str, int]
    loading: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most there is at once."""
        return max(sum(self.working.values()), sum(self.loading.values()))

    @property
    def largest(self) -> Mapping[str, int]:
        """The parts of the peak."""
        return max(self.working, self.loading, key=lambda parts: sum(parts.values()))


def resident_bytes(pid: int | str = "self", peak: bool = False) -> int:
    """What of a process is in memory, files that it maps among it, or was at most; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    wanted = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted)), 0)
