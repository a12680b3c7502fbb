from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus import fim
from porcelet.train.corpus.fim import FillInTheMiddle, cut
from porcelet.train.corpus.tokenizer import MIN_VOCAB, train_tokenizer
from tests.train.corpus.tiny_corpus import tokenizer_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["some text"], MIN_VOCAB, tmp_path_factory.mktemp("fim") / "tokenizer")


@given(text=st.text(), key=st.integers(0, 2**40))
def test_the_parts_are_the_text(text: str, key: int) -> None:
    """Whatever the text and the cuts, prefix, middle and suffix join to it."""
    assert "".join(cut(text, key)) == text


@given(text=st.text(), position=st.integers(0, 2**40))
def test_a_rearranged_document_can_be_put_together_again(tokenizer: Tokenizer, text: str, position: int) -> None:
    """Decoded, it is begin, prefix, hole, suffix, end, middle, each part whole characters, which join to the text."""
    ids = FillInTheMiddle(tokenizer, 1.0, seed=5).encode(text, position)
    begin, hole, end = (tokenizer.token_id(mark) for mark in (fim.BEGIN, fim.HOLE, fim.END))
    assert ids[0] == begin and ids.count(hole) == ids.count(end) == 1
    prefix, suffix = ids[1 : ids.index(hole)], ids[ids.index(hole) + 1 : ids.index(end)]
    middle = ids[ids.index(end) + 1 :]
    assert tuple(map(tokenizer.decode, (prefix, middle, suffix))) == cut(text, 5, position)
    assert "".join(map(tokenizer.decode, (prefix, middle, suffix))) == text


def test_the_rate_is_kept_and_the_rest_is_left_alone(tokenizer: Tokenizer) -> None:
    """Of 4000 documents at V3's rate a tenth is rearranged, the same ones each time; the others are as they were."""
    encoder = FillInTheMiddle(tokenizer, 0.1, seed=1)
    ids = [encoder.encode("some text", position) for position in range(4000)]
    plain = [tokens == tokenizer.encode("some text") for tokens in ids]
    assert 0.085 < plain.count(False) / 4000 < 0.115
    assert ids == [FillInTheMiddle(tokenizer, 0.1, seed=1).encode("some text", i) for i in range(4000)]
    places = {cut("0123456789", 1, position)[0] for position in range(2000)}
    assert len(places) == 11


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    """By name, unless nothing is to be rearranged; a rate outside 0..1 is refused too."""
    bare = Tokenizer.from_folder(tokenizer_folder(tmp_path))
    with pytest.raises(ModelError, match="fim▁begin"):
        FillInTheMiddle(bare, 0.1, 0)
    assert FillInTheMiddle(bare, 0.0, 0).encode("a", 0) == bare.encode("a")
    with pytest.raises(InputError, match="fim_rate"):
        FillInTheMiddle(bare, 1.5, 0)
