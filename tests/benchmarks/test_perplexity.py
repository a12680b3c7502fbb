"""What benchmarks/perplexity.py counts, and how it reads llama.cpp's scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import perplexity
from benchmarks.rivals import llama_perplexity
from porcelet.models.transformer import build, initialize
from tests.models.variants import V3


def test_scores_of_the_file_are_those_of_the_next_tokens(tmp_path: Path) -> None:
    """A file of two windows of six tokens: the scores are least + step · the number of the token that follows."""
    V, tokens = 5, np.array([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 4]], np.int32)
    places = list(llama_perplexity.counted(6))
    assert places == [3, 4]
    numbers = np.random.default_rng(0).integers(0, 65536, (2, 2, V + 1), np.uint16)
    spans = np.array([[[0.5, -9.0], [0.25, -8.0]], [[0.125, -7.0], [1.0, -6.0]]], np.float32)  # step, least
    with (tmp_path / "scores").open("wb") as file:
        file.write(b"_logits_" + np.array([6, V, 2], np.int32).tobytes() + tokens.tobytes())
        file.write(np.concatenate((spans.view(np.uint16), numbers), axis=-1).tobytes())
    read, found = llama_perplexity._read(tmp_path / "scores")
    assert torch.equal(read, torch.from_numpy(tokens).long())
    for window in range(2):
        for i, place in enumerate(places):
            step, least = spans[window, i]
            assert found[window, i] == pytest.approx(least + step * numbers[window, i, tokens[window, place + 1]])


def test_every_window_is_computed_from_nothing() -> None:
    """The engine's scores of a window do not depend on the one before; a uniform model is as unsure as it can be."""
    model = initialize(build(V3), seed=0).eval()
    tokens = torch.randint(0, V3.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    both = perplexity.scores(model, tokens)
    assert both.shape == (2, 31) and torch.equal(both[1:], perplexity.scores(model, tokens[1:]))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity.perplexity(perplexity.scores(model, tokens)) == pytest.approx(V3.vocab_size, rel=1e-5)
    assert math.isfinite(both.sum().item())


def test_the_text_is_there() -> None:
    """Python brings its documentation along, and more of it than the benchmark takes by default."""
    text = perplexity.documentation(16 * 512 * perplexity.CHARACTERS_A_TOKEN)
    assert len(text) > 16 * 512 * 5 and "assert" in text
