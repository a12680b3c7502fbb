"""Where samples come from, and how they lie side by side.

A task is a finite set of problems, split by hash into those trained on and those held out. The stream over it is
infinite and has no state: position i draws by hashing (seed, i), so resuming needs nothing but the position. A problem
is rendered as a conversation in the model's own chat format; only the answer and the token that ends it carry weight.

`pack` puts sequences of any length into one flat batch without padding. Left out so far: reading datasets from files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Builder
from torch import Tensor

from porcelet.chat import V3_TEMPLATE, ChatFormat
from porcelet.config import TrainConfig
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float, Int

HELD_OUT_SHARE = 10  # one problem in so many is never trained on
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


@dataclass(frozen=True)
class Problem:
    """A question and the one answer that counts as right."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Problems to train on, and problems to measure with."""

    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    def draw(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream."""
        return self.training[hashed(seed, position) % len(self.training)]


def sums(config: TrainConfig) -> Iterable[Problem]:
    """A+B= for all A, B below `max_number`."""
    for a, b in itertools.product(range(config.max_number), repeat=2):
        yield Problem(f"{a}+{b}=", str(a + b))


TASKS: dict[str, Callable[[TrainConfig], Iterable[Problem]]] = {"sums": sums}


def load_task(config: TrainConfig) -> Task:
    """The recipe's task.

    Raises:
        InputError: no task has that name, or it is too small to hold problems out.
    """
    if config.task not in TASKS:
        raise InputError(f"task is {config.task!r}; known: {', '.join(TASKS)}")
    split: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in TASKS[config.task](config):
        split[hashed(problem.question) % HELD_OUT_SHARE == 0].append(problem)
    if not all(split):
        raise InputError(f"max_number is {config.max_number}; too few problems to hold any out, raise it")
    return Task(*map(tuple, split))


def hashed(*values: object) -> int:
    """63 bits that depend on the values alone: every random choice of a run comes from here."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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


@dataclass(frozen=True)
class Packed:
    """A flat batch: row i has read `tokens[i]` and predicts `targets[i]`, with the weights of that prediction.

    A sequence of n tokens has n - 1 rows; `offsets` [B+1] cut the rows into sequences.
    """

    tokens: Int[Tensor, "T"]
    positions: Int[Tensor, "T"]
    offsets: Int[Tensor, "B1"]
    targets: Int[Tensor, "T"]
    weights: Float[Tensor, "T"]
    advantages: Float[Tensor, "T"]
    old_logprobs: Float[Tensor, "T"]


def pack(samples: Sequence[Sample]) -> Packed:
    """Lay samples side by side; each needs two tokens at least, and the first token's entries must be 0 or absent."""
    for sample in samples:
        assert len(sample.tokens) > 1, "a sequence of one token predicts nothing"
        assert not any(sample.weights[:1] + sample.advantages[:1]), "nothing predicts the first token"
    lengths = [len(sample.tokens) - 1 for sample in samples]
    return Packed(
        tokens=_flat([s.tokens[:-1] for s in samples], torch.int64),
        positions=_flat([range(length) for length in lengths], torch.int64),
        offsets=torch.tensor([0, *itertools.accumulate(lengths)]),
        targets=_flat([s.tokens[1:] for s in samples], torch.int64),
        weights=_flat([_entries(s.weights, s) for s in samples], torch.float32),
        advantages=_flat([_entries(s.advantages, s) for s in samples], torch.float32),
        old_logprobs=_flat([_entries(s.old_logprobs, s) for s in samples], torch.float32),
    )


def _entries(values: tuple[float, ...], sample: Sample) -> Sequence[float]:
    assert len(values) in (0, len(sample.tokens)), "a sample's lists are as long as its tokens"
    return values[1:] if values else (0.0,) * (len(sample.tokens) - 1)


def _flat(pieces: Iterable[Iterable[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(itertools.chain.from_iterable(pieces)), dtype=dtype)


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
