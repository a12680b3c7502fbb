"""What computes: torch, the native library and the threads that both share."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from porcelet import hub
from porcelet.doctor.finding import Finding, told
from porcelet.doctor.machine import ROOT, told_by
from porcelet.errors import InputError
from porcelet.hub.store import REINSTALL
from porcelet.kernels.generations import generation_of
from porcelet.kernels.triton import contest
from porcelet.kernels.triton.tasks import OWN, TASKS


def torch_version() -> Finding:
    """Whether torch is a version that porcelet asks for."""
    found = torch.__version__
    try:
        wanted = next(one for one in map(Requirement, requires("porcelet") or ()) if one.name == "torch")
    except PackageNotFoundError:
        return Finding("torch", "note", f"torch {found}; porcelet is not installed, so nothing says which it needs")
    if wanted.specifier.contains(found, prereleases=True):
        return Finding("torch", "ok", f"torch {found}; porcelet asks for {wanted}")
    return Finding("torch", "problem", f"torch is {found}; porcelet asks for {wanted}", f"pip install '{wanted}'")


def native_library() -> Finding:
    """Whether the C++ bodies are there and used; without them torch computes."""
    code = "native_library"
    try:
        from porcelet.kernels import cpu
    except ImportError as problem:
        return Finding(code, "problem", f"the native library is there, and does not load: {problem}", REINSTALL)
    if not cpu.available():
        compiler = shutil.which("g++")
        reason = "the compiler that is here now was not, or was refused" if compiler else "there is no g++ to build it"
        first = "" if compiler else "install g++ (apt-get install g++), then "
        cause = f"installed without the native library: torch computes everything, slower; {reason}"
        return Finding(code, "note", cause, first + REINSTALL)
    if os.environ.get("PORCELET_KERNELS") == "reference":
        return Finding(code, "note", "there, and turned off by PORCELET_KERNELS=reference", "unset PORCELET_KERNELS")
    return Finding(code, "ok", "there, and used")


def instruction_set() -> Finding:
    """What the native library computes with, beside what the processor offers."""
    from porcelet.kernels import cpu

    code = "instruction_set"
    if not cpu.available():
        return Finding(code, "ok", f"torch chooses: {torch.backends.cpu.get_cpu_capability()}")
    offered = cpu.isas()
    try:
        used = cpu.isa()
    except InputError as problem:
        return Finding(code, "problem", str(problem), "unset PORCELET_ISA")
    if used != offered[0]:
        cause = f"{used}, set by PORCELET_ISA; the processor offers {', '.join(offered)}"
        return Finding(code, "note", cause, "unset PORCELET_ISA")
    if used == "scalar":
        return Finding(code, "note", "scalar: the processor has neither AVX2 nor AVX-512, so products are slow")
    return Finding(code, "ok", f"{used}; the processor offers {', '.join(offered)}")


def gpu() -> Finding:
    """Whether `device=cuda` would compute, and what its kernels do on this generation."""
    from porcelet.kernels.triton.device import arch_of, why_not

    if not torch.cuda.is_available():
        return Finding("gpu", "ok", "torch sees none; porcelet needs none")
    name = torch.cuda.get_device_name()
    if reason := why_not():
        return Finding("gpu", "note", f"{name}: {reason}; porcelet computes on the processor")
    can = f"{name}, {generation_of(arch_of(torch.device('cuda')))}"
    if find_spec("triton") is None:
        cause = f"{can}; Triton, which compiles the kernels, is not installed"
        return Finding("gpu", "note", cause, "pip install 'porcelet[gpu]'")
    return _kernels(can, torch.device("cuda"))


def _kernels(can: str, device: torch.device) -> Finding:
    """Which kernels a good GPU's tasks take."""
    try:
        measured = contest.load(hub.home() / contest.FILE)
    except InputError as problem:
        return told("gpu", "problem", problem)
    if measured is None:
        rivals = dict.fromkeys(name for task in TASKS.values() for name in task.names(device) if name != OWN)
        if rivals:
            cause = f"{can}; device=cuda computes on it with Triton's kernels, not measured beside {', '.join(rivals)}"
            return Finding("gpu", "note", cause, "porcelet bench")
        return Finding("gpu", "ok", f"{can}; device=cuda computes on it")
    if differing := contest.stale(measured, device):
        cause = f"{can}; its kernels were measured with another {differing}, so Triton's are taken"
        return Finding("gpu", "note", cause, "porcelet bench")
    taken = ", ".join(f"{outcome.task} by {outcome.taken}" for outcome in measured.outcomes)
    return Finding("gpu", "ok", f"{can}; device=cuda computes on it, {taken}, as measured on {measured.date}")


def openmp() -> Finding:
    """Whether all native code of this process shares one pool of threads."""
    runtimes = sorted(openmp_runtimes())
    if len(runtimes) > 1:
        cause = f"{len(runtimes)} OpenMP runtimes are in one process and take each other's cores: {', '.join(runtimes)}"
        return Finding("openmp", "problem", cause, f"unset LD_PRELOAD if it is set, or {REINSTALL}")
    return Finding("openmp", "ok", f"one runtime: {runtimes[0]}" if runtimes else "no runtime of its own")


def openmp_runtimes() -> set[str]:
    """The OpenMP libraries that are mapped into this process, by path."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.exists() else []
    mapped = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    return {path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}


def threads() -> Finding:
    """Whether torch takes as many threads as there are cores for this process: more wait for each other all the
    time."""
    taken, usable = torch.get_num_threads(), usable_cores()
    if taken > usable:
        cause = f"{taken} threads on {usable:g} usable cores: they wait for each other in every layer"
        return Finding("threads", "problem", cause, f"set OMP_NUM_THREADS={max(int(usable), 1)}")
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen and taken < int(usable):
        cause = f"{taken} of {usable:g} usable cores are used, as OMP_NUM_THREADS is {chosen}"
        return Finding("threads", "note", cause, "unset OMP_NUM_THREADS, if nothing else needs the others")
    return Finding("threads", "ok", f"{taken} on {usable:g} usable cores")


def usable_cores(root: Path = ROOT) -> float:
    """Processors this process may run on: those of its affinity, and no more than its container's share of time."""
    allowed = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    quota, _, period = told_by(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    return min(allowed, int(quota) / int(period)) if quota.isdecimal() and period.isdecimal() else allowed
