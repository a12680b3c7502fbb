"""What the parts of a run hand to each other."""

from __future__ import annotations

from collections.abc import Callable

from porcelet.types import Sample

ROLLOUTS = ("grpo", "distill")  # methods whose samples are drawn from the model; they are journalled

Metrics = dict[str, float]
Source = Callable[[int], tuple[list[Sample], Metrics]]  # step → its samples, and what is to log about them
