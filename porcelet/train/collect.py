"""Rejection sampling: a model answers problems many times, and right answers are written down as conversations.

    problems → engine.generate, G draws each → judge → the shortest distinct right ones, `keep` a problem

R1 draws its 600,000 reasoning samples so (2501.12948, section 2.3.3) and teaches small models with them (section 2.4).
A right answer is one to which the first reward gives 1, whatever the others and the weights say. It is a lesson if it
ended by itself and says something, behind a thought where every prompt begins one. A step is a function of (seed, step)
and the model, on as many threads: a run that was killed goes on behind the last step whose file is whole (kept.py).
Left out: filters of the language or of the reader's taste, which R1 applies; give them as the first reward. Of
[policy], only what says how answers are drawn, and `keep`, has a meaning here.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from porcelet import hub
from porcelet.config import TrainConfig
from porcelet.engine.engine import Engine
from porcelet.errors import InputError
from porcelet.train import checkpoint, kept
from porcelet.train.answers import ask
from porcelet.train.evaluate import is_right
from porcelet.train.files import write_durably
from porcelet.train.hashing import hashed
from porcelet.train.log import open_log
from porcelet.train.loop import check_device, set_threads
from porcelet.train.measure import Stopwatch, record_session
from porcelet.train.pause import Paused, watching
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer, Term, judge, rewards_of, summarize
from porcelet.train.sampler import make_engine
from porcelet.train.sources import check_data, check_room
from porcelet.train.start import claim, write_text_files
from porcelet.train.tasks import Problem, Task, load_task
from porcelet.train.types import Metrics
from porcelet.types import SamplingParams
from porcelet.weights.load import load


def collect(
    config: TrainConfig,
    report: Callable[[Metrics], None] = lambda metrics: None,
    *,
    resume: bool = False,
    minutes: float = math.inf,
    unsafe_sandbox: bool = False,
) -> Path:
    """Run a recipe of method "sample" to its end; the file of what was kept.

    `report` sees each step's metrics, of which `kept` counts the answers written down. `resume`, `minutes` and signals
    act as in `train`.

    Raises:
        InputError: the recipe cannot be used, the output holds another run, or no answer at all was right.
        ModelError: the model cannot be read.
        CapacityError: the disk is full.
        Paused: the run is not at its end.
    """
    began = time.monotonic()
    check_data(config)
    check_device(config)
    output, recipe = Path(config.output), checkpoint.recipe_of(config, {})
    state = _found(config, output, recipe, resume=resume)
    set_threads(config, state)
    claim(output)
    draw = _open(config, output, unsafe_sandbox=unsafe_sandbox)
    if state is None:  # only now, as nothing that could be wrong with the recipe is left
        kept.write_state(output, checkpoint.Header(0, recipe, {}, torch.get_num_threads(), torch.__version__))
    first = kept.num_done(output, config.steps)
    record_session(output, first, config.device)
    with open_log(config, recipe, first) as sink, watching(60 * minutes, began) as watch:
        for step in range(first, config.steps):
            start = time.monotonic()
            lessons, metrics = draw(step)
            sink.write(metrics)
            sink.flush()  # the step's file says that the step is done, so all else of it comes before
            write_durably(kept.path_of(output, step), "".join(_line(*one) for one in lessons))
            report(metrics)
            watch.stepped(time.monotonic() - start)
            if step + 1 < config.steps and (reason := watch.reason()):
                where = f"what was kept so far is in {output / kept.FOLDER}"
                raise Paused(
                    f"{reason}: paused after step {step + 1} of {config.steps}, {where}; continue with --resume",
                    asked=not watch.signal,
                )
    found = kept.join(output, config.steps)
    if found is None:
        raise InputError(
            f"{output}: not one of {config.steps * config.samples_per_step} answers was right, so there is nothing to "
            f"learn from; delete {output}, then draw more, raise [policy] max_new_tokens, or train the model further"
        )
    return found


def is_collected(config: TrainConfig) -> bool:
    """Whether a run of this recipe is at its end.

    Raises:
        InputError: its folder holds a run of another recipe.
    """
    output = Path(config.output)
    return kept.read_state(output, checkpoint.recipe_of(config, {})) is not None and (output / kept.RESULT).exists()


@dataclass(frozen=True)
class Collector:
    """One step: what was kept of the answers drawn, and what is to log about all of them."""

    engine: Engine
    task: Task
    renderer: Renderer
    config: TrainConfig
    rewards: Sequence[Term]

    def __call__(self, step: int) -> tuple[list[tuple[Problem, Answer]], Metrics]:
        watch, size = Stopwatch(), self.config.policy.group_size
        count = self.config.samples_per_step // size
        positions = range(step * count, (step + 1) * count)
        with watch.phase("draw"):
            problems = [self.task.draw(self.config.seed, position) for position in positions]
            groups = ask(self.engine, self.renderer, problems, [self._sampling(position) for position in positions])
            answers = [answer for group in groups for answer in group]
            judged = judge(self.rewards, [problem for problem in problems for _ in range(size)], answers)
        right = [is_right(one.parts[self.rewards[0].name]) for one in judged]
        good = [verdict and self.is_lesson(answer) for answer, verdict in zip(answers, right, strict=True)]
        lessons = [
            (problem, answer)
            for i, (problem, group) in enumerate(zip(problems, groups, strict=True))
            for answer in shortest([*compress(group, good[i * size :])], self.config.policy.keep)
        ]
        num_tokens = sum(answer.num_tokens for answer in answers)
        return lessons, {
            "step": step + 1,
            **summarize(judged),
            "right": statistics.fmean(right),
            "kept": len(lessons),
            "completions/mean_length": num_tokens / len(answers),
            "completions/clipped_ratio": statistics.fmean(not answer.finished for answer in answers),
            "tokens": num_tokens,
            **watch.metrics(num_tokens, self.config.device),
            "skipped": 0,
        }

    def is_lesson(self, answer: Answer) -> bool:
        """Whether a conversation can be made of it that begins as this model's prompts do."""
        thought = bool(answer.reasoning.strip()) or not self.renderer.opens_reasoning
        return answer.finished and thought and bool(answer.content.strip())

    def _sampling(self, position: int) -> SamplingParams:
        policy = self.config.policy
        return SamplingParams(
            max_tokens=policy.max_new_tokens,
            temperature=policy.temperature,
            seed=hashed(self.config.seed, "collect", position),
            n=policy.group_size,
        )


def shortest(answers: Sequence[Answer], keep: int) -> list[Answer]:
    """The `keep` shortest, no two alike."""
    different = {answer.text: answer for answer in answers}
    return sorted(different.values(), key=lambda answer: answer.num_tokens)[:keep]


def _open(config: TrainConfig, output: Path, *, unsafe_sandbox: bool) -> Collector:
    """What the recipe draws with."""
    path = hub.resolve(config.model)
    write_text_files(path, output)
    task, renderer, model = load_task(config.task.name, config.task.options), Renderer(output), load(path)
    check_room(config, model.config, renderer, task)
    rewards = rewards_of(config, unsafe_sandbox=unsafe_sandbox)
    return Collector(make_engine(model, config.policy), task, renderer, config, rewards)


def _found(config: TrainConfig, output: Path, recipe: Mapping[str, Any], *, resume: bool) -> checkpoint.Header | None:
    """The state to go on from, if there is one; nothing is written before all that is refused has been."""
    if checkpoint.newest(output):
        raise InputError(f"output {output} holds a run that trains a model; choose another output")
    if Path(config.model).resolve() == output.resolve():
        raise InputError(f"output {config.output} is the model to draw from; choose another output")
    if kept.holds_samples(output) and not resume:
        raise InputError(f"output {output} holds a run; continue it with --resume, or choose another")
    return kept.read_state(output, recipe)


def _line(problem: Problem, answer: Answer) -> str:
    fields = {"question": problem.question, "answer": answer.content, "reasoning": answer.reasoning}
    return json.dumps({name: text for name, text in fields.items() if text}, ensure_ascii=False) + "\n"
