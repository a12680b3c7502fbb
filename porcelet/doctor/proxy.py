"""The proxies that the environment names. A password in one is never shown."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlsplit

from porcelet.doctor.finding import Finding

NAMES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
SCHEMES = ("http", "https", "socks5", "socks5h")
LOOPBACK = ("localhost", "127.0.0.1")
CODE = "proxy"


def proxies() -> Iterator[Finding]:
    """What is wrong with each proxy, and whether requests to this machine itself would go to one; one finding if all is
    well."""
    named = {name: value for upper in NAMES for name in (upper.lower(), upper) if (value := os.environ.get(name))}
    found = [finding for name, value in named.items() if (finding := _malformed(name, value) or _doubled(name, named))]
    if not found and (finding := _for_this_machine(named)):
        found = [finding]
    shown = ", ".join(f"{name}={without_password(value)}" for name, value in named.items())
    yield from found or [Finding(CODE, "ok", shown or "no proxy is set")]


def address(url: str) -> tuple[str, int] | None:
    """Host and port of the proxy through which a URL would be asked for; None if through none, or through what is no
    proxy."""
    parts = urlsplit(url)
    chosen = urllib.request.getproxies()
    value = chosen.get(parts.scheme) or chosen.get("all")
    if not value or _malformed("", value) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = urlsplit(with_scheme(value))
    return proxy.hostname or "", proxy.port or (443 if proxy.scheme == "https" else 80)


def without_password(value: str) -> str:
    """A proxy's URL as it may be shown."""
    scheme, _, rest = with_scheme(value).partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"  # a password with a slash in it is one, too


def with_scheme(value: str) -> str:
    """A proxy's URL as programs read it: http, where it does not say."""
    return value if "://" in value else f"http://{value}"


def _malformed(name: str, value: str) -> Finding | None:
    remedy = f"set {name} to http://HOST:PORT, or unset it"
    if (scheme := with_scheme(value).partition("://")[0].lower()) not in SCHEMES:
        cause = f"{name} is {without_password(value)}: {scheme!r} is no kind of proxy"
        return Finding(CODE, "problem", cause, f"set {name} to one of {', '.join(SCHEMES)}, as in http://HOST:PORT")
    try:
        parts = urlsplit(with_scheme(value))
        is_whole = bool(parts.hostname) and parts.port != 0 and parts.path in ("", "/") and " " not in value
    except ValueError:
        is_whole = False
    if not is_whole:
        return Finding(CODE, "problem", f"{name} is {without_password(value)!r}: no host and port", remedy)
    if scheme.startswith("socks") and find_spec("socksio") is None:
        cause = f"{name} is {without_password(value)}, and nothing here speaks SOCKS"
        return Finding(CODE, "problem", cause, "pip install socksio, or name an HTTP proxy")
    return None


def _doubled(name: str, named: dict[str, str]) -> Finding | None:
    """A name in capitals whose small twin says something else: programs differ in which they take."""
    twin = named.get(name.lower(), "")
    if name.islower() or not twin or twin == named[name]:
        return None
    shown = f"{name}={without_password(named[name])} and {name.lower()}={without_password(twin)}"
    return Finding(CODE, "note", f"{shown} differ; porcelet takes the second", "set both alike, or unset one")


def _for_this_machine(named: dict[str, str]) -> Finding | None:
    plain = [name for name in named if name.lower() in ("http_proxy", "all_proxy")]
    if not plain or all(urllib.request.proxy_bypass(host) for host in LOOPBACK):
        return None
    cause = f"{plain[0]} is set and NO_PROXY lacks {' and '.join(LOOPBACK)}: clients ask the proxy for a server here"
    return Finding(CODE, "note", cause, f"export NO_PROXY={','.join(LOOPBACK)}")
