"""A training report's plots: metrics over steps, and what could be done after each stage.

Numbers and stages' names are all that is written in them, as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from porcelet.page.draw import LARGE, SERIES, SMALL, STYLES, svg
from porcelet.train.estimate import Estimate

MAX_POINTS = 600  # of a line; more are thinned out
SMOOTHED, MAX_WINDOW = 20, 100  # a running mean is over one in so many points, and at most so many

Points = Sequence[tuple[float, float]]  # step, value


def window_of(num_points: int) -> int:
    """How many points the running mean of a line is over."""
    return min(max(1, num_points // SMOOTHED), MAX_WINDOW)


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The mean of each point and those before it, over the window."""
    window, values = window_of(len(points)), [value for _, value in points]
    return [(step, fmean(values[max(0, i + 1 - window) : i + 1])) for i, (step, _) in enumerate(points)]


def draw_curves(curves: Sequence[Points], means: Sequence[Points], label: str, name: str) -> Markup:
    """At most two metrics over the steps of a run: thin as they are, bold their means, which may be the same.

    `label` says to those who cannot see it what is to be seen; `name` is unique on the page.
    """

    def draw(axes: Any) -> None:
        for points, mean, colour, style in zip(curves, means, SERIES, STYLES, strict=False):
            if mean != points:
                axes.plot(*_thinned(points), color=colour, linewidth=0.6, alpha=0.45)
            marker = "o" if len(points) == 1 else None
            axes.plot(*_thinned(mean), color=colour, linestyle=style, linewidth=1.8, marker=marker)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return svg(draw, SMALL, label, name)


def draw_stages(stages: Sequence[str], curves: Sequence[Sequence[Estimate | None]], label: str, name: str) -> Markup:
    """At most two numbers after each stage, with their intervals as bars."""

    def draw(axes: Any) -> None:
        for shift, curve, colour, style in zip((-0.05, 0.05), curves, SERIES, STYLES, strict=False):
            found = [(i, one) for i, one in enumerate(curve) if one]
            places = [i + shift * (len(curves) > 1) for i, _ in found]
            axes.errorbar(
                places,
                [one.value for _, one in found],
                [[one.value - one.low for _, one in found], [one.high - one.value for _, one in found]],
                color=colour,
                linestyle=style,
                linewidth=1.4,
                marker="o",
                markersize=4,
                elinewidth=1.2,
                capsize=3,
            )
        turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if len(stages) > 3 else {}
        axes.set_xticks(range(len(stages)), stages, parse_math=False, **turned)
        axes.set_xlim(-0.4, len(stages) - 0.6)
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0.0)

    return svg(draw, LARGE, label, name)


def _thinned(points: Points) -> list[tuple[float, ...]]:
    """Steps and values, the last point among them."""
    stride = -(-len(points) // MAX_POINTS)
    return list(zip(*points[::-stride][::-1], strict=True))
