"""From a finished output to an answer: its text, split into reasoning and what follows."""

from __future__ import annotations

from collections.abc import Sequence

from porcelet.chat.split import Content, Reasoning, Splitter
from porcelet.engine.engine import Engine
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Answer
from porcelet.train.tasks import Problem
from porcelet.types import Output, SamplingParams


def ask(
    engine: Engine, renderer: Renderer, problems: Sequence[Problem], params: Sequence[SamplingParams]
) -> list[list[Answer]]:
    """The answers to each problem, as many as its parameters' `n`."""
    prompts = [renderer.prompt(problem.question) for problem in problems]
    outputs = iter(engine.generate(prompts, params))
    return [[read_answer(next(outputs), renderer) for _ in range(each.n)] for each in params]


def read_answer(output: Output, renderer: Renderer) -> Answer:
    """What was said after a prompt of `renderer`.

    Reasoning that never ends is reasoning to the last, and then the content is empty. Calls of tools are left in it.
    """
    text = renderer.tokenizer.decode(output.tokens)
    splitter = Splitter(renderer.opens_reasoning)
    events = splitter.push(text) + splitter.flush()
    return Answer(
        text=text,
        reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
        content="".join(event.text for event in events if isinstance(event, Content)),
        finished=output.finish_reason == "stop",
        num_tokens=output.num_generated,
    )
