"""The model store: that it can be used, that what it holds is whole, and what lies there for nothing."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator

from porcelet import hub
from porcelet.doctor.disk import nearest
from porcelet.doctor.finding import Finding, told
from porcelet.errors import InputError, ModelError
from porcelet.weights import records

ALSO = {
    errno.EROFS: ", or have its disk mounted for writing",
    errno.EACCES: ", or have its owner give you the right to write",
    errno.ENOSPC: ", or free some space",
}


def store() -> Finding:
    """Whether the model store can be read and written, tried in its folder or the first that is there above it."""
    home = hub.home()
    try:
        if home.exists():
            os.listdir(home)
        with tempfile.TemporaryFile(dir=nearest(home)):
            pass
    except OSError as problem:
        cause = f"the model store {home} cannot be read and written: {problem.strerror}"
        remedy = "set PORCELET_HOME to another folder" + ALSO.get(problem.errno or 0, "")
        return Finding("store", "problem", cause, remedy)
    return Finding("store", "ok", f"{home} can be read and written")


def integrity(deep: bool = False) -> Iterator[Finding]:
    """Whether the files of each stored model are there in their sizes; if `deep`, with their checksums, too, which
    means reading all of them."""
    code, whole = "store_integrity", []
    for name in hub.entries():
        try:
            whole.append(hub.verify(name) if deep else hub.look_up(name))
        except ModelError as problem:
            yield told(code, "problem", problem)
        except InputError as problem:  # a folder that somebody put there
            yield told(code, "note", problem)
        except OSError as problem:
            cause = f"the files of {name} cannot be read: {problem.strerror}"
            yield Finding(code, "problem", cause, "look at the disk's health (dmesg, smartctl), then pull it again")
    how = "every byte compared" if deep else "sizes compared; `porcelet doctor --deep` compares every byte"
    size = sum(model.size for model in whole)
    yield Finding(code, "ok", f"{len(whole)} models are whole, {size / 1e9:.2f} GB: {how}")


def left_over() -> Iterator[Finding]:
    """What pulls that were interrupted have left."""
    for folder in hub.unfinished():
        size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
        cause = f"{folder}: {size / 1e6:,.1f} MB of a pull that did not end"
        name = folder.name.rpartition("-")[0]
        resume = f"pull {name} again to go on, or `porcelet rm {name}`"
        remedy = "delete it, or leave it: a pull takes it away after a day" if folder.parent == hub.home() else resume
        yield Finding("left_over", "note", cause, remedy)


def kept_experts(deep: bool = False) -> Iterator[Finding]:
    """Each file of experts that stay on disk: whether the model of which it was made is still there as it was; if
    `deep`, whether every expert has its checksum."""
    for file in sorted(hub.experts().glob(f"*{records.SUFFIX}")):
        try:
            layout = records.read_layout(file)
            if deep:
                records.verify(file)
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
