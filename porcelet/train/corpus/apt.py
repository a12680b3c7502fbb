"""One Debian package: fetched and unpacked by apt-get and dpkg, which install nothing here, and read as documents."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from porcelet.errors import InputError, PorceletError
from porcelet.train.corpus.extract import licences, package_documents
from porcelet.train.corpus.packages import DocPackage
from porcelet.train.corpus.readers import as_line

TIMEOUT_SECONDS = 1800


def fetch(package: DocPackage, work: Path) -> None:
    """Leave the package's text in work/NAME.jsonl, its notice in NAME.txt and, once that is complete, NAME.json.

    Raises:
        InputError: apt-get or dpkg is missing.
        PorceletError: the package cannot be fetched or unpacked.
    """
    folder = work / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    name = _debian_name(package)
    _run(["apt-get", "download", "--quiet", name], folder)
    (archive,) = folder.glob("*.deb")
    _run(["dpkg", "-x", archive.name, "files"], folder)
    version = _run(["dpkg-deb", "--field", archive.name, "Version"], folder).strip()
    with (work / f"{package.name}.jsonl").open("w", encoding="utf-8") as file:
        for document in package_documents(folder / "files", package):
            file.write(as_line(document))
    notice = _copyright(folder, name)
    (work / f"{package.name}.txt").write_text(notice, encoding="utf-8")
    known = {"name": package.name, "package": name, "version": version, "licences": licences(notice)}
    (work / f"{package.name}.part").write_text(json.dumps(known), encoding="utf-8")
    (work / f"{package.name}.part").rename(work / f"{package.name}.json")
    shutil.rmtree(folder)


def _debian_name(package: DocPackage) -> str:
    """The newest package that this release has under the name."""
    names = _run(["apt-cache", "pkgnames", package.prefix]).split()
    found = [name for name in names if re.fullmatch(package.debian, name)]
    if not found:
        raise PorceletError(
            f"apt knows no package {package.debian}; run apt-get update, or leave {package.name} out by --packages"
        )
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def _copyright(folder: Path, name: str) -> str:
    """The package's notice, fetched with the package that has it where the documentation is but a link to its."""
    link = folder / "files/usr/share/doc" / name
    if link.is_symlink():
        name = Path(os.readlink(link)).name
        _run(["apt-get", "download", "--quiet", name], folder)
        _run(["dpkg", "-x", *(path.name for path in folder.glob(f"{name}_*.deb")), "files"], folder)
    path = folder / "files/usr/share/doc" / name / "copyright"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        return subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        ).stdout
    except FileNotFoundError as problem:
        raise InputError(f"{command[0]} is not here; debian-docs is built on Debian and its relatives") from problem
    except subprocess.CalledProcessError as problem:
        lines = [line for line in problem.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E:")] or lines or [f"exit code {problem.returncode}"]
        raise PorceletError(
            f"{' '.join(command)} failed: {errors[0]}; check the network and run it again: what is done is kept"
        ) from problem
    except subprocess.TimeoutExpired as problem:
        raise PorceletError(f"{' '.join(command)} took half an hour; check the network and run it again") from problem
