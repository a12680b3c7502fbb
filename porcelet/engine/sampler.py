"""From logits to tokens: each drawing's parameters become the columns of one vectorised draw.

Most drawings read the model's logits as they are. Only what a mask, a bias or a penalty changes is copied, so there
are at most two calls: one on the model's rows, one on the changed copies. A draw's random number depends on the
sequence's seed and the token's number alone, never on the batch.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from porcelet.kernels.sample import allow, penalize, sample
from porcelet.types import Draw, Drawing

Top = tuple[tuple[int, float], ...]


class Sampler:
    """Draws one token for each drawing of a batch."""

    @torch.inference_mode()
    def draw(self, logits: Tensor, draws: Sequence[Drawing]) -> list[Draw]:
        """One draw for each of `draws`, whose rows are those of `logits` [rows, V]; `logits` stay as they are."""
        assert all(0 <= drawing.row < len(logits) for drawing in draws)
        logits = logits.float()
        found = {i: (drawing.token, 0.0) for i, drawing in enumerate(draws) if drawing.token is not None}
        shaped = [i for i, drawing in enumerate(draws) if i not in found and _is_shaped(drawing)]
        plain = [i for i in range(len(draws)) if i not in found and i not in shaped]
        if plain:
            own = [draws[i] for i in plain]
            found |= zip(plain, _sampled(logits, [drawing.row for drawing in own], own), strict=True)
        if shaped:
            own = [draws[i] for i in shaped]
            found |= zip(shaped, _sampled(_shape(logits, own), range(len(own)), own), strict=True)
        reported = _reported(logits, [found[i][0] for i in range(len(draws))], draws)
        return [Draw(*found[i], *reported.get(i, ())) for i in range(len(draws))]


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of a seed's stream, by hashing; 53 bits."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _sampled(logits: Tensor, rows: Sequence[int], draws: Sequence[Drawing]) -> list[tuple[int, float]]:
    """Token and log-probability of each of `draws`, drawn from its row."""
    params = [drawing.params for drawing in draws]
    numbers = [uniform(d.seed, d.index) if d.params.temperature else 0.0 for d in draws]
    tokens, logprobs = sample(
        logits,
        torch.tensor(rows, device=logits.device),
        _column(logits, [p.temperature for p in params]),
        torch.tensor([p.top_k for p in params], device=logits.device),
        _column(logits, [p.top_p for p in params]),
        _column(logits, [p.min_p for p in params]),
        torch.tensor(numbers, dtype=torch.float64, device=logits.device),
    )
    return list(zip(tokens.tolist(), logprobs.tolist(), strict=True))


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _is_shaped(drawing: Drawing) -> bool:
    return bool(drawing.mask is not None or drawing.history or drawing.params.logit_bias)


def _shape(logits: Tensor, draws: Sequence[Drawing]) -> Tensor:
    """A row of its own for each drawing: its logits after mask, bias and penalties."""
    scores = logits[torch.tensor([drawing.row for drawing in draws], device=logits.device)]
    _mask(scores, draws)
    _bias(scores, draws)
    return _penalized(scores, draws)


def _mask(scores: Tensor, draws: Sequence[Drawing]) -> None:
    masks = {row: drawing.mask for row, drawing in enumerate(draws) if drawing.mask is not None}
    if not masks:
        return
    size = -(-scores.shape[1] // 8)
    # A mask may end before the vocabulary, which models pad, or go on past it.
    packed = bytearray().join(mask[:size].ljust(size, b"\0") for mask in masks.values())
    rows = torch.tensor(list(masks), device=scores.device)
    bits = torch.frombuffer(packed, dtype=torch.uint8).view(len(masks), size).to(scores.device)
    scores[rows] = allow(scores[rows], bits)


def _bias(scores: Tensor, draws: Sequence[Drawing]) -> None:
    entries = [(row, token, bias) for row, d in enumerate(draws) for token, bias in d.params.logit_bias]
    if entries:
        rows, tokens, biases = zip(*entries, strict=True)
        where = torch.tensor([rows, tokens], device=scores.device)
        scores.index_put_(tuple(where), _column(scores, biases), accumulate=True)


def _penalized(scores: Tensor, draws: Sequence[Drawing]) -> Tensor:
    """Of a drawing's history, the last `index` tokens were drawn; the ones before are its prompt."""
    history = array("q", [token for drawing in draws for token in drawing.history])
    if not history:
        return scores
    lengths = torch.tensor([len(drawing.history) for drawing in draws])
    rows = torch.repeat_interleave(lengths)
    first_drawn = lengths.cumsum(0) - torch.tensor([drawing.index for drawing in draws])
    params = [drawing.params for drawing in draws]
    return penalize(
        scores,
        rows.to(scores.device),
        torch.frombuffer(history, dtype=torch.int64).to(scores.device),
        (torch.arange(len(rows)) >= first_drawn[rows]).long().to(scores.device),
        _column(scores, [p.repetition_penalty for p in params]),
        _column(scores, [p.presence_penalty for p in params]),
        _column(scores, [p.frequency_penalty for p in params]),
    )


def _reported(logits: Tensor, tokens: Sequence[int], draws: Sequence[Drawing]) -> dict[int, tuple[float, Top]]:
    """For the drawings that ask: their token's log-probability in the model's own distribution, and its best tokens."""
    asking = {i: drawing.params.logprobs for i, drawing in enumerate(draws) if drawing.params.logprobs is not None}
    if not asking:
        return {}
    rows = torch.tensor([draws[i].row for i in asking], device=logits.device)
    # A greedy draw gives the best token's log-probability; the others' follow from how far below it they are.
    zeros = torch.zeros(len(asking), device=logits.device)
    best, offset = sample(logits, rows, zeros, rows * 0, zeros + 1, zeros, zeros)
    offset -= logits[rows, best]
    chosen = torch.tensor([tokens[i] for i in asking], device=logits.device)
    raw = (logits[rows, chosen] + offset).tolist()
    tops = _tops(logits, rows, offset, max(asking.values()))
    return {i: (raw[k], tops[k][:count]) for k, (i, count) in enumerate(asking.items())}


def _tops(logits: Tensor, rows: Tensor, offset: Tensor, count: int) -> list[Top]:
    if not count:
        return [()] * len(rows)
    best, ids = logits[rows].topk(min(count, logits.shape[1]), dim=-1)
    values = (best + offset[:, None]).tolist()
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values, strict=True)]
