"""Room for files: bytes, names, and what kind of disk the store is on."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from porcelet import hub
from porcelet.doctor.finding import Finding, State
from porcelet.doctor.machine import ROOT, told_by

LITTLE_DISK = 1_000_000_000
FEW_NAMES = 1000
OVER_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "lustre", "glusterfs", "ceph", "beegfs", "afs")


def disk() -> Finding:
    """Whether the store's disk has room: for the default model if it is to be fetched yet, else for more."""
    free = shutil.disk_usage(nearest(hub.home())).free
    source = hub.SOURCES[hub.DEFAULT_MODEL]
    is_here = hub.DEFAULT_MODEL in {model.name for model in hub.list_models()}
    needed = 0 if is_here else source.download_size + source.size
    cause = f"{free / 1e9:.1f} GB are free for the model store"
    remedy = "free some, or set PORCELET_HOME to another disk"
    if free < needed:
        return Finding("disk", "problem", f"{cause}; the default model needs {needed / 1e9:.1f} GB", remedy)
    return Finding("disk", "note", cause, remedy) if free < LITTLE_DISK else Finding("disk", "ok", cause)


def inodes() -> Finding:
    """Whether the store's disk may hold more files, which can run out before its bytes do."""
    facts = os.statvfs(nearest(hub.home()))
    if not facts.f_files:
        return Finding("inodes", "ok", "this file system has no limit of files")
    cause = f"{facts.f_favail:,} more files may be made on the store's disk"
    if facts.f_favail < FEW_NAMES:
        state: State = "note" if facts.f_favail else "problem"
        return Finding("inodes", state, cause, "delete many small files (see df -i), or set PORCELET_HOME")
    return Finding("inodes", "ok", cause)


def file_system(root: Path = ROOT) -> Finding:
    """What kind of disk the store is on: models are mapped, so one that is reached over a network is slow to start
    from, and gone when the network is."""
    place = nearest(hub.home()).resolve()
    found = ("", "")
    for line in told_by(root / "proc/self/mounts").splitlines():
        _, mounted, kind, *_ = line.split(" ")
        at = mounted.replace("\\040", " ")
        if place.is_relative_to(at) and len(at) >= len(found[0]):
            found = (at, kind)
    at, kind = found
    if kind in OVER_NETWORK:
        cause = f"the model store is on {at}, which is {kind}: a disk over the network"
        return Finding("file_system", "note", cause, "set PORCELET_HOME to a disk of this machine")
    return Finding("file_system", "ok", f"the model store is on {at} ({kind})" if at else "this system does not tell")


def temporary() -> Finding:
    """Whether the folder that TMPDIR names is one where files can be made; if not, another one is taken in silence."""
    chosen, used = os.environ.get("TMPDIR"), ""
    try:
        used = tempfile.gettempdir()
        with tempfile.TemporaryFile(dir=chosen or used):
            pass
    except OSError as problem:
        cause = f"no file can be made in {chosen or used or 'any temporary folder'}: {problem.strerror}"
        remedy = "set TMPDIR to a folder that this user may write"
        return Finding("temporary", "note" if chosen and used else "problem", cause, remedy)
    return Finding("temporary", "ok", f"{chosen or used} can be written")


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
