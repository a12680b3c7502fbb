from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from porcelet.errors import InputError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.train.corpus.bits import bits_per_byte, document_logprobs, held_out_bits
from porcelet.train.rendering import make_tokenizer
from porcelet.train.start import write_text_files
from porcelet.weights.load import load, save
from tests.train.tiny_run import model
from tests.weights import tiny_gguf

TEXTS = ["A first document, with a little text.", "Grüße 🐷", "", "x" * 100]


def test_bits_of_known_probabilities() -> None:
    """Four tokens of probability 1/4 for four bytes are two bits a byte; for eight, one."""
    assert bits_per_byte([math.log(0.25)] * 4, 4) == pytest.approx(2.0)
    assert bits_per_byte([math.log(0.25)] * 4, 8) == pytest.approx(1.0)


def test_log_probabilities_equal_a_plain_softmax() -> None:
    """Packed and cut at the context, each token has the probability it has with its piece alone."""
    network = model()
    ids = [int(i) for i in torch.randint(3, 250, (37,), generator=torch.Generator().manual_seed(0))]
    found = document_logprobs(network, 0, ids, context=16)
    expected = []
    tokens = [0, *ids]
    for start in range(0, 37, 16):
        piece = torch.tensor(tokens[start : start + 17])
        with torch.no_grad():
            hidden = network(piece[:-1], torch.arange(len(piece) - 1), PackedView(Segments.of(len(piece) - 1)))
            logprobs = network.logits(hidden).log_softmax(-1)
        expected += logprobs.gather(1, piece[1:, None])[:, 0].tolist()
    assert len(found) == 37 and found == pytest.approx(expected, abs=1e-5)


def test_held_out_text_is_measured_in_bits(tmp_path: Path) -> None:
    """All bytes are counted once; an untrained model needs about log2(vocabulary) for each; a part is a part."""
    save(model(initializer_range=1e-3), tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    source = tmp_path / "held-out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    found = held_out_bits(tmp_path / "model", source)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (found.num_bytes, found.num_tokens, found.num_documents) == (num_bytes, num_bytes, 3)
    assert found.bits_per_byte == pytest.approx(math.log2(261), abs=0.05)
    part = held_out_bits(tmp_path / "model", source, max_bytes=120)
    assert 117 <= part.num_bytes <= 120  # the last document is cut between characters
    with pytest.raises(InputError, match="context is 65; the model reads 64"):
        held_out_bits(tmp_path / "model", source, context=65)
    source.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no text to measure"):
        held_out_bits(tmp_path / "model", source)


def test_gguf_file_is_measured_as_the_same_model_in_a_folder(tmp_path: Path) -> None:
    """Its tokenizer and the token that begins a document are its own."""
    path, folder, source = tmp_path / "tiny.gguf", tmp_path / "model", tmp_path / "held-out.txt"
    tiny_gguf.write(path, "F32")
    save(load(path), folder)
    write_text_files(path, folder)
    source.write_text("abc ab cab", encoding="utf-8")
    found = held_out_bits(path, source)
    assert found.num_bytes == 10 and found == held_out_bits(folder, source)
