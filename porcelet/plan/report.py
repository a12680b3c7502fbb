"""A plan as one self-contained HTML page: verdicts, figures with formula and sources, plots.

There is no script, and nothing is loaded from elsewhere. Equal answers give equal bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from porcelet.errors import CapacityError
from porcelet.page import Plot, render
from porcelet.page.draw import INK, LARGE, LINE, SERIES, STYLES, svg
from porcelet.plan.answer import Answer
from porcelet.plan.cost import HOURS_A_MONTH, Usage, hourly
from porcelet.plan.text import SHOWN_LAYOUTS, amount, row, sentence, shown, spread
from porcelet.plan.verdicts import verdicts
from porcelet.plan.words import words

SHADES = (1.0, 0.55, 0.8, 0.3, 0.65)  # of the parts of a bar
POINTS = 24  # of a line


def write_report(answer: Answer, output: Path, language: str = "en") -> Path:
    """Write the page to `output`.

    Raises:
        InputError: the language is not known.
        MissingExtraError: matplotlib is not installed.
        CapacityError: the page cannot be written.
    """
    html = page(answer, language)
    unfinished = output.with_name(output.name + ".unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(html, encoding="utf-8")
        os.replace(unfinished, output)
    except OSError as problem:
        raise CapacityError(f"{output} cannot be written: {problem.strerror}; choose another place") from problem
    return output


def page(answer: Answer, language: str = "en") -> str:
    """The page's HTML."""
    said = words(language)
    return render(
        "porcelet.plan",
        "report.html.jinja",
        language=language,
        words=said,
        title=said["title"].format(model=answer.question.model.name, fleet=answer.question.fleet),
        asked=_asked(answer, said),
        verdicts=[(one, sentence(one, language)) for one in verdicts(answer)],
        sections=answer.sections,
        shown=shown,
        spread=spread,
        layouts=[row(option, language) for option in answer.options[:SHOWN_LAYOUTS]],
        plots=_plots(answer, said),
    )


def _asked(answer: Answer, said: Mapping[str, Any]) -> list[tuple[str, str]]:
    question, traffic = answer.question, answer.question.traffic
    values = {
        "model": question.model.name,
        "weights": f"{question.model.format.name}, {amount(question.model.num_bytes, 'B')}",
        "fleet": str(question.fleet),
        "prompt": f"{traffic.prompt:,}",
        "answer": f"{traffic.answer:,}",
        "thinking": f"{traffic.thinking:g}",
        "hits": f"{100 * traffic.hits:g} %",
        "speed": f"{traffic.speed:g}",
        "first_token": f"{traffic.first_token:g}",
        "turns": f"{traffic.turns:g}",
        "users": f"{question.users:,.0f}" if question.users else "-",
        "busy_hours": f"{question.busy_hours:g}",
        "supply": said["ways"][question.supply.way],
        "electricity": f"{question.supply.electricity:g}",
        "tariff": answer.tariff.cited,
    }
    return [(said["asked"][key], value) for key, value in values.items()]


# ---- plots ----------------------------------------------------------------------------------------------------------


def _plots(answer: Answer, said: Mapping[str, Any]) -> list[Plot]:
    if answer.best is None:
        return []
    found = [_curve(answer, said)]
    if answer.usage and answer.usage.output:
        found.append(_cost(answer, said))
    return [*found, _memory(answer, said)]


def _curve(answer: Answer, said: Mapping[str, Any]) -> Plot:
    """Throughput against speed of the best two layouts, from a lone answer to as many as fit."""
    title, shown_options = said["plots"]["curve"], answer.options[:2]
    legend = [str(option.layout) for option in shown_options]

    def draw(axes: Any) -> None:
        for option, colour, style in zip(shown_options, SERIES, STYLES, strict=False):
            speeds, written = [p.speed for p in option.curve], [p.written for p in option.curve]
            axes.plot(speeds, written, color=colour, linestyle=style, linewidth=1.8)
            if option.best:
                axes.plot([option.best.speed], [option.best.written], color=colour, marker="o")
        axes.axvline(answer.question.traffic.speed, color=LINE, linewidth=1.0)
        axes.set_xscale("log")
        axes.set_yscale("log")

    numbers = [
        f"{option.layout}: {option.best.written:,.0f} {said['lines']['written']}, "
        f"{option.best.speed:.3g} {said['across']['curve']}"
        for option in shown_options
        if option.best
    ]
    return Plot(
        title, legend, numbers, svg(draw, LARGE, f"{title}. {'; '.join(numbers)}", title), said["across"]["curve"]
    )


def _cost(answer: Answer, said: Mapping[str, Any]) -> Plot:
    """A month's cost here and through the API, for up to all the tokens that the fleet can write."""
    assert answer.usage is not None and answer.best is not None
    question, point = answer.question, answer.best.best or answer.best.curve[0]
    capacity = point.written * HOURS_A_MONTH * 3600
    shares = [i / POINTS for i in range(POINTS + 1)]
    own = [HOURS_A_MONTH * hourly(question.fleet, question.supply, share).value for share in shares]
    mixed = answer.usage
    whole = replace(
        mixed, **{name: getattr(mixed, name) * capacity / mixed.output for name in ("hit", "miss", "output")}
    )
    api = [share * _api(answer, whole) for share in shares]
    millions = [share * capacity / 1e6 for share in shares]

    def draw(axes: Any) -> None:
        axes.plot(millions, own, color=SERIES[0], linestyle=STYLES[0], linewidth=1.8)
        axes.plot(millions, api, color=SERIES[1], linestyle=STYLES[1], linewidth=1.8)
        axes.axvline(mixed.output / 1e6, color=LINE, linewidth=1.0)
        axes.set_ylim(bottom=0.0)

    title, lines = said["plots"]["cost"], said["lines"]
    now = (answer.figure("cost", "month"), answer.figure("cost", "api_month"))
    even = answer.figure("cost", "break_even")
    numbers = [f"{name}: {shown(one)}" for name, one in zip((lines["own"], lines["api"]), now, strict=True) if one]
    numbers += [f"{said['rows']['break_even']}: {shown(even)}"] if even else []
    drawing = svg(draw, LARGE, f"{title}. {'; '.join(numbers)}", title)
    return Plot(title, [lines["own"], lines["api"]], numbers, drawing, said["across"]["cost"])


def _api(answer: Answer, usage: Usage) -> float:
    return answer.tariff.cost(usage.hit, usage.miss, usage.output)


def _memory(answer: Answer, said: Mapping[str, Any]) -> Plot:
    """A device's memory, part by part, with the cache of the answers under way at the best point."""
    assert answer.best is not None
    option = answer.best
    memory, point = option.memory, option.best or option.curve[0]
    replicas = option.copies * option.layout.data * option.layout.pipeline
    cached = -(-point.concurrency // replicas) * option.layout.pipeline * answer.question.traffic.context
    parts = {
        said["rows"]["weights"]: memory.weights,
        said["rows"]["cache token"]: min(cached, memory.room) * memory.token,
        said["rows"]["activations"]: memory.activations,
        said["rows"]["runtime"]: memory.runtime,
        said["rows"]["reserve"]: memory.reserve,
    }
    title = said["plots"]["memory"]
    numbers = [f"{name}: {amount(value, 'B')}" for name, value in parts.items()]
    return Plot(title, [], numbers, svg(_bar(list(parts.values()), memory.available), LARGE, title, title), "GB")


def _bar(sizes: Sequence[float], available: float) -> Any:
    def draw(axes: Any) -> None:
        left = 0.0
        for size, shade in zip(sizes, SHADES, strict=True):
            axes.barh([0], [size / 1e9], left=[left], color=SERIES[0], alpha=shade, edgecolor=INK, linewidth=0.4)
            left += size / 1e9
        axes.axvline(available / 1e9, color=INK, linewidth=1.4)
        axes.set_yticks([])
        axes.set_xlim(0, max(left, available / 1e9) * 1.03)

    return draw
