"""`porcelet doctor`: what this machine gives porcelet, and what it keeps from it.

A finding says what is so, and where that costs something, what to do. "ok" is as it should be; a "note" works, slower
or with less than it could; a "problem" will fail, or be slow beyond use, until somebody does something. Codes stay the
same from version to version.

Nothing is changed, no model is loaded and no network is asked, unless `network` is. What computes is imported last: a
native library that does not load is a finding too.
"""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from porcelet import hub
from porcelet.config import EngineConfig
from porcelet.errors import CapacityError, InputError, ModelError, PorceletError
from porcelet.hub.huggingface import check_reachable, is_offline
from porcelet.hub.store import REINSTALL
from porcelet.weights import records

PORT = 8000  # of `porcelet serve`
LITTLE_DISK = 1_000_000_000
VARIABLES = {  # what of the environment changes how porcelet computes or where it keeps things
    "PORCELET_HOME": "where models and conversations are kept",
    "PORCELET_ISA": "a lesser instruction set",
    "PORCELET_KERNELS": "reference turns all fast bodies off",
    "PORCELET_ACTIVATIONS": "16 rounds less and is slower",
    "PORCELET_BENCH": "where benchmarks keep other engines",
    "OMP_NUM_THREADS": "threads",
    "OMP_PROC_BIND": "where threads may run",
    "GOMP_CPU_AFFINITY": "where threads may run",
    "MKL_NUM_THREADS": "threads of torch's matrix products",
    "ATEN_CPU_CAPABILITY": "a lesser instruction set of torch",
    "ONEDNN_MAX_CPU_ISA": "a lesser instruction set of torch's matrix products",
}

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `code` is for programs, `cause` says what is so, `remedy` what to do about it."""

    code: str
    state: State
    cause: str
    remedy: str = ""


def examine(*, network: bool = False) -> Iterator[Finding]:
    """Every finding about this machine, in the order in which one would ask. `network` also asks whether the model hub
    answers."""
    yield torch_version()
    native = native_library()
    yield native
    if native.state != "problem":
        yield instruction_set()
        yield openmp()
        yield from model_memory()
    yield threads()
    yield store()
    yield disk()
    yield from kept_experts()
    yield environment()
    yield port()
    yield hub_access(network)


def told(code: str, state: State, problem: PorceletError) -> Finding:
    """An error as a finding: ours say what is wrong, then what to do about it."""
    cause, _, remedy = str(problem).rpartition("; ")
    return Finding(code, state, cause, remedy) if cause else Finding(code, state, remedy)


# ---- what computes --------------------------------------------------------------------------------------------------


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


def usable_cores() -> float:
    """Processors this process may run on: those of its affinity, and no more than its container's share of time."""
    allowed = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return min(allowed, int(quota) / int(period)) if quota.isdecimal() else allowed


# ---- what is computed with ------------------------------------------------------------------------------------------


def model_memory() -> Iterator[Finding]:
    """For each model of the store, whether its weights and the cache of `EngineConfig` fit into the memory there is."""
    models = hub.list_models()
    if hub.DEFAULT_MODEL not in {model.name for model in models}:
        yield Finding("default_model", "note", f"{hub.DEFAULT_MODEL} is not in the store", "run `porcelet pull`")
    for model in models:
        try:
            yield _memory_of(model)
        except CapacityError as problem:
            yield told("memory", "problem" if model.name == hub.DEFAULT_MODEL else "note", problem)
        except ModelError as problem:
            yield told("model", "problem", problem)


def _memory_of(model: hub.StoredModel) -> Finding:
    """Raises CapacityError for weights that do not fit, ModelError for files that are no model."""
    from porcelet.weights import memory
    from porcelet.weights.files import open_checkpoint
    from porcelet.weights.load import PACKED, chosen_format

    checkpoint = open_checkpoint(model.path)
    config, weights = checkpoint.config, chosen_format("auto", checkpoint)
    stored = sum(tensor.num_bytes for tensor in checkpoint.tensors)
    memory.check_fits(config, weights, model.name, stored)
    tokens = EngineConfig().cache_tokens
    size = memory.weight_bytes(config, weights, stored)
    cache = (2 if weights in PACKED else 4) * tokens * config.cache_values_per_token()  # `cache_dtype` "auto"
    available = memory.available_memory()
    cause = (
        f"{model.name}: {size / 1e6:,.0f} MB of weights ({weights}) and {cache / 1e6:,.0f} MB for {tokens:,} cached "
        f"tokens; {available / 1e6:,.0f} MB are available"
    )
    if size + cache > available:
        return Finding("memory", "note", cause, "serve it with --set cache_memory=0.5, or free some memory")
    return Finding("memory", "ok", cause)


def store() -> Finding:
    """Whether the model store can be read and written, tried in its folder or the first that is there above it."""
    home = hub.home()
    try:
        if home.exists():
            os.listdir(home)
        with tempfile.TemporaryFile(dir=_existing(home)):
            pass
    except OSError as problem:
        cause = f"the model store {home} cannot be read and written: {problem.strerror}"
        return Finding("store", "problem", cause, "set PORCELET_HOME to another folder")
    return Finding("store", "ok", f"{home} can be read and written")


def disk() -> Finding:
    """Whether the store's disk has room: for the default model if it is to be fetched yet, else for more."""
    free = shutil.disk_usage(_existing(hub.home())).free
    source = hub.SOURCES[hub.DEFAULT_MODEL]
    is_here = hub.DEFAULT_MODEL in {model.name for model in hub.list_models()}
    needed = 0 if is_here else source.download_size + source.size
    cause = f"{free / 1e9:.1f} GB are free for the model store"
    remedy = "free some, or set PORCELET_HOME to another disk"
    if free < needed:
        return Finding("disk", "problem", f"{cause}; the default model needs {needed / 1e9:.1f} GB", remedy)
    return Finding("disk", "note", cause, remedy) if free < LITTLE_DISK else Finding("disk", "ok", cause)


def kept_experts() -> Iterator[Finding]:
    """Each file of experts that stay on disk: whether the model of which it was made is still there as it was."""
    for file in sorted(hub.experts().glob(f"*{records.SUFFIX}")):
        try:
            layout = records.read_layout(file)
        except ModelError as problem:
            yield told("experts", "note", problem)
            continue
        path = layout.made_from[0][0]
        cause = f"{file} holds {layout.num_bytes / 1e9:.1f} GB of experts of {path}"
        if all(_is_as_it_was(*one) for one in layout.made_from):
            yield Finding("experts", "ok", cause)
        else:
            yield Finding("experts", "note", f"{cause}, which is gone or has changed", "delete it: nothing uses it")


def _is_as_it_was(path: str, size: int, time_ns: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (size, time_ns)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# ---- what is around -------------------------------------------------------------------------------------------------


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


def port() -> Finding:
    """Whether `porcelet serve` could listen where it does by itself."""
    try:
        socket.create_server(("127.0.0.1", PORT)).close()
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            cause = f"port {PORT} on 127.0.0.1 is taken, by a running server perhaps"
            return Finding("port", "note", cause, "start another one with `porcelet serve --port`")
        return Finding("port", "problem", f"nothing can listen on 127.0.0.1 port {PORT}: {problem.strerror}")
    return Finding("port", "ok", f"{PORT} on 127.0.0.1 is free")


def hub_access(ask: bool) -> Finding:
    """Whether models could be fetched; it is tried only if `ask`."""
    if is_offline():
        return Finding("network", "ok", "HF_HUB_OFFLINE is set: models come from the store and the hub's cache alone")
    if not ask:
        return Finding("network", "ok", "not asked for; `porcelet doctor --network` tries the model hub")
    try:
        return Finding("network", "ok", f"{check_reachable()} answers")
    except PorceletError as problem:
        return told("network", "problem", problem)
