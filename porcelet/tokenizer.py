"""Text to token ids and back: BPE over the `tokenizers` library, from a `tokenizer.json` or from GGUF metadata.

Two ideas. The BPE itself never learns of special tokens: they are taken out of its vocabulary and kept in a table of
our own, so ordinary text *cannot* become one, whatever it spells; only `split`, used on a template's text, finds them.
And every token is a fixed string of bytes, so decoding is joining bytes, streamed or not; the two cannot differ.

Vocabularies write bytes in one of two ways: GPT-2's alphabet of 256 letters (DeepSeek, Llama 3, Qwen), or
SentencePiece's, where "▁" is a space and "<0x0A>" a byte (Llama 2, Mistral). The second kind puts a space before the
text; `decode` takes one off again.

Special are all of a file's added tokens, flagged so or not: V3 does not flag `<｜User｜>`. So where the library and
llama.cpp find unflagged ("user defined") tokens in any text, here they are found in trusted text only.

Left out: Unigram and WordPiece, added tokens that take in their surroundings, a space before the first part of a text
only (Metaspace "first"), and GGUF pre-tokenizers beside those in `_PATTERNS`; each is refused by name.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer

from porcelet.errors import InputError, ModelError, PorceletError

MAX_ID = 2**31 - 1
MAX_PIECE = 256  # characters of one SentencePiece piece; trainers stop at 16 unless told otherwise


class Tokenizer:
    """A BPE and the special tokens beside it.

    Ids that stand for no token decode to nothing; bytes that the vocabulary lacks encode to nothing (SmolLM2 has no
    U+0004, for one: it never met it). `vocab_size` is the largest id plus one: what an embedding must have rows for.
    """

    def __init__(
        self,
        bpe: BPETokenizer,
        vocabulary: Mapping[str, int],
        special: Mapping[str, int],
        spelling: Spelling | None = None,
    ) -> None:
        self._bpe = bpe
        self._special = dict(special)
        self._spelling = spelling or BYTE_LEVEL
        self._tokens = {id: token for token, id in vocabulary.items()}
        self._bytes = {id: token.encode() for token, id in special.items()}  # grows as ordinary tokens are asked for
        self._pattern = _any_of(special)
        self.vocab_size = max([*self._tokens, *self._bytes], default=-1) + 1

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read a folder's `tokenizer.json`.

        Raises:
            ModelError: the file is missing, damaged, or of a kind that is not supported.
        """
        path = path / "tokenizer.json"
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")), str(path))
        except FileNotFoundError as problem:
            raise ModelError(f"{path} does not exist; the model's folder needs it") from problem
        except _DAMAGE as problem:
            raise ModelError(f"{path} is not a tokenizer.json: {problem!r}") from problem

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> Tokenizer:
        """Build from GGUF metadata: `tokenizer.ggml.model` "gpt2", with a known `tokenizer.ggml.pre`, or "llama".

        Raises:
            ModelError: another kind of tokenizer, or keys that are missing or disagree.
        """
        try:
            return _from_gguf(metadata, source)
        except _DAMAGE as problem:
            raise ModelError(f"{source}: the tokenizer's metadata cannot be used: {problem!r}") from problem

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens are recognised only with `special`, which is never for a user's words.

        Raises:
            InputError: `text` holds half of a surrogate pair, which no encoding can carry, or it is more than the
                vocabulary's regular expressions can bear.
        """
        if special:
            return [id for part in self.split(text) for id in ([part] if isinstance(part, int) else self.encode(part))]
        return list(self._encoding(text).ids)

    def _encoding(self, text: str) -> Encoding:
        if _SURROGATE.search(text):
            raise InputError("the text holds half of a surrogate pair and is not valid Unicode; send it as UTF-8")
        too_much = f"a text of {len(text)} characters cannot be cut into words; send less at once"
        with _library_errors(InputError, too_much):
            return self._bpe.encode(text, add_special_tokens=False)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each of `encode`'s ids, the characters of `text` it stands for: the first, and the one after the last.

        Raises:
            InputError: as `encode`.
        """
        return list(self._encoding(text).offsets)

    def split(self, text: str) -> list[str | int]:
        """Cut trusted text at special tokens: their ids, and the ordinary text between them."""
        parts: list[str | int] = []
        end = 0
        for match in self._pattern.finditer(text):
            parts += [text[end : match.start()], self._special[match[0]]]
            end = match.end()
        return [part for part in [*parts, text[end:]] if part != ""]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self)
        return decoder.push(ids) + decoder.flush()

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to the text; empty for an id that stands for no token."""
        if id not in self._bytes and id in self._tokens:
            self._bytes[id] = self._spelling.bytes_of(self._tokens[id])
        return self._bytes.get(id, b"")

    def token_id(self, text: str) -> int | None:
        """The id of the special token with this text, or None."""
        return self._special.get(text)

    def to_json(self) -> str:
        """The text of a `tokenizer.json` that gives the same ids, here and in `transformers`. Special tokens lie in the
        vocabulary again, where the library looks them up."""
        values = json.loads(self._bpe.to_str())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        numbered = sorted((id, token) for token, id in self._special.items())
        values["added_tokens"] = [{"id": id, "content": token, **flags, "special": True} for id, token in numbered]
        values["model"]["vocab"] |= self._special
        values["decoder"] = self._spelling.decoder
        return json.dumps(values, ensure_ascii=False)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text and id of every special token."""
        return self._special

    @property
    def adds_space(self) -> bool:
        """Whether `decode` takes one space off the front, where `encode` has put one."""
        return self._spelling.adds_space


class StreamDecoder:
    """Decodes a growing list of ids. What it returns, joined, is `decode` of all ids; a character is never cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.adds_space

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete."""
        return self._without_added_space(self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids))))

    def flush(self, tail: bytes = b"") -> str:
        """What is left at the end of the stream: the `tail` of a token that was cut, and U+FFFD if the last character
        never became whole."""
        return self._without_added_space(self._decoder.decode(tail, final=True))

    def _without_added_space(self, text: str) -> str:
        if not (self._drops_space and text):
            return text
        self._drops_space = False
        return text.removeprefix(" ")


_SURROGATE = re.compile("[\ud800-\udfff]")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the leftmost and there the longest of `texts`, as the library does; without texts, nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _require_ids(vocabulary: Mapping[str, int], special: Mapping[str, int], source: str) -> None:
    """Every token has one id and every id one token, or encoding and decoding would disagree."""
    for token in vocabulary.keys() & special.keys():
        raise ModelError(f"{source}: token {token!r} has two ids, {vocabulary[token]!r} and {special[token]!r}")
    seen: set[int] = set()
    for token, id in [*vocabulary.items(), *special.items()]:
        if type(id) is not int or not 0 <= id <= MAX_ID:
            raise ModelError(f"{source}: token {token!r} has the id {id!r}; ids are whole numbers from 0 to {MAX_ID}")
        if id in seen:
            raise ModelError(f"{source}: id {id} stands for {token!r} and for another token")
        seen.add(id)


@contextmanager
def _library_errors(error: type[PorceletError], message: str) -> Iterator[None]:
    """The library's failures as ours. It raises plain Exceptions, and its panics are not even those."""
    try:
        yield
    except BaseException as problem:
        if isinstance(problem, Exception) or type(problem).__name__ == "PanicException":
            raise error(f"{message}: {problem}") from problem
        raise


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], source: str, **options: Any) -> BPETokenizer:
    with _library_errors(ModelError, f"{source}: the tokenizer's merges do not fit its tokens"):
        return BPETokenizer(models.BPE(dict(vocabulary), merges, **options))


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


# ---- bytes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary writes bytes, and whether its encoder puts a space before the text."""

    bytes_of: Callable[[str], bytes]
    adds_space: bool

    @property
    def decoder(self) -> dict[str, Any]:
        """What a `tokenizer.json` calls it."""
        if self.bytes_of is _byte_level:
            return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        return {"type": "Sequence", "decoders": [*_PIECES, *([_STRIP] if self.adds_space else [])]}


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet, so it means itself, as in the library
        return token.encode()


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's way to write bytes as text: printable Latin-1 stands for itself, the other 68 begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    outside = dict.fromkeys(others, 0xFFFF)  # no letter of the alphabet: made to fail as Latin-1
    return outside | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKENS.get(token)
    return token.replace(_SPACE, " ").encode() if byte is None else bytes([byte])


_SPACE = "▁"
_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}

BYTE_LEVEL = Spelling(_byte_level, adds_space=False)


def _require_bytes(vocabulary: Mapping[str, int], source: str) -> None:
    """With a token for every byte no text is unknown; without, the library would have to drop some."""
    if missing := _BYTE_TOKENS.keys() - vocabulary.keys():
        raise ModelError(f"{source}: the vocabulary lacks the byte token {min(missing)}; not supported yet")


# ---- tokenizer.json -------------------------------------------------------------------------------------------------

_REPLACE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_PIECES = [_REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_DECODERS = "('BPE', 'ByteLevel') and ('BPE', 'Sequence' of Replace, ByteFallback, Fuse, Strip)"


def _from_json(values: dict[str, Any], source: str) -> Tokenizer:
    model = values["model"]
    spelling = _spelling(values, source)
    special = _added_tokens(values["added_tokens"], source)
    vocabulary = {token: id for token, id in model["vocab"].items() if special.get(token) != id}
    _require_ids(vocabulary, special, source)
    _require_plain(model, source)
    if spelling is not BYTE_LEVEL:
        _require_bytes(vocabulary, source)
    bpe = _bpe(
        vocabulary,
        [_pair(merge) for merge in model["merges"]],
        source,
        ignore_merges=model.get("ignore_merges") or False,
        byte_fallback=spelling is not BYTE_LEVEL,
    )
    shell = _shell(values, source)
    shell.model = bpe.model
    return Tokenizer(shell, vocabulary, special, spelling)


def _spelling(values: dict[str, Any], source: str) -> Spelling:
    model, decoder = values["model"]["type"], values.get("decoder") or {}
    if (model, decoder.get("type")) == ("BPE", "ByteLevel"):
        return BYTE_LEVEL
    if (model, decoder.get("type")) == ("BPE", "Sequence") and decoder["decoders"] in (_PIECES, [*_PIECES, _STRIP]):
        return Spelling(_sentencepiece, adds_space=_STRIP in decoder["decoders"])
    raise ModelError(
        f"{source}: model and decoder {(model, decoder.get('type'))} are not supported yet; supported: {_DECODERS}"
    )


def _added_tokens(added: list[dict[str, Any]], source: str) -> dict[str, int]:
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"].encode():
            raise ModelError(
                f"{source}: added token {token['content']!r} is empty or takes in its surroundings; not supported yet"
            )
    special = {token["content"]: token["id"] for token in added}
    if len(special) != len(added):
        raise ModelError(f"{source}: an added token is listed twice")
    return special


def _require_plain(model: dict[str, Any], source: str) -> None:
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ModelError(f"{source}: the BPE's {option} {model[option]!r} is not supported yet")


def _shell(values: dict[str, Any], source: str) -> BPETokenizer:
    """What comes before the BPE. No truncation, padding or post-processor: they would change what `encode` returns."""
    before = {key: values.get(key) for key in ("normalizer", "pre_tokenizer")}
    for step in filter(None, before.values()):
        _require_known(step, source)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": empty, **before})
    with _library_errors(ModelError, f"{source} is not a tokenizer.json"):
        return BPETokenizer.from_str(text.replace(json.dumps(r"\s+$"), json.dumps(_FINAL_SPACE)))


_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace")
_PRE_TOKENIZERS = ("ByteLevel", "Digits", "Metaspace", "Split")
_KNOWN = ("Sequence", *_NORMALIZERS, *_PRE_TOKENIZERS)


def _require_known(step: dict[str, Any], source: str) -> None:
    """Only what the library runs without a panic, and what means the same for each part of a text."""
    kind = step["type"]
    if kind not in _KNOWN:
        raise ModelError(f"{source}: {kind!r} before the BPE is not supported yet; supported: {', '.join(_KNOWN)}")
    if (kind == "Prepend" and not step["prepend"]) or (kind == "Replace" and not step["pattern"].get("String")):
        raise ModelError(f"{source}: {kind} of nothing, or of a regular expression, is not supported yet")
    if step.get("prepend_scheme") == "first":
        raise ModelError(f"{source}: {kind} with prepend_scheme 'first' is not supported yet; supported: 'always'")
    for inner in step.get("normalizers", []) + step.get("pretokenizers", []):
        _require_known(inner, source)


# ---- GGUF -----------------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # values of tokenizer.ggml.token_type


def _from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    kind, pre = metadata.get("tokenizer.ggml.model"), str(metadata.get("tokenizer.ggml.pre", "default"))
    if kind == "llama":
        return _pieces(metadata, source)
    if kind != "gpt2" or pre not in _PATTERNS:
        raise ModelError(
            f"{source}: tokenizer {(kind, pre)} is not supported yet; supported: 'llama', "
            f"and 'gpt2' with {', '.join(map(repr, _PATTERNS))}"
        )
    vocabulary, rest, special = _tokens(metadata, source)
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = _bpe(vocabulary, merges, source, ignore_merges=_PATTERNS[pre] is _LLAMA3)
    if _PATTERNS[pre] is _QWEN2:
        bpe.normalizer = normalizers.NFC()  # in Qwen's tokenizer.json; GGUF has no place for it
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*map(_isolate, _PATTERNS[pre]), byte_level])
    return Tokenizer(bpe, vocabulary | rest, special)


def _pieces(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """A SentencePiece vocabulary: its merges follow from the scores. The space goes before every part of a text that
    begins after a special token, as in llama.cpp and in Llama 2's own tokenizer.json."""
    vocabulary, rest, special = _tokens(metadata, source)
    _require_bytes(vocabulary, source)
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    bpe = _bpe(vocabulary, _merges(vocabulary, scores), source, byte_fallback=True)
    adds_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if not isinstance(adds_space, bool):
        raise ValueError(f"tokenizer.ggml.add_space_prefix is {adds_space!r}, neither true nor false")
    first = [normalizers.Prepend(_SPACE)] if adds_space else []
    bpe.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    return Tokenizer(bpe, vocabulary | rest, special, Spelling(_sentencepiece, adds_space))


def _tokens(metadata: Mapping[str, Any], source: str) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What the BPE may produce, what it may not but has an id (padding), and the special tokens."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    by_type: dict[int, dict[str, int]] = {type: {} for type in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)}
    for id, (token, type) in enumerate(zip(tokens, types, strict=True)):
        if not isinstance(token, str) or not token.encode():
            raise ValueError(f"token {id} is empty or not a string")
        by_type[type][token] = id
    if len(set(tokens)) != len(tokens):
        raise ModelError(f"{source}: tokenizer.ggml.tokens holds the same token twice")
    special = by_type[UNKNOWN] | by_type[CONTROL] | by_type[USER_DEFINED]
    return by_type[NORMAL] | by_type[BYTE], by_type[UNUSED], special


def _merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: so every cut of every piece in two, best first."""
    cuts = []
    for piece in vocabulary.keys() - _BYTE_TOKENS.keys():
        if len(piece) > MAX_PIECE:
            raise ValueError(f"a piece of {len(piece)} characters; at most {MAX_PIECE} are read")
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        cuts += [(-scores[piece], vocabulary[piece], pair) for pair in known]
    return [pair for _, _, pair in sorted(cuts)]


def _isolate(pattern: str) -> pre_tokenizers.PreTokenizer:
    if pattern == _DIGIT:  # the library's digits, which are more than those of its regular expressions
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


_DIGIT = r"\p{N}"
# Finds what V2's own `\s+$` finds, which takes quadratic time over blanks inside a text (20,000 of them: 4 s).
_FINAL_SPACE = r"(?<!\s)\s+$"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_LLAMA3 = (_WORD + r"\p{N}{1,3}" + _SIGNS + _BLANKS,)
_QWEN2 = (_WORD + r"\p{N}" + _SIGNS + _BLANKS,)
_V2_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷ"
    "ᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿ"
    "ⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
# Each pattern cuts what the ones before it left, as in the models' own tokenizer.json and in llama.cpp; "default" is
# what llama.cpp takes for a file that names none.
_PATTERNS = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_V2_LETTERS}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        _FINAL_SPACE,
        _CJK,
        _DIGIT,
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS,
    ),
}
