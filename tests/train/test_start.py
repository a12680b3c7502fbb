from __future__ import annotations

import json
from pathlib import Path

import pytest

from porcelet.chat import ChatFormat
from porcelet.engine.codec import open_codec
from porcelet.tokenizer import Tokenizer
from porcelet.train.start import write_text_files

TEXTS = ("Hello  world!\n\n 12345 it's", "Grüße, 你好 \t🐷", "<|im_start|>user\n", "")


def test_text_files_of_a_gguf_model_are_in_hugging_face_form(default_model: Path, tmp_path: Path) -> None:
    """The default model's: the same ids here and in `transformers`, the same conversation with the same mask."""
    transformers = pytest.importorskip("transformers")
    tokenizer, chat = open_codec(default_model)
    write_text_files(default_model, tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == tokenizer.encode(text)
        assert theirs.encode(text) == tokenizer.encode(text, special=True)
        assert theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False) == text
    assert ours.special_tokens == tokenizer.special_tokens and ours.vocab_size == tokenizer.vocab_size
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    mine, wanted = ChatFormat.from_folder(tmp_path).render(talk, ours), chat.render(talk, tokenizer)
    assert mine.tokens == wanted.tokens and mine.trainable == wanted.trainable
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["eos_token"] == "<|im_end|>"
