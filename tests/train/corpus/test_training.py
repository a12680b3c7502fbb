"""A corpus as the source of pre-training, through the loop."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus.bits import held_out_bits
from porcelet.train.corpus.readers import Document
from porcelet.train.corpus.store import write_store
from porcelet.train.corpus.tokenizer import train_tokenizer
from porcelet.train.loop import train
from porcelet.weights.load import load
from tests.train.corpus.tiny_corpus import store_of
from tests.train.tiny_run import FIELDS, config, metrics_of, state_of


def texts(count: int, seed: int) -> list[str]:
    random_ = random.Random(seed)
    words = ["".join(random.Random(i).choices("abcdef", k=4)) for i in range(20)]
    return [" ".join(random_.choices(words, k=random_.randint(3, 40))) for _ in range(count)]


def test_a_model_learns_the_corpus_with_its_tokenizer(tmp_path: Path) -> None:
    """A new model gets the store's tokenizer; its bits a byte on held-out documents fall well below an untrained one's;
    the log counts epochs."""
    train_tokenizer(texts(50, 0), 300, tmp_path / "tokenizer")
    documents = [Document(text, "") for text in texts(200, 1)]
    write_store(tmp_path / "store", documents, tmp_path / "tokenizer")
    (tmp_path / "held-out.txt").write_text("\n".join(texts(5, 2)), encoding="utf-8")
    corpus = {"corpus": (str(tmp_path / "store"),), "tokens_per_step": 128, "context": 32}
    bits = []
    for steps in (1, 25):
        run = config(tmp_path / str(steps), steps=steps, learning_rate=1e-2, checkpoint_every=100, **corpus)
        output = train(run, FIELDS)
        bits.append(held_out_bits(output, tmp_path / "held-out.txt", context=32).bits_per_byte)
    assert Tokenizer.from_folder(output).vocab_size == load(output).config.vocab_size == 300
    assert bits[1] < 0.7 * bits[0]
    epochs = [line["epoch"] for line in metrics_of(tmp_path / "25")]
    assert epochs == sorted(epochs) and epochs[0] > 0


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, document_mask: bool) -> None:
    """Bit for bit, with two stores mixed, with and without document masks."""
    stores = tuple(str(store_of(tmp_path, texts(30, i), f"store{i}").path) for i in range(2))
    corpus = {"corpus": stores, "weights": (2.0, 1.0), "tokens_per_step": 128, "context": 24}
    corpus["document_mask"] = document_mask
    train(config(tmp_path / "whole", steps=6, checkpoint_every=3, **corpus), FIELDS)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "cut", steps=6, checkpoint_every=3, **corpus), FIELDS, _stop_at(5))
    train(config(tmp_path / "cut", steps=6, checkpoint_every=3, **corpus), FIELDS, resume=True)
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert all((whole[name] == cut[name]).all() for name in whole) and whole.keys() == cut.keys()
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def _stop_at(step: int):  # type: ignore[no-untyped-def]
    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == step:
            raise KeyboardInterrupt

    return report


def test_a_store_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    """A model keeps its tokenizer, ids of another would mean other words; and it reads no more than it can."""
    store = store_of(tmp_path, ["some text"] * 5)
    first = train(config(tmp_path / "first", steps=1, corpus=(str(store.path),), tokens_per_step=8, context=8), FIELDS)
    train_tokenizer(["some text"], 300, tmp_path / "other")
    other = write_store(tmp_path / "otherstore", [Document("some text", "")], tmp_path / "other")
    run = config(tmp_path / "second", model=str(first), corpus=(str(other.path),), tokens_per_step=8, context=8)
    with pytest.raises(InputError, match="was not tokenized with the tokenizer of"):
        train(run, {})
    run = config(tmp_path / "third", steps=1, corpus=(str(store.path),), tokens_per_step=8, context=65)
    with pytest.raises(InputError, match="context is 65; the model has max_position_embeddings 64"):
        train(run, FIELDS)
