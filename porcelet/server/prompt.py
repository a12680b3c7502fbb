"""A conversation that is to be answered, as the model's tokens, and how the reasoning that it opens will end.

A model that always thinks is kept from it by closing its reasoning at once; one whose template leaves it to the model
to write `<think>` gets the mark written where thinking is asked for, so that what is limited or constrained begins
inside the reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from porcelet.chat import ChatFormat
from porcelet.chat.builtin import END_THINK, THINK
from porcelet.engine.messages import Ready
from porcelet.errors import InputError
from porcelet.server.ask import Ask
from porcelet.tokenizer import Tokenizer
from porcelet.types import Reasoning

# What a spent thinking budget makes the model say before it answers.
LAST_THOUGHT = "\n\nThat is as long as I may think about this; here is my answer."


@dataclass(frozen=True)
class Loaded:
    """What is known of a model once it is loaded."""

    facts: Ready
    tokenizer: Tokenizer
    format: ChatFormat


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `reasoning` is for the engine: None where nothing limits it and nothing follows from its
    end."""

    tokens: Sequence[int]
    opens_reasoning: bool
    reasoning: Reasoning | None


def prompt_of(ask: Ask, model: Loaded) -> Prompt:
    """Render what is asked.

    Raises:
        InputError: the conversation cannot be written in the model's format.
        ModelError: the model's own template does not work.
    """
    ability = model.format.thinking(model.tokenizer)
    if ask.thinking and ability == "never":
        raise InputError("thinking: this model's chat format has none; leave it out, or ask a model that reasons")
    thinking = ask.thinking if ability == "choice" else None
    rendered = model.format.render(ask.messages, model.tokenizer, tools=ask.tools or None, thinking=thinking)
    if rendered.opens_reasoning:
        return Prompt(rendered.tokens, True, _reasoning(ask, model.tokenizer))
    if ask.thinking and not ask.messages[-1].get("prefix"):
        opening = model.tokenizer.encode(THINK + "\n", special=True)
        return Prompt([*rendered.tokens, *opening], True, _reasoning(ask, model.tokenizer))
    return Prompt(rendered.tokens, False, None)


def _reasoning(ask: Ask, tokenizer: Tokenizer) -> Reasoning | None:
    silent = ask.thinking is False  # and yet it was opened: it is to be closed at once
    budget = 0 if silent else ask.budget
    if budget is None and ask.answer is None:
        return None
    end = tuple(tokenizer.encode(END_THINK, special=True))
    last_thought = tokenizer.encode(("" if silent else LAST_THOUGHT) + "\n")
    return Reasoning(end=end, budget=budget, closing=(*last_thought, *end))
