from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus.tokenizer import ADDED, MIN_VOCAB, SPECIAL, bytes_per_token, train_tokenizer
from porcelet.train.rendering import Renderer

TEXTS = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps on. " * 3,
    "def add(a: int, b: int) -> int:\n    return a + b\n\n\n" * 3,
    "12345 + 678 = 13023, and 3.14159",
    "Grüße, 你好，世界 こんにちは 🐷\t\r\n",
    "<think>no special token in plain text</think><｜User｜>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "tokenizer"
    train_tokenizer(TEXTS * 5, 400, path)
    return path


@given(text=st.one_of(st.text(), st.sampled_from(TEXTS)))
def test_any_text_comes_back(folder: Path, text: str) -> None:
    """Encoded and decoded, whatever it is; no text becomes a special token."""
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


def test_transformers_reads_it_with_the_same_ids(folder: Path) -> None:
    """Texts, special tokens and conversations; the three flagged tokens in their roles, in V3's places."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Renderer(folder)
    for text in TEXTS[:4]:
        assert theirs.encode(text, add_special_tokens=False) == ours.tokenizer.encode(text)
    marked = "".join(ADDED) + "a" + "".join(SPECIAL)
    assert theirs.encode(marked, add_special_tokens=False) == ours.tokenizer.encode(marked, special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == ours.tokenizer.vocab_size == 400
    talk = [{"role": "user", "content": "1+1="}]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == ours.chat.render(talk, ours.tokenizer).tokens
    flagged = [
        token["content"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        if token["special"]
    ]
    assert flagged == list(SPECIAL)


def test_text_is_cut_as_in_v3(folder: Path, tmp_path: Path) -> None:
    """Digits in groups of three, or alone where asked; the pattern is the published tokenizer's."""
    text = "0123456789" * 200
    grouped = train_tokenizer([text] * 3, 700, tmp_path / "grouped")
    assert [grouped.decode([id]) for id in grouped.encode("1234567890")] == ["123", "456", "789", "0"]
    alone = train_tokenizer([text] * 3, 700, tmp_path / "alone", digits=1)
    assert [alone.decode([id]) for id in alone.encode("1234 5")] == ["1", "2", "3", "4", " ", "5"]
    steps = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]["pretokenizers"]
    assert [step.get("pattern", {}).get("Regex") for step in steps] == [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+".replace('\\"', '"'),
        None,
    ]


def test_more_tokens_mean_fewer_for_a_text(tmp_path: Path) -> None:
    """The smallest vocabulary reads byte by byte; a larger one needs fewer tokens, and training repeats exactly."""
    random_ = random.Random(0)
    words = ["".join(random_.choices("abcdefghij", k=random_.randint(2, 9))) for _ in range(300)]
    texts = [" ".join(random_.choices(words, k=500)) for _ in range(20)]
    sizes = [MIN_VOCAB, 500, 1000]
    made = [train_tokenizer(texts, size, tmp_path / str(size)) for size in sizes]
    ratios = [bytes_per_token(tokenizer, texts) for tokenizer in made]
    assert ratios[0] == 1.0 < ratios[1] < ratios[2] and [tokenizer.vocab_size for tokenizer in made] == sizes
    train_tokenizer(texts, 1000, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "1000/tokenizer.json").read_bytes()


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """Below bytes and special tokens; and digits in groups that V3's pattern does not have."""
    with pytest.raises(InputError, match=str(MIN_VOCAB)):
        train_tokenizer(TEXTS, MIN_VOCAB - 1, tmp_path)
    with pytest.raises(InputError, match="digits"):
        train_tokenizer(TEXTS, 400, tmp_path, digits=4)


def test_nothing_is_learnt_from_no_text_and_nothing_is_replaced(tmp_path: Path) -> None:
    """Empty texts leave no folder behind; a folder that is there, a model's for one, keeps its tokenizer."""
    with pytest.raises(InputError, match="no text to learn"):
        train_tokenizer(["", ""], 400, tmp_path / "a")
    assert not any(tmp_path.iterdir())
    train_tokenizer(TEXTS, 400, tmp_path / "a")
    before = (tmp_path / "a/tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="a exists"):
        train_tokenizer(TEXTS, 300, tmp_path / "a")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == before
