"""Who computes what in the next step. Pure Python, no tensors.

One idea: a step has a budget of tokens, and every sequence wants its computed tokens to catch up with its known
ones. Decoding is wanting one token, a prompt is wanting many, a chunk is getting fewer than wanted, and a preempted
sequence simply starts to want again. Running sequences go first, those that decode before those in their prompt;
then waiting ones are admitted while the budget lasts and all their known tokens find pages. When pages run out, the
youngest running sequence gives its own back and waits.

Left out so far: priorities, shared prefixes, fairness across tenants.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field

from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine.cache import PagePool
from porcelet.errors import InputError
from porcelet.types import Batch, Output, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way: its prompt and what has been drawn, how much of that is in the cache, and where."""

    request: Request
    tokens: list[int]
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Scheduler:
    """Two queues and a page pool. `schedule` → a `Batch` → the model → `commit` → `Output`s."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        self.config = config
        self.eos = frozenset(model.eos_token_ids)
        self.vocab_size = model.vocab_size
        self.max_length = min(model.max_position_embeddings, config.num_pages * PAGE_SIZE)
        self.pool = PagePool(config.num_pages)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preempted = 0
        self._scheduled: list[tuple[Sequence, int]] = []

    def add(self, request: Request) -> None:
        """Queue a request, or refuse one that could never be served.

        Raises:
            InputError: empty prompt, token out of the vocabulary, or no room left for a single new token.
        """
        if not request.prompt:
            raise InputError("the prompt is empty; send at least one token")
        strange = next((t for t in request.prompt if not 0 <= t < self.vocab_size), None)
        if strange is not None:
            raise InputError(f"token {strange} of the prompt lies outside the vocabulary of {self.vocab_size}")
        if len(request.prompt) >= self.max_length:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; with room for an answer at most {self.max_length - 1} "
                "fit (the smaller of the model's context and cache_tokens)"
            )
        if any(s.request.id == request.id for s in (*self.waiting, *self.running)):
            raise InputError(f"request id {request.id!r} is already in flight")
        self.waiting.append(Sequence(request, list(request.prompt)))

    def remove(self, request_id: str) -> bool:
        """Drop a request and free its pages; False if it is not in flight."""
        for queue in (self.waiting, self.running):
            for sequence in queue:
                if sequence.request.id == request_id:
                    queue.remove(sequence)
                    self.pool.release(sequence.pages)
                    return True
        return False

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
            budget -= self._take(sequence, budget)
        if not self._scheduled:
            self.check_idle()
            return None
        return _batch(self._scheduled)

    def commit(self, tokens: ReadOnly[int], logprobs: ReadOnly[float]) -> list[Output]:
        """Enter one drawn token for each sampled sequence of the batch, in its order."""
        outputs = []
        drawn = zip(tokens, logprobs, strict=True)
        for sequence, count in self._scheduled:
            sequence.num_computed += count
            if sequence.num_computed == len(sequence.tokens):
                outputs.append(self._append(sequence, *next(drawn)))
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

    def _append(self, sequence: Sequence, token: int, logprob: float) -> Output:
        request = sequence.request
        sequence.tokens.append(token)
        stops = token in request.params.stop_token_ids or (token in self.eos and not request.params.ignore_eos)
        full = sequence.num_generated >= request.params.max_tokens or len(sequence.tokens) >= self.max_length
        if stops or full:
            self.running.remove(sequence)
            self.pool.release(sequence.pages)
        return Output(
            request_id=request.id,
            tokens=() if stops else (token,),
            logprobs=(logprob,),
            stop_token=token if stops else None,
            finish_reason="stop" if stops else "length" if full else None,
            num_prompt_tokens=len(request.prompt),
            num_generated=sequence.num_generated,
        )


def _batch(scheduled: list[tuple[Sequence, int]]) -> Batch:
    offsets, tokens, positions = [0], list[int](), list[int]()
    for sequence, count in scheduled:
        start = sequence.num_computed
        tokens += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        offsets.append(len(tokens))
    return Batch(
        request_ids=tuple(s.request.id for s, _ in scheduled),
        tokens=tuple(tokens),
        positions=tuple(positions),
        offsets=tuple(offsets),
        lengths=tuple(s.num_computed + count for s, count in scheduled),
        tables=tuple(tuple(s.pages) for s, _ in scheduled),
        sampled=tuple(s.num_computed + count == len(s.tokens) for s, count in scheduled),
        params=tuple(s.request.params for s, _ in scheduled),
        num_generated=tuple(s.num_generated for s, _ in scheduled),
    )
