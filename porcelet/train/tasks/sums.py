"""Sums: the smallest task that can be right or wrong.

`sums` lists A+B= for all small A, B. `chain_sums` draws longer chains, and writes the carries out digit by digit, last
digit first, as Lee et al. found small models to need (arXiv:2307.03381): 27+58: 7+8=15 2+5+1=8 is 85.
"""

from __future__ import annotations

import itertools

from porcelet.errors import InputError
from porcelet.train.hashing import hashed
from porcelet.train.tasks.problem import FiniteTask, GeneratedTask, Problem, split


def sums(*, max_number: int = 20) -> FiniteTask:
    """A+B= for all A, B below `max_number`."""
    if max_number < 1:
        raise InputError(f"max_number is {max_number}; it must be at least 1")
    pairs = itertools.product(range(max_number), repeat=2)
    return split((Problem(f"{a}+{b}=", str(a + b)) for a, b in pairs), f"max_number is {max_number}, raise it")


def chain_sums(*, num_terms: int = 3, max_number: int = 100, num_held_out: int = 200) -> GeneratedTask:
    """A+B+C= for `num_terms` numbers below `max_number`, with a worked solution."""
    if num_terms < 2 or max_number < 2:
        raise InputError(f"num_terms is {num_terms} and max_number {max_number}; both must be at least 2")

    def generate(seed: int, position: int) -> Problem:
        terms = [hashed(seed, position, i) % max_number for i in range(num_terms)]
        return Problem("+".join(map(str, terms)) + "=", str(sum(terms)), trace=worked_sum(terms))

    return GeneratedTask(generate, num_held_out)


def worked_sum(terms: list[int]) -> str:
    """One line an addition: what is added, the columns from the last digit on, and the result."""
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}+{term}: {_columns(total, term)} is {total + term}")
        total += term
    return "\n".join(lines)


def _columns(a: int, b: int) -> str:
    """7+8=15 2+5+1=8: every column's digits and the carry into it."""
    width, carry, columns = max(len(str(a)), len(str(b))), 0, []
    for x, y in zip(reversed(f"{a:0{width}}"), reversed(f"{b:0{width}}"), strict=True):
        value = int(x) + int(y) + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={value}")
        carry = value // 10
    return " ".join(columns)
