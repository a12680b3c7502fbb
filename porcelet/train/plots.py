"""A report's plots: inline SVG by matplotlib, in the colours of the page around them, light or dark.

Numbers and stages' names are all that is written in them, as text. Titles, legends and units are the page's, in its
language and its fonts. Equal input gives equal bytes, whatever style matplotlib is set to.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from porcelet.train.estimate import Estimate
from porcelet.train.extras import optional

SMALL, LARGE = (3.6, 2.2), (4.2, 2.7)  # inches; three or two of them fit on a page, one on a phone
MAX_POINTS = 600  # of a line; more are thinned out
SMOOTHED, MAX_WINDOW = 20, 100  # a running mean is over one in so many points, and at most so many

# Colours that stand for the page's own.
INK, LINE, SERIES = "#010101", "#010102", ("#010103", "#010104")
COLOURS = {INK: "currentColor", LINE: "var(--line)", SERIES[0]: "var(--one)", SERIES[1]: "var(--two)"}
STYLES = ("-", (0, (4, 2)))  # solid and dashed: series are told apart without colours
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),  # others are told with an exponent: labels have room for six characters
    "axes.spines.top": False,
    "axes.spines.right": False,
}

MARGINS = {"left": 0.15, "right": 0.97, "bottom": 0.12, "top": 0.91}  # shares of the figure

Points = Sequence[tuple[float, float]]  # step, value


def require_packages() -> None:
    """Find out before a long run what its report would miss.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    optional("matplotlib")


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

    return _svg(draw, SMALL, label, name)


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

    return _svg(draw, LARGE, label, name)


def _thinned(points: Points) -> list[tuple[float, ...]]:
    """Steps and values, the last point among them."""
    stride = -(-len(points) // MAX_POINTS)
    return list(zip(*points[::-stride][::-1], strict=True))


def _svg(draw: Callable[[Any], None], size: tuple[float, float], label: str, name: str) -> Markup:
    require_packages()
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        # Room by measure takes three times as long, which only long names are worth.
        figure = Figure(figsize=size, layout="constrained" if size == LARGE else None)
        axes = figure.subplots(gridspec_kw=None if size == LARGE else MARGINS)
        axes.tick_params(color=LINE)
        draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    whole = buffer.getvalue()
    body = whole[whole.index(">", whole.index("<svg")) + 1 :]
    body = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", body)  # names of groups, which every plot has
    body = re.sub(r" font-family: [^;]+;", "", body)  # the page's
    for colour, own in COLOURS.items():
        body = body.replace(colour, own)
    box = f"0 0 {72 * size[0]:g} {72 * size[1]:g}"
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, label) + Markup(body)
