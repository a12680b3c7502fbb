"""One file over HTTP: resumed where it broke off, checked before it counts.

The bytes go to `<file>.part`; `<file>.version` notes which version of the file they are of (a commit, an ETag, a
SHA-256). A later run, after Ctrl-C or kill -9, asks for the rest with a Range request if the version is the same; else
it starts over. TLS, proxies and authorities come from the environment: HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE,
SSL_CERT_DIR, and REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, which the HTTP library does not read itself.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from porcelet import __version__
from porcelet.errors import InputError, ModelError
from porcelet.hub.store import sha256_of

MAX_FAILURES = 4  # in a row, without a byte between them
RETRY_SECONDS = 1.0
TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
HTTP_PROBLEMS = (httpx2.RequestError, httpx2.InvalidURL)
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Report = Callable[[int], None]  # bytes of this file so far

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file to fetch. Where `version` is a quoted ETag, the server is asked whether it still holds."""

    url: str
    size: int | None
    version: str
    sha256: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@contextmanager
def http_client() -> Iterator[httpx2.Client]:
    """The client of one pull.

    Raises:
        InputError: the file of certificate authorities that the environment names cannot be read.
    """
    headers = {"User-Agent": f"porcelet/{__version__}", "Accept-Encoding": "identity"}
    try:
        client = httpx2.Client(verify=_authorities(), headers=headers, timeout=TIMEOUT, follow_redirects=True)
    except (OSError, ValueError, ImportError) as problem:  # SSLError is an OSError; SOCKS needs another package
        raise InputError(
            f"the HTTP settings of the environment cannot be used: {problem}; check SSL_CERT_FILE, "
            "REQUESTS_CA_BUNDLE, HTTPS_PROXY and ALL_PROXY"
        ) from problem
    with client:
        yield client


def _authorities() -> ssl.SSLContext | bool:
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return True
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if not bundle:
        return True
    if os.path.isdir(bundle):
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def download(client: httpx2.Client, remote: Remote, target: Path, report: Report) -> str:
    """Fetch a file to `target` and return its SHA-256.

    Raises:
        ModelError: the server cannot be reached or refuses, or the bytes are not the promised ones.
    """
    part, note = target.with_name(target.name + ".part"), target.with_name(target.name + ".version")
    if not note.is_file() or not remote.version or note.read_text(encoding="utf-8") != remote.version:
        part.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
        note.write_text(remote.version, encoding="utf-8")
    if not target.exists():
        _fill(client, remote, part, report)
        part.rename(target)
    report(target.stat().st_size)
    found = sha256_of(target)
    if remote.sha256 not in ("", found):
        target.unlink()
        raise ModelError(f"{public(remote.url)} has SHA-256 {found}, not {remote.sha256}; pull again or report it")
    return found


def _fill(client: httpx2.Client, remote: Remote, part: Path, report: Report) -> None:
    """Add to `part` until it is whole, over as many connections as it takes while they bring something."""
    failures, problem = 0, ""
    while failures < MAX_FAILURES:
        size = part.stat().st_size if part.exists() else 0
        if remote.size is not None and size > remote.size:
            part.unlink()
            size = 0
        if size and size == remote.size:
            return
        try:
            _stream(client, remote, part, size, report)
            if part.exists() and remote.size in (None, part.stat().st_size):  # else the server made us start over
                return
            problem = "the connection was closed early"
        except HTTP_PROBLEMS as error:
            if isinstance(error, httpx2.ConnectError) and not size:
                raise unreachable(remote.url, error) from error
            problem = str(error) or type(error).__name__
        grown = (part.stat().st_size if part.exists() else 0) - size
        failures = 0 if grown > 0 else failures + 1
        logger.info("%s: %s; resuming after %d bytes", public(remote.url), problem, size + max(0, grown))
        time.sleep(RETRY_SECONDS)
    raise ModelError(f"{public(remote.url)} breaks off: {problem}; pull again to resume, or check the network")


def _stream(client: httpx2.Client, remote: Remote, part: Path, offset: int, report: Report) -> None:
    headers = dict(remote.headers)
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if remote.version.startswith('"'):
            headers["If-Range"] = remote.version
    with client.stream("GET", remote.url, headers=headers) as response:
        check_response(response)
        resumed = response.status_code == 206
        if offset and response.status_code == 416:
            part.unlink()
            return
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            part.unlink()
            return
        written = offset if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                written += len(chunk)
                if remote.size is not None and written > remote.size:
                    raise ModelError(f"{public(remote.url)} sends more than its {remote.size} bytes; pull again")
                report(written)
            file.flush()
            os.fsync(file.fileno())


# ---- what went wrong ------------------------------------------------------------------------------------------------


def check_response(response: httpx2.Response) -> None:
    """Raises ModelError for an answer that is not the file; 404, 410 and 416 too unless the caller took them out."""
    first, *hops = [str(hop.url) for hop in (*response.history, response)]
    for hop in hops:
        if is_secure(first) and not is_secure(hop):
            raise ModelError(f"{public(first)} leads to {public(hop)}, which is not https; ask who runs the server")
    status, url = response.status_code, public(str(response.url))
    if status in (200, 206, 416):
        return
    if status in (401, 403):
        raise ModelError(
            f"{url} refuses access (HTTP {status}); set HF_TOKEN to a token that may read it, and accept a gated "
            "model's terms on its page"
        )
    if status in (404, 410):
        raise ModelError(f"{url} does not exist (HTTP {status}); check the name and the revision")
    raise ModelError(f"{url} answers HTTP {status}; try again later")


def unreachable(url: str, problem: Exception) -> ModelError:
    """One line for a connection that did not come about."""
    host, reason = urlsplit(url).netloc.rpartition("@")[2], str(problem) or type(problem).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        return ModelError(
            f"{host}: its certificate is not trusted ({reason}); set SSL_CERT_FILE to a PEM file of your authority"
        )
    if isinstance(problem, httpx2.ProxyError):
        return ModelError(f"the proxy does not lead to {host}: {reason}; check HTTPS_PROXY and NO_PROXY")
    return ModelError(f"{host} cannot be reached: {reason}; check the network, HTTPS_PROXY and NO_PROXY")


def is_secure(url: str) -> bool:
    """https, or a server on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def public(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
