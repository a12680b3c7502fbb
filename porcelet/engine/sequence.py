"""One sample of a request on its way: what it knows, what it may draw next, and what ends it. No pages are taken here.

A sequence is its tokens, of which the first `num_computed` are in the cache. Everything that looks at its drawn tokens
one by one lives here too: stop strings and end tokens, the grammar that its answer must follow, the reasoning's budget.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING

from porcelet.engine.speculative import Acceptance, Lookup
from porcelet.engine.stop import StopMatcher
from porcelet.engine.thinking import Thinking
from porcelet.errors import EngineError
from porcelet.types import Draw, Drawing, Output, Request, SamplingParams

if TYPE_CHECKING:
    from porcelet.engine.grammar import Matcher

MAX_PENALIZED = 2048  # tokens of a text up to which guesses are worth a penalty's look at all of it


@dataclass(frozen=True)
class Rules:
    """What ends every sequence of an engine, and the text of a token, where it is known."""

    eos: frozenset[int]
    max_length: int
    unending: bytes  # a mask of all tokens but those: what is thought may not end a constrained answer
    token_bytes: Callable[[int], bytes] | None = None


@dataclass(frozen=True)
class Ending:
    """Why a sequence ends with its last token."""

    reason: str
    stop_token: int | None = None
    stop: str | None = None
    tail: bytes = b""
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    """`arrival` numbers the requests. `num_unborn` more samples fork from this one once its prompt is computed.

    `pages` hold its tokens, `chain` are the hashes of full ones, from `root` on, and `num_registered` of them can be
    found by others. The MTP layer has seen them without a gap up to `mtp_until`. Up to `expanded_until` tokens MLA
    attends in its expanded form. `drafts` are guesses of the next tokens. `held` are the draws that no output has told
    of yet, of which `num_certain` are certain to be text. `mask` are the tokens that the grammar permits next.
    `created` is a time of `time.monotonic`, `queue_seconds` how long it then waited to run for the first time.
    """

    request: Request
    rules: Rules
    tokens: list[int]
    seed: int
    arrival: int
    root: bytes
    index: int = 0
    num_unborn: int = 0
    matcher: StopMatcher | None = None
    thinking: Thinking | None = None
    grammar: Matcher | None = None
    mask: bytes | None = None
    num_computed: int = 0
    num_cached: int | None = None
    created: float = field(default_factory=monotonic)
    queue_seconds: float = 0.0
    expanded_until: int = 0
    pages: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    drafts: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    mtp_until: int = 0
    lookup: Lookup = field(default_factory=Lookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    held: list[Draw] = field(default_factory=list)
    num_certain: int = 0
    prompt_logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    scores_told: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_expanded(self) -> bool:
        """Whether MLA attends its next tokens in the expanded form."""
        return self.num_computed < self.expanded_until

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be found."""
        asked = self.request.params.prompt_logprobs is not None and self.index == 0
        return asked and len(self.prompt_logprobs) < len(self.request.prompt) - 1

    @property
    def is_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.active

    @property
    def max_drafts(self) -> int:
        """How many tokens after the next one could still be its own free choice."""
        params = self.request.params
        budgeted = self.is_thinking and params.reasoning and params.reasoning.budget is not None
        long = params.penalizes and len(self.tokens) > MAX_PENALIZED
        constrained = self.grammar and not self.grammar.waits
        if self.num_unborn or constrained or budgeted or long:
            return 0
        room = min(params.max_tokens - self.num_generated, self.rules.max_length - len(self.tokens))
        return max(room - 1, 0)

    @cached_property
    def scoring_params(self) -> SamplingParams:
        """For the prompt's own tokens."""
        return replace(self.request.params, logprobs=self.request.params.prompt_logprobs)

    @cached_property
    def drafting_params(self) -> SamplingParams:
        """For guesses, of which nobody is told."""
        return replace(self.request.params, logprobs=None)

    def fork(self, index: int, seed: int) -> Sequence:
        """The next sample of a prompt that is computed; its pages are not shared yet."""
        return replace(
            self,
            tokens=list(self.tokens),
            seed=seed,
            index=index,
            num_unborn=0,
            matcher=self.matcher and StopMatcher(self.request.params.stop),
            thinking=self.thinking and self.thinking.fork(),
            grammar=self.grammar and self.grammar.fork(),
            pages=[],
            chain=list(self.chain),
            drafts=[],
            lookup=self.lookup.fork(),
            acceptance=Acceptance(self.acceptance.rate),
            held=[],
            prompt_logprobs=[],
        )

    def drawings(self, row: int) -> list[Drawing]:
        """What is drawn after the last known token, whose row this is, and after each guess, in the rows that follow;
        every sample's first token before its fork."""
        params, forced = self.request.params, self.thinking.forced if self.thinking else None
        if self.num_unborn:
            seeds = [sample_seed(self.seed, index) for index in range(1 + self.num_unborn)]
            return [Drawing(row, params, seed, 0, self._history(0), self.mask, forced) for seed in seeds]
        return [
            Drawing(row + j, params, self.seed, self.num_generated + j, self._history(j), self.mask, forced)
            for j in range(1 + len(self.drafts))
        ]

    def append(self, draw: Draw) -> Ending | None:
        """Enter a draw; why the sequence ends with it, if it does."""
        params = self.request.params
        if not math.isfinite(draw.logprob):
            return Ending("error", error=_not_finite(self))
        self.tokens.append(draw.token)
        self.held.append(draw)
        may_end = not params.ignore_eos or self.grammar is not None  # a grammar's end is an end token
        if draw.token in params.stop_token_ids or (may_end and draw.token in self.rules.eos):
            return Ending("stop", stop_token=draw.token)
        ending = self._read(draw.token) or self._follow(draw.token)
        if ending:
            return ending
        if self.num_generated >= params.max_tokens or len(self.tokens) >= self.rules.max_length:
            return Ending("length")
        return None

    def output(self, ending: Ending | None = None) -> Output:
        """What is certain since the last output; at the end, whatever was held back is text."""
        count = len(self.held) if ending else self.num_certain
        draws, self.held = self.held[:count], self.held[count:]
        self.num_certain = 0
        stop_token = ending.stop_token if ending else None
        asked = draws if self.request.params.logprobs is not None else ()
        scores = self._scores()
        return Output(
            request_id=self.request.id,
            index=self.index,
            tokens=tuple([draw.token for draw in draws[: len(draws) - (stop_token is not None)]]),
            logprobs=tuple([draw.logprob for draw in draws]),
            raw_logprobs=tuple([draw.raw_logprob for draw in asked]),
            top_logprobs=tuple([draw.top for draw in asked]),
            prompt_logprobs=scores,
            stop_token=stop_token,
            num_prompt_tokens=len(self.request.prompt),
            num_cached_tokens=self.num_cached or 0,
            num_generated=self.num_generated,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            queue_seconds=self.queue_seconds,
            finish_reason=ending.reason if ending else None,
            stop=ending.stop if ending else None,
            tail=ending.tail if ending else b"",
            error=ending.error if ending else None,
        )

    def _scores(self) -> tuple[tuple[float, tuple[tuple[int, float], ...]], ...]:
        """The prompt's log-probabilities, once all are there, and once."""
        if self.scores_told or self.scores_prompt or not self.prompt_logprobs:
            return ()
        self.scores_told = True
        return tuple(self.prompt_logprobs)

    def _read(self, token: int) -> Ending | None:
        """Look for stop strings."""
        if self.matcher is None:
            self.num_certain += 1
            return None
        assert self.rules.token_bytes
        verdict = self.matcher.push(self.rules.token_bytes(token))
        self.num_certain += verdict.num_certain
        if verdict.stop is None:
            return None
        del self.held[self.num_certain :]
        return Ending("stop", stop=verdict.stop, tail=verdict.tail)

    def _follow(self, token: int) -> Ending | None:
        """Take a token through reasoning and grammar, which may be complete with it."""
        try:
            if self.thinking and self.thinking.active:
                self.thinking.push(token)
            elif self.grammar:
                self.grammar.push(token)
                if self.grammar.finished:
                    return Ending("stop")
            self.update_mask()
        except EngineError as problem:
            return Ending("error", error=f"request {self.request.id!r}: {problem}")
        return None

    def update_mask(self) -> None:
        """Find out what the grammar permits next.

        Raises:
            EngineError: it grew past its limits.
        """
        if self.grammar and not self.grammar.waits:
            self.mask = self.rules.unending if self.is_thinking else self.grammar.mask()

    def _history(self, ahead: int) -> tuple[int, ...]:
        return (*self.tokens, *self.drafts[:ahead]) if self.request.params.penalizes else ()


def sample_seed(seed: int, index: int) -> int:
    """The seed of a request's sample `index`; its first sample's is its own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8, person=b"sample").digest()
    return int.from_bytes(digest, "little") >> 1


def _not_finite(sequence: Sequence) -> str:
    return (
        f"request {sequence.request.id!r}: the logits for token {sequence.num_generated + 1} of the answer are not "
        "finite; the model's weights are damaged, or a value overflowed on the way"
    )
