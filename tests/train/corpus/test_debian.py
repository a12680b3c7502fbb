from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from porcelet.errors import InputError, PorceletError
from porcelet.train.corpus import debian
from porcelet.train.corpus.debian import build_corpus
from porcelet.train.corpus.extract import licences, package_documents, stem
from porcelet.train.corpus.packages import PACKAGES, DocPackage
from porcelet.train.corpus.readers import documents

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="packages are made and unpacked by dpkg")

# Stands in for the network alone: it copies archives that dpkg-deb has built.
APT_GET = """#!/bin/sh
echo "$@" >> {folder}/calls
for name; do :; done
cp {folder}/"$name"_*.deb . 2>/dev/null || {{ echo "E: Failed to fetch $name" >&2; exit 100; }}
"""
APT_CACHE = """#!/bin/sh
ls {folder} | sed -n 's/_.*deb$//p'
"""


def sentence(seed: object, length: int = 60) -> str:
    return " ".join(f"w{debian.hashed(seed, i) % 5000}" for i in range(length))


def archive(folder: Path, name: str, files: dict[str, str | bytes], links: dict[str, str] | None = None) -> None:
    """Build a real package."""
    root = folder / f"build-{name}"
    control = f"Package: {name}\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: nobody\nDescription: test\n"
    for path, content in {"DEBIAN/control": control, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content.encode() if isinstance(content, str) else content)
    for path, target in (links or {}).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    subprocess.run(["dpkg-deb", "-b", root, folder / f"{name}_2.0-1_all.deb"], check=True, capture_output=True)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that apt-get "downloads" from."""
    folder = tmp_path / "apt"
    folder.mkdir()
    for name, script in (("apt-get", APT_GET), ("apt-cache", APT_CACHE)):
        (folder / name).write_text(script.format(folder=folder), encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def publish(apt: Path) -> None:
    """Two packages: documentation in pages and their sources, and code whose notice lies in a third."""
    files: dict[str, str | bytes] = {"usr/share/doc/linux-doc-6.1/copyright": "License: GPL-2\n"}
    for i in range(300):
        shared = sentence("shared paragraph") if i else sentence("first")
        page = f"<html><body><nav>no</nav><h1>Page {i}</h1><p>{sentence(i)}<p>{shared}</body></html>"
        files[f"usr/share/doc/linux-doc-6.1/html/page{i}.html"] = page
        files[f"usr/share/doc/linux-doc-6.1/Documentation/page{i}.rst.gz"] = gzip.compress(
            f"Page {i}\n======\n\n{sentence(('source', i))}\n".encode(), mtime=0
        )
    files["usr/share/doc/linux-doc-6.1/html/genindex.html"] = f"<p>{sentence('index')}</p>"
    archive(apt, "linux-doc-6.1", files)
    archive(apt, "linux-doc-5.10", {"usr/share/doc/linux-doc-5.10/copyright": "old"})
    code = {f"usr/lib/python3.11/m{i}.py": f"# {sentence(('code', i))}\n" for i in range(5)}
    link = {"usr/share/doc/libpython3.11-stdlib": "libpython3.11-minimal"}
    archive(apt, "libpython3.11-stdlib", dict(code), link)
    archive(apt, "libpython3.11-minimal", {"usr/share/doc/libpython3.11-minimal/copyright": "PSF LICENSE AGREEMENT"})


NAMES = ("python-stdlib", "linux-doc")


def places(output: Path, part: str) -> list[str]:
    files = sorted((output / part).glob("*.jsonl"))
    return [json.loads(line)["id"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@needs_dpkg
def test_a_corpus_is_built_from_packages(tmp_path: Path, apt: Path) -> None:
    """The newest of several versions; every page and source once, both on one side; one paragraph once; licences,
    versions, counts and hashes in the manifest."""
    publish(apt)
    manifest = build_corpus(tmp_path / "corpus", NAMES)
    train, held_out = places(tmp_path / "corpus", "train"), places(tmp_path / "corpus", "held-out")
    assert len(train) + len(held_out) == 605 and 1 <= len(held_out) < 25
    assert not set(map(stem, train)) & set(map(stem, held_out))
    texts = [document.text for document in documents(tmp_path / "corpus/train/linux-doc.jsonl")]
    texts += [document.text for document in documents(tmp_path / "corpus/held-out/linux-doc.jsonl")]
    assert sum(sentence("shared paragraph") in text for text in texts) == 1
    assert not any("no\n" in text or sentence("index") in text for text in texts)
    kernel, python = manifest["packages"]
    assert (kernel["package"], kernel["version"], kernel["licences"]) == ("linux-doc-6.1", "1:2.0-1", ["GPL-2"])
    assert (python["package"], python["licences"]) == ("libpython3.11-stdlib", ["PSF"])
    assert manifest["train"]["documents"] == len(train) and manifest["held-out"]["documents"] == len(held_out)
    assert json.loads((tmp_path / "corpus/manifest.json").read_text(encoding="utf-8")) == manifest
    assert "PSF" in (tmp_path / "corpus/licences/python-stdlib.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "corpus/work").exists()
    again = build_corpus(tmp_path / "again", NAMES)
    assert again == manifest
    with pytest.raises(InputError, match="complete corpus"):
        build_corpus(tmp_path / "corpus", NAMES)


@needs_dpkg
def test_a_stopped_build_goes_on_behind_the_last_package(tmp_path: Path, apt: Path) -> None:
    """A package that fails leaves the others done: they are not fetched again, and the result is the same."""
    publish(apt)
    whole = build_corpus(tmp_path / "whole", NAMES)
    (apt / "calls").unlink()
    (apt / "libpython3.11-minimal_2.0-1_all.deb").rename(apt / "away")
    with pytest.raises(PorceletError, match="Failed to fetch libpython3.11-minimal; check the network"):
        build_corpus(tmp_path / "corpus", NAMES)
    (apt / "away").rename(apt / "libpython3.11-minimal_2.0-1_all.deb")
    assert build_corpus(tmp_path / "corpus", NAMES) == whole
    assert (apt / "calls").read_text().count("linux-doc-6.1") == 1


@needs_dpkg
def test_a_sample_is_a_part_of_the_whole(tmp_path: Path, apt: Path) -> None:
    """--max-megabytes keeps about so much, chosen by hash: the same documents on the same sides."""
    publish(apt)
    whole = build_corpus(tmp_path / "whole", NAMES)
    size = (whole["train"]["bytes"] + whole["held-out"]["bytes"]) / 1e6
    part = build_corpus(tmp_path / "part", NAMES, max_megabytes=size / 2)
    share = part["train"]["bytes"] / whole["train"]["bytes"]
    assert 0.4 < share < 0.6
    for side in ("train", "held-out"):
        assert set(places(tmp_path / "part", side)) <= set(places(tmp_path / "whole", side))


@needs_dpkg
def test_held_out_copies_of_training_text_are_dropped(tmp_path: Path, apt: Path) -> None:
    """A held-out document that is mostly in the training part, here in other paragraphs, does not measure anything."""
    held_out = next(i for i in range(10**4) if debian._part(f"gcide/{i}") == "held-out")
    text = sentence("twice", 200).split()
    first, second = (" ".join(text[a:]) for a in (0, 3))
    files: dict[str, str | bytes] = {
        "usr/lib/python3.11/a.py": f"# {first}",
        "usr/share/doc/libpython3.11-stdlib/copyright": "",
    }
    archive(apt, "libpython3.11-stdlib", files)
    pages = [sentence(("page", i), 1500) for i in range(held_out)] + [second + " " + "x" * 8000]
    entries = "\n\n".join(f"Entry{i} {page}" for i, page in enumerate(pages))
    archive(
        apt,
        "dict-gcide",
        {"usr/share/dictd/gcide.dict.dz": gzip.compress(entries.encode()), "usr/share/doc/dict-gcide/copyright": ""},
    )
    manifest = build_corpus(tmp_path / "corpus", ("gcide", "python-stdlib"))
    place = f"gcide/gcide.dict.dz/{held_out}"
    assert (debian._part(place) == "held-out") == (manifest["held-out dropped"] == 1)
    assert place not in places(tmp_path / "corpus", "held-out")


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt: Path) -> None:
    """An unknown name, a package that apt does not know, and a machine without apt."""
    with pytest.raises(InputError, match="'linux' is not known; known: linux-doc"):
        build_corpus(tmp_path / "a", ["linux"])
    with pytest.raises(PorceletError, match="apt knows no package vim-doc"):
        build_corpus(tmp_path / "b", ["vim-doc"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt-cache is not here"):
        build_corpus(tmp_path / "c", ["vim-doc"])


def test_dictionaries_become_pages_of_entries(tmp_path: Path) -> None:
    """No entry is lost or cut; WordNet's lines become synonyms with their meaning."""
    entries = [f"Word{i} \\Word{i}\\, n.\n   {sentence(i)}\n\n   2. More." for i in range(100)]
    (tmp_path / "usr/share/dictd").mkdir(parents=True)
    (tmp_path / "usr/share/dictd/gcide.dict.dz").write_bytes(gzip.compress("\n\n".join(entries).encode()))
    found = list(package_documents(tmp_path, by_name("gcide")))
    assert len(found) > 3 and "\n\n".join(document.text for document in found) == "\n\n".join(entries)
    assert all(len(document.text) < 9000 for document in found)
    (tmp_path / "usr/share/wordnet").mkdir()
    lines = '  1 licence\n00006150 03 n 02 parent 0 old_one 0 001 @ 00004475 n 0000 | one that begets; "a parent"  \n'
    (tmp_path / "usr/share/wordnet/data.noun").write_text(lines, encoding="utf-8")
    (page,) = package_documents(tmp_path, by_name("wordnet"))
    assert page.text == 'parent, old one: one that begets; "a parent"'


def by_name(name: str) -> DocPackage:
    return next(package for package in PACKAGES if package.name == name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("License: GPL-2+ or Artistic\n text\nLicense:  Expat\n", ["Expat", "GPL-2+ or Artistic"]),
        ("License: Permission to use, copy, modify\n", []),
        ("see `/usr/share/common-licenses/GPL-2'. and\n/usr/share/common-licenses/LGPL-2.1.", ["GPL-2", "LGPL-2.1"]),
        ("under the GNU Free\nDocumentation License", ["GFDL"]),
    ],
)
def test_licences_are_found_in_notices(text: str, found: list[Any]) -> None:
    """Identifiers of machine-readable fields, of Debian's common licences and of well-known names; no sentences."""
    assert licences(text) == found
