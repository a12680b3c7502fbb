"""The store's folders: what is stored, under which manifest, and how an entry appears and goes in one step."""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from porcelet.errors import CapacityError, InputError, ModelError
from porcelet.hub import packaged
from porcelet.hub.wheel import DEFAULT_MODEL, SOURCES

MANIFEST = "manifest.json"
DAY = 86400
# What a killed process left: workspaces are of no use to anyone, downloads are what the next pull resumes.
LEFT_OVER = {"tmp-*": DAY, "downloads/*": 30 * DAY}
QUIET = 60.0  # seconds without a byte after which a pull that holds no lock is over
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
NO_DOWNLOAD = f"; {packaged.R1_MINI} needs no download"
REINSTALL = "install the package again: `pip install --force-reinstall --no-deps porcelet`"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredFile:
    """One file of a model as its manifest describes it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoredModel:
    """A model in the store or the package. `path` is what the loader takes: the .gguf file, or the folder of all
    files."""

    name: str
    path: Path
    source: str
    revision: str
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def folder(self) -> Path:
        return _folder(self.name)


def list_models() -> list[StoredModel]:
    """What the store holds whole, by name; then what comes with the package."""
    return [model for name in entries() if (model := stored(name)) is not None]


def entries() -> list[str]:
    """The names of what lies in the store, whole or damaged; then what comes with the package."""
    folder = models()
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    return [name for name in names if name not in packaged.NAMES] + list(packaged.NAMES)


def look_up(name: str) -> StoredModel:
    """A stored model whose files have the manifest's sizes.

    Raises:
        ModelError: it is not in the store, or a file is gone or cut.
    """
    model = stored(checked(name))
    if model is None:
        raise _unknown(name)
    return model


def verify(name: str) -> StoredModel:
    """Hash every file of a stored model again.

    Raises:
        ModelError: it is not in the store, or its bytes have changed.
    """
    model = look_up(name)
    for file in model.files:
        found = sha256_of(model.folder / file.name)
        if found != file.sha256:
            again = REINSTALL if name in packaged.NAMES else f"run `porcelet rm {name}`, then pull it again"
            raise ModelError(f"{model.folder / file.name} has SHA-256 {found}, not {file.sha256}; {again}")
    return model


def remove(name: str) -> Path | None:
    """Delete a model from the store, and what an interrupted pull of it left. The path that it was loaded from, links
    followed; None if there was no more than such a pull.

    Raises:
        InputError: it is the package's, not the store's.
        ModelError: neither is there.
    """
    if name in packaged.NAMES:
        raise InputError(f"model {name!r} is part of the package and goes only with it: `pip uninstall porcelet`")
    with lock(checked(name)), workspace(0) as aside:
        left = list(downloads().glob(f"{name}-{'?' * 12}"))
        if not (models() / name).is_dir() and not left:
            raise _unknown(name)
        for number, folder in enumerate(left):
            folder.rename(aside / str(number))
        model = _manifest(name)
        path = model.path.resolve() if model else None
        _set_aside(name, aside)
        return path


def resolve(name_or_path: str) -> Path:
    """The file or folder of a model: a path to a `.gguf` file or a model folder, or a stored model's name or source.

    Raises:
        ModelError: there is no such file or model; the message says how to get one.
    """
    if NAME.fullmatch(name_or_path) and (model := stored(name_or_path)) is not None:
        return model.path
    if name_or_path.startswith("hf:"):
        return _from_source(name_or_path)
    try:
        path = Path(name_or_path).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as problem:  # an unknown user's home, a name too long, a zero byte
        raise ModelError(f"{name_or_path[:100]!r} is neither a stored model nor a path: {problem}") from problem
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        raise ModelError(
            f"{path} has no config.json; a model folder needs config.json, *.safetensors and tokenizer.json"
        )
    if path.exists():
        raise ModelError(f"{path} is not a model; give a .gguf file or a model folder")
    raise _unknown(name_or_path)


# ---- names and manifests --------------------------------------------------------------------------------------------


def home() -> Path:
    """The store's folder; it need not exist yet."""
    if chosen := os.environ.get("PORCELET_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "porcelet"


def models() -> Path:
    return home() / "models"


def downloads() -> Path:
    return home() / "downloads"


def experts() -> Path:
    """Where models' experts are that stay on disk (weights/records.py)."""
    return home() / "experts"


def checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise InputError(f"model name {name!r} is not usable; names hold only a-z, 0-9, '.', '_' and '-'")
    return name


def stored(name: str) -> StoredModel | None:
    """The model, if its manifest can be read and its files have the manifest's sizes; else it counts as absent."""
    model = _manifest(name)
    return model if model is not None and not _gone(model) else None


def _manifest(name: str) -> StoredModel | None:
    folder = _folder(name)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # Version 0.1 wrote one file's name, size and hash at the top.
        listed = manifest.get("files") or {manifest["file"]: manifest}
        files = tuple(StoredFile(Path(name).name, int(v["size"]), str(v["sha256"])) for name, v in listed.items())
        source, revision = str(manifest["source"]), str(manifest.get("revision", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return StoredModel(name, _model_path(folder, (file.name for file in files)), source, revision, files)


def _folder(name: str) -> Path:
    return packaged.folder_of(name) if name in packaged.NAMES else models() / name


def _gone(model: StoredModel) -> str:
    """The first file that is not there in its size, or nothing. A link into a cache that was cleared counts as gone."""
    for file in model.files:
        try:
            if (model.folder / file.name).stat().st_size != file.size:
                return file.name
        except OSError:
            return file.name
    return ""


def finish(folder: Path, source: str, revision: str, sha256: dict[str, str]) -> Path:
    """Write the manifest of a folder whose files `sha256` names, and drop all others; the path of its model."""
    for file in folder.iterdir():
        if file.name not in sha256:
            file.unlink()
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digest} for name, digest in sha256.items()}
    manifest = {"source": source, "revision": revision, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return _model_path(folder, sha256)


def _model_path(folder: Path, names: Iterable[str]) -> Path:
    """What the loader takes: the GGUF file, else the folder."""
    return next((folder / name for name in names if name.endswith(".gguf")), folder)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_source(source: str) -> Path:
    found = [model for model in list_models() if model.source == source.replace("@main", "", 1)]
    if not found:
        raise ModelError(f"{source} is not in the store {models()}; run `porcelet pull {source}` first")
    return found[0].path


def _unknown(name: str) -> ModelError:
    if name in packaged.NAMES:
        return ModelError(f"model {name!r} is part of the package, but its files are gone or cut; {REINSTALL}")
    damaged = _manifest(name) if NAME.fullmatch(name) else None
    if damaged is not None:
        file = damaged.folder / _gone(damaged)
        linked = f" (a link to {os.readlink(file)})" if file.is_symlink() else ""
        source = next((known for known in SOURCES if SOURCES[known].requirement == damaged.source), damaged.source)
        again = f"porcelet pull {source} --name {name}"
        return ModelError(f"model {name!r} is stored, but {file}{linked} is gone or cut; run `{again}`")
    if NAME.fullmatch(name) and (models() / name).is_dir():
        again = f"run `porcelet rm {name}`, then pull it again"
        return ModelError(f"model {name!r} is stored, but {models() / name / MANIFEST} cannot be read; {again}")
    if name in SOURCES:
        command = "porcelet pull" if name == DEFAULT_MODEL else f"porcelet pull {name}"
        return ModelError(f"model {name!r} is not in the store {models()}; run `{command}` first{NO_DOWNLOAD}")
    known = {*SOURCES, *(model.name for model in list_models())}
    return ModelError(
        f"model {name!r} is neither a file, a folder nor a stored model{near(name, known)}; "
        f"`porcelet pull` fetches {DEFAULT_MODEL}{NO_DOWNLOAD}"
    )


def near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


# ---- one step at a time ---------------------------------------------------------------------------------------------


@contextmanager
def lock(name: str) -> Iterator[None]:
    """One pull or removal of a name at a time, over all processes; a killed one's lock is free."""
    path = home() / f"{name}.lock"
    with _readable_errors():
        home().mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: who waits sees that the file it holds is no longer the one
        os.close(file)


def unfinished() -> list[Path]:
    """The folders of pulls that ended before their model was whole."""
    folders = (folder for pattern in LEFT_OVER for folder in sorted(home().glob(pattern)))
    return [folder for folder in folders if _newest(folder) < time.time() - QUIET and not _is_at_work(folder)]


def _is_at_work(folder: Path) -> bool:
    """Whether a process holds the lock of the model whose download lies there."""
    try:
        file = os.open(home() / f"{folder.name.rpartition('-')[0]}.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another pull of %s is running; waiting for it", path.stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass  # the holder before us took the file away with its lock; try for the next one
        os.close(file)


@contextmanager
def workspace(num_bytes: int) -> Iterator[Path]:
    """A folder of our own on the store's disk, with room for `num_bytes`; gone at the end, whatever happened."""
    with _readable_errors():
        home().mkdir(parents=True, exist_ok=True)
        _clean()
        need_space(num_bytes)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=home(), ignore_cleanup_errors=True) as folder:
            yield Path(folder)


@contextmanager
def download_folder(name: str, source: str) -> Iterator[Path]:
    """Where one source's files are gathered until they are published. Weights survive an interruption."""
    with _readable_errors():
        _clean()
        folder = downloads() / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            if not any(path.suffix in (".part", ".safetensors", ".gguf") for path in folder.glob("*")):
                shutil.rmtree(folder, ignore_errors=True)


def need_space(num_bytes: int) -> None:
    free = shutil.disk_usage(home()).free
    if free < num_bytes:
        raise CapacityError(
            f"{home()} has {free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB are needed; "
            "free some or set PORCELET_HOME to another disk"
        )


def publish(ready: Path, name: str) -> None:
    """Rename a finished folder into place; a damaged entry of that name makes room. The caller holds the lock."""
    models().mkdir(exist_ok=True)
    with workspace(0) as aside:
        _set_aside(name, aside)
        ready.rename(models() / name)


def _set_aside(name: str, aside: Path) -> None:
    """Move an entry out of the store in one step, into a workspace that is about to go."""
    try:
        (models() / name).rename(aside / "old")
    except FileNotFoundError:
        return


def _clean() -> None:
    """Remove what killed processes left long ago. Running ones write all the time."""
    for pattern, age in LEFT_OVER.items():
        for folder in home().glob(pattern):
            if _newest(folder) < time.time() - age:
                logger.info("removing %s, which a pull left unfinished", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _newest(folder: Path) -> float:
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        try:
            times.append(path.lstat().st_mtime)
        except FileNotFoundError:  # another process is at work there
            return time.time()
    return max(times)


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if problem.errno == errno.ENOSPC:
            raise CapacityError(f"{home()}: the disk is full; free some space or set PORCELET_HOME") from problem
        raise ModelError(
            f"the model store {home()} cannot be written: {problem}; set PORCELET_HOME to another folder"
        ) from problem
