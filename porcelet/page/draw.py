"""Drawings of a page: inline SVG by matplotlib, in the colours of the page around them, light or dark.

Titles, legends and units are the page's, in its language and its fonts. Equal input gives equal bytes, whatever style
matplotlib is set to.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from porcelet.extras import optional

SMALL, LARGE = (3.6, 2.2), (4.2, 2.7)  # inches; three or two of them fit on a page, one on a phone

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


def require_packages(extra: str = "plan") -> None:
    """Find out before long work what its page would miss; `extra` is the optional set that it comes with.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    optional("matplotlib", extra)


def svg(draw: Callable[[Any], None], size: tuple[float, float], label: str, name: str) -> Markup:
    """What `draw` puts on axes of `size` inches. `label` says to those who cannot see it what is to be seen; `name` is
    unique on the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
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
