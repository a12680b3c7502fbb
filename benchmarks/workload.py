"""Seeded lists of requests, the same for every engine: load of mixed lengths, a shared prefix, text that repeats.

The text is English words in random order, so that no two prompts share more than a few tokens and a prefix cache gains
nothing unless it should. Lengths depend on the seed alone, the text on the round as well: rounds do equal work and
never repeat a prompt.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.rivals.protocol import Asked

Encode = Callable[[str], Sequence[int]]

WORDS = """
the a of in to and with from under over near old new small large quiet bright cold warm early late green blue river
mountain city house garden road bridge market letter child teacher doctor farmer sailor writer winter summer morning
evening story number question answer window table paper stone water fire wind cloud bird horse music color walks runs
finds keeps brings writes reads opens closes builds carries follows remembers forgets slowly quickly always never
"""
SENTENCE_WORDS = (5, 12)
PREFIX_TOKENS, TAIL_TOKENS, PREFIX_ANSWER = 2000, 50, 16
REPEATED_TOKENS, REPEATS, REPEATED_ANSWER = 60, 5, 128


@dataclass(frozen=True)
class Lengths:
    """Inclusive ranges of tokens, drawn from evenly."""

    prompt: tuple[int, int] = (50, 500)
    answer: tuple[int, int] = (32, 256)


def mixed(count: int, lengths: Lengths, encode: Encode, *, seed: int, round: int, window: float = 0.0) -> list[Asked]:
    """`count` requests, at once, or as a Poisson process that brings them within about `window` seconds."""
    shape, words = random.Random(f"{seed}"), random.Random(f"{seed} {round}")
    gaps = [shape.expovariate(count / window) if window else 0.0 for _ in range(count)]
    return [
        Asked(str(index), text(shape.randint(*lengths.prompt), encode, words), shape.randint(*lengths.answer), arrival)
        for index, arrival in enumerate(itertools.accumulate(gaps))
    ]


def shared_prefix(encode: Encode, *, seed: int, round: int) -> tuple[Asked, Asked]:
    """Two requests that begin alike, to be asked one after the other."""
    words = random.Random(f"{seed} {round} prefix")
    prefix = text(PREFIX_TOKENS, encode, words)
    first, second = (prefix + text(TAIL_TOKENS, encode, words) for _ in range(2))
    return Asked("first", first, PREFIX_ANSWER, 0.0), Asked("second", second, PREFIX_ANSWER, 0.0)


def repeating(count: int, encode: Encode, *, seed: int, round: int) -> list[Asked]:
    """Requests whose prompts say a few sentences again and again, as a small model then goes on to do."""
    words = random.Random(f"{seed} {round} repeating")
    paragraphs = [text(REPEATED_TOKENS, encode, words) for _ in range(count)]
    return [Asked(str(i), part * REPEATS, REPEATED_ANSWER, 0.0) for i, part in enumerate(paragraphs)]


def text(num_tokens: int, encode: Encode, words: random.Random) -> list[int]:
    """The first `num_tokens` tokens of random sentences."""
    sentences = itertools.islice(_sentences(words), num_tokens // SENTENCE_WORDS[0] + 1)
    tokens = list(encode(" ".join(sentences)))  # a word is at least a token
    return tokens[:num_tokens]


def _sentences(words: random.Random) -> Iterator[str]:
    vocabulary = WORDS.split()
    while True:
        yield " ".join(words.choices(vocabulary, k=words.randint(*SENTENCE_WORDS))).capitalize() + "."
