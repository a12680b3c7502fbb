"""Published figures that must agree with one another, and whether they do.

Press figures are repeated without being added up. Each entry of published.toml says which of its numbers follow from
which; `check` computes them and tells what does not fit, and by how much.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

from porcelet.errors import InputError


@dataclass(frozen=True)
class Contradiction:
    """Numbers of an entry that give another one than it says. `told` is the relation in words."""

    entry: str
    told: str
    computed: float
    published: float

    @property
    def factor(self) -> float:
        return self.computed / self.published


@cache
def entries() -> Mapping[str, Mapping[str, Any]]:
    """All entries by name."""
    return tomllib.loads(files("porcelet.plan").joinpath("published.toml").read_text(encoding="utf-8"))


def check(name: str) -> list[Contradiction]:
    """What does not fit in an entry; empty: its numbers agree.

    Raises:
        InputError: there is no such entry.
    """
    if name not in entries():
        raise InputError(f"nothing published is called {name!r}; known: {', '.join(entries())}")
    entry = entries()[name]
    found = (_contradiction(name, entry, relation) for relation in entry["relations"])
    return [one for one in found if one]


def _contradiction(name: str, entry: Mapping[str, Any], relation: Mapping[str, Any]) -> Contradiction | None:
    if "sum" in relation:
        computed, told = sum(entry[key] for key in relation["sum"]), " + ".join(relation["sum"])
    else:
        over = relation.get("over", [])
        computed = prod(entry[key] for key in relation["of"]) / prod(entry[key] for key in over)
        told = " x ".join(relation["of"]) + "".join(f" / {key}" for key in over)
    published = entry[relation["is"]]
    if abs(computed / published - 1) <= relation["within"] + 1e-12:
        return None
    return Contradiction(name, f"{told} = {relation['is']}", computed, published)
