"""Who may reach the server, as the command line says it: keys, names and certificate."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from porcelet.errors import InputError
from porcelet.server.gate.loopback import is_loopback


@dataclass(frozen=True, kw_only=True)
class Access:
    """`local`: the listening address is loopback. `allowed_hosts` are the names under which browsers may use the
    server; empty allows loopback's own names where it is local, and any elsewhere."""

    local: bool = True
    require_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None

    @property
    def needs_key(self) -> bool:
        """Whether nobody gets in without a key. A name that is not loopback's says that others come: by a proxy."""
        return self.require_key or not self.local or not all(map(is_loopback, self.allowed_hosts))

    @property
    def scheme(self) -> str:
        return "https" if self.certificate else "http"

    def check(self) -> None:
        """See that the certificate can be used.

        Raises:
            InputError: one of its files is missing or not what it should be, or it is given without its key.
        """
        if (self.certificate is None) != (self.private_key is None):
            raise InputError("a certificate needs its key: give both --certificate and --private-key, or neither")
        for file in filter(None, (self.certificate, self.private_key)):
            if not file.is_file():
                raise InputError(f"{file} does not exist; --certificate and --private-key take PEM files")
        if self.certificate:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                    self.certificate, self.private_key, _no_password
                )
            except (ssl.SSLError, OSError, ValueError) as problem:
                reason = getattr(problem, "reason", None) or problem
                raise InputError(f"{self.certificate} and {self.private_key} cannot be used: {reason}") from problem


def _no_password() -> str:
    raise ValueError("the private key has a password; give one without")
