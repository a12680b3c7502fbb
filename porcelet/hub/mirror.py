"""Models from a plain https server: one .gguf file, or a folder with the files of a Hugging Face repository.

A file's SHA-256 comes from the URL (`#sha256=...`, one file only) or from `<file>.sha256` beside it; where the server
has neither, that is said, and the size and TLS are all there is. Plain http is for servers on this machine.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2

from porcelet.errors import InputError, ModelError
from porcelet.hub import gather
from porcelet.hub.download import (
    HTTP_PROBLEMS,
    Remote,
    check_response,
    download,
    http_client,
    is_secure,
    public,
    unreachable,
)
from porcelet.hub.gather import Gathered, Offer
from porcelet.types import Progress

EXTRAS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "LICENSE-MODEL",
    "README.md",
)

logger = logging.getLogger(__name__)


def fetch(url: str, folder: Path, progress: Progress) -> Gathered:
    """Gather the model at a URL in `folder`.

    Raises:
        InputError: a URL that cannot be used.
        ModelError: not reachable, no access, a file is missing, not the promised bytes.
        CapacityError: not enough disk.
    """
    url, file, sha256 = parse(url)
    unchecked: list[str] = []
    with http_client() as client:
        if file:
            offer = _offer(client, url, unchecked, sha256)
            found = gather.gather_gguf(offer, file, folder, public(url), progress)
        else:

            def look(name: str) -> Offer | None:
                return _offer(client, url + name, unchecked)

            found = gather.gather_folder(look, EXTRAS, folder, public(url), progress)
    if unchecked:
        logger.info("%s gives no SHA-256 for %s: only sizes were checked", public(url), ", ".join(unchecked))
    return Gathered(folder=folder, sha256=found)


def parse(url: str) -> tuple[str, str, str]:
    """The URL to fetch, the file's name ("" for a folder) and the SHA-256 the URL gives ("" without).

    Raises:
        InputError: not a URL, not https, or a fragment that is no SHA-256.
    """
    try:
        parts = urlsplit(url)
    except ValueError as problem:
        raise InputError(f"the source is not a URL: {problem}") from problem
    if not is_secure(url):
        raise InputError(f"{public(url)} is not https; plain http is for servers on this machine alone")
    file = unquote(PurePosixPath(parts.path).name) if parts.path.endswith(".gguf") else ""
    sha256 = ""
    if parts.fragment:
        match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
        if match is None or not file:
            raise InputError(f"{public(url)}#{parts.fragment}: the form is file.gguf#sha256=<64 hexadecimal digits>")
        sha256 = match[1].lower()
    if not file and parts.query:
        raise InputError(f"{public(url)} is a folder; a query cannot be used with it")
    path = parts.path if file or parts.path.endswith("/") else parts.path + "/"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), file, sha256


def _offer(client: httpx2.Client, url: str, unchecked: list[str], sha256: str = "") -> Offer | None:
    """The file at a URL, or None where the server has none. Its name joins `unchecked` if nothing tells its hash."""
    try:
        response = client.head(url)
        if response.status_code in (404, 410):
            return None
        check_response(response)
        sha256 = sha256 or _hash_beside(client, url)
    except HTTP_PROBLEMS as problem:
        raise unreachable(url, problem) from problem
    if not sha256:
        unchecked.append(PurePosixPath(urlsplit(url).path).name)
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    # A weak ETag or a date promises less than equal bytes: good enough only with a hash to compare at the end.
    etag = response.headers.get("ETag", "")
    remote = Remote(url=url, size=size, version=etag if etag.startswith('"') else sha256, sha256=sha256)
    return Offer(size=size, disk=size or 0, obtain=lambda target, report: download(client, remote, target, report))


def _hash_beside(client: httpx2.Client, url: str) -> str:
    """What `sha256sum file > file.sha256` wrote."""
    parts = urlsplit(url)
    beside = urlunsplit(parts._replace(path=parts.path + ".sha256"))
    response = client.get(beside)
    if response.status_code in (403, 404, 410):
        return ""
    check_response(response)
    words = response.text.split()
    if not words or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise ModelError(f"{public(beside)} does not begin with a SHA-256 in hexadecimal")
    return words[0].lower()
