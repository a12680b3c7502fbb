"""The native draw against its definition where they could part: ties, edges of blocks, cuts of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from porcelet.kernels import cpu
from porcelet.kernels.sample import sample
from tests.kernels.test_cpu import HERE

pytestmark = pytest.mark.skipif(not HERE, reason="no native module")


def spread(vocabulary: int) -> Tensor:
    return torch.randn(2, vocabulary, generator=torch.manual_seed(vocabulary)) * 4


def tied(vocabulary: int) -> Tensor:
    """Few different logits, 0 and -0 among them, so that cuts fall between equals."""
    choices = torch.tensor([0.0, -0.0, 1.0, 2.0, -torch.inf])
    return choices[torch.randint(0, 5, (2, vocabulary), generator=torch.manual_seed(vocabulary))].index_fill(
        1, torch.tensor([vocabulary - 1]), 2.5
    )


def flat(vocabulary: int) -> Tensor:
    return torch.full((2, vocabulary), -3.0)


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"top_p": 0.777},
    {"top_p": 0.99999},
    {"top_p": 1e-9},
    {"top_p": 0.613, "temperature": 30.0},
    {"top_p": 0.777, "temperature": 1e-30},
    {"top_k": 1},
    {"top_k": 129},
    {"top_k": 10**9},
    {"top_k": 200, "top_p": 0.877, "min_p": 0.001, "temperature": 2.0},
]


def arguments(logits: Tensor, cut: dict[str, Any], count: int = 40) -> tuple[Tensor, ...]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | cut
    columns = (torch.full((count,), value) for value in values.values())
    uniform = (torch.arange(count, dtype=torch.float64) + 0.123) / count
    return logits, torch.arange(count) % len(logits), *columns, uniform


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("make", [spread, tied, flat], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draws_are_the_definitions(isa: str, make: Any, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same uniform, same token; the same log-probability within float32."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    for vocabulary in (1, 7, 64, 65, 1000, 9973):
        args = arguments(make(vocabulary), cut)
        tokens, logprobs = cpu.sample_cpu(*args)
        expected_tokens, expected = sample.reference(*args)
        assert torch.equal(tokens, expected_tokens), vocabulary
        assert torch.allclose(logprobs, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_draw_does_not_depend_on_threads_or_neighbours(cut: dict[str, Any]) -> None:
    """Alone or among others, on one thread or two: the same bits."""
    args = arguments(spread(5000), cut)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cpu.sample_cpu(*args))
    finally:
        torch.set_num_threads(before)
    alone = [cpu.sample_cpu(args[0], *(column[i : i + 1] for column in args[1:])) for i in range(40)]
    for crowd in results:
        assert torch.equal(crowd[0], torch.cat([tokens for tokens, _ in alone]))
        assert torch.equal(crowd[1], torch.cat([logprobs for _, logprobs in alone]))


def test_log_probabilities_do_not_depend_on_the_default_dtype() -> None:
    """The same bits in a process whose new tensors are float64."""
    args = arguments(spread(1000), {})
    tokens, logprobs = cpu.sample_cpu(*args)
    torch.set_default_dtype(torch.float64)
    try:
        again = cpu.sample_cpu(*args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], logprobs)


def test_the_largest_uniform_draws_the_last_token_with_weight() -> None:
    """Rounding never leads past the tokens that can be drawn."""
    logits = torch.zeros(1, 200)
    logits[0, 150:] = -torch.inf
    uniform = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    one, off = torch.ones(1), torch.zeros(1)
    tokens, _ = cpu.sample_cpu(logits, torch.tensor([0]), one, torch.tensor([0]), one, off, uniform)
    assert tokens.item() == 149
