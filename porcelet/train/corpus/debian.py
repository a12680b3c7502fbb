"""The reference corpus: Debian's documentation as clean text, with its licences, split and hashed.

Packages are fetched and unpacked by `apt-get download` and `dpkg -x`, which install nothing and need no rights. Each
package's text is kept in `work/`, so a run that is stopped continues behind the last one. When all are there,
paragraphs met before are dropped, in the order of the packages, and documents are divided by the hash of their name:
one in a hundred is held out, and a page and its source never lie on two sides. Held-out documents of which more than
half is in the training part too, in runs of 13 words, are dropped.

    OUTPUT/train/NAME.jsonl  held-out/NAME.jsonl  licences/NAME.txt  manifest.json

The text depends on the packages' versions, which the manifest names beside every hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porcelet.errors import InputError, PorceletError
from porcelet.train.corpus.decontaminate import NGRAM
from porcelet.train.corpus.dedup import drop_repeated_paragraphs
from porcelet.train.corpus.extract import licences, package_documents, stem
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.packages import ON_REQUEST, PACKAGES, DocPackage
from porcelet.train.corpus.readers import Document, rows
from porcelet.train.hashing import hashed

if TYPE_CHECKING:
    from jaxtyping import Bool

HELD_OUT_SHARE = 100  # one document in so many
MIN_CHARACTERS = 200  # of what is left of a document; shorter ones are dropped
MAX_OVERLAP = 0.5  # of a held-out document's n-grams with the training part
PARTS = ("train", "held-out")

Report = Callable[[str, int, int], None]  # what is done now, steps done, steps in all


def build_corpus(
    output: Path,
    names: Sequence[str] = (),
    *,
    max_megabytes: float = 0,
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Make the corpus in `output`; its manifest.

    `names` chooses packages, empty all but those that come on request. With `max_megabytes`, documents are left out by
    hash until about so much remains.

    Raises:
        InputError: `output` holds a complete corpus, a name is unknown, or apt-get or dpkg is missing.
        PorceletError: a package cannot be fetched or unpacked.
    """
    packages = _chosen(names)
    if (output / "manifest.json").exists():
        raise InputError(f"{output} holds a complete corpus; delete it or choose another output")
    (output / "work").mkdir(parents=True, exist_ok=True)
    total = len(packages) + len(PARTS)
    for done, package in enumerate(packages):
        report(package.name, done, total)
        if not (output / "work" / f"{package.name}.json").exists():
            _fetch(package, output / "work")
    report("deduplication", len(packages), total)
    entries = _assemble(output, packages)
    _thin_out(output, entries, max_megabytes)
    report("overlap", len(packages) + 1, total)
    num_dropped = _drop_overlaps(output, entries)
    manifest = _manifest(output, entries, num_dropped)
    shutil.rmtree(output / "work")
    report("done", total, total)
    return manifest


def _chosen(names: Sequence[str]) -> list[DocPackage]:
    known = {package.name: package for package in PACKAGES}
    strange = [name for name in names if name not in known]
    if strange:
        raise InputError(f"package {strange[0]!r} is not known; known: {', '.join(known)}")
    return [package for package in PACKAGES if package.name in (names or known.keys() - set(ON_REQUEST))]


# ---- one package ----------------------------------------------------------------------------------------------------


def _fetch(package: DocPackage, work: Path) -> None:
    """Leave the package's text in work/NAME.jsonl and, once that is complete, what is known about it in NAME.json."""
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
            file.write(_line(document))
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
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=1800).stdout
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


# ---- all packages ---------------------------------------------------------------------------------------------------


def _assemble(output: Path, packages: Sequence[DocPackage]) -> list[dict[str, Any]]:
    """Write every package's parts without the paragraphs of those before it; what is known about each package."""
    seen: set[int] = set()
    entries = []
    for folder in (*PARTS, "licences"):
        shutil.rmtree(output / folder, ignore_errors=True)
        (output / folder).mkdir()
    for package in packages:
        work = output / "work" / package.name
        lines: dict[str, list[str]] = {part: [] for part in PARTS}
        for document in _stored(work.with_suffix(".jsonl")):
            text = drop_repeated_paragraphs(document.text, seen)
            if len(text) >= MIN_CHARACTERS:
                lines[_part(document.place)].append(_line(Document(text, document.place)))
        for part in PARTS:
            (output / part / f"{package.name}.jsonl").write_text("".join(lines[part]), encoding="utf-8")
        shutil.copyfile(work.with_suffix(".txt"), output / "licences" / f"{package.name}.txt")
        entries.append(json.loads(work.with_suffix(".json").read_text(encoding="utf-8")))
    return entries


def _thin_out(output: Path, entries: Sequence[dict[str, Any]], max_megabytes: float) -> None:
    """Leave out documents by hash until about so much is left; 0 keeps all."""
    files = [output / part / f"{entry['name']}.jsonl" for part in PARTS for entry in entries]
    total = sum(file.stat().st_size for file in files)
    if max_megabytes and total > max_megabytes * 1e6:
        limit = int(max_megabytes * 1e6 / total * 2**63)
        for file in files:
            kept = [_line(document) for document in _stored(file) if hashed("kept", stem(document.place)) < limit]
            file.write_text("".join(kept), encoding="utf-8")


def _drop_overlaps(output: Path, entries: Sequence[dict[str, Any]]) -> int:
    """Rewrite the held-out part without documents that are mostly in the training part; how many there were."""
    files = [output / "held-out" / f"{entry['name']}.jsonl" for entry in entries]
    held_out = {file: [(document, ngram_hashes(document.text, NGRAM)) for document in _stored(file)] for file in files}
    every = [grams for pairs in held_out.values() for _, grams in pairs]
    known = np.unique(np.concatenate([np.zeros(1, dtype=np.uint64), *every]))
    met = np.zeros(len(known), dtype=bool)
    for entry in entries:
        for document in _stored(output / "train" / f"{entry['name']}.jsonl"):
            grams = ngram_hashes(document.text, NGRAM)
            places = np.searchsorted(known, grams).clip(max=len(known) - 1)
            met[places[known[places] == grams]] = True
    num_dropped = 0
    for file, pairs in held_out.items():
        kept = [document for document, grams in pairs if _overlap(met[np.searchsorted(known, grams)]) <= MAX_OVERLAP]
        file.write_text("".join(map(_line, kept)), encoding="utf-8")
        num_dropped += len(pairs) - len(kept)
    return num_dropped


def _overlap(met: Bool[np.ndarray, "N"]) -> float:
    return float(met.mean()) if len(met) else 0.0


def _manifest(output: Path, entries: Sequence[dict[str, Any]], num_dropped: int) -> dict[str, Any]:
    """Count and hash what was written, and write it down last of all."""
    whole = hashlib.sha256()
    packages = []
    for entry in entries:
        counts: dict[str, Any] = {}
        digest = hashlib.sha256()
        for part in PARTS:
            file = output / part / f"{entry['name']}.jsonl"
            digest.update(file.read_bytes())
            sizes = [len(document.text.encode()) for document in _stored(file)]
            counts[part] = {"documents": len(sizes), "bytes": sum(sizes)}
        whole.update(digest.digest())
        packages.append(entry | counts | {"sha256": digest.hexdigest()})
    totals = {
        part: {count: sum(entry[part][count] for entry in packages) for count in ("documents", "bytes")}
        for part in PARTS
    }
    manifest = {"sha256": whole.hexdigest(), **totals, "held-out dropped": num_dropped, "packages": packages}
    unfinished = output / "manifest.json.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.rename(output / "manifest.json")
    return manifest


def _stored(file: Path) -> Iterator[Document]:
    yield from (Document(row["text"], row["id"]) for _, row in rows(file))


def _line(document: Document) -> str:
    return json.dumps({"id": document.place, "text": document.text}, ensure_ascii=False) + "\n"


def _part(place: str) -> str:
    return PARTS[hashed("held out", stem(place)) % HELD_OUT_SHARE == 0]
