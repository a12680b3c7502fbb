from __future__ import annotations

import random

import numpy as np
import pytest

from porcelet.errors import InputError
from porcelet.train.corpus import minhash
from porcelet.train.corpus.dedup import drop_repeated_paragraphs, drop_repeats
from porcelet.train.corpus.minhash import drop_near_duplicates, signature_of, similarity
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.readers import Document
from tests.train.corpus.tiny_corpus import WORDS


def test_repeats_are_dropped_whatever_their_case_and_spacing() -> None:
    """The first of equal documents stays, in its place."""
    texts = ["One two", "three", "one  TWO\n", "Three!", "one two"]
    kept = drop_repeats(Document(text, str(i)) for i, text in enumerate(texts))
    assert [document.place for document in kept] == ["0", "1", "3"]


def test_paragraphs_met_before_go_and_the_rest_stays_as_it_was() -> None:
    """Long ones once over all documents, short ones always; indentation and blank lines are kept."""
    long, other = "    A sentence that is long enough to count as one.", "Another sentence that is long enough, too."
    seen: set[int] = set()
    first = f"Title\n\n{long}\n\n\nTitle\n\n    code()"
    assert drop_repeated_paragraphs(first, seen) == first
    second = f"Title\n\n{long.upper()}\n\n{other}\n\n    code()"
    assert drop_repeated_paragraphs(second, seen) == f"Title\n\n{other}\n\n    code()"
    assert drop_repeated_paragraphs(second, seen, min_characters=10**6) == second


def jaccard(a: str, b: str) -> float:
    ours, theirs = (set(ngram_hashes(text, minhash.NGRAM).tolist()) for text in (a, b))
    return len(ours & theirs) / len(ours | theirs)


def changed(words: list[str], number: int, random_: random.Random) -> list[str]:
    words = list(words)
    for place in random_.sample(range(len(words)), number):
        words[place] = random_.choice(WORDS)
    return words


def test_signatures_estimate_similarity() -> None:
    """Over 300 pairs of every similarity: no bias, and the error that theory gives."""
    random_ = random.Random(0)
    errors = []
    for i in range(300):
        words = random_.choices(WORDS, k=random_.randint(50, 400))
        a, b = " ".join(words), " ".join(changed(words, i % 40, random_))
        first, second = signature_of(a), signature_of(b)
        assert first is not None and second is not None
        errors.append(similarity(first, second) - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.046


def test_near_duplicates_are_found_and_others_kept() -> None:
    """Against true similarities at a threshold of 0.8: of pairs above 0.9 at least 98 % are found, of pairs below 0.65
    at most 2 % are taken for duplicates."""
    random_ = random.Random(1)
    similar, different = [], []
    for i in range(400):
        words = random_.choices(WORDS, k=200)
        a, b = " ".join(words), " ".join(changed(words, 1 + i % 12, random_))
        found = len(list(drop_near_duplicates([Document(a, "a"), Document(b, "b")]))) == 1
        true = jaccard(a, b)
        (similar if true > 0.9 else different if true < 0.65 else []).append(found)
    assert len(similar) > 60 and np.mean(similar) >= 0.98
    assert len(different) > 100 and np.mean(different) <= 0.02


def test_the_first_of_many_near_duplicates_stays() -> None:
    """Among 200 unrelated documents each copy is found, wherever it stands; very short documents always stay."""
    random_ = random.Random(2)
    originals = [random_.choices(WORDS, k=120) for _ in range(200)]
    copies = [changed(words, 1, random_) for words in originals[::4]]
    pairs = [("original", words) for words in originals] + [("copy", words) for words in copies]
    documents = [Document(" ".join(words), kind) for kind, words in pairs] + [Document("too short", "short")] * 2
    kept = [document.place for document in drop_near_duplicates(documents)]
    assert kept == ["original"] * 200 + ["short"] * 2
    with pytest.raises(InputError, match="threshold"):
        list(drop_near_duplicates([], 0.1))
