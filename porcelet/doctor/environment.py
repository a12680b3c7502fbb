"""What surrounds this process: variables, the clock, and what can be printed."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from porcelet.doctor.finding import Finding
from porcelet.errors import InputError

VARIABLES = {  # what of the environment changes how porcelet computes or where it keeps things
    "PORCELET_HOME": "where models and conversations are kept",
    "PORCELET_ISA": "a lesser instruction set",
    "PORCELET_KERNELS": "reference turns fast bodies off, own vendors' kernels, interpreted runs GPUs' here",
    "PORCELET_ACTIVATIONS": "16 rounds less and is slower",
    "PORCELET_BENCH": "where benchmarks keep other engines",
    "OMP_NUM_THREADS": "threads",
    "OMP_PROC_BIND": "where threads may run",
    "GOMP_CPU_AFFINITY": "where threads may run",
    "MKL_NUM_THREADS": "threads of torch's matrix products",
    "ATEN_CPU_CAPABILITY": "a lesser instruction set of torch",
    "ONEDNN_MAX_CPU_ISA": "a lesser instruction set of torch's matrix products",
}
WRONG_CLOCK = 3600.0


def environment() -> Finding:
    """The variables that change what porcelet does, and those that look as if they did."""
    from porcelet.kernels.linear import wide_from

    ours = {name: value for name, value in sorted(os.environ.items()) if name in VARIABLES}
    unknown = sorted(name for name in os.environ if name.startswith("PORCELET_") and name not in VARIABLES)
    if unknown:
        near = difflib.get_close_matches(unknown[0], VARIABLES, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known: {', '.join(VARIABLES)}"
        return Finding("environment", "note", f"{', '.join(unknown)}: set, and nothing reads it", remedy)
    try:
        wide_from()
    except InputError as problem:
        return Finding("environment", "problem", str(problem), "unset PORCELET_ACTIVATIONS")
    shown = ", ".join(f"{name}={value} ({VARIABLES[name]})" for name, value in ours.items())
    return Finding("environment", "ok", shown or "nothing is set that changes how porcelet computes")


def encoding() -> Finding:
    """Whether standard output takes every character that a model may write."""
    chosen = getattr(sys.stdout, "encoding", None) or "none"
    if chosen.lower().replace("-", "") == "utf8":
        return Finding("encoding", "ok", "standard output takes every character")
    cause = f"standard output is {chosen}, which lacks most characters that a model may write"
    return Finding("encoding", "note", cause, "export PYTHONUTF8=1, and unset PYTHONIOENCODING")


def clock(files: Iterable[Path] | None = None, now: float | None = None) -> Finding:
    """Whether the clock is behind: `files` that were surely written in the past are then in its future. Connections
    fail then, as certificates seem not to hold yet."""
    times = [file.stat().st_mtime for file in (_written() if files is None else files)]
    ahead = max(times, default=0.0) - (time.time() if now is None else now)
    if ahead > WRONG_CLOCK:
        shown = time.strftime("%Y-%m-%d %H:%M")
        cause = f"the clock says {shown}, and files here were written {ahead / 3600:,.0f} h later"
        return Finding("clock", "problem", cause, "set the clock (timedatectl set-ntp true, or hwclock)")
    return Finding("clock", "ok", "no file here is of the future")


def _written() -> list[Path]:
    """Files of porcelet itself, of Python's, and of the system's start."""
    paths = (Path(__file__), Path(sys.executable), Path("/etc/hostname"), Path("/tmp"))
    return [path for path in paths if path.exists()]
