"""Supervised fine-tuning: conversations from JSON Lines or tables, with the mask of what the assistant said.

    file → its rows (corpus/readers.py) → messages → chat format → tokens and mask → Sample → the one loop

A row, in JSON Lines a line, is one of

    {"messages": [...], "tools"?: [...]}                      OpenAI's form; reasoning_content and tool_calls included
    {"prompt": text, "completion": text}
    {"question": text, "answer": text, "reasoning"?: text}    the reasoning goes where the chat format thinks

The chat format alone decides what the tokens are and which of them the assistant produced: its reasoning, content, tool
calls and the token that ends its turn, never a prompt, a tool's list or its result. What is rendered is what is
trained; R1 and V3.1 leave out the reasoning of answers before the last user message, so a reasoning model is best
trained with `train_on = "last"`. Every line is rendered before the first step: a mistake ends the run at once, with
file, line and field.

An epoch is a permutation by hash, and position p of the stream is a function of (seed, p). Packing needs nothing: every
conversation is a segment of its own in the flat batch. Left out: fields besides those above (they are refused unless
`[data] ignore` names them), and one sample for each answer of a conversation.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from porcelet.config import ModelConfig, TrainConfig
from porcelet.errors import InputError, ModelError
from porcelet.train.corpus.readers import rows
from porcelet.train.hashing import hashed
from porcelet.train.rendering import Renderer, question_and_answer
from porcelet.types import Sample

FORMS = (
    ({"messages"}, {"tools"}),
    ({"prompt", "completion"}, set[str]()),
    ({"question", "answer"}, {"reasoning"}),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendering:
    """A conversation's tokens, with a 1 in the mask for each that is trained."""

    tokens: array[int]
    mask: bytes

    def sample(self, weight: float) -> Sample:
        """The conversation with `weight` on each trained token."""
        return Sample(tokens=tuple(self.tokens), weights=tuple(weight if flag else 0.0 for flag in self.mask))


@dataclass(frozen=True)
class Conversations:
    """The source of a fine-tuning run over its rendered files: `source(step)` gives that step's samples."""

    renderings: Sequence[Rendering]
    config: TrainConfig
    metrics: Mapping[str, float]  # logged with every step: what was left out, if anything was
    _orders: dict[int, list[int]] = field(default_factory=dict)  # of the epoch under way
    _starts: list[int] = field(default_factory=lambda: [0])  # the position at which each step so far begins

    def __call__(self, step: int) -> tuple[list[Sample], dict[str, float]]:
        positions = self._positions(step)
        chosen = [self._at(position) for position in positions]
        by_conversation = self.config.data.weigh == "conversations"
        samples = [one.sample(1.0 / sum(one.mask) if by_conversation else 1.0) for one in chosen]
        trained = sum(sum(one.mask) for one in chosen)
        epoch = positions[-1] / len(self.renderings)
        return samples, {"epoch": epoch, "conversations": len(chosen), "trained_tokens": trained, **self.metrics}

    def _positions(self, step: int) -> range:
        """The step's part of the stream. By tokens, it begins where all steps before it end."""
        if self.config.data.step_of == "samples":
            return range(step * self.config.samples_per_step, (step + 1) * self.config.samples_per_step)
        while len(self._starts) < step + 2:
            self._starts.append(self._filled(self._starts[-1]))
        return range(self._starts[step], self._starts[step + 1])

    def _filled(self, start: int) -> int:
        """Behind the last conversation of a step that begins at `start`: as many as fit, and one at least."""
        end, num_tokens = start + 1, len(self._at(start).tokens)
        while (num_tokens := num_tokens + len(self._at(end).tokens)) <= self.config.data.tokens_per_step:
            end += 1
        return end

    def _at(self, position: int) -> Rendering:
        epoch, index = divmod(position, len(self.renderings))
        if epoch not in self._orders:
            while len(self._orders) > 1:  # two epochs may meet in a step
                del self._orders[min(self._orders)]
            numbers = range(len(self.renderings))
            key = self.config.seed, "conversations", epoch
            self._orders[epoch] = sorted(numbers, key=lambda number: hashed(*key, number))
        return self.renderings[self._orders[epoch][index]]


def read_conversations(config: TrainConfig, model: ModelConfig, renderer: Renderer) -> Conversations:
    """Render all of `config.data.conversations`.

    Raises:
        InputError: a file cannot be read, or a conversation cannot be used; with file, line and field.
        ModelError: the chat format does not end an answer with a token that ends one in the model's config.
    """
    context = min(config.data.context, model.max_position_embeddings)
    kept, num_long, num_cut = list[Rendering](), 0, 0
    for source in config.data.conversations:
        for place, values in rows(source):
            known = {name: value for name, value in values.items() if name not in config.data.ignore}
            whole = render(known, renderer, place, config.data.train_on)
            renderer.require_end(whole.tokens[whole.mask.rindex(1)], model.eos_token_ids, place)
            fitting = _fit(whole, context, config, place)
            num_long += fitting is None
            if fitting is not None:
                num_cut += len(fitting.tokens) < len(whole.tokens)
                kept.append(fitting)
    if not kept:
        raise InputError(f"{', '.join(config.data.conversations)}: no conversation is left to learn from")
    if num_long or num_cut:
        log.warning("of %d conversations, %d are longer than %d tokens and dropped, %d cut to it",
                    len(kept) + num_long, num_long, context, num_cut)  # fmt: skip
    counts = {"dropped": float(num_long), "cut": float(num_cut)}
    return Conversations(kept, config, {name: count for name, count in counts.items() if count})


def render(values: Mapping[str, Any], renderer: Renderer, place: str, train_on: str = "all") -> Rendering:
    """One line's conversation in the chat format, and what of it is trained.

    Raises:
        InputError: names `place`, and the field.
    """
    messages = to_messages(values, place)
    _require_answer(messages, place)
    tools = values.get("tools")
    if not isinstance(tools, list | None):
        raise InputError(f"{place}: tools is a {type(tools).__name__}; it must be a list")
    try:
        rendered = renderer.chat.render(messages, renderer.tokenizer, add_generation_prompt=False, tools=tools)
        mask = bytes(rendered.trainable)
    except (InputError, ModelError) as problem:
        raise type(problem)(f"{place}: {problem}") from problem
    # Turns are apart: between two answers there is always a token that the assistant did not produce.
    first = mask.rfind(0, 0, mask.rindex(1)) + 1 if train_on == "last" else 0
    return Rendering(array("i", rendered.tokens), bytes(first) + mask[first:])


def to_messages(values: Mapping[str, Any], place: str) -> list[Any]:
    """A line's messages, whichever form it has; a field that is null counts as absent.

    Raises:
        InputError: it has none of the forms.
    """
    values = {name: value for name, value in values.items() if value is not None}
    form = next((names for names in FORMS if names[0] <= values.keys()), None)
    if form is None:
        known = " or ".join(" + ".join(sorted(needed)) for needed, _ in FORMS)
        raise InputError(f"{place}: the fields are {', '.join(values) or 'none'}; a conversation has {known}")
    strange = [name for name in values if name not in form[0] | form[1]]
    if strange:
        known = ", ".join(sorted(form[0] | form[1]))
        raise InputError(
            f"{place}: unknown field {strange[0]!r}; known here: {known}; rename it, or name it in [data] ignore"
        )
    if "messages" in values:
        if not isinstance(values["messages"], list):
            raise InputError(f"{place}: messages is a {type(values['messages']).__name__}; it must be a list")
        return list(values["messages"])
    for name, text in values.items():
        if not isinstance(text, str):
            raise InputError(f"{place}: {name} is a {type(text).__name__}; it must be a text")
    if "prompt" in values:
        return question_and_answer(values["prompt"], values["completion"])
    return question_and_answer(values["question"], values["answer"], values.get("reasoning", ""))


def _require_answer(messages: Sequence[Any], place: str) -> None:
    last = messages[-1] if messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise InputError(f"{place}: messages[{max(len(messages) - 1, 0)}] is not the assistant's; "
                         "a conversation to learn from ends with an answer")  # fmt: skip
    if last.get("prefix"):
        raise InputError(f"{place}: messages[{len(messages) - 1}].prefix is true; an answer to learn is whole")


def _fit(rendering: Rendering, context: int, config: TrainConfig, place: str) -> Rendering | None:
    """The conversation within `context`, by the rule; None if it is dropped."""
    if len(rendering.tokens) <= context:
        return rendering
    if config.data.too_long == "refuse":
        raise InputError(
            f"{place}: the conversation has {len(rendering.tokens)} tokens, more than {context}; raise [data] context "
            'as far as the model goes, or say too_long = "drop" or "cut"'
        )
    cut = Rendering(rendering.tokens[:context], rendering.mask[:context])
    return cut if config.data.too_long == "cut" and any(cut.mask) else None
