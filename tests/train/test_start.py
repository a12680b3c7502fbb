from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from porcelet.chat import ChatFormat
from porcelet.engine.codec import open_codec
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.train.loop import train
from porcelet.train.start import start_model, write_text_files
from tests.train.test_checkpoint import train_until
from tests.train.tiny_run import FIELDS, config, metrics_of

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


@pytest.mark.parametrize("name", ["rollouts/mine.txt", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path, name: str, resume: bool) -> None:
    """A user's files are named and stay the only ones there, whatever a run would write under their names."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=f"such as {name.split('/')[0]}; choose another output"):
        train(config(tmp_path, steps=2), FIELDS, resume=resume)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path] and path.read_text() == "mine"


def test_run_that_reached_no_checkpoint_can_be_started_again(tmp_path: Path) -> None:
    """Its folder is known by its sessions.jsonl."""
    train_until(config(tmp_path), FIELDS, 2)
    train(config(tmp_path, steps=2), FIELDS)
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_number_format_without_its_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The definitions alone compute in float32, which nobody asked for."""
    monkeypatch.setenv("PORCELET_KERNELS", "reference")
    with pytest.raises(InputError, match=f"dtype is '{dtype}', and PORCELET_KERNELS=reference"):
        train(config(tmp_path, dtype=dtype), FIELDS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"alpha": 4.0}, "its rank is 0"),
        ({"corpus": ("store",), "chat_format": "R1"}, "a corpus brings its own"),
        ({"corpus": ("store",), "digits": 3}, "digits 3, but a corpus brings its own"),
        ({"held_out": "nowhere"}, "held_out is 'nowhere'"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    """Before anything is written."""
    output = tmp_path / "run"
    with pytest.raises(InputError, match=named):
        start_model(config(output, **changes), FIELDS, output)
    assert not output.exists()
