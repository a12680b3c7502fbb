"""Answers as a test writes them."""

from __future__ import annotations

from porcelet.train.rewards import Answer


def said(text: str, *, reasoning: str = "", finished: bool = True, num_tokens: int = 1) -> Answer:
    return Answer(text=text, reasoning=reasoning, content=text, finished=finished, num_tokens=num_tokens)
