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
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porcelet.errors import InputError
from porcelet.train.corpus.apt import fetch
from porcelet.train.corpus.decontaminate import NGRAM
from porcelet.train.corpus.dedup import drop_repeated_paragraphs
from porcelet.train.corpus.extract import stem
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.packages import ON_REQUEST, PACKAGES, DocPackage
from porcelet.train.corpus.readers import Document, as_line, rows
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
            fetch(package, output / "work")
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
                lines[_part(document.place)].append(as_line(Document(text, document.place)))
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
            kept = [as_line(document) for document in _stored(file) if hashed("kept", stem(document.place)) < limit]
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
        file.write_text("".join(map(as_line, kept)), encoding="utf-8")
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


def _part(place: str) -> str:
    return PARTS[hashed("held out", stem(place)) % HELD_OUT_SHARE == 0]
