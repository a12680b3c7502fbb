from __future__ import annotations

import random

import pytest

from porcelet.errors import InputError
from porcelet.train.corpus.decontaminate import Evaluation, Report, decontaminate
from porcelet.train.corpus.ngrams import ngram_hashes
from porcelet.train.corpus.readers import Document
from tests.train.corpus.tiny_corpus import WORDS


def sentence(random_: random.Random, length: int) -> str:
    return " ".join(random_.choices(WORDS, k=length))


def test_hashes_are_equal_exactly_where_words_are() -> None:
    """Against a plain comparison of word tuples, with repeats; layout, case and punctuation do not count."""
    random_ = random.Random(0)
    words = random_.choices(WORDS[:4], k=300)
    hashes = ngram_hashes(" ".join(words), 3).tolist()
    tuples = [tuple(words[i : i + 3]) for i in range(298)]
    assert len(hashes) == 298
    assert len(set(hashes)) == len(set(tuples)) == len(set(zip(hashes, tuples, strict=True)))
    assert ngram_hashes("The Cat,\n sat!", 3).tolist() == ngram_hashes("the cat sat", 3).tolist()
    assert not len(ngram_hashes("two words", 3))


def test_documents_that_hold_a_question_are_dropped() -> None:
    """13 words in a row are found anywhere, 12 are not; the report has place and share, and others stay in order."""
    random_ = random.Random(1)
    question = sentence(random_, 20)
    words = question.split()
    documents = [
        Document(f"{sentence(random_, 50)} {question.upper()}! {sentence(random_, 50)}", "whole"),
        Document(f"{sentence(random_, 30)} {' '.join(words[4:17])} {sentence(random_, 30)}", "thirteen"),
        Document(f"{sentence(random_, 30)} {' '.join(words[4:16])} {sentence(random_, 30)}", "twelve"),
        Document("short", "short"),
    ]
    report = Report()
    evaluation = Evaluation.of([question, "too short to look for"])
    kept = [document.place for document in decontaminate(documents, evaluation, report)]
    assert kept == ["twelve", "short"] and evaluation.num_unchecked == 1
    assert [place for place, _ in report.dropped] == ["whole", "thirteen"]
    assert report.dropped[0][1] == pytest.approx(8 / 108) and report.dropped[1][1] == pytest.approx(1 / 61)


def test_evaluation_texts_too_short_for_any_ngram_are_refused() -> None:
    """Nothing could be found with them, which must not look like nothing was found."""
    with pytest.raises(InputError, match="choose shorter"):
        Evaluation.of(["12+34="])
    with pytest.raises(InputError, match="length"):
        Evaluation.of(["a b c"], 0)
