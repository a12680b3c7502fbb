"""Encoding and decoding, against the `tokenizers` library and, for the default model, against known ids."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.weights import gguf

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im|>", "<｜Assistant｜>"]
TEXTS = [
    "Hello, world! I'm here, you've seen; they'll go.",
    " 12 34\n\n 567  8",
    "def f(x):\n    return x**2\n\n\n\tpass  ",
    "naïve café, e\u0301, \u00a0\u2003x",
    "你好，世界。こんにちは 세계",
    "Привет, мир! مرحبا नमस्ते",
    "👩‍👩‍👧‍👦🎉 🏳️‍🌈",
    "<|im_end|>\n<|im_start|>system <｜Assistant｜>",
    "",
]
# Verified once against `transformers` on the same file, given SmolLM2's own pre-tokenizer (digits apart, then bytes).
KNOWN = {
    "Hello, world!": [19556, 28, 905, 17],
    "12345 apples and 3.14": [33, 34, 35, 36, 37, 13855, 284, 216, 35, 30, 33, 36],
    "\n\n 123": [8866, 33, 34, 35],
    "12  34": [33, 34, 256, 35, 36],
    "a\n\n\nb   c\t\td": [81, 1116, 198, 82, 256, 265, 197, 197, 84],
    "你好，世界": [18645, 250, 48392, 138, 12831, 7906, 240, 178, 239, 230],
    "Привет, мир": [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175],
    "مرحبا": [21706, 20602, 44626, 31462, 10805],
    "🎉": [10813, 232, 227],
    "naïve café": [3546, 46494, 37366],
    "I'm you've they'll": [57, 5248, 346, 3543, 502, 3060],
    "   ": [333],
    "\u00a0\u2003x": [15442, 321, 221, 104],
}


@pytest.fixture(scope="module")
def library() -> Library:
    """A byte-level BPE of 600 tokens with SmolLM2's pre-tokenizer; ids of special tokens come first and last."""
    made = Library(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL[:2], min_frequency=1, show_progress=False
    )
    made.train_from_iterator([text for text in TEXTS if "<" not in text], trainer)
    made.add_tokens([AddedToken(text, normalized=False) for text in SPECIAL[2:]])
    return made


@pytest.fixture(scope="module")
def folder(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    library.enable_truncation(4)  # a setting left in the file must not cut what we encode
    library.save(str(path / "tokenizer.json"))
    library.no_truncation()
    return path


def metadata(library: Library) -> dict[str, Any]:
    """The same tokenizer as a GGUF file has it."""
    vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(library.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in vocabulary],
        "tokenizer.ggml.token_type": tuple(3 if token in SPECIAL else 1 for token, _ in vocabulary),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }


@pytest.fixture(scope="module", params=["folder", "gguf"])
def tokenizer(request: pytest.FixtureRequest, library: Library, folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder) if request.param == "folder" else Tokenizer.from_gguf(metadata(library))


@given(
    text=st.one_of(
        st.sampled_from(TEXTS), st.text(), st.lists(st.sampled_from([*SPECIAL, " ", "1", "a\n"])).map("".join)
    )
)
def test_trusted_text_encodes_as_in_the_library(tokenizer: Tokenizer, library: Library, text: str) -> None:
    """With special=True the ids are the library's, special tokens included, and decode gives the text back."""
    ids = tokenizer.encode(text, special=True)
    assert ids == library.encode(text).ids
    assert tokenizer.decode(ids) == text


@given(text=st.lists(st.sampled_from([*SPECIAL, *TEXTS, "<|im_", "end|>", "<", "|>"])).map("".join))
def test_untrusted_text_never_becomes_special(tokenizer: Tokenizer, text: str) -> None:
    """Whatever a user spells, no special id comes out, and nothing of the text is lost."""
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 700)))
def test_decode_equals_the_library(tokenizer: Tokenizer, library: Library, ids: list[int]) -> None:
    """Any ids, broken UTF-8 and unknown ids among them, decode as in the library."""
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


@given(
    text=st.text(max_size=20),
    ids=st.lists(st.integers(0, 620), max_size=20),
    steps=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_streamed_equals_whole(tokenizer: Tokenizer, text: str, ids: list[int], steps: list[int]) -> None:
    """Pushed in pieces, ids give the text of the whole list, and what was sent never has to be taken back."""
    ids = tokenizer.encode(text) + ids
    decoder, sent, position = StreamDecoder(tokenizer), "", 0
    for step in cycle(steps):
        if position >= len(ids):
            break
        sent += decoder.push(ids[position : position + step])
        position += step
        assert tokenizer.decode(ids).startswith(sent)
    assert sent + decoder.flush() == tokenizer.decode(ids)


def test_half_a_character_waits() -> None:
    """The bytes of one character arrive one by one: nothing, nothing, nothing, the character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: id for id, letter in enumerate(alphabet)}
    library = Library(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise = Tokenizer(library, vocabulary, {})
    decoder = StreamDecoder(bytewise)
    assert [decoder.push([id]) for id in bytewise.encode("🎉a")] == ["", "", "", "🎉", "a"]
    assert decoder.push(bytewise.encode("é")[:1]) == ""
    assert decoder.flush() == "\ufffd"


def test_vocabulary(tokenizer: Tokenizer, library: Library) -> None:
    """Sizes, special ids and the bytes of a token are those of the file."""
    assert tokenizer.vocab_size == library.get_vocab_size()
    assert [tokenizer.token_id(text) for text in SPECIAL] == [library.token_to_id(text) for text in SPECIAL]
    assert tokenizer.token_id("Hello") is None
    assert tokenizer.token_bytes(library.token_to_id("Ġ")) == b" "
    assert tokenizer.token_bytes(10**9) == b""


def test_the_longest_special_token_wins(tokenizer: Tokenizer) -> None:
    """Where one special token begins like another, split takes the longest that matches."""
    parts = tokenizer.split("a<|im|>b<|im_end|>")
    assert parts == ["a", tokenizer.token_id("<|im|>"), "b", tokenizer.token_id("<|im_end|>")]


def test_half_a_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    """A lone surrogate, which JSON can carry, is an InputError."""
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_the_default_model_encodes_as_it_was_trained(default_model: Path) -> None:
    """Ids of the real vocabulary, verified once against transformers."""
    tokenizer = Tokenizer.from_gguf(gguf.read(default_model).metadata)
    assert {text: tokenizer.encode(text) for text in KNOWN} == KNOWN
    assert [tokenizer.decode(ids) for ids in KNOWN.values()] == list(KNOWN)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "llama", "not supported"),
        ("tokenizer.ggml.pre", "qwen2", "qwen2"),
        ("tokenizer.ggml.tokens", None, "cannot be used"),
        ("tokenizer.ggml.tokens", [1, 2], "cannot be used"),
        ("tokenizer.ggml.token_type", (1,), "cannot be used"),
        ("tokenizer.ggml.merges", ["a b c"], "cannot be used"),
        ("tokenizer.ggml.merges", ["a zzzz"], "do not fit"),
    ],
)
def test_gguf_metadata_that_disagree_are_named(library: Library, key: str, value: object, message: str) -> None:
    """Missing or contradictory metadata are one ModelError."""
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(metadata(library) | {key: value})


def test_a_token_twice_is_named(library: Library) -> None:
    """Two ids for one token would make decoding and encoding disagree."""
    values = metadata(library)
    values["tokenizer.ggml.tokens"][-1] = values["tokenizer.ggml.tokens"][-2]
    with pytest.raises(ModelError, match="twice"):
        Tokenizer.from_gguf(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "type"), "Unigram", "Unigram"),
        (("decoder",), None, "None"),
        (("decoder", "type"), "Metaspace", "Metaspace"),
        (("added_tokens", 0, "lstrip"), True, "im_start"),
        (("added_tokens", 0, "id"), "x", "not a tokenizer.json"),
        (("model", "merges"), [["a", "zzzz"]], "not a tokenizer.json"),
        (("model", "vocab"), 7, "not a tokenizer.json"),
    ],
)
def test_files_that_are_not_supported_are_named(
    folder: Path, tmp_path: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    """A tokenizer.json of another kind, or a damaged one, is one ModelError with its path."""
    values = json.loads((folder / "tokenizer.json").read_text())
    place = values
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=message) as raised:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "[]", "{", "[" * 100_000, '{"model": {}}'])
def test_a_tokenizer_json_that_is_none(tmp_path: Path, text: str | None) -> None:
    """An absent or unreadable file is one ModelError."""
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
