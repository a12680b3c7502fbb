from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porcelet.errors import InputError
from porcelet.train.corpus.packing import Pretraining
from porcelet.types import Sample
from tests.train.corpus.tiny_corpus import store_of

BOS, EOS = 0, 1


def texts_of(lengths: list[int]) -> list[str]:
    """Texts of given lengths; document i begins with a letter of its own, and no letter follows itself."""
    alphabet = [chr(ord("!") + i) for i in range(90)]
    return ["".join(alphabet[(i + 7 * j) % 90] for j in range(length)) for i, length in enumerate(lengths)]


def predictions(samples: list[Sample]) -> list[tuple[int, int]]:
    """(token before, token) of each prediction that counts."""
    pairs = []
    for sample in samples:
        assert sample.weights[0] == 0 and len(sample.tokens) == len(sample.weights) >= 2
        marked = zip(sample.tokens, sample.tokens[1:], sample.weights[1:], strict=False)
        pairs += [(before, token) for before, token, weight in marked if weight]
    return pairs


def expected(texts: list[str], encode: dict[str, int]) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for text in texts:
        tokens = [BOS, *(encode[letter] for letter in text), EOS]
        found.update(zip(tokens, tokens[1:], strict=False))
    return found


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    context=st.integers(2, 12),
    tokens_per_step=st.integers(1, 50),
    document_mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_an_epoch_predicts_every_token_once(
    lengths: list[int], context: int, tokens_per_step: int, document_mask: bool, seed: int
) -> None:
    """Whatever the lengths: over two epochs each token of each document is predicted exactly twice, behind its own
    predecessor; a step has exactly its budget, a sample at most the context, and masked ones no second document."""
    texts = texts_of(lengths)
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), texts)
        source = Pretraining(
            [store], tokens_per_step=tokens_per_step, context=context, seed=seed, document_mask=document_mask
        )
        encode = {text[i]: int(store.document(d)[i]) for d, text in enumerate(texts) for i in range(len(text))}
        total = 2 * sum(length + 1 for length in lengths)
        steps = [source(step)[0] for step in range(-(-total // tokens_per_step))]
    for samples in steps:
        assert len(predictions(samples)) == tokens_per_step
        assert all(len(sample.tokens) <= context + 1 for sample in samples)
        assert not document_mask or all(sample.tokens[1:].count(BOS) == 0 for sample in samples)
        assert all(
            weight == (token != BOS) for s in samples for token, weight in zip(s.tokens[1:], s.weights[1:], strict=True)
        )
    pairs = [pair for samples in steps for pair in predictions(samples)]
    wanted = expected(texts, encode)
    assert Counter(pairs[: total // 2]) == wanted
    assert Counter(pairs[total // 2 : total]) == wanted


def test_a_step_depends_on_its_number_alone(tmp_path: Path) -> None:
    """Any step can be asked for at any time, of any object; epochs and seeds have orders of their own."""
    store = store_of(tmp_path, texts_of([30] * 40))
    first, second = (Pretraining([store], tokens_per_step=62, context=16, seed=4) for _ in range(2))
    forwards = [first(step) for step in range(60)]
    assert [second(step) for step in reversed(range(60))] == forwards[::-1]
    per_epoch = [[sample.tokens for samples, _ in forwards[a : a + 20] for sample in samples] for a in (0, 20)]
    assert sorted(per_epoch[0]) == sorted(per_epoch[1]) and per_epoch[0] != per_epoch[1]
    assert Pretraining([store], tokens_per_step=62, context=16, seed=5)(0) != forwards[0]
    assert forwards[19][1] == {"epoch": 1.0}


def test_pieces_of_a_document_share_one_token(tmp_path: Path) -> None:
    """A long document is cut at every `context` predictions; a piece begins with what the one before it ended with."""
    store = store_of(tmp_path, texts_of([20]))
    samples, _ = Pretraining([store], tokens_per_step=21, context=8, seed=0)(0)
    assert [len(sample.tokens) for sample in samples] == [9, 9, 6]
    assert [a.tokens[-1] for a in samples[:-1]] == [b.tokens[0] for b in samples[1:]]
    joined = samples[0].tokens + samples[1].tokens[1:] + samples[2].tokens[1:]
    assert joined == (BOS, *store.document(0).tolist(), EOS)


def test_stores_are_mixed_by_weight(tmp_path: Path) -> None:
    """Shares of the tokens follow the weights, a small store begins anew, and none skips or repeats within an epoch."""
    small, large = store_of(tmp_path, ["a" * 499] * 10, "small"), store_of(tmp_path, ["b" * 999] * 50, "large")
    source = Pretraining([small, large], tokens_per_step=1024, context=16, seed=0, weights=[1, 3])
    letters: Counter[int] = Counter()
    for step in range(64):  # a block of the mixture
        samples, _ = source(step)
        assert len(predictions(samples)) == 1024
        letters.update(token for _, token in predictions(samples))
    a, b = int(small.document(0)[0]), int(large.document(0)[0])
    share = letters[a] / (letters[a] + letters[b])
    assert abs(share - 0.25) < 0.01
    by_size = Pretraining([small, large], tokens_per_step=1024, context=16, seed=0)
    found = Counter(token for step in range(64) for _, token in predictions(by_size(step)[0]))
    assert abs(found[a] / (found[a] + found[b]) - 1 / 11) < 0.005


@pytest.mark.parametrize("document_mask", [True, False])
def test_no_store_goes_on_in_another(tmp_path: Path, document_mask: bool) -> None:
    """Documents of the same number and length in two stores: a token is predicted behind its own predecessor alone."""
    texts = [["abcdefghijklmnopqrstuvwxyz"[:21]], ["ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:21]]]
    both = [store_of(tmp_path, part, name) for part, name in zip(texts, "ab", strict=True)]
    source = Pretraining(both, tokens_per_step=18, context=6, seed=0, document_mask=document_mask)
    wanted: set[tuple[int, int]] = set()
    for store in both:
        tokens = [BOS, *store.document(0).tolist(), EOS]
        wanted |= set(zip(tokens, tokens[1:], strict=False))
    for step in range(200):
        pairs = predictions(source(step)[0])
        assert len(pairs) == 18 and set(pairs) <= wanted


def test_samples_of_several_stores_are_as_long_as_those_of_one(tmp_path: Path) -> None:
    """Windows that follow each other cut no document, so a step has about as few samples as from one store."""
    texts = [letter * 997 for letter in "abcdefghij"]
    both = [store_of(tmp_path, part, name) for part, name in ((texts[:5], "a"), (texts[5:], "b"))]
    stores = (both, [store_of(tmp_path, texts)])
    sources = [Pretraining(each, tokens_per_step=2048, context=64, seed=0) for each in stores]
    numbers = [sum(len(source(step)[0]) for step in range(20)) for source in sources]
    assert numbers[0] < 1.1 * numbers[1]


def test_unusable_settings_are_refused(tmp_path: Path) -> None:
    """No store, no budget, weights for others, and stores of different tokenizers."""
    store = store_of(tmp_path, ["a"])
    for changes, message in [
        ({"stores": []}, "no corpus"),
        ({"tokens_per_step": 0}, "tokens_per_step"),
        ({"weights": [1, 2]}, "2 weights for 1"),
    ]:
        values = {"stores": [store], "tokens_per_step": 4, "context": 4, "seed": 0} | changes
        with pytest.raises(InputError, match=message):
            Pretraining(**values)  # type: ignore[arg-type]
