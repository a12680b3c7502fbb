"""What the system lets this process take: files, addresses, memory, processor time."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from porcelet.doctor.finding import Finding
from porcelet.doctor.hardware import memory_total
from porcelet.doctor.machine import ROOT, number_in, told_by

FEW_FILES = 1024  # the server takes 800 connections, and needs files besides
STRICT = 2  # /proc/sys/vm/overcommit_memory: no more than the commit limit is ever promised


def open_files() -> Finding:
    """Whether a server may hold as many connections as it takes."""
    limit, possible = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= FEW_FILES:
        shown = "any number" if limit == resource.RLIM_INFINITY else limit
        return Finding("open_files", "ok", f"{shown} may be open at once")
    cause = f"{limit} files and connections may be open at once; a busy server needs {FEW_FILES}"
    is_allowed = possible == resource.RLIM_INFINITY or possible >= FEW_FILES
    where = "first" if is_allowed else f"as an administrator; this user's highest is {possible}"
    return Finding("open_files", "note", cause, f"ulimit -n {FEW_FILES} {where}")


def address_space(root: Path = ROOT) -> Finding:
    """Whether models can be mapped: a limit of addresses counts a mapped file whole, however little of it is read."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return Finding("address_space", "ok", "a process may map as much as it likes")
    cause = f"a process may map {limit / 1e9:.1f} GB (ulimit -v); files of models count whole"
    if limit < memory_total(root):
        return Finding("address_space", "note", cause, "ulimit -v unlimited, or ask for more in the batch job")
    return Finding("address_space", "ok", cause)


def overcommit(root: Path = ROOT) -> Finding:
    """Whether memory that is free can also be had: a strict system refuses what its commit limit does not cover."""
    code = "overcommit"
    if number_in(root / "proc/sys/vm/overcommit_memory") != STRICT:
        return Finding(code, "ok", "the system promises memory freely")
    lines = (line.split() for line in told_by(root / "proc/meminfo").splitlines())
    kilobytes = {name: int(value) for name, value, *_ in lines}
    left = (kilobytes.get("CommitLimit:", 0) - kilobytes.get("Committed_AS:", 0)) * 1024
    cause = f"the system promises no more memory than its commit limit: {left / 1e9:.1f} GB are left of it"
    if left < kilobytes.get("MemAvailable:", 0) * 1024:
        return Finding(code, "note", cause, "sysctl vm.overcommit_memory=0, or a higher vm.overcommit_ratio")
    return Finding(code, "ok", cause)


def memory_limit(root: Path = ROOT) -> Finding:
    """Whether this process's group (a container, a systemd service, a batch job) may take less memory than porcelet
    believes: it looks at the container's own limit alone."""
    code = "memory_limit"
    total = memory_total(root)
    limits = [limit for folder in _groups(root, "memory") if (limit := _memory_of(folder)) is not None]
    if not limits or min(limits) >= total:
        return Finding(code, "ok", "no limit but the machine's own memory")
    cause = f"this process's group may take {min(limits) / 1e9:.1f} GB of {total / 1e9:.1f} GB"
    if min(limits) == number_in(root / "sys/fs/cgroup/memory.max"):
        return Finding(code, "ok", f"{cause}, which porcelet keeps to")
    remedy = "raise it (MemoryMax= of a service, --mem of a job), or serve with --set cache_tokens=4096 and watch it"
    return Finding(code, "note", f"{cause}; porcelet does not see that, and the kernel ends what takes more", remedy)


def cpu_limit(cores: float, root: Path = ROOT) -> Finding:
    """Whether this process's group has less processor time than the `cores` that porcelet takes threads for."""
    shares = [share for folder in _groups(root, "cpu") if (share := _cores_of(folder)) is not None]
    if not shares or min(shares) >= cores:
        return Finding("cpu_limit", "ok", f"no limit below {cores:g} cores")
    cause = f"this process's group has the time of {min(shares):g} cores; porcelet takes threads for {cores:g}"
    remedy = f"set OMP_NUM_THREADS={max(int(min(shares)), 1)}, or raise the limit (CPUQuota= of a service)"
    return Finding("cpu_limit", "note", cause, remedy)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, the nearest first; version 2 and version 1 of the kernel's."""
    mounted = root / "sys/fs/cgroup"
    for line in told_by(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        folder = top / path.strip("/")
        yield from (one for one in (folder, *folder.parents) if one.is_relative_to(top))


def _memory_of(folder: Path) -> int | None:
    return next((size for name in ("memory.max", "memory.limit_in_bytes") if (size := number_in(folder / name))), None)


def _cores_of(folder: Path) -> float | None:
    quota, _, period = told_by(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (told_by(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None
