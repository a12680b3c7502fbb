"""Text in, text out, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.engine.text import TextModel, load
from porcelet.types import SamplingParams
from tests.tiny_model import SPECIAL, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return load(str(folder))


def test_stops_cut_the_text(model: TextModel) -> None:
    """An answer ends before the first stop, whether that begins with a token or within one, and what is streamed is
    the answer."""
    user = 256 + SPECIAL.index("<|user|>")
    always = SamplingParams(max_tokens=20, temperature=0, logit_bias=((user, 100.0),), stop=("><|us",))
    assert model.chat("hello", always) == "<|user|"
    free = SamplingParams(max_tokens=60, temperature=1.5, seed=3)
    text = model.chat("hello", free)
    stop = next(text[i : i + 2] for i in range(5, len(text)) if "\ufffd" not in text[i : i + 2])
    cut = SamplingParams(max_tokens=60, temperature=1.5, seed=3, stop=(stop,))
    pieces = list(model.stream("hello", cut))
    assert "".join(piece for piece, _ in pieces) == model.chat("hello", cut) == text.split(stop)[0]
    assert pieces[-1][1].stop == stop
