"""From a finished output to an answer: its text, split into reasoning and what follows."""

from __future__ import annotations

from collections.abc import Sequence

from porcelet.chat.split import Content, Reasoning, Splitter
from porcelet.engine.engine import Engine
from porcelet.tokenizer import Tokenizer
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
    return [
        [read_answer(next(outputs), prompt, renderer.tokenizer) for _ in range(each.n)]
        for prompt, each in zip(prompts, params, strict=True)
    ]


def read_answer(output: Output, prompt: Sequence[int], tokenizer: Tokenizer) -> Answer:
    """What was said after `prompt`. Reasoning that never ends is reasoning to the last, and then the content is empty.

    Calls of tools are left in the content.
    """
    text = tokenizer.decode(output.tokens)
    splitter = Splitter(opens_reasoning(prompt, tokenizer))
    events = splitter.push(text) + splitter.flush()
    return Answer(
        text=text,
        reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
        content="".join(event.text for event in events if isinstance(event, Content)),
        finished=output.finish_reason == "stop",
        num_tokens=output.num_generated,
    )


def opens_reasoning(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the last special token of a prompt is `<think>`, so that the answer begins inside its reasoning."""
    special = set(tokenizer.special_tokens.values())
    last = next((token for token in reversed(prompt) if token in special), None)
    return last is not None and last == tokenizer.token_id("<think>")
