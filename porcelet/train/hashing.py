"""Where every random choice of a run comes from: a hash of (seed, position), never a generator's state.

A position can be drawn at any time and in any order, so a resumed run needs nothing but the number of its step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def hashed(*values: object) -> int:
    """63 bits that depend on the values alone."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pick(items: Sequence[Item], *values: object) -> Item:
    """One of the items."""
    return items[hashed(*values) % len(items)]


def shuffled(items: Sequence[Item], *values: object) -> list[Item]:
    """The items in an order of their own; which one, the values say."""
    order = sorted(range(len(items)), key=lambda i: hashed(*values, i))
    return [items[i] for i in order]
