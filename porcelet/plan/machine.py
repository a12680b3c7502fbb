"""What `porcelet bench` measured on this machine: costs of kernels and of a step, in a file of the store's folder.

Costs hold for the processor, the number of threads, the instruction set and the versions they were measured with; a
profile of others is refused, not scaled.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from porcelet import __version__, hub
from porcelet.errors import CapacityError, InputError

FILE = "machine.json"
AGAIN = "run `porcelet bench` again"


@dataclass(frozen=True)
class Machine:
    """Measured costs by name (kernels/measure.py and engine/measure.py say what each is), and what they hold for."""

    processor: str
    threads: int
    instructions: str
    torch: str
    date: str
    costs: Mapping[str, float]
    stolen: float = 0.0  # share of the time that the hypervisor gave to others meanwhile
    porcelet: str = __version__

    @cached_property
    def _tables(self) -> Mapping[str, tuple[list[float], list[float]]]:
        """Points of each cost that depends on a number: log of the number, log of the cost."""
        tables: dict[str, dict[float, float]] = {}
        for key, cost in self.costs.items():
            name, _, number = _split(key)
            if number is not None:
                tables.setdefault(name, {})[number] = cost
        return {
            name: ([math.log(n) for n in sorted(points)], [math.log(max(points[n], 1e-15)) for n in sorted(points)])
            for name, points in tables.items()
        }

    def cost(self, name: str, number: float | None = None) -> float:
        """A cost; one that depends on a number of tokens is interpolated between those measured, and beyond the last
        grows with the number.

        Raises:
            InputError: it was not measured.
        """
        if number is None:
            if name not in self.costs:
                raise InputError(f"the machine's profile has no {name!r}; {AGAIN}")
            return self.costs[name]
        if name not in self._tables:
            raise InputError(f"the machine's profile has no {name!r}; {AGAIN}")
        places, values = self._tables[name]
        at = math.log(max(number, 1e-9))
        if at <= places[0] or len(places) == 1:
            return math.exp(values[0])
        i = min(bisect.bisect_left(places, at), len(places) - 1)
        slope = (values[i] - values[i - 1]) / (places[i] - places[i - 1])
        return math.exp(values[i - 1] + slope * (at - places[i - 1]))


def _split(key: str) -> tuple[str, str, float | None]:
    """ "product.int4.16" as its name and number; a name without a number as it is. Numbers may have a point."""
    words = key.split(".")
    for length in (2, 1):
        text = ".".join(words[-length:])
        if len(words) > length and text.replace(".", "", 1).isdigit():
            return ".".join(words[:-length]), ".", float(text)
    return key, "", None


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def processor_times() -> tuple[int, int]:
    """(stolen, total) ticks of all processors since boot; zeros where the system does not tell."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0, 0
    fields = [int(word) for word in words[1:9]]
    return fields[7], sum(fields)


def save(machine: Machine, path: Path | None = None) -> Path:
    """Write the profile, by default to the store's folder.

    Raises:
        CapacityError: it cannot be written.
    """
    path = path or hub.home() / FILE
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(machine), indent=1), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as problem:
        raise CapacityError(f"{path} cannot be written: {problem.strerror}; set PORCELET_HOME elsewhere") from problem
    return path


def load(path: Path | None = None) -> Machine | None:
    """The profile, or None if nothing was measured yet.

    Raises:
        InputError: the file is not one.
    """
    path = path or hub.home() / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        costs = {str(name): float(cost) for name, cost in values.pop("costs").items()}
        return Machine(costs=costs, **values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise InputError(f"{path} is no profile of a machine ({problem}); {AGAIN}") from problem


def check_current(machine: Machine, now: Machine) -> None:
    """Refuse a profile that was measured under other conditions than `now`'s.

    Raises:
        InputError: processor, threads, instruction set or a version differ.
    """
    for name in ("processor", "threads", "instructions", "torch", "porcelet"):
        was, is_now = getattr(machine, name), getattr(now, name)
        if was != is_now:
            raise InputError(f"the machine was measured with {name} {was!r}, and now it is {is_now!r}; {AGAIN}")
