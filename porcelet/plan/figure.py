"""A number that says where it comes from: its range, its formula, and the sources of what is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Label = Literal["measured", "published", "derived", "assumed"]
LABELS: tuple[Label, ...] = ("measured", "published", "derived", "assumed")  # from the firmest to the weakest


@dataclass(frozen=True)
class Number:
    """An input: one number of hardware.toml, tariffs.toml or of the user's own.

    `source` says who says so, `date` when (ISO, as exact as known); `low` and `high` bound it where it is uncertain.
    """

    value: float
    label: Label
    source: str
    date: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high

    def cited(self, name: str) -> str:
        """The number as a source of what is computed from it."""
        when = f", {self.date}" if self.date else ""
        return f"{name} {self.value:g}: {self.source}{when} ({self.label})"


@dataclass(frozen=True)
class Figure:
    """A result: a value between `low` and `high`, in `unit`, by `formula`, from `sources`.

    `label` is the weakest of those of its inputs: what is computed from published numbers is "derived" at best.
    """

    value: float
    unit: str
    formula: str
    label: Label = "derived"
    sources: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


def weakest(labels: Iterable[Label]) -> Label:
    """The label of what is computed from numbers with these labels."""
    return max(("derived", *labels), key=LABELS.index)
