"""The certificate authorities that the environment names: whose word is taken for who a server is."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from porcelet.doctor.finding import Finding, State

FILES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
FOLDERS = "SSL_CERT_DIR"
SHOWN = 3
MANY = 10  # a system's own bundle has a hundred, of which some have always expired
CODE = "certificates"


def certificates(now: float | None = None) -> Iterator[Finding]:
    """A finding for each file or folder of authorities that a variable names, or one if none does. `now` in Unix
    seconds."""
    named: dict[str, list[str]] = {}
    for name in FILES:
        if path := os.environ.get(name):
            named.setdefault(path, []).append(name)
    found = [_file(", ".join(names), Path(path), now) for path, names in named.items()]
    folders = os.environ.get(FOLDERS, "").split(os.pathsep)
    found += [_folder(Path(folder)) for folder in folders if folder]
    yield from found or [Finding(CODE, "ok", "the environment names no authorities: those that are built in are used")]


def _file(name: str, path: Path, now: float | None) -> Finding:
    """One file of authorities, which must be PEM; a folder is possible but for SSL_CERT_FILE."""
    remedy = f"set {name} to a PEM file of your authorities, or unset it"
    if path.is_dir():
        if name.startswith(FILES[0]):
            return Finding(CODE, "problem", f"{name}={path} is a folder", f"set {FOLDERS} to it, or {remedy}")
        return _folder(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError:
        return Finding(CODE, "problem", f"{name}={path} holds no certificate in PEM form", remedy)
    except OSError as problem:
        return Finding(CODE, "problem", f"{name}={path} cannot be read: {problem.strerror}", remedy)
    return _dates(f"{name}={path}", context, time.time() if now is None else now)


def _dates(shown: str, context: ssl.SSLContext, now: float) -> Finding:
    """Whether the authorities hold today."""
    authorities = context.get_ca_certs()
    if not authorities:
        remedy = "name the certificate of the authority that signs, not a server's own"
        return Finding(CODE, "problem", f"{shown} holds no authority, only other certificates", remedy)
    expired = [_common_name(one) for one in authorities if ssl.cert_time_to_seconds(str(one["notAfter"])) < now]
    early = [_common_name(one) for one in authorities if ssl.cert_time_to_seconds(str(one["notBefore"])) > now]
    cause = f"{shown} names {len(authorities)} authorities"
    if early:
        return Finding(CODE, "problem", f"{cause}, of which {_some(early)} do not hold yet", "set the clock")
    if len(expired) == len(authorities) or (expired and len(authorities) <= MANY):
        state: State = "problem" if len(expired) == len(authorities) else "note"
        return Finding(CODE, state, f"{cause}, of which {_some(expired)} expired", "ask for their new certificates")
    return Finding(CODE, "ok", f"{cause}, {len(authorities) - len(expired)} of which hold")


def _folder(folder: Path) -> Finding:
    """A folder of authorities: OpenSSL finds none in it that is not named after its hash."""
    shown = f"the folder of authorities {folder}"
    try:
        names = os.listdir(folder)
    except OSError as problem:
        return Finding(CODE, "problem", f"{shown} cannot be read: {problem.strerror}", f"correct or unset {FOLDERS}")
    hashed = [name for name in names if len(name.partition(".")[0]) == 8 and name.partition(".")[2].isdecimal()]
    if not hashed:
        return Finding(CODE, "problem", f"{shown} has none under its hash", f"openssl rehash {folder}")
    return Finding(CODE, "ok", f"{shown} has {len(hashed)}")


def _common_name(certificate: Mapping[str, object]) -> str:
    subject = certificate.get("subject", ())
    assert isinstance(subject, tuple)
    facts = {key: value for group in subject for key, value in group}
    return facts.get("commonName") or facts.get("organizationName") or "one without a name"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
