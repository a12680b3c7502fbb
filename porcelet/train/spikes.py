"""Which steps are not taken: those whose loss or gradient norm is not finite, or far above what it was lately.

Far above is mean + `spike_deviations` standard deviations of the last `spike_window` steps taken, judged once half of
them are there; OLMo 2 skips steps by this rule with 6 and 128. A refused step is in no statistic, so a second spike is
measured like the first. The rule's state is saved with the checkpoint, as a resumed run must refuse the same steps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from porcelet.errors import ModelError


@dataclass
class SpikeRule:
    """The rule and what it remembers: losses and gradient norms of the last `window` steps taken, oldest first."""

    window: int
    deviations: float  # 0: only what is not finite is refused
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    num_in_row: int = 0

    def objection(self, loss: float, norm: float) -> str:
        """Why a step is not to be taken; empty if it is."""
        reasons = (
            not_finite(loss, norm),
            self._jump("loss", loss, self.losses),
            self._jump("gradient norm", norm, self.norms),
        )
        return next(filter(None, reasons), "")

    def take(self, loss: float, norm: float) -> None:
        """A step's first update was taken: the next steps' are measured by it."""
        self.losses = [*self.losses, loss][-self.window :]
        self.norms = [*self.norms, norm][-self.window :]

    def end(self) -> None:
        """A step was taken to its end, without an objection to any of its updates."""
        self.num_in_row = 0

    def skip(self) -> None:
        """A step, or the rest of one, was refused."""
        self.num_skipped += 1
        self.num_in_row += 1

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values; floats survive JSON exactly."""
        return dataclasses.asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what another rule remembered; its window may have been another.

        Raises:
            ModelError: it is no rule's state.
        """
        try:
            self.losses = state["losses"][-self.window :]
            self.norms = state["norms"][-self.window :]
            self.num_skipped, self.num_in_row = state["num_skipped"], state["num_in_row"]
        except (KeyError, TypeError) as problem:
            raise ModelError(
                f"the checkpoint's state.json is damaged: spikes has no {problem}; delete the checkpoint to start over"
            ) from problem

    def _jump(self, name: str, value: float, past: Sequence[float]) -> str:
        if not self.deviations or len(past) < max(2, self.window // 2):
            return ""
        limit = statistics.fmean(past) + self.deviations * statistics.pstdev(past)
        if value <= limit:
            return ""
        return f"the {name} is {value:.4g}, above {limit:.4g} = mean + {self.deviations:g} deviations of {len(past)}"


def not_finite(loss: float, norm: float) -> str:
    """What of a step is infinite or not a number; empty if nothing is."""
    values = {"loss": loss, "gradient norm": norm}
    return next((f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)), "")
