"""A vocabulary of one's own: byte-level BPE with DeepSeek-V3's way to cut text into words, and its special tokens.

V3 cuts before it merges: numbers into groups of up to three digits, runs of Chinese and Japanese letters, then words,
punctuation and line ends. `digits=1` gives every digit a token of its own, which is how small models learn to
calculate. Every byte is a token, so any text can be encoded; the smallest vocabulary has no merges at all and reads
letter by letter.

Ids: begin and end of sentence and padding first (0, 1, 2, as in V3), then bytes and merges, then the tokens of the chat
format, of reasoning and of fill-in-the-middle. As in V3, only the first three are flagged special.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Builder

from porcelet.chat import V3_TEMPLATE
from porcelet.errors import InputError
from porcelet.tokenizer import Tokenizer
from porcelet.train.corpus import fim
from porcelet.train.corpus.outputs import appearing

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
ADDED = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", fim.HOLE, fim.BEGIN, fim.END)
MIN_VOCAB = len(SPECIAL) + 256 + len(ADDED)

_CHINESE_AND_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, *, digits: int = 3) -> Tokenizer:
    """Learn merges from `texts` and write the tokenizer that this package and `transformers` read to `folder`.

    `vocab_size` counts every token; fewer come out where the texts have too few different words. `digits` is how many
    a token may join.

    Raises:
        InputError: the size leaves no room for bytes and special tokens, `digits` is none of 1, 2, 3, there is no text
            to learn from, or `folder` exists or cannot be written.
    """
    if vocab_size < MIN_VOCAB:
        raise InputError(f"the vocabulary size is {vocab_size}; bytes and special tokens take {MIN_VOCAB}")
    if digits not in (1, 2, 3):
        raise InputError(f"digits is {digits}; a token joins 1, 2 or 3 of them")
    builder = Builder(models.BPE())
    builder.pre_tokenizer = _pre_tokenizer(digits)
    builder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with appearing(folder) as unfinished:
        unfinished.mkdir()
        builder.train_from_iterator(_some(texts), trainer)
        builder.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
        builder.save(str(unfinished / "tokenizer.json"))
        _write_settings(unfinished)
    return Tokenizer.from_folder(folder)


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes that one token stands for on average; 0 for no text."""
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode(text))
    return num_bytes / num_tokens if num_tokens else 0.0


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The texts that are not empty, of which there must be one."""
    filled = filter(None, texts)
    first = next(filled, None)
    if first is None:
        raise InputError("there is no text to learn a tokenizer from; check the sources")
    yield first
    yield from filled


def _pre_tokenizer(digits: int) -> pre_tokenizers.PreTokenizer:
    patterns = (rf"\p{{N}}{{1,{digits}}}", _CHINESE_AND_JAPANESE, _WORDS)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _write_settings(folder: Path) -> None:
    bos, eos, pad = SPECIAL
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "chat_template": V3_TEMPLATE,
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
