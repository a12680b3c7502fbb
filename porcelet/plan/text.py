"""A plan as text for a terminal, and as JSON: the same figures, with formula, range, label and sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from porcelet.plan.answer import Answer, Question
from porcelet.plan.figure import Figure
from porcelet.plan.serve import Option, Point
from porcelet.plan.verdicts import Verdict, verdicts
from porcelet.plan.words import words

SHOWN_LAYOUTS = 5


def lines(answer: Answer, language: str = "en") -> Iterator[str]:
    """The answer as a person reads it: verdicts, figures, layouts."""
    said = words(language)
    for verdict in verdicts(answer):
        yield ("  - " if verdict.key.startswith("change_") else "") + sentence(verdict, language)
    for section in answer.sections:
        yield ""
        yield f"{said['sections'][section.key]}"
        for key, figure in section.rows.items():
            yield f"  {said['rows'][key]:<42} {shown(figure):>20}  {spread(figure)}".rstrip()
    if answer.options:
        yield ""
        yield said["layouts"]
        columns = (said["layout"], said["copies"], said["at_once"], said["written"], said["most"], said["limit"])
        yield "  {:<26}{:>8}{:>18}{:>12}{:>12}  {}".format(*columns)
        for option in answer.options[:SHOWN_LAYOUTS]:
            yield "  {:<26}{:>8}{:>18}{:>12}{:>12}  {}".format(*row(option, language))


def row(option: Option, language: str) -> tuple[str, ...]:
    """A layout as a line of a table."""
    best = option.best
    most = max((point.written for point in option.curve), default=0.0)
    limit = words(language)["limits"][(best or option.curve[0]).limit]
    concurrency, written = (f"{best.concurrency:,}", f"{best.written:,.0f}") if best else ("-", "-")
    return str(option.layout), str(option.copies), concurrency, written, f"{most:,.0f}", limit


def sentence(verdict: Verdict, language: str) -> str:
    """A verdict in words."""
    text = words(language)["said"][verdict.key].format(**verdict.values)
    return text if isinstance(text, str) else str(text)


def shown(figure: Figure) -> str:
    """The value with its unit."""
    return amount(figure.value, figure.unit)


def spread(figure: Figure) -> str:
    """The range, where there is one."""
    low, high = figure.range
    return f"{amount(low, figure.unit)} - {amount(high, figure.unit)}" if low != high else ""


def amount(value: float, unit: str) -> str:
    """A number as people write it: bytes in GB, shares in %, thousands apart."""
    if value == float("inf"):
        return "-"
    if unit == "B":
        return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value:,.0f} B"
    if unit.startswith("of "):
        return f"{100 * value:.3g} %"
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}"


# ---- JSON -----------------------------------------------------------------------------------------------------------


def as_json(answer: Answer, language: str = "en") -> dict[str, Any]:
    """Everything, for programs. Numbers are in the units that each figure names."""
    return {
        "question": _question(answer.question),
        "verdicts": [
            {"key": one.key, "good": one.good, "text": sentence(one, language), **one.values}
            for one in verdicts(answer)
        ],
        "figures": {
            section.key: {key: figure_json(figure) for key, figure in section.rows.items()}
            for section in answer.sections
        },
        "layouts": [_option(option) for option in answer.options],
        "changes": [{"kind": change.kind, "setting": change.setting} for change in answer.changes],
    }


def figure_json(figure: Figure) -> dict[str, Any]:
    """A figure with all that it says about itself."""
    low, high = figure.range
    return {
        "value": _finite(figure.value),
        "low": _finite(low),
        "high": _finite(high),
        "unit": figure.unit,
        "formula": figure.formula,
        "label": figure.label,
        "sources": list(figure.sources),
    }


def _finite(value: float) -> float | None:
    return None if value == float("inf") else value


def _question(question: Question) -> dict[str, Any]:
    model = question.model
    return {
        "model": model.name,
        "architecture": model.config.architecture,
        "parameters": model.config.num_parameters(),
        "active_parameters": model.config.num_active_parameters(),
        "weights": model.format.name,
        "weight_bytes": model.num_bytes,
        "weight_source": model.source,
        "device": question.fleet.device.name,
        "count": question.fleet.count,
        "traffic": dataclasses.asdict(question.traffic),
        "users": question.users,
        "busy_hours": question.busy_hours,
        "supply": dataclasses.asdict(question.supply),
        "tariff": question.tariff,
        "speculation": question.mtp,
    }


def _option(option: Option) -> Mapping[str, Any]:
    return {
        "layout": dataclasses.asdict(option.layout),
        "copies": option.copies,
        "cache_tokens": int(option.memory.room),
        "best": _point(option.best) if option.best else None,
        "curve": [_point(point) for point in option.curve],
    }


def _point(point: Point) -> Mapping[str, Any]:
    return {
        "concurrency": point.concurrency,
        "written": point.written,
        "speed": point.speed,
        "first_token": point.first_token,
        "limit": point.limit,
    }
