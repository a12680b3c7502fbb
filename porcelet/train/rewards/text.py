"""Rewards that read the answer alone: exact text, form, length, language. They are total functions and fast."""

from __future__ import annotations

import math
import re
import unicodedata
from functools import lru_cache

from porcelet.errors import InputError
from porcelet.train.rewards.answer import Answer, Reward
from porcelet.train.tasks.problem import Problem

SCRIPTS = {
    "latin": ("LATIN",),
    "cjk": ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
}
WORD = re.compile(r"[^\W\d_]+")


def exact() -> Reward:
    """1 for the problem's answer and nothing else; white space around it is forgiven."""
    return exact_answer


def exact_answer(problem: Problem, answer: Answer) -> float:
    return float(answer.content.strip() == problem.answer)


def form(*, open_tag: str = "<think>", close_tag: str = "</think>") -> Reward:
    """1 for a thought that is closed once and not empty, then an answer that is not empty and ended by itself.

    The opening tag may be missing, as a prompt can end with it; if it is there, it is there once and first.
    """
    if not open_tag or not close_tag or open_tag == close_tag:
        raise InputError(f"reward format: the tags are {open_tag!r} and {close_tag!r}; two different ones are needed")

    def reward(problem: Problem, answer: Answer) -> float:
        thought, closed, content = answer.text.partition(close_tag)
        thought = thought.strip().removeprefix(open_tag)
        stray = open_tag in thought or open_tag in content or close_tag in content
        return float(bool(closed) and not stray and answer.finished and bool(thought.strip() and content.strip()))

    return reward


def length(*, max_tokens: int, min_tokens: int = 0, shape: str = "linear") -> Reward:
    """1 up to `min_tokens`, 0 from `max_tokens` on; between them a line or half a cosine. A negative weight prefers
    long answers."""
    if not 0 <= min_tokens < max_tokens:
        raise InputError(f"reward length: min_tokens {min_tokens} must lie in 0 ... {max_tokens - 1}, below max_tokens")
    if shape not in ("linear", "cosine"):
        raise InputError(f"reward length: shape is {shape!r}; it must be linear or cosine")

    def reward(problem: Problem, answer: Answer) -> float:
        share = min(1.0, max(0.0, (answer.num_tokens - min_tokens) / (max_tokens - min_tokens)))
        return 1.0 - share if shape == "linear" else (1.0 + math.cos(math.pi * share)) / 2.0

    return reward


def language(*, script: str = "latin") -> Reward:
    """The share of the thought's words that are in the wanted script (R1 paper, section 2.3.2); of the whole text's if
    there is no thought. Where there are no words, nothing is in the wrong one: 1."""
    if script not in SCRIPTS:
        raise InputError(f"reward language: script is {script!r}; known: {', '.join(SCRIPTS)}")

    def reward(problem: Problem, answer: Answer) -> float:
        found = [word_script(word) for word in words(answer.reasoning or answer.text)]
        return found.count(script) / len(found) if found else 1.0

    return reward


def words(text: str) -> list[str]:
    """Runs of letters; a Chinese or Japanese character is a word, as no spaces part them."""
    return [part for run in WORD.findall(text) for part in _parted(run)]


def _parted(run: str) -> list[str]:
    parts: list[str] = []
    for character in run:
        script = letter_script(character)
        if parts and script != "cjk" and letter_script(parts[-1][-1]) != "cjk":
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def word_script(word: str) -> str:
    """The script of a word's letters; empty if they are of several."""
    scripts = {letter_script(character) for character in word}
    return scripts.pop() if len(scripts) == 1 else ""


@lru_cache(maxsize=1 << 14)
def letter_script(character: str) -> str:
    """Read off the letter's Unicode name, which begins with its script."""
    name = unicodedata.name(character, "")
    return next((script for script, starts in SCRIPTS.items() if name.startswith(starts)), "")
