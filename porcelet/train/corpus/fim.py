"""Fill-in-the-middle: a document out of order, so that a model learns to write what lies between two texts.

Prefix-suffix-middle as DeepSeek-V3 does it, at document level, before packing (report section 4.1; Bavarian et al.
2022):

    <｜fim▁begin｜>PREFIX<｜fim▁hole｜>SUFFIX<｜fim▁end｜>MIDDLE

The two cuts are uniform over the text's characters, so no character is cut in two; the parts joined are the text.
"""

from __future__ import annotations

from porcelet.errors import InputError, ModelError
from porcelet.tokenizer import Tokenizer
from porcelet.train.hashing import hashed

BEGIN, HOLE, END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


def cut(text: str, *key: object) -> tuple[str, str, str]:
    """Prefix, middle and suffix of a text, cut at two places that `key` decides."""
    first, second = sorted(hashed("fim cut", *key, i) % (len(text) + 1) for i in range(2))
    return text[:first], text[first:second], text[second:]


class FillInTheMiddle:
    """Encodes documents, a share `rate` of them out of order."""

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int) -> None:
        """`seed` and a document's position decide what happens to it.

        Raises:
            InputError: `rate` lies outside 0..1.
            ModelError: the tokenizer lacks the three tokens.
        """
        if not 0 <= rate <= 1:
            raise InputError(f"fim_rate is {rate}; it must lie in 0..1")
        self._tokenizer, self._rate, self._seed = tokenizer, rate, seed
        self._marks = [_mark(tokenizer, text) for text in (BEGIN, HOLE, END)] if rate else []

    def encode(self, text: str, position: int) -> list[int]:
        """Token ids of the document at a position of the corpus, which decides whether and where it is cut."""
        encode = self._tokenizer.encode
        if hashed("fim", self._seed, position) >= self._rate * 2**63:
            return encode(text)
        prefix, middle, suffix = map(encode, cut(text, self._seed, position))
        begin, hole, end = self._marks
        return [begin, *prefix, hole, *suffix, end, *middle]


def _mark(tokenizer: Tokenizer, text: str) -> int:
    token = tokenizer.token_id(text)
    if token is None:
        raise ModelError(f"the tokenizer has no {text}; train it with this package, or set fim_rate to 0")
    return token
