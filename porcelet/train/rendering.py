"""From problems to tokens, in the chat format of a model folder; and the smallest tokenizer for a new model."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Builder

from porcelet.chat import V3_TEMPLATE, ChatFormat
from porcelet.tokenizer import Tokenizer
from porcelet.train.tasks import Problem
from porcelet.types import Sample

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


class Renderer:
    """Turns problems into tokens with the tokenizer and the chat format of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.chat = ChatFormat.from_folder(folder)
        # A rendering takes up to a millisecond; a stream over a finite task asks for the same ones again and again.
        self.prompt = lru_cache(maxsize=1 << 16)(self._prompt)

    def _prompt(self, question: str) -> tuple[int, ...]:
        """Tokens up to the point where the answer begins."""
        messages = [{"role": "user", "content": question}]
        return tuple(self.chat.render(messages, self.tokenizer).tokens)

    def sample(self, problem: Problem, stop: int) -> Sample:
        """Prompt, answer, `stop`; weight 1 on what the model shall say."""
        prompt = self.prompt(problem.question)
        answer = (*self.tokenizer.encode(problem.answer), stop)
        return Sample(tokens=prompt + answer, weights=(0.0,) * len(prompt) + (1.0,) * len(answer))


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer that `transformers` reads too: V3's special tokens and chat format, every byte, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, PAD, *alphabet, USER, ASSISTANT])}
    builder = Builder(models.BPE(vocab=vocabulary, merges=[]))
    builder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    builder.decoder = decoders.ByteLevel()
    builder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    builder.add_tokens([AddedToken(token, special=False, normalized=False) for token in (USER, ASSISTANT)])
    folder.mkdir(parents=True, exist_ok=True)
    builder.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": V3_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
