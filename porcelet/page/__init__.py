"""Self-contained HTML pages: one style, inline drawings, no script, nothing loaded from elsewhere.

The trainer's report and the planner's are made of this. Equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Plot:
    """A figure: its title, what its lines are called, their numbers in words, the drawing, what runs to the right."""

    title: str
    legend: Sequence[str]
    numbers: Sequence[str]
    svg: Markup
    across: str


def render(package: str, template: str, **values: Any) -> str:
    """A page from a template of `package`, which extends base.html.jinja."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("porcelet.page", "")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["grouped"] = grouped
    return environment.get_template(template).render(**values)


def grouped(number: int) -> str:
    """Thousands apart, as SI writes them."""
    return f"{number:,}".replace(",", "\u202f")
