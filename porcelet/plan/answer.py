"""A plan: what somebody asks about a model on some machines, and the answer, figure by figure.

The command line, the JSON and the page (report.py) all show this one answer; verdicts.py says what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from porcelet.errors import InputError
from porcelet.plan.cost import HOURS_A_MONTH, Supply, Usage, cost_figures, hourly
from porcelet.plan.figure import Figure
from porcelet.plan.hardware import Fleet, devices
from porcelet.plan.memory import memory_figures
from porcelet.plan.model import PlannedModel
from porcelet.plan.search import Change, changes_that_fit, smallest_fleet
from porcelet.plan.serve import Option, Point, Traffic, options, users
from porcelet.plan.tariffs import Tariff, find_tariff
from porcelet.plan.training import Run, TrainingPlan, plan_training
from porcelet.plan.work import label, sources

DAYS_A_MONTH = HOURS_A_MONTH / 24


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: a model on a fleet, under some traffic; for `users` people who are online during `busy_hours` of
    each day (0: as many as the fleet serves); how the fleet is had, and which API it is compared with."""

    model: PlannedModel
    fleet: Fleet
    traffic: Traffic = Traffic()
    users: float = 0
    busy_hours: float = 10.0
    supply: Supply = Supply()
    tariff: str = "deepseek-flash"
    cache_bytes: float = 2
    mtp: bool = False
    train: Run | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.users < 1e10:
            raise InputError(f"users is {self.users}; it must be 0 (as many as can be served) or more")
        if not 0 < self.busy_hours <= 24:
            raise InputError(f"busy_hours is {self.busy_hours}; it must be above 0 and at most 24")


@dataclass(frozen=True)
class Section:
    """Figures that belong together: "memory", "speed", "cost", "training". Keys are of words.py."""

    key: str
    rows: Mapping[str, Figure]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`options` are the layouts that fit, best first; `changes` what would fit where none does; `served` are the people
    that the best option serves, `smallest` the fewest of the same devices that serve those who are to be."""

    question: Question
    options: Sequence[Option]
    sections: Sequence[Section]
    tariff: Tariff
    changes: Sequence[Change] = ()
    served: float = 0
    smallest: Fleet | None = None
    usage: Usage | None = None
    training: TrainingPlan | None = None

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options else None

    def figure(self, section: str, row: str) -> Figure | None:
        """One of the figures; None where the answer has none of them."""
        return next((part.rows.get(row) for part in self.sections if part.key == section), None)


def answer(question: Question) -> Answer:
    """Everything about the question.

    Raises:
        InputError: the tariff is not known.
    """
    model, fleet, tariff = question.model, question.fleet, find_tariff(question.tariff)
    found = options(model, fleet, question.traffic, cache_bytes=question.cache_bytes, mtp=question.mtp)
    training = plan_training(model, fleet, question.train) if question.train else None
    trained = [Section("training", training_figures(training, fleet, question.supply))] if training else []
    if not found:
        changes = changes_that_fit(model, fleet, question.traffic, devices())
        return Answer(
            question=question, options=[], sections=trained, tariff=tariff, changes=changes, training=training
        )
    option = found[0]
    point = option.best or option.curve[0]
    served = users(point, question.traffic)
    usage = monthly(question, min(question.users or served, served))
    sections = [
        Section("memory", memory_figures(option.memory, model, fleet.device)),
        Section("speed", speed_figures(question, option, point)),
        Section("cost", _costs(question, point, usage, tariff)),
    ]
    smallest = smallest_fleet(model, fleet.device, question.traffic, question.users) if question.users else None
    return Answer(
        question=question,
        options=found,
        sections=sections + trained,
        tariff=tariff,
        served=served,
        smallest=smallest[0] if smallest else None,
        usage=usage,
        training=training,
    )


def monthly(question: Question, people: float) -> Usage:
    """A month's tokens of so many people online in the busy hours."""
    traffic = question.traffic
    requests = people * traffic.turns * question.busy_hours * DAYS_A_MONTH
    hit = traffic.prompt * traffic.hits
    return Usage(hit=requests * hit, miss=requests * (traffic.prompt - hit), output=requests * traffic.written)


def _costs(question: Question, point: Point, usage: Usage, tariff: Tariff) -> dict[str, Figure]:
    return cost_figures(
        question.fleet, question.supply, point.written, point.computed, point.prompt_share, usage, tariff
    )


def speed_figures(question: Question, option: Option, point: Point) -> dict[str, Figure]:
    """What answers get at one point of an option's curve, and alone."""
    device, traffic = question.fleet.device, question.traffic
    known = (label(device), sources(device))
    low, high = point.range
    slow, fast = (share / point.written for share in (low, high))
    served = users(point, traffic)
    return {
        "written": Figure(point.written, "tokens/s", "answers at once / step, less prompts' share", *known, low, high),
        "speed": Figure(
            point.speed, "tokens/s", "written / answers at once", *known, point.speed * slow, point.speed * fast
        ),
        "alone": Figure(option.curve[0].speed, "tokens/s", "1 / step of a lone answer", *known),
        "first_token": Figure(point.first_token, "s", "a prompt's time + wait for those before it (M/D/1)", *known),
        "computed": Figure(point.computed, "tokens/s", "prompt tokens of a step / its time", *known),
        "prompt_share": Figure(point.prompt_share, "of time", "seconds of prompts / all seconds", *known),
        "concurrency": Figure(point.concurrency, "answers", "the most that keep the promised speed and wait", *known),
        "users": Figure(
            served, "people", "answers at once / (questions a second and user x seconds of an answer)", *known
        ),
    }


def training_figures(plan: TrainingPlan, fleet: Fleet, supply: Supply) -> dict[str, Figure]:
    """A training run's time, use and cost."""
    device = Fleet(fleet.device, 1)
    (low, high), hour = plan.device_hours.range, hourly(device, supply)
    cheap, dear = hour.range
    return {
        "device_hours": plan.device_hours,
        "days": plan.days,
        "utilisation": plan.utilisation,
        "without_attention": plan.without_attention,
        "training_cost": Figure(
            plan.device_hours.value * hour.value,
            "$",
            f"device hours x cost of one ({hour.formula})",
            hour.label,
            plan.device_hours.sources + hour.sources,
            low * cheap,
            high * dear,
        ),
    }
