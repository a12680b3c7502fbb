"""Text to token ids and back: byte-level BPE over the `tokenizers` library.

Two ideas. The BPE itself never learns of special tokens: they are taken out of its vocabulary and kept in a table of
our own, so ordinary text *cannot* become one, whatever it spells; only `split`, used on a template's text, finds them.
And every token is a fixed string of bytes, so decoding is joining bytes, streamed or not; the two cannot differ.

Left out: SentencePiece vocabularies (Llama 2, Gemma), added tokens that swallow white space, GGUF pre-tokenizers beside
"smollm"; each is refused by name.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BPETokenizer
from tokenizers import models, pre_tokenizers

from porcelet.errors import InputError, ModelError

NORMAL_TOKEN = 1  # GGUF's token_type of a token that BPE may produce


class Tokenizer:
    """A BPE and the special tokens beside it.

    Ids that stand for no token decode to nothing; bytes that the vocabulary lacks encode to nothing (SmolLM2 has no
    U+0004, for one: it never met it).
    """

    def __init__(self, bpe: BPETokenizer, vocabulary: Mapping[str, int], special: Mapping[str, int]) -> None:
        self._bpe = bpe
        self._special = dict(special)
        self._bytes = _token_bytes(vocabulary, special)
        self._pattern = _any_of(special)
        self.vocab_size = max(self._bytes, default=-1) + 1

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read a folder's `tokenizer.json`.

        Raises:
            ModelError: the file is missing, damaged, or of a kind that is not supported.
        """
        path = path / "tokenizer.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            _require_byte_level(values, path)
            special = _take_special(values, path)
        except FileNotFoundError as problem:
            raise ModelError(f"{path} does not exist; the model's folder needs it") from problem
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ModelError(f"{path} is not a tokenizer.json: {problem!r}") from problem
        return cls(_from_json(values, path), values["model"]["vocab"], special)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str = "GGUF") -> Tokenizer:
        """Build from GGUF metadata: `tokenizer.ggml.model` "gpt2" with `tokenizer.ggml.pre` "smollm".

        Raises:
            ModelError: another kind of tokenizer, or keys that are missing or disagree.
        """
        kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise ModelError(f"{source}: tokenizer {kind} is not supported yet; supported: ('gpt2', 'smollm')")
        try:
            tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
            if not all(isinstance(token, str) and token for token in tokens):
                raise ValueError("a token is empty or not a string")
            vocabulary = {
                token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type == NORMAL_TOKEN
            }
            special = {
                token: id for id, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != NORMAL_TOKEN
            }
            merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise ModelError(f"{source}: the tokenizer's metadata cannot be used: {problem!r}") from problem
        if len(vocabulary) + len(special) != len(tokens):
            raise ModelError(f"{source}: tokenizer.ggml.tokens holds the same token twice")
        return cls(_smollm(vocabulary, merges, source), vocabulary, special)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens are recognised only with `special`, which is never for a user's words.

        Raises:
            InputError: `text` holds half of a surrogate pair, which no encoding can carry.
        """
        if special:
            return [id for part in self.split(text) for id in ([part] if isinstance(part, int) else self.encode(part))]
        try:
            return list(self._bpe.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as problem:
            raise InputError(
                "the text holds half of a surrogate pair and is not valid Unicode; send it as UTF-8"
            ) from problem

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
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to the text; empty for an id beyond the vocabulary."""
        return self._bytes.get(id, b"")

    def token_id(self, text: str) -> int | None:
        """The id of the special token with this text, or None."""
        return self._special.get(text)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Text and id of every special token."""
        return self._special


class StreamDecoder:
    """Decodes a growing list of ids. What it returns, joined, is `decode` of all ids; a character is never cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that `ids` complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", final=True)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the leftmost and there the longest of `texts`, as the library does; without texts, nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


# ---- bytes ----------------------------------------------------------------------------------------------------------


def _token_bytes(vocabulary: Mapping[str, int], special: Mapping[str, int]) -> dict[int, bytes]:
    table = {id: _bytes_of(token) for token, id in vocabulary.items()}
    return table | {id: token.encode("utf-8", "replace") for token, id in special.items()}


def _bytes_of(token: str) -> bytes:
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # not written in the alphabet, so it means itself, as in the library
        return token.encode("utf-8", "replace")


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's way to write bytes as text: printable Latin-1 stands for itself, the other 68 begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    outside = dict.fromkeys(others, 0xFFFF)  # no letter of the alphabet: made to fail as Latin-1
    return outside | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


# ---- tokenizer.json -------------------------------------------------------------------------------------------------


def _take_special(values: dict[str, Any], path: Path) -> dict[str, int]:
    """Remove every added token from a parsed tokenizer.json and return them."""
    added = values.pop("added_tokens")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            raise ModelError(
                f"{path}: added token {token['content']!r} is empty or takes in its surroundings; not supported yet"
            )
        values["model"]["vocab"].pop(token["content"], None)
    # Both would change what `encode` returns behind its back.
    values |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    return {str(token["content"]): int(token["id"]) for token in added}


def _require_byte_level(values: dict[str, Any], path: Path) -> None:
    kinds = (values["model"]["type"], (values.get("decoder") or {}).get("type"))
    if kinds != ("BPE", "ByteLevel"):
        raise ModelError(f"{path}: model and decoder {kinds} are not supported yet; supported: ('BPE', 'ByteLevel')")


def _from_json(values: dict[str, Any], path: Path) -> BPETokenizer:
    try:
        return BPETokenizer.from_str(json.dumps(values, ensure_ascii=False))
    except Exception as problem:  # the library raises nothing narrower
        raise ModelError(f"{path} is not a tokenizer.json: {problem}") from problem


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _smollm(vocabulary: dict[str, int], merges: list[tuple[str, str]], source: str) -> BPETokenizer:
    try:
        bpe = BPETokenizer(models.BPE(vocabulary, merges))
    except Exception as problem:  # the library raises nothing narrower
        raise ModelError(f"{source}: the tokenizer's merges do not fit its tokens: {problem}") from problem
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe
