"""Bits a byte: how well a model predicts text, comparable across vocabularies, unlike perplexity.

    bits a byte = -Σ log2 p(token) / Σ UTF-8 bytes of the tokens

A model that knows nothing needs 8. A token counts with what it reads before it in its own document, at most `context`
tokens back to where the document was cut. The end of a document is no byte of it and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from porcelet.config import ModelConfig
from porcelet.engine.codec import open_tokenizer
from porcelet.errors import InputError, ModelError
from porcelet.kernels.loss import token_logprobs
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.corpus.readers import documents
from porcelet.train.corpus.store import sentence_ends
from porcelet.train.hashing import hashed
from porcelet.train.packing import pack, passes
from porcelet.types import Sample
from porcelet.weights.load import load

TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class HeldOut:
    """What a model needed for how much text."""

    bits_per_byte: float
    num_documents: int
    num_tokens: int
    num_bytes: int


def bits_per_byte(logprobs: Iterable[float], num_bytes: int) -> float:
    """Natural log-probabilities of the tokens of a text of so many bytes."""
    assert num_bytes > 0, "a text without bytes has no bits a byte"
    return -math.fsum(logprobs) / math.log(2) / num_bytes


def held_out_bits(
    path: Path, source: str | Path, max_bytes: int = 1 << 20, *, context: int = 0, key: str = "text"
) -> HeldOut:
    """Bits a byte of a model, a folder or a GGUF file, on a source's documents, the first `max_bytes` in an order by
    hash: the same text for every model.

    A document is cut at every `context` tokens; 0 is all that the model can read at once, 4096 at most.

    Raises:
        InputError: the source has no text, or cannot be read; `context` is more than the model reads.
        ModelError: the model or its tokenizer cannot be used.
    """
    model, tokenizer = load(path), open_tokenizer(path)
    longest = model.config.max_position_embeddings
    if context > longest:
        raise InputError(f"context is {context}; the model reads {longest} tokens at most (max_position_embeddings)")
    context = context or min(longest, 4096)
    texts = sorted((document.text for document in documents(source, key)), key=hashed)
    logprobs: list[float] = []
    num_documents = num_bytes = 0
    bos = sentence_ends(path)[0] if path.is_dir() else _first_token(model.config, path)
    for ids in map(tokenizer.encode, _first(texts, max_bytes)):
        logprobs += document_logprobs(model, bos, ids, context)
        num_bytes += sum(len(tokenizer.token_bytes(id)) for id in ids)
        num_documents += 1
    if not num_bytes:
        raise InputError(f"{source} holds no text to measure with")
    return HeldOut(bits_per_byte(logprobs, num_bytes), num_documents, len(logprobs), num_bytes)


def _first_token(config: ModelConfig, path: Path) -> int:
    """The token that begins a document, by the config of a GGUF file; without one, that which ends it."""
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None:
            return token
    raise ModelError(f"{path} names no token that begins or ends a document")


def document_logprobs(model: Transformer, bos: int, ids: Sequence[int], context: int) -> list[float]:
    """The natural log-probability of each token of a document that begins with `bos`."""
    tokens = (bos, *ids)
    pieces = [tokens[start : start + context + 1] for start in range(0, len(ids), context)]
    samples = [Sample(tokens=piece, weights=(0.0, *(1.0,) * (len(piece) - 1))) for piece in pieces]
    return [value for batch in passes(samples, TOKENS_PER_PASS) for value in _logprobs(model, batch)]


@torch.inference_mode()
def _logprobs(model: Transformer, samples: Sequence[Sample]) -> list[float]:
    batch = pack(samples)
    hidden = model(batch.tokens, batch.positions, PackedView(batch.segments))
    head = model.lm_head.weight
    assert isinstance(head, Tensor), "the model was loaded unquantised"
    return token_logprobs(hidden[batch.rows], head, batch.targets).tolist()


def _first(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Texts until they have `max_bytes` bytes; the last one cut between characters, empty ones left out."""
    left = max_bytes
    for text in texts:
        kept = text.encode()[: max(left, 0)].decode(errors="ignore")
        if kept:
            yield kept
        left -= len(text.encode())
