"""From problems to tokens, in the chat format of a model; and the smallest tokenizer for a new model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Builder

from porcelet.chat import R1_TEMPLATE, V3_TEMPLATE, ChatFormat, Rendered
from porcelet.engine.codec import open_codec
from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.train.tasks import Problem
from porcelet.types import Sample

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"


class Renderer:
    """Turns problems into tokens with the tokenizer and the chat format of a model's folder or GGUF file. A folder may
    hold no model yet."""

    def __init__(self, path: Path) -> None:
        if path.is_file():
            self.tokenizer, self.chat = open_codec(path)
        else:
            self.tokenizer, self.chat = Tokenizer.from_folder(path), ChatFormat.from_folder(path)
        # A rendering takes up to a millisecond; a stream over a finite task asks for the same ones again and again.
        self.prompt = lru_cache(maxsize=1 << 16)(self._prompt)
        self.sample = lru_cache(maxsize=1 << 16)(self._sample)

    def _prompt(self, question: str) -> tuple[int, ...]:
        """Tokens up to the point where the model begins: in its reasoning, if the chat format opens that."""
        return tuple(self._rendered(question).tokens)

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether answers begin inside their reasoning: the chat format ends every prompt with `<think>`."""
        return self._rendered("").opens_reasoning

    def _rendered(self, question: str) -> Rendered:
        return self.chat.render([{"role": "user", "content": question}], self.tokenizer)

    def _sample(self, problem: Problem) -> Sample:
        """Prompt, the problem's trace as reasoning, answer, end; weight 1 on what the model shall say.

        Raises:
            InputError: the chat format has no reasoning for the trace, or a prompt that asks for another beginning.
        """
        messages = question_and_answer(problem.question, problem.answer, problem.trace)
        rendered = self.chat.render(messages, self.tokenizer, add_generation_prompt=False)
        prompt, tokens = self.prompt(problem.question), tuple(rendered.tokens)
        if self.chat.thinking(self.tokenizer) != "never" and tokens[: len(prompt)] != prompt:
            raise InputError(
                f"the problem {problem.question[:60]!r} has {'a' if problem.trace else 'no'} trace; a prompt in the "
                "model's chat format asks for the contrary. Choose another task, its options or another chat format"
            )
        return Sample(tokens=tokens, weights=tuple(map(float, rendered.trainable)))

    def require_end(self, last: int, ends: Sequence[int], place: str) -> None:
        """Refuse a chat format whose answers end with another token than the model's: it would never learn to stop.

        Raises:
            ModelError: `last`, the last token that is learnt, is none of `ends`.
        """
        if last not in ends:
            known = " or ".join(repr(self.tokenizer.decode([token])) for token in ends) or "nothing"
            raise ModelError(
                f"{place}: the chat format ends an answer with {self.tokenizer.decode([last])!r}, the model's config "
                f"with {known}; correct eos_token_id in config.json, or the chat template"
            )


def question_and_answer(question: str, answer: str, reasoning: str = "") -> list[dict[str, str]]:
    """Two messages, the second with its reasoning if there is some."""
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **thought}]


def make_tokenizer(folder: Path, chat_format: str = "V3", digits: int = 1) -> None:
    """Write a tokenizer that `transformers` reads too: V3's special tokens, every byte, no merges; R1's thinking tokens
    if that is the chat format. Numbers of up to `digits` digits without leading zeros are tokens (V3: 3)."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(str, range(10, 10**digits))]
    marks = [USER, ASSISTANT, *([THINK, END_THINK] if chat_format == "R1" else [])]
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, PAD, *alphabet, *marks])}
    builder = Builder(models.BPE(vocab=vocabulary, merges=[], ignore_merges=digits > 1))  # a whole token is taken whole
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    numbers = pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated")
    builder.pre_tokenizer = pre_tokenizers.Sequence([numbers, letters]) if digits > 1 else letters
    builder.decoder = decoders.ByteLevel()
    builder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    builder.add_tokens([AddedToken(token, special=False, normalized=False) for token in marks])
    folder.mkdir(parents=True, exist_ok=True)
    builder.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": R1_TEMPLATE if chat_format == "R1" else V3_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
