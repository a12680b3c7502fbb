"""From logits to tokens: per-request parameters become the columns of one vectorised draw.

A draw's random number depends on the request's seed and the token's number alone, never on the batch, so a seeded
request repeats whatever runs beside it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from porcelet.kernels.sample import penalize, sample
from porcelet.types import Draw, Drawing, SamplingParams

Top = tuple[tuple[int, float], ...]


class Sampler:
    """Draws one token for each drawing of a batch."""

    @torch.inference_mode()
    def draw(self, logits: Tensor, draws: Sequence[Drawing]) -> list[Draw]:
        """One draw for each of `draws`, whose rows are those of `logits` [rows, V]."""
        if not draws:
            return []
        logits = logits[torch.tensor([drawing.row for drawing in draws])].float()
        params = [drawing.params for drawing in draws]
        answers = [(drawing.history, drawing.index) for drawing in draws]
        tokens, logprobs = sample(
            _penalized(_biased(logits, params), params, answers),
            _column(logits, [p.temperature for p in params]),
            torch.tensor([p.top_k for p in params], device=logits.device),
            _column(logits, [p.top_p for p in params]),
            _column(logits, [p.min_p for p in params]),
            torch.tensor([uniform(d.seed, d.index) for d in draws], dtype=torch.float64, device=logits.device),
        )
        reported = _reported(logits, tokens, params)
        return [
            Draw(token, logprob, *reported.get(row, ()))
            for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True))
        ]


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of a seed's stream, by hashing; 53 bits."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _biased(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    entries = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias]
    if not entries:
        return logits
    rows, tokens, biases = zip(*entries, strict=True)
    where = torch.tensor([rows, tokens], device=logits.device)
    return logits.index_put(tuple(where), _column(logits, biases), accumulate=True)


def _penalized(
    logits: Tensor, params: Sequence[SamplingParams], answers: Sequence[tuple[tuple[int, ...], int]]
) -> Tensor:
    """`answers` are each row's known tokens, if its draw is penalised for them, and how many, the last, were drawn."""
    rows, tokens, generated = list[int](), list[int](), list[int]()
    for row, (history, num_generated) in enumerate(answers):
        rows += [row] * len(history)
        tokens += history
        generated += ([0] * (len(history) - num_generated) + [1] * num_generated) if history else []
    if not rows:
        return logits
    return penalize(
        logits,
        torch.tensor(rows, device=logits.device),
        torch.tensor(tokens, device=logits.device),
        torch.tensor(generated, device=logits.device),
        _column(logits, [p.repetition_penalty for p in params]),
        _column(logits, [p.presence_penalty for p in params]),
        _column(logits, [p.frequency_penalty for p in params]),
    )


def _reported(logits: Tensor, tokens: Tensor, params: Sequence[SamplingParams]) -> dict[int, tuple[float, Top]]:
    """For the rows that ask: the drawn token's log-probability in the model's own distribution, and its best tokens."""
    asking = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None}
    if not asking:
        return {}
    rows = torch.tensor(list(asking), device=logits.device)
    logprobs = logits[rows].float().log_softmax(-1)
    drawn = logprobs.gather(-1, tokens[rows, None])[:, 0].tolist()
    best, ids = logprobs.topk(min(max(asking.values()), logprobs.shape[-1]), dim=-1)
    tops = (tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best.tolist(), strict=True))
    return {row: (raw, top[:count]) for (row, count), raw, top in zip(asking.items(), drawn, tops, strict=True)}
