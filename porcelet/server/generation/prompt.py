"""A conversation that is to be answered, as the model's tokens, and what the answer may then be: how the reasoning that
the prompt opens will end, which calls may follow, what constraint holds.

A model that always thinks is kept from it by closing its reasoning at once; one whose template leaves it to the model
to write `<think>` gets the mark written where thinking is asked for, so that what is limited or constrained begins
inside the reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from porcelet.chat import ChatFormat, Splitter
from porcelet.chat.builtin import END_THINK, THINK
from porcelet.chat.calls import CallForm
from porcelet.chat.messages import check_tools
from porcelet.chat.tools import Beginning, Calling, constraint_of, forbidden
from porcelet.engine.messages import Ready
from porcelet.errors import InputError
from porcelet.server.generation.ask import Ask
from porcelet.tokenizer import Tokenizer
from porcelet.types import Constraint, Reasoning, SamplingParams

# What a spent thinking budget makes the model say before it answers.
LAST_THOUGHT = "\n\nThat is as long as I may think about this; here is my answer."

LEAST_BIAS = -100.0


@dataclass(frozen=True)
class Loaded:
    """What is known of a model once it is loaded."""

    facts: Ready
    tokenizer: Tokenizer
    format: ChatFormat


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, and what follows from it for the answer.

    `params` are the request's with the constraint, the reasoning's end and the tokens that are forbidden. Of the calls
    in an answer, those of the tools `names` in the form `calls` are told from text.
    """

    tokens: Sequence[int]
    params: SamplingParams
    opens_reasoning: bool
    calls: CallForm | None
    names: frozenset[str]

    def splitter(self) -> Splitter:
        """For the text of one answer."""
        return Splitter(self.opens_reasoning, self.calls, self.names)


def prompt_of(ask: Ask, model: Loaded) -> Prompt:
    """Render what is asked.

    Raises:
        InputError: the conversation cannot be written in the model's format, or a tool cannot be offered.
        ModelError: the model's own template does not work.
    """
    calling = Calling(model.format.calls(model.tokenizer), check_tools(ask.tools), ask.tool_choice, ask.parallel_calls)
    tokens, beginning = _render(ask, model)
    constraint = constraint_of(calling, ask.answer, beginning, model.tokenizer)
    reasoning = _reasoning(ask, model.tokenizer, constraint) if beginning == "reasoning" else None
    params = replace(ask.params, constraint=constraint, reasoning=reasoning)
    if banned := _banned(ask, calling, beginning, model.tokenizer):
        kept = [(token, bias) for token, bias in params.logit_bias if token not in banned]
        params = replace(params, logit_bias=(*kept, *((token, LEAST_BIAS) for token in banned)))
    form = calling.form if calling.offered else None
    return Prompt(tokens, params, beginning == "reasoning", form, calling.names)


def _render(ask: Ask, model: Loaded) -> tuple[Sequence[int], Beginning]:
    ability = model.format.thinking(model.tokenizer)
    if ask.thinking and ability == "never":
        raise InputError("thinking: this model's chat format has none; leave it out, or ask a model that reasons")
    thinking = ask.thinking if ability == "choice" else None
    rendered = model.format.render(ask.messages, model.tokenizer, tools=ask.tools or None, thinking=thinking)
    if rendered.opens_reasoning:
        return rendered.tokens, "reasoning"
    if ability == "never" or ask.messages[-1].get("prefix"):
        return rendered.tokens, "answer"
    if ask.thinking:
        opening = model.tokenizer.encode(model.format.opening(model.tokenizer), special=True)
        return [*rendered.tokens, *opening], "reasoning"
    return rendered.tokens, "answer" if ask.thinking is False or rendered.last_mark == END_THINK else "either"


def _banned(ask: Ask, calling: Calling, beginning: Beginning, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens that may not come although nothing else keeps the model from them."""
    opening = tokenizer.token_id(THINK) if ask.thinking is False and beginning == "answer" else None
    calls = bool(ask.tools) or any(message.get("tool_calls") for message in ask.messages)
    return (*(forbidden(calling, tokenizer) if calls else ()), *(() if opening is None else (opening,)))


def _reasoning(ask: Ask, tokenizer: Tokenizer, constraint: Constraint | None) -> Reasoning | None:
    """None where nothing limits the reasoning and nothing follows from its end."""
    silent = ask.thinking is False  # and yet it was opened: it is to be closed at once
    budget = 0 if silent else ask.budget
    if budget is None and constraint is None:
        return None
    end = tuple(tokenizer.encode(END_THINK, special=True))
    last_thought = tokenizer.encode(("" if silent else LAST_THOUGHT) + "\n")
    return Reasoning(end=end, budget=budget, closing=(*last_thought, *end))
