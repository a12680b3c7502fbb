"""A plan: what somebody asks about a model on some machines, and the answer, figure by figure, with verdicts.

The command line, the JSON and the page (report.py) all show this one answer. A verdict is a key of words.py with the
values that its sentence needs; it says what follows from the figures, and is as ready to advise against as for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from porcelet.plan.figure import Figure
from porcelet.plan.hardware import Fleet, devices
from porcelet.plan.memory import memory_figures
from porcelet.plan.model import PlannedModel
from porcelet.plan.search import Change, changes_that_fit, smallest_fleet
from porcelet.plan.serve import Option, Point, Traffic, options, users
from porcelet.plan.training import Run, TrainingPlan, plan_training
from porcelet.plan.work import label, sources


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: a model on a fleet, under some traffic; for `users` people online (0: as many as it serves)."""

    model: PlannedModel
    fleet: Fleet
    traffic: Traffic = Traffic()
    users: float = 0
    cache_bytes: float = 2
    mtp: bool = False
    train: Run | None = None


@dataclass(frozen=True)
class Section:
    """Figures that belong together: "memory", "speed", "cost", "training". Keys are of words.py."""

    key: str
    rows: Mapping[str, Figure]


@dataclass(frozen=True)
class Verdict:
    """A sentence of words.py, and the values in it."""

    key: str
    values: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`options` are the layouts that fit, best first; `changes` what would fit where none does."""

    question: Question
    options: Sequence[Option]
    sections: Sequence[Section]
    verdicts: Sequence[Verdict]
    changes: Sequence[Change] = ()
    training: TrainingPlan | None = None

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options else None


def answer(question: Question) -> Answer:
    """Everything about the question, without asking anything else."""
    model, fleet, traffic = question.model, question.fleet, question.traffic
    found = options(model, fleet, traffic, cache_bytes=question.cache_bytes, mtp=question.mtp)
    training = plan_training(model, fleet, question.train) if question.train else None
    changes = [] if found else changes_that_fit(model, fleet, traffic, devices())
    sections = [*_served(question, found[0])] if found else []
    if training:
        sections.append(Section("training", _training_rows(training)))
    return Answer(
        question=question,
        options=found,
        sections=sections,
        verdicts=_verdicts(question, found[0] if found else None, changes),
        changes=changes,
        training=training,
    )


def _served(question: Question, option: Option) -> list[Section]:
    memory = memory_figures(option.memory, question.model, question.fleet.device)
    point = option.best or option.curve[0]
    return [Section("memory", memory), Section("speed", speed_figures(question, option, point))]


def speed_figures(question: Question, option: Option, point: Point) -> dict[str, Figure]:
    """What answers get at one point of an option's curve, and alone."""
    device, traffic = question.fleet.device, question.traffic
    known = (label(device), sources(device))
    low, high = point.range
    slow, fast = point.decode.seconds / point.decode.high, point.decode.seconds / point.decode.low
    rows = {
        "written": Figure(point.written, "tokens/s", "answers at once / step, less prompts' share", *known, low, high),
        "speed": Figure(
            point.speed, "tokens/s", "written / answers at once", *known, point.speed * slow, point.speed * fast
        ),
        "concurrency": Figure(point.concurrency, "answers", "the most that keep the promised speed and wait", *known),
        "first_token": Figure(point.first_token, "s", "a prompt's time + wait for those before it (M/D/1)", *known),
        "computed": Figure(point.computed, "tokens/s", "prompt tokens of a step / its time", *known),
        "prompt_share": Figure(point.prompt_share, "of time", "seconds of prompts / all seconds", *known),
        "alone": Figure(option.curve[0].speed, "tokens/s", "1 / step of a lone answer", *known),
    }
    served = users(point, traffic)
    rows["users"] = Figure(
        served, "people", "answers at once / (questions a second and user x seconds of an answer)", *known
    )
    return rows


def _training_rows(plan: TrainingPlan) -> dict[str, Figure]:
    return {
        "device_hours": plan.device_hours,
        "days": plan.days,
        "utilisation": plan.utilisation,
        "without_attention": plan.without_attention,
    }


# ---- verdicts -------------------------------------------------------------------------------------------------------


def _verdicts(question: Question, option: Option | None, changes: Sequence[Change]) -> list[Verdict]:
    """What follows, the most important first."""
    model, fleet, traffic = question.model, question.fleet, question.traffic
    name = f"{fleet.count}x{fleet.device.name}"
    if option is None:
        told = {"model": model.name, "fleet": name, "weights": model.num_bytes / 1e9}
        told |= {"memory": fleet.count * fleet.device.memory.value / 1e9}
        return [Verdict("does_not_fit", told), *(Verdict(f"change_{c.kind}", {"setting": c.setting}) for c in changes)]
    verdicts = [Verdict("fits", {"model": model.name, "fleet": name, "layout": str(option.layout)})]
    if option.best is None:
        alone = option.curve[0]
        verdicts.append(Verdict("too_slow", {"speed": alone.speed, "wanted": traffic.speed, "wait": alone.first_token}))
        return verdicts
    served = users(option.best, traffic)
    if not question.users:
        return [*verdicts, Verdict("serves", {"users": served})]
    smallest = smallest_fleet(model, fleet.device, traffic, question.users)
    told = {"users": served, "wanted": question.users}
    if served < question.users:
        needed = {"needed": f"{smallest[0].count}x{fleet.device.name}"} if smallest else {}
        return [*verdicts, Verdict("not_enough" if smallest else "never_enough", told | needed)]
    verdicts.append(Verdict("enough", told))
    if smallest and smallest[0].count < fleet.count:
        verdicts.append(Verdict("buy_less", {"needed": f"{smallest[0].count}x{fleet.device.name}", "fleet": name}))
    return verdicts
