from __future__ import annotations

import ast
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.tasks.expression import MAX_DEPTH, ExpressionError, evaluate

expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " * "]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=8,
)


def reference(node: ast.expr) -> Fraction:
    """Python's own grammar, with fractions for numbers."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    a, b = reference(node.left), reference(node.right)
    match node.op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
    return a / b


@given(expressions)
def test_agrees_with_pythons_grammar(text: str) -> None:
    """Same value as Python's parse of the same text, exactly; a division by zero is an error in both."""
    try:
        expected = reference(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="zero"):
            evaluate(text)
        return
    value, numbers = evaluate(text)
    assert value == expected
    assert numbers == [int(part) for part in "".join(c if c.isdigit() else " " for c in text).split()]


def test_thirds_are_exact() -> None:
    """What floating point rounds is compared exactly; other signs for times and divided are read."""
    assert evaluate("8/(3-8/3)")[0] == 24
    assert evaluate("1÷3×3")[0] == 1


@pytest.mark.parametrize(
    "text",
    ["", "3+", "*3", "3 4", "(3", "3)", "2**3", "2^3", "3.5", "-3", "f(3)", "__import__", "1e9", "٣+1", "1" * 10],
)
def test_nothing_else_is_an_expression(text: str) -> None:
    """Signs, powers, decimals, names and what Python might run are refused."""
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_length_and_depth_have_limits() -> None:
    """So that no answer overflows the stack or takes long."""
    assert evaluate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)[0] == 1
    for text in ("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1), "1+" * 200 + "1"):
        with pytest.raises(ExpressionError):
            evaluate(text)
