"""Who computes what in the next step. Pure Python, no tensors.

One idea: a step has a budget of tokens, and every sequence wants its computed tokens to catch up with its known
ones. Decoding is wanting one token, a prompt is wanting many, a chunk is getting fewer than wanted, and a preempted
sequence simply starts to want again. Running sequences go first, those that decode before those in their prompt;
then waiting ones are admitted while the budget lasts and all their known tokens find pages. When pages run out, the
youngest running sequence gives its own back and waits.

Left out so far: priorities, shared prefixes, fairness across tenants.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field, replace

from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine.cache import PagePool
from porcelet.engine.stop import StopMatcher, Verdict
from porcelet.errors import InputError
from porcelet.types import Batch, Draw, Drawing, Output, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way: its prompt and what has been drawn, how much of that is in the cache, and where.

    `held` are the draws that no output has told of yet; more than the last one only while a stop string may be among
    them. Up to `expanded_until` tokens MLA attends in its expanded form: a long prompt, in whatever chunks it comes.
    """

    request: Request
    tokens: list[int]
    seed: int
    matcher: StopMatcher | None = None
    num_computed: int = 0
    expanded_until: int = 0
    pages: list[int] = field(default_factory=list)
    held: list[Draw] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Scheduler:
    """Two queues and a page pool. `schedule` → a `Batch` → the model → `commit` → `Output`s.

    `token_bytes` gives the text of a token, for requests with stop strings; without it they are refused. Requests
    without a seed get one from `seed`'s stream.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        token_bytes: Callable[[int], bytes] | None = None,
        seed: int | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self.config = config
        self.token_bytes = token_bytes
        self.eos = frozenset(model.eos_token_ids)
        self.vocab_size = model.vocab_size
        self.absorbed_below = model.absorbed_below()
        self.max_length = min(model.max_position_embeddings, config.num_pages * PAGE_SIZE)
        self.pool = PagePool(config.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._scheduled: list[tuple[Sequence, int]] = []

    def add(self, request: Request) -> None:
        """Queue a request, or refuse one that could never be served.

        Raises:
            InputError: empty prompt, token out of the vocabulary, no room left for a single new token, or stop
                strings for an engine without a tokenizer.
        """
        if not request.prompt:
            raise InputError("the prompt is empty; send at least one token")
        self._check_tokens(request.prompt, "the prompt")
        self._check_tokens([token for token, _ in request.params.logit_bias], "logit_bias")
        if len(request.prompt) >= self.max_length:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; with room for an answer at most {self.max_length - 1} "
                "fit (the smaller of the model's context and cache_tokens)"
            )
        if any(s.request.id == request.id for s in (*self.waiting, *self.running)):
            raise InputError(f"request id {request.id!r} is already in flight")
        seed = self._random.getrandbits(63) if request.params.seed is None else request.params.seed
        self.waiting.append(Sequence(request, list(request.prompt), seed, self._matcher(request)))

    def abort(self, request_id: str) -> Output | None:
        """Drop a request; its last output, or None if it is not in flight."""
        sequence = self._find(request_id)
        return self._end(sequence, "abort") if sequence else None

    def remove(self, request_id: str) -> bool:
        """Drop a request and free its pages; False if it is not in flight."""
        sequence = self._find(request_id)
        if sequence:
            self._drop(sequence)
        return sequence is not None

    def schedule(self) -> Batch | None:
        """Choose the step's tokens; None when there is nothing to do."""
        self._scheduled = []
        budget = self.config.max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: len(s.tokens) - s.num_computed > 1):
            if budget and sequence in self.running:  # it may have been preempted meanwhile
                budget -= self._take(sequence, budget)
        while self.waiting and budget and len(self.running) < self.config.max_sequences:
            sequence = self.waiting[0]
            if not self.pool.extend(sequence.pages, len(sequence.tokens)):
                break
            self.running.append(self.waiting.popleft())
            num_new = len(sequence.tokens) - sequence.num_computed
            sequence.expanded_until = len(sequence.tokens) if num_new >= self.absorbed_below else 0
            budget -= self._take(sequence, budget)
        if not self._scheduled:
            self.check_idle()
            return None
        return _batch(self._scheduled)

    def commit(self, draws: ReadOnly[Draw]) -> list[Output]:
        """Enter one draw for each sampled sequence of the batch, in its order."""
        outputs = []
        drawn = iter(draws)
        for sequence, count in self._scheduled:
            sequence.num_computed += count
            if sequence.num_computed == len(sequence.tokens):
                outputs.append(self._append(sequence, next(drawn)))
        assert next(drawn, None) is None, "more tokens drawn than sequences sampled"
        self._scheduled = []
        return outputs

    def check_idle(self) -> None:
        """Asserts that an idle engine holds no pages."""
        if not self.running and not self.waiting:
            self.pool.check_idle()

    def _take(self, sequence: Sequence, budget: int) -> int:
        """Schedule a running sequence, taking pages from the youngest others if it must; the number of tokens it
        got."""
        count = min(len(sequence.tokens) - sequence.num_computed, budget)
        while not self.pool.extend(sequence.pages, sequence.num_computed + count):
            scheduled = {id(other) for other, _ in self._scheduled}
            victim = next(other for other in reversed(self.running) if id(other) not in scheduled)
            self._preempt(victim)
            if victim is sequence:
                return 0
        self._scheduled.append((sequence, count))
        return count

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preempted += 1

    def _append(self, sequence: Sequence, draw: Draw) -> Output:
        params = sequence.request.params
        if not math.isfinite(draw.logprob):
            return replace(self._end(sequence, "error"), error=_not_finite(sequence))
        sequence.tokens.append(draw.token)
        sequence.held.append(draw)
        if draw.token in params.stop_token_ids or (draw.token in self.eos and not params.ignore_eos):
            return self._end(sequence, "stop", stop_token=draw.token)
        verdict = self._read(sequence, draw.token)
        if verdict.stop is not None:
            del sequence.held[verdict.num_certain :]
            return replace(self._end(sequence, "stop"), stop=verdict.stop, tail=verdict.tail)
        if sequence.num_generated >= params.max_tokens or len(sequence.tokens) >= self.max_length:
            return self._end(sequence, "length")
        output = _output(sequence, sequence.held[: verdict.num_certain])
        del sequence.held[: verdict.num_certain]
        return output

    def _read(self, sequence: Sequence, token: int) -> Verdict:
        if sequence.matcher is None:
            return Verdict(num_certain=1)
        assert self.token_bytes
        return sequence.matcher.push(self.token_bytes(token))

    def _end(self, sequence: Sequence, finish_reason: str, stop_token: int | None = None) -> Output:
        """Whatever was held back is text now."""
        self._drop(sequence)
        return replace(_output(sequence, sequence.held, stop_token), finish_reason=finish_reason)

    def _drop(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.pool.release(sequence.pages)

    def _find(self, request_id: str) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.request.id == request_id), None)

    def _check_tokens(self, tokens: ReadOnly[int], place: str) -> None:
        strange = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
        if strange is not None:
            raise InputError(f"token {strange} of {place} lies outside the vocabulary of {self.vocab_size}")

    def _matcher(self, request: Request) -> StopMatcher | None:
        if not request.params.stop:
            return None
        if self.token_bytes is None:
            raise InputError("this engine has no tokenizer to find stop strings with; use stop_token_ids")
        self.token_bytes(0)  # opens a tokenizer that is opened at its first use: if that fails, it fails here
        return StopMatcher(request.params.stop)


def _output(sequence: Sequence, draws: ReadOnly[Draw], stop_token: int | None = None) -> Output:
    """`draws` told of; the stop token, if there is one, is the last of them."""
    request, num_stops = sequence.request, stop_token is not None
    asked = draws if request.params.logprobs is not None else ()
    return Output(
        request_id=request.id,
        tokens=tuple(draw.token for draw in draws[: len(draws) - num_stops]),
        logprobs=tuple(draw.logprob for draw in draws),
        raw_logprobs=tuple(draw.raw_logprob for draw in asked),
        top_logprobs=tuple(draw.top for draw in asked),
        stop_token=stop_token,
        num_prompt_tokens=len(request.prompt),
        num_generated=sequence.num_generated,
    )


def _not_finite(sequence: Sequence) -> str:
    return (
        f"request {sequence.request.id!r}: the logits for token {sequence.num_generated + 1} of the answer are not "
        "finite; the model's weights are damaged, or a value overflowed on the way"
    )


def _batch(scheduled: list[tuple[Sequence, int]]) -> Batch:
    offsets, tokens, positions = [0], list[int](), list[int]()
    sampled_rows, draws = list[int](), list[Drawing]()
    for sequence, count in scheduled:
        start = sequence.num_computed
        tokens += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        offsets.append(len(tokens))
        if start + count == len(sequence.tokens):
            draws.append(_drawing(sequence, len(sampled_rows)))
            sampled_rows.append(len(tokens) - 1)
    return Batch(
        request_ids=tuple(s.request.id for s, _ in scheduled),
        tokens=tuple(tokens),
        positions=tuple(positions),
        offsets=tuple(offsets),
        lengths=tuple(s.num_computed + count for s, count in scheduled),
        tables=tuple(tuple(s.pages) for s, _ in scheduled),
        expanded=tuple(s.num_computed < s.expanded_until for s, _ in scheduled),
        sampled_rows=tuple(sampled_rows),
        draws=tuple(draws),
    )


def _drawing(sequence: Sequence, row: int) -> Drawing:
    params = sequence.request.params
    history = tuple(sequence.tokens) if params.penalizes else ()
    return Drawing(row, params, sequence.seed, sequence.num_generated, history)
