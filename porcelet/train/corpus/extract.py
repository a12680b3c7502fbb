"""The documents of an unpacked Debian package: pages as text, dictionaries as pages of entries, sources as they are."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from porcelet.errors import InputError
from porcelet.train.corpus.html import html_to_text
from porcelet.train.corpus.packages import DocPackage
from porcelet.train.corpus.readers import Document

TEXTS = (".txt", ".rst", ".md", ".pod", ".py")
PAGES = (".html", ".htm", ".xhtml")
PAGE_CHARACTERS = 8000  # entries of a dictionary that make a document

_SUFFIXES = re.compile(r"(\.(gz|html?|xhtml|txt|rst|md|pod|py))+$")
_ENTRY = re.compile(r"\n+(?=\S)")
# "Licence: GPL-2+ or Artistic", but no sentence
_LICENCE_FIELD = re.compile(r"^Licen[cs]e:[ \t]*(\w\S*(?: +(?:and|or|with|AND|OR) +\S+)*)[ \t]*$", re.MULTILINE)
_COMMON_LICENCE = re.compile(r"/usr/share/common-licenses/([A-Za-z]+(?:-\d(?:\.\d)?)?)")
_PHRASES = {
    "PSF": r"PSF\s+LICENSE\s+AGREEMENT|PYTHON\s+SOFTWARE\s+FOUNDATION\s+LICENSE",
    "GFDL": r"GNU\s+Free\s+Documentation\s+License",
}


def package_documents(folder: Path, package: DocPackage) -> Iterator[Document]:
    """The documents of a package unpacked in `folder`, in an order that is the same everywhere.

    A document's place is the package's name and the path below its root.

    Raises:
        InputError: none of the package's folders is there.
    """
    roots = sorted(root for pattern in package.roots for root in folder.glob(pattern))
    if not roots:
        raise InputError(f"package {package.name}: it has none of the folders {', '.join(package.roots)}")
    skip = re.compile(package.skip)
    for root in roots:
        for path in sorted(entry for entry in root.rglob("*") if entry.is_file() and not entry.is_symlink()):
            place = path.relative_to(root).as_posix()
            if not skip.search(place):
                yield from _documents(path, f"{package.name}/{place}")


def stem(place: str) -> str:
    """What a page and its source have in common: the place without suffixes."""
    return _SUFFIXES.sub("", place)


def licences(copyright_text: str) -> list[str]:
    """The identifiers of the licences that a package's copyright file names, in alphabetical order."""
    found = {" ".join(match.split()) for match in _LICENCE_FIELD.findall(copyright_text)}
    found |= set(_COMMON_LICENCE.findall(copyright_text))
    found |= {name for name, phrase in _PHRASES.items() if re.search(phrase, copyright_text)}
    return sorted(name for name in found if len(name) > 1)


def _documents(path: Path, place: str) -> Iterator[Document]:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    if name.startswith("data.") and path.parent.name == "wordnet":
        yield from _pages(_wordnet(_read(path)), place)
    elif name.endswith(".dict.dz"):
        yield from _pages(_ENTRY.split(_read(path)), place)
    elif suffix in PAGES:
        yield Document(html_to_text(_read(path)), place)
    elif suffix in TEXTS:
        yield Document(_read(path).strip(), place)


def _read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")  # a few old pages are Latin-1; one odd letter does not spoil them


def _pages(entries: Iterable[str], place: str) -> Iterator[Document]:
    """Consecutive entries as documents of some thousand characters."""
    page: list[str] = []
    size = number = 0
    for entry in entries:
        page.append(entry.strip())
        size += len(entry)
        if size >= PAGE_CHARACTERS:
            yield Document("\n\n".join(page), f"{place}/{number}")
            page, size, number = [], 0, number + 1
    if page:
        yield Document("\n\n".join(page), f"{place}/{number}")


def _wordnet(text: str) -> Iterator[str]:
    """Each set of synonyms with its meaning; wndb(5WN) has the format."""
    for line in text.splitlines():
        if line[:1].isdigit():
            fields, _, gloss = line.partition(" | ")
            parts = fields.split(" ")
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            yield ", ".join(word.replace("_", " ") for word in words) + ": " + gloss.strip()
