"""The nouns that cross a package border. Plain frozen dataclasses of Python values: no tensors, no torch.

A request's way: `Request` → scheduler → `Batch` → runner → sampler → `Output`.
A training token's way: data or rollout → `Sample` → flat batch → loss. `Episode` is a rollout with its reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from porcelet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Order: temperature, then top-k and top-p, then the draw.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `seed` makes a request's draws reproducible
    whatever else shares its batch. `stop_token_ids` end the request and are not part of its text; so do the model's
    own end-of-sequence tokens unless `ignore_eos`, which benchmarks use to get answers of a given length.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens < 2**31:
            raise InputError(f"max_tokens is {self.max_tokens}; it must lie in 1..2^31-1")
        if not 0.0 <= self.temperature <= 100.0:  # also refuses NaN
            raise InputError(f"temperature is {self.temperature}; it must lie in 0..100")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k is {self.top_k}; it must lie in 0..2^31-1, 0 being off")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must lie in 0..2^63-1")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to complete. `id` is unique among the requests in flight."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step added to one request.

    `tokens` are new since the last output, the stop token excluded; `stop_token` is the one that ended the request,
    if one did. `logprobs` belong to all drawn tokens, the stop token's last, each under the distribution it was
    drawn from (raw, where greedy). `finish_reason` is None while the request runs, else "stop", "length", "abort" or
    "error" (then `error` says why). `num_generated` counts all tokens drawn so far, the stop token included.
    """

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_token: int | None = None
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_generated: int = 0
    error: str | None = None


def join_outputs(outputs: Sequence[Output]) -> Output:
    """Consecutive outputs of one request as one."""
    return replace(
        outputs[-1],
        tokens=tuple(token for output in outputs for token in output.tokens),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One engine step as the scheduler decided it: flat tokens, no padding.

    `offsets` [B+1] cut the flat lists into sequences; `lengths` [B] are cached tokens after the step; `tables`
    [B] are each sequence's pages in order; `sampled` [B] says whether the sequence's last token is drawn from.
    """

    request_ids: tuple[str, ...]
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    sampled: tuple[bool, ...]
    params: tuple[SamplingParams, ...]
    num_generated: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sequence. Every list is as long as `tokens`; entry t weighs the prediction OF token t.

    `weights` weigh cross-entropy; `advantages` weigh the policy gradient, with `old_logprobs` the log-probability
    each token had when it was drawn. A method that uses only one of the two leaves the other empty. Pre-training,
    SFT and GRPO differ only in these numbers.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...] = ()
    advantages: tuple[float, ...] = ()
    old_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One rollout: what was asked, what was answered, with which log-probabilities, and what it earned."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    reward: float
