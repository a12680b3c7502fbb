from __future__ import annotations

from pathlib import Path

import pytest

from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.train.start import write_text_files
from porcelet.train.tasks.sums import sums
from tests.weights import tiny_gguf


def test_only_answer_and_stop_carry_weight(tmp_path: Path) -> None:
    """The prompt is the chat format's, the rest is the answer and the end of sentence, and only that is weighed."""
    make_tokenizer(tmp_path)
    renderer = Renderer(tmp_path)
    problem = sums().training[0]
    sample = renderer.sample(problem)
    num_prompt = len(sample.weights) - int(sum(sample.weights))
    text = renderer.tokenizer.decode(sample.tokens[:num_prompt])
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>{problem.question}<｜Assistant｜>"
    assert renderer.tokenizer.decode(sample.tokens[num_prompt:-1]) == problem.answer and sample.tokens[-1] == 1
    assert sample.weights == (0.0,) * num_prompt + (1.0,) * (len(problem.answer) + 1)
    talk = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}]
    whole = renderer.chat.render(talk, renderer.tokenizer, add_generation_prompt=False)
    assert tuple(whole.tokens) == sample.tokens and whole.trainable == [weight == 1 for weight in sample.weights]


def test_gguf_file_renders_as_the_folder_made_of_it(tmp_path: Path) -> None:
    """The same tokens, and answers that begin alike."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf.write(path)
    write_text_files(path, tmp_path)
    ours, theirs = Renderer(path), Renderer(tmp_path)
    assert ours.prompt("abc ab") == theirs.prompt("abc ab") and len(ours.prompt("abc ab")) > 3
    assert ours.opens_reasoning == theirs.opens_reasoning


def test_numbers_may_be_one_token(tmp_path: Path) -> None:
    """Of up to so many digits, without leading zeros; longer ones are cut from the left, all else is letters."""
    make_tokenizer(tmp_path, "R1", digits=2)
    tokenizer = Renderer(tmp_path).tokenizer
    texts = {"7 12*99": "7| |12|*|99", "1234567": "12|34|56|7", "007": "0|0|7", "x10y": "x|10|y"}
    for text, expected in texts.items():
        assert "|".join(tokenizer.decode([token]) for token in tokenizer.encode(text)) == expected
    make_tokenizer(tmp_path / "three", digits=3)
    assert len(Renderer(tmp_path / "three").tokenizer.encode("999 1000")) == 1 + 1 + 2


@pytest.mark.parametrize("digits", [1, 3])
def test_transformers_reads_the_tokenizer_and_the_chat_format(tmp_path: Path, digits: int) -> None:
    """Same ids for any text and any conversation, and the special tokens in their roles."""
    transformers = pytest.importorskip("transformers")
    make_tokenizer(tmp_path, digits=digits)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Renderer(tmp_path)
    for text in ("12+34=", "1234567 007", "Grüße, 你好 \n\t 🐷", bytes(range(128)).decode()):
        ids = ours.tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.tokenizer.decode(ids) == text
    talk = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == ours.chat.render(talk, ours.tokenizer).tokens
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
