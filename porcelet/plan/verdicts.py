"""What follows from a plan's figures, as ready to advise against as for. Sentences are in words.py, by these keys.

An API is advised where it is cheaper than even the low end of what the fleet costs, the fleet where even its high end
is cheaper; between the two neither is. The comparison is of prices alone: an API's model is another one, and what stays
inside a house has no price here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from porcelet.plan.answer import Answer


@dataclass(frozen=True)
class Verdict:
    """A sentence of words.py and the values in it. `good`: what was asked for can be had."""

    key: str
    values: Mapping[str, str | float] = field(default_factory=dict)
    good: bool = True


def verdicts(answer: Answer) -> list[Verdict]:
    """The most important first."""
    return [*_fit(answer), *_enough(answer), *_price(answer), *_training(answer)]


def _fit(answer: Answer) -> Iterator[Verdict]:
    model, fleet, best = answer.question.model, answer.question.fleet, answer.best
    if best:
        yield Verdict(
            "fits", {"model": model.name, "fleet": str(fleet), "layout": str(best.layout), "copies": best.copies}
        )
        return
    memory = fleet.count * fleet.device.memory.value
    told: dict[str, str | float] = {"model": model.name, "fleet": str(fleet), "format": model.format.name}
    yield Verdict("does_not_fit", told | {"weights": model.num_bytes / 1e9, "memory": memory / 1e9}, False)
    for change in answer.changes:
        yield Verdict(f"change_{change.kind}", {"setting": change.setting})


def _enough(answer: Answer) -> Iterator[Verdict]:
    question, best = answer.question, answer.best
    if best is None:
        return
    if best.best is None:
        alone, traffic = best.curve[0], question.traffic
        told = {
            "speed": alone.speed,
            "wanted": traffic.speed,
            "wait": alone.first_token,
            "patience": traffic.first_token,
        }
        yield Verdict("too_slow", told, False)
    elif not question.users:
        yield Verdict("serves", {"users": answer.served})
    elif answer.served < question.users:
        told = {"users": answer.served, "wanted": question.users}
        if answer.smallest:
            yield Verdict("not_enough", {**told, "needed": str(answer.smallest)}, False)
        else:
            yield Verdict("never_enough", {**told, "device": question.fleet.device.name}, False)
    else:
        yield Verdict("enough", {"users": answer.served, "wanted": question.users})
        if answer.smallest and answer.smallest.count < question.fleet.count:
            yield Verdict("buy_less", {"needed": str(answer.smallest), "fleet": str(question.fleet)})


def _price(answer: Answer) -> Iterator[Verdict]:
    own, api = answer.figure("cost", "month"), answer.figure("cost", "api_month")
    if own is None or api is None:
        return
    low, high = own.range
    told: dict[str, str | float] = {"own": own.value, "api": api.value, "tariff": answer.tariff.name}
    even = answer.figure("cost", "break_even")
    told["share"] = 100 * (even.value if even else 0.0)
    if api.value < low:
        reachable = even is not None and even.range[0] <= 1
        yield Verdict("stay_on_api" if reachable else "never_cheaper", told, False)
    elif api.value > high:
        yield Verdict("own_is_cheaper", told)
    else:
        yield Verdict("about_even", told)


def _training(answer: Answer) -> Iterator[Verdict]:
    plan = answer.training
    if plan is None:
        return
    if plan.layouts:
        layout, size = plan.layouts[0]
        yield Verdict("trains", {"days": plan.days.value, "layout": str(layout), "memory": size / 1e9})
    else:
        yield Verdict("cannot_train", {"model": answer.question.model.name, "fleet": str(answer.question.fleet)}, False)
