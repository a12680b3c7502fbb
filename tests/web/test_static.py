"""What of the page needs no browser to be checked: its size, licences and texts, and that it needs nobody else."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

STATIC = Path(__file__).parents[2] / "porcelet/server/static"
VENDOR = STATIC / "vendor"
OWN = [file for file in STATIC.rglob("*") if file.is_file() and VENDOR not in file.parents]
MODULES = [file for file in OWN if file.suffix == ".js"]
SOURCES = [file for file in OWN if file.suffix in (".js", ".css", ".html", ".webmanifest", ".svg")]
PAGES = [STATIC / "index.html", STATIC / "login.html"]
LANGUAGES = ("en", "fr", "zh")
ERRORS = {  # the codes of the chat API that the page says in the visitor's language
    "invalid_api_key",
    "rate_limit_exceeded",
    "insufficient_balance",
    "model_not_found",
    "context_length_exceeded",
    "overloaded",
    "engine_unavailable",
    "file_too_large",
    "file_unreadable",
    "file_encrypted",
    "file_scanned",
    "file_encoding",
    "file_too_long",
    "not_found",
    "unreachable",
    "other",
}


def texts() -> dict[str, dict[str, str]]:
    source = (STATIC / "app/texts.js").read_text()
    catalogue: dict[str, dict[str, str]] = json.loads(source.partition("TEXTS = ")[2].rpartition(";")[0])
    return catalogue


def test_page_is_small() -> None:
    """The whole page, its libraries and fonts included, is below one megabyte compressed."""
    sizes = {file: len(gzip.compress(file.read_bytes(), 9)) for file in STATIC.rglob("*") if file.is_file()}
    assert sum(sizes.values()) < 1_000_000


def test_libraries_are_pinned_and_licensed() -> None:
    """Every vendored library has its version in its folder's name, its licence beside it and a line in the README."""
    folders = [folder for folder in VENDOR.iterdir() if folder.is_dir()]
    readme = (VENDOR / "README.md").read_text()
    assert folders
    for folder in folders:
        name, version = re.fullmatch(r"([a-z-]+)-(\d+\.\d+\.\d+)", folder.name).groups()  # type: ignore[union-attr]
        assert re.search(rf"^\| {re.escape(folder.name)} \|.*\b{re.escape(version)}\b", readme, re.MULTILINE), name
        assert (folder / "LICENSE").stat().st_size > 500


def test_every_named_file_exists() -> None:
    """Whatever a page, a style sheet, a module or the manifest names is there, and nothing vendored lies unused."""
    named = set(PAGES)
    for page in PAGES:
        named |= {STATIC / path for path in re.findall(r'(?:src|href)="/static/([^"#]+)"', page.read_text())}
    manifest = json.loads((STATIC / "manifest.webmanifest").read_text())
    named |= {STATIC / icon["src"].removeprefix("/static/") for icon in manifest["icons"]}
    for module in MODULES:
        found = re.findall(r'(?:from |import |KATEX = )"(\.[^"]+)"', module.read_text())
        named |= {(module.parent / path).resolve() for path in found}
    assert [file for file in named if not file.is_file()] == []
    unused = {file for file in STATIC.rglob("*") if file.suffix in (".js", ".mjs", ".css", ".html")} - named
    assert unused == {STATIC / "worker.js"}  # registered by its address at the root


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(STATIC)))
def test_nothing_refers_to_another_host(file: Path) -> None:
    """No address of another host is in what we wrote; the name of SVG's language is no address."""
    addresses = set(re.findall(r"(?:https?:)?//[\w-]+\.[^\s\"'<)]+", file.read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(STATIC)))
def test_nothing_is_inline(file: Path) -> None:
    """No script, style or handler stands in markup, and no module writes markup or evaluates text."""
    source = file.read_text()
    if file.suffix == ".html":
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", source)
    if file.suffix == ".js":
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
        assert not re.search(r"setAttribute\(\"style|style:", source)
    if file.suffix == ".css":
        assert not re.search(r"@import|url\(", source)


def test_modules_say_what_they_are_for() -> None:
    """Every module and style sheet opens with a comment, and no line is wider than 120 columns."""
    for file in OWN:
        if file.suffix in (".js", ".css"):
            lines = file.read_text().splitlines()
            assert lines[0].startswith(("// ", "/* ")), file
            assert max(map(len, lines)) <= 120 or file.name == "texts.js", file


def test_texts_are_whole_in_every_language() -> None:
    """Every language has the same keys, none empty, with the same blanks."""
    catalogue = texts()
    assert tuple(catalogue) == LANGUAGES
    blanks = {key: set(re.findall(r"\{\w+\}", text)) for key, text in catalogue["en"].items()}
    for language in catalogue.values():
        assert list(language) == list(blanks)
        assert all(language.values())
        assert {key: set(re.findall(r"\{\w+\}", text)) for key, text in language.items()} == blanks


def test_french_spaces_do_not_break() -> None:
    """No French sign is left alone on a new line: ? ! ; % have a narrow space before, : a wide one, « » wide inside."""
    for key, text in texts()["fr"].items():
        assert not re.search(r"[^\u202f][?!;%]|[^\u00a0][:»]|«(?!\u00a0)", text), key


def test_languages_differ() -> None:
    """A text is not left in English, but for the few words that languages share."""
    catalogue = texts()
    shared = {"context_short", "message", "conversation_options", "options", "code"}
    for language in ("fr", "zh"):
        same = {key for key, text in catalogue["en"].items() if catalogue[language][key] == text}
        assert same <= shared, language


def test_every_text_is_used_and_every_used_text_exists() -> None:
    """The page uses each key, and no other; errors are looked up by the server's codes."""
    keys = set(texts()["en"])
    code = "".join(file.read_text() for file in OWN if file.suffix in (".js", ".html") and file.name != "texts.js")
    marked = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', code))
    called = set(re.findall(r'\b(?:announce|text|setText|setLabel|copyButton)\((?:[^"()]|\([^()]*\))*"(\w+)"', code))
    literal = set(re.findall(r'"(\w+)"', code))
    by_code = {f"error_{code_}" for code_ in ERRORS}
    assert {key for key in keys if key.startswith("error_")} == by_code
    assert marked <= keys
    assert {key for key in called if "_" in key or key in keys} - keys - {"aria_label"} == set()
    assert keys - by_code - {"language_name"} - marked - literal == set()


def test_manifest_makes_it_installable() -> None:
    """The manifest has what browsers ask for: a name, a start, a display mode, and icons of the two sizes as said."""
    manifest: dict[str, Any] = json.loads((STATIC / "manifest.webmanifest").read_text())
    assert manifest["start_url"] == manifest["scope"] == "/"
    assert manifest["display"] == "standalone"
    png = {icon["sizes"]: icon["src"].removeprefix("/static/") for icon in manifest["icons"] if "png" in icon["src"]}
    for size in ("192x192", "512x512"):
        header = (STATIC / png[size]).read_bytes()[:24]
        width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        assert f"{width}x{height}" == size


def test_worker_keeps_the_shell_alone() -> None:
    """The service worker asks for the page and its files; nothing of the API is ever kept."""
    source = (STATIC / "worker.js").read_text()
    assert 'pathname === "/" || pathname.startsWith("/static/")' in source
    assert "/api" not in source.replace("(never of /api", "")
