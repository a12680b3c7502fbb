"""Arithmetic that a model wrote, evaluated exactly: fractions, a grammar of five lines, and no `eval`.

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/") factor)*
    factor  = number | "(" sum ")"

There is no sign, no power and no decimal point: countdown knows none, and none of what remains can grow large. An
expression is at most `MAX_LENGTH` characters and `MAX_DEPTH` parentheses deep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

MAX_LENGTH = 256
MAX_DEPTH = 16
MAX_DIGITS = 9
TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))")
SIGNS = str.maketrans("×·÷−–", "**/--")  # what models write for them


class ExpressionError(ValueError):
    """The text is no expression of the grammar, or divides by zero."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The value, and the numbers used, in order.

    Raises:
        ExpressionError: not an expression, too long, too deep, or a division by zero.
    """
    reader = _Reader(_tokens(text))
    value = _sum(reader, 0)
    if reader.peek():
        raise ExpressionError(f"{reader.peek()!r} is left over")
    return value, reader.numbers


@dataclass
class _Reader:
    tokens: list[str]
    position: int = 0
    numbers: list[int] = field(default_factory=list)

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token


def _tokens(text: str) -> list[str]:
    text = text.strip().translate(SIGNS)
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    tokens, end = [], 0
    while end < len(text):
        match = TOKEN.match(text, end)
        if match is None or len(match[1] or "") > MAX_DIGITS:
            raise ExpressionError(f"{text[end : end + 8]!r} is no number, sign or parenthesis")
        tokens.append(match[1] or match[2])
        end = match.end()
    return tokens


def _sum(reader: _Reader, depth: int) -> Fraction:
    value = _product(reader, depth)
    while reader.peek() in ("+", "-"):
        value += _product(reader, depth) if reader.take() == "+" else -_product(reader, depth)
    return value


def _product(reader: _Reader, depth: int) -> Fraction:
    value = _factor(reader, depth)
    while reader.peek() in ("*", "/"):
        if reader.take() == "*":
            value *= _factor(reader, depth)
            continue
        divisor = _factor(reader, depth)
        if divisor == 0:
            raise ExpressionError("division by zero")
        value /= divisor
    return value


def _factor(reader: _Reader, depth: int) -> Fraction:
    token = reader.take()
    if token.isdigit():
        reader.numbers.append(int(token))
        return Fraction(int(token))
    if token != "(" or depth == MAX_DEPTH:
        raise ExpressionError(f"{token!r} stands where a number or a parenthesis should")
    value = _sum(reader, depth + 1)
    if reader.take() != ")":
        raise ExpressionError("a parenthesis is not closed")
    return value
