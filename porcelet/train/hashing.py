"""Every random choice of a run: a hash of what it is for, so there is no random state to save or restore."""

from __future__ import annotations

import hashlib


def hashed(*values: object) -> int:
    """63 bits that depend on the values alone."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
