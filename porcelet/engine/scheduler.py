"""Who computes what in the next step. Pure Python, no tensors.

One idea: a step has a budget of tokens, and every sequence wants its computed tokens to catch up with its known
ones. Decoding is wanting one token, a prompt is wanting many, a chunk is getting fewer than wanted, a prefix hit is
having some already, guesses are wanting a few more, and a preempted sequence simply starts to want again. Running
sequences go first, those that decode before those in their prompt; then waiting ones are admitted while the budget
lasts and all their known tokens find pages. When pages run out, the running sequence of least priority that came last
gives its own back and waits; what it had computed stays findable until the pages are taken.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ReadOnly
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from porcelet.config import PAGE_SIZE, REPLAYED_TOKENS, EngineConfig, ModelConfig
from porcelet.engine.cache import PageHasher, PagePool
from porcelet.engine.sequence import Ending, Rules, Sequence, sample_seed
from porcelet.engine.speculative import MAX_DRAFTS, Acceptance, Pace, choose_drafter
from porcelet.engine.stop import StopMatcher
from porcelet.engine.thinking import Thinking
from porcelet.engine.waiting import WaitingQueue
from porcelet.errors import InputError
from porcelet.types import Batch, Constraint, Draw, Drawing, Output, Request

if TYPE_CHECKING:
    from porcelet.engine.grammar import Matcher

Computed = tuple[Sequence, int, int]  # what a step computed: whose, its first row, its first position
MAX_SCORED = 64  # prompt tokens scored a step, for each of which a row of the vocabulary is computed


class DraftBatch(NamedTuple):
    """A batch for the MTP layer: `hidden_rows` are its tokens' rows in the step before."""

    batch: Batch
    hidden_rows: list[int]


class Scheduler:
    """A queue, the running sequences and a page pool. `schedule` → a `Batch` → the model → `commit` → `Output`s.

    `token_bytes` gives the text of a token, for requests with stop strings, `compile_constraint` makes the matchers of
    constrained ones; without them they are refused. Requests without a seed get one from `seed`'s stream.
    `weights_version` keeps cached pages of different weights apart.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        num_pages: int,
        token_bytes: Callable[[int], bytes] | None = None,
        compile_constraint: Callable[[Constraint], Matcher] | None = None,
        seed: int | None = None,
    ) -> None:
        self.config = config
        self.drafter = choose_drafter(config.speculation, model)
        self.compile_constraint = compile_constraint
        self.vocab_size = model.vocab_size
        self.absorbed_below = model.absorbed_below()
        max_length = min(model.max_position_embeddings, num_pages * PAGE_SIZE)
        unending = (1 << model.vocab_size) - 1 - sum(1 << token for token in set(model.eos_token_ids))
        mask = unending.to_bytes(-(-model.vocab_size // 8), "little")
        self.rules = Rules(frozenset(model.eos_token_ids), max_length, mask, token_bytes)
        self.pool = PagePool(num_pages)
        self.waiting = WaitingQueue()
        self.running: dict[Sequence, None] = {}
        self.weights_version = 0
        self.pace = Pace()
        self.acceptance = Acceptance()
        self.num_preempted = self.num_hit_tokens = self.num_prompt_tokens = self.num_drafts = self.num_drafted = 0
        self.num_accepted_at = [0] * max(MAX_DRAFTS.values())  # by the guess's place in its draft
        self._hasher = PageHasher()
        self._random = random.Random(seed)
        self._arrivals = itertools.count()
        self.only_decodes = False  # the step has neither prompts nor scores in it
        self._num_scored = 0
        self._sequences: dict[str, list[Sequence]] = {}
        self._scheduled: list[tuple[Sequence, int]] = []
        self._copies: list[tuple[int, int]] = []
        self._computed: list[Computed] = []
        self._drafting: list[Sequence] = []

    @property
    def num_accepted(self) -> int:
        """Guesses that were right."""
        return sum(self.num_accepted_at)

    @property
    def max_length(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self.rules.max_length

    def add(self, request: Request) -> None:
        """Queue a request, or refuse one that could never be served.

        Raises:
            InputError: empty prompt, token out of the vocabulary (in the prompt, a bias, the reasoning's end), no room
                left for a single new token, more samples than may run at once, an id that is in flight, an unknown
                adapter, a constraint that cannot be kept, or stop strings or a constraint without a tokenizer.
        """
        self._check(request)
        params = request.params
        sequence = Sequence(
            request=request,
            rules=self.rules,
            tokens=list(request.prompt),
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            arrival=next(self._arrivals),
            root=self._hasher.root(request.tenant, request.adapter, str(self.weights_version)),
            acceptance=Acceptance(self.acceptance.rate),
            num_unborn=params.n - 1,
            matcher=StopMatcher(params.stop) if params.stop else None,
            thinking=Thinking(params.reasoning) if params.reasoning else None,
            grammar=self.compile(params.constraint) if params.constraint else None,
        )
        sequence.update_mask()
        self._enter(sequence)
        self.waiting.push(sequence)

    def compile(self, constraint: Constraint) -> Matcher:
        """The matcher of a constraint; the same one again comes at once.

        Raises:
            InputError: it cannot be kept.
        """
        if self.compile_constraint is None:
            raise InputError(f"this engine has no tokenizer to keep a {constraint.kind} constraint with")
        return self.compile_constraint(constraint)

    def abort(self, request_id: str) -> list[Output]:
        """Drop a request; the last output of each of its samples, none if it is not in flight."""
        return [o for s in self._sequences.get(request_id, [])[:] for o in self._end(s, Ending("abort"))]

    def schedule(self) -> Batch | None:
        """Choose the step's tokens; None when there is nothing to do."""
        self._scheduled, self._copies, self._num_scored = [], [], 0
        budget = self.config.max_batch_tokens
        self._make_room()
        self._guess()
        for sequence in sorted(self.running, key=lambda s: (s.num_uncomputed > 1, _importance(s))):
            if budget and sequence in self.running:  # it may have been preempted meanwhile
                budget -= self._take(sequence, budget)
        while budget and (first := self.waiting.first()) and self._admit(first):
            budget -= self._take(first, budget)
        if not self._scheduled:
            assert not self.running and not self.waiting, "sequences are here, and none could be scheduled"
            return None
        self._scheduled.sort(key=lambda item: item[0].is_expanded)
        self.only_decodes = all(count == 1 and s.num_generated for s, count in self._scheduled)
        return _batch(self._scheduled, self._copies)

    def commit(self, draws: ReadOnly[Draw]) -> list[Output]:
        """Enter the draws of the batch, in its order."""
        outputs, drawn, row = list[Output](), iter(draws), 0
        self._computed = []
        for sequence, count in self._scheduled:
            start, num_rows = sequence.num_computed, count + len(sequence.drafts)
            outputs += self._commit(sequence, count, list(itertools.islice(drawn, _num_draws(sequence, count))))
            if sequence in self.running:
                self._computed.append((sequence, row, start))
            row += num_rows
        assert next(drawn, None) is None, "more tokens drawn than asked for"
        self._scheduled = []
        return outputs

    def draft_batch(self) -> DraftBatch | None:
        """What the MTP layer reads after a step: for every token computed and kept the one after it. It guesses what
        follows each text that is being continued. It writes to its own layer of the cache alone, where samples of one
        prompt see the first one's token after it; that can make a guess worse, and nothing else."""
        if self.drafter != "mtp":
            return None
        price = self._price(len(self._computed))
        # Past a gap in what the layer has seen its guesses are worth little, so whoever was left out stays out.
        part = [(s, row, at) for s, row, at in self._computed if s.mtp_until >= at and s.acceptance.worth(price, 1)]
        for sequence, _, _ in part:
            sequence.mtp_until = sequence.num_computed
        self._drafting = [s for s, _, _ in part if s.num_uncomputed == 1 and s.max_drafts]
        return _draft_batch(part, set(self._drafting)) if part else None

    def take_drafts(self, draws: ReadOnly[Draw]) -> None:
        """The MTP layer's guesses, in the order of the draft batch's draws."""
        for sequence, draw in zip(self._drafting, draws, strict=True):
            sequence.drafts = [draw.token]

    def fail(self, reason: str) -> list[Output]:
        """The step went wrong: end every sequence that took part."""
        taking_part, self._scheduled = [sequence for sequence, _ in self._scheduled], []
        return [output for s in taking_part for output in self._end(s, Ending("error", error=reason))]

    def check(self) -> None:
        """Asserts that every page belongs to who says so, and that the others are free."""
        self.pool.check([sequence.pages for sequence in (*self.running, *self.waiting)])

    # What a request may be

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise InputError("the prompt is empty; send at least one token")
        self._check_tokens(request.prompt, "the prompt")
        self._check_tokens([token for token, _ in request.params.logit_bias], "logit_bias")
        if reasoning := request.params.reasoning:
            self._check_tokens(reasoning.end + reasoning.closing, "the reasoning's end or closing")
        if constraint := request.params.constraint:
            self._check_tokens(constraint.special, "the constraint")
        if len(request.prompt) >= self.max_length:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; with room for an answer at most {self.max_length - 1} "
                "fit (the smaller of the model's context and the cache)"
            )
        if request.params.n > self.config.max_sequences:
            raise InputError(
                f"n is {request.params.n}; at most {self.config.max_sequences} (max_sequences) run at once"
            )
        if request.adapter:
            raise InputError(f"adapter {request.adapter!r} is not loaded; this engine has the model's own weights only")
        if request.id in self._sequences:
            raise InputError(f"request id {request.id!r} is already in flight")
        if request.params.stop:
            if self.rules.token_bytes is None:
                raise InputError("this engine has no tokenizer to find stop strings with; use stop_token_ids")
            self.rules.token_bytes(0)  # opens a tokenizer that is opened at its first use: if that fails, it fails here

    def _check_tokens(self, tokens: Iterable[int], place: str) -> None:
        strange = next((t for t in tokens if not 0 <= t < self.vocab_size), None)
        if strange is not None:
            raise InputError(f"token {strange} of {place} lies outside the vocabulary of {self.vocab_size}")

    # Who takes part

    def _make_room(self) -> None:
        """Let a waiting sequence take the place of running ones of lesser priority."""
        first = self.waiting.first()
        if first is None:
            return
        lesser = sorted((s for s in self.running if s.request.priority > first.request.priority), key=_importance)
        num_pages = -(-len(first.tokens) // PAGE_SIZE)
        held = Counter(page for other in lesser for page in other.pages)
        num_freed = sum(self.pool.num_owners(page) == count for page, count in held.items())
        if num_pages > self.pool.num_free + num_freed or not self._has_slots(first, lesser):
            return  # it could not run even in the place of all of them
        while lesser and not (self._has_slots(first) and num_pages <= self.pool.num_free):
            self._preempt(lesser.pop())

    def _has_slots(self, sequence: Sequence, gone: ReadOnly[Sequence] = ()) -> bool:
        """Whether all samples of a sequence could run beside the running ones, were those of `gone` not there."""
        num_running = sum(1 + other.num_unborn for other in self.running) - sum(1 + other.num_unborn for other in gone)
        return num_running + 1 + sequence.num_unborn <= self.config.max_sequences

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if it finds a slot and pages, those among them that hold its beginning."""
        if not self._has_slots(sequence):
            return False
        found = self._found(sequence)
        self.pool.share(found)
        sequence.pages += found
        if not self.pool.extend(sequence.pages, len(sequence.tokens)):
            self.pool.release(sequence.pages)
            return False
        self.waiting.remove(sequence)
        self.running[sequence] = None
        sequence.num_registered = len(found)
        sequence.num_computed = sequence.mtp_until = len(found) * PAGE_SIZE
        sequence.expanded_until = len(sequence.tokens) if sequence.num_uncomputed >= self.absorbed_below else 0
        if sequence.num_cached is None:  # not again after a preemption
            sequence.num_cached = sequence.num_computed
            sequence.queue_seconds = monotonic() - sequence.created
            self.num_hit_tokens += sequence.num_computed
            self.num_prompt_tokens += len(sequence.tokens)
        return True

    def _found(self, sequence: Sequence) -> list[int]:
        """The cached pages that hold its beginning; never all, since the last token has to be computed."""
        if self.config.prefix_cache == "off" or sequence.scores_prompt:
            return []
        self._hasher.extend(sequence.chain, sequence.root, sequence.tokens, len(sequence.tokens) - 1)
        return self.pool.find(sequence.chain)

    def _take(self, sequence: Sequence, budget: int) -> int:
        """Schedule a running sequence, taking pages from others if it must; the number of tokens it got."""
        count = min(sequence.num_uncomputed, budget)
        if sequence.scores_prompt:
            count = min(count, MAX_SCORED - self._num_scored)
            if not count:
                return 0
        del sequence.drafts[budget - count :]
        if sequence.drafts and not self._own(sequence, count + len(sequence.drafts)):
            sequence.drafts = []  # a guess is worth nobody's pages
        while not self._own(sequence, count):
            scheduled = {other for other, _ in self._scheduled}
            victim = max((other for other in self.running if other not in scheduled), key=_importance)
            self._preempt(victim)
            if victim is sequence:
                return 0
        self._scheduled.append((sequence, count))
        self._num_scored += count if sequence.scores_prompt else 0
        self.waiting.charge(sequence.request.tenant, count)
        return count + len(sequence.drafts)

    def _own(self, sequence: Sequence, count: int) -> bool:
        """Get pages of its own for the next `count` tokens; False, and nothing changed, if too few are free."""
        index, offset = divmod(sequence.num_computed, PAGE_SIZE)
        shared = offset > 0 and self.pool.num_owners(sequence.pages[index]) > 1  # samples that forked from the same
        if not self.pool.extend(sequence.pages, sequence.num_computed + count, spare=int(shared)):
            return False
        if shared:
            self._copies.append(self.pool.copy_on_write(sequence.pages, index))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.pool.release(sequence.pages)
        sequence.num_computed = 0
        sequence.drafts = []
        self.waiting.push(sequence)
        self.num_preempted += 1

    def _guess(self) -> None:
        """Look every decoding sequence's last tokens up in its text, or drop the MTP layer's guess where that pays."""
        if self.drafter == "off":
            return
        decoding = [s for s in self.running if s.num_uncomputed == 1]
        price, room, has_rested = self._price(len(decoding)), max(REPLAYED_TOKENS - len(decoding), 0), False
        for sequence in decoding:
            most = sequence.acceptance.worth(price, min(sequence.max_drafts, MAX_DRAFTS[self.drafter], room))
            if self.drafter == "lookup":
                sequence.drafts = sequence.lookup.propose(sequence.tokens, most) if most else []
            del sequence.drafts[most:]
            room -= len(sequence.drafts)
            if not most and sequence.max_drafts:  # a guess was allowed, and did not pay
                sequence.acceptance.rest()
                has_rested = True
        if has_rested:
            self.acceptance.rest()

    def _price(self, num_sequences: int) -> float:
        return self.pace.price(num_sequences) if self.config.speculation == "auto" else 0.0

    # What came of it

    def _commit(self, sequence: Sequence, count: int, draws: list[Draw]) -> list[Output]:
        num_scores = _num_scores(sequence, count)
        sequence.prompt_logprobs += [(draw.raw_logprob, draw.top) for draw in draws[:num_scores]]
        sequence.num_computed += count
        if sequence.num_uncomputed:
            self._register(sequence)
            return []
        drawn = draws[num_scores:]
        if not sequence.num_unborn:
            return self._append(sequence, drawn)
        family = [sequence, *self._fork(sequence)]
        return [output for s, draw in zip(family, drawn, strict=True) for output in self._append(s, [draw])]

    def _append(self, sequence: Sequence, draws: list[Draw]) -> list[Output]:
        """Enter the draws of the last known token and of its guesses, up to the first guess that was wrong, or up to a
        token that begins a constraint, which the draws after it do not know."""
        guesses, sequence.drafts, mask = sequence.drafts, [], sequence.mask
        ending, num_right = sequence.append(draws[0]), 0
        for guess, earlier, draw in zip(guesses, draws, draws[1:], strict=False):
            if ending or guess != earlier.token or sequence.mask is not mask:
                break
            num_right += 1
            ending = sequence.append(draw)
        if guesses:
            sequence.num_drafted += len(guesses)
            sequence.num_accepted += num_right
            self.num_drafts += 1
            self.num_drafted += len(guesses)
            for place in range(num_right):
                self.num_accepted_at[place] += 1
            for acceptance in (sequence.acceptance, self.acceptance):
                acceptance.record(num_right, int(num_right < len(guesses) and not ending))
            sequence.num_computed += num_right
        if ending is None or ending.reason != "error":  # what ended in NaN is not for others
            self._register(sequence)
        return self._end(sequence, ending) if ending else [sequence.output()]

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """The other samples of a prompt that is computed, running beside it on the same pages."""
        born = [sequence.fork(i, sample_seed(sequence.seed, i)) for i in range(1, 1 + sequence.num_unborn)]
        sequence.num_unborn = 0
        for other in born:
            other.pages += sequence.pages[: -(-sequence.num_computed // PAGE_SIZE)]
            self.pool.share(other.pages)
            self.running[other] = None
            self._enter(other)
        return born

    def _register(self, sequence: Sequence) -> None:
        """Let others find the pages that are full now."""
        num_full = sequence.num_computed // PAGE_SIZE
        if num_full == sequence.num_registered or self.config.prefix_cache == "off":
            return
        self._hasher.extend(sequence.chain, sequence.root, sequence.tokens, sequence.num_computed)
        for index in range(sequence.num_registered, num_full):
            self.pool.register(sequence.pages[index], sequence.chain[index])
            sequence.num_registered = index + 1

    def _end(self, sequence: Sequence, ending: Ending) -> list[Output]:
        """The last output of a sequence, and of the samples that would have forked from it."""
        if sequence in self.running:
            del self.running[sequence]
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.pages)
        self.waiting.leave(sequence)
        family = self._sequences[sequence.request.id]
        family.remove(sequence)
        if not family:
            del self._sequences[sequence.request.id]
        last = sequence.output(ending)
        return [last, *(replace(last, index=index) for index in range(1, 1 + sequence.num_unborn))]

    def _enter(self, sequence: Sequence) -> None:
        self.waiting.enter(sequence)
        self._sequences.setdefault(sequence.request.id, []).append(sequence)


def _importance(sequence: Sequence) -> tuple[int, int, int]:
    """The largest gives way first."""
    return sequence.request.priority, sequence.arrival, sequence.index


def _num_scores(sequence: Sequence, count: int) -> int:
    """How many of the step's tokens score the prompt token after them."""
    if not sequence.scores_prompt:
        return 0
    end = min(sequence.num_computed + count, len(sequence.request.prompt) - 1)
    return max(end - max(sequence.num_computed, len(sequence.prompt_logprobs)), 0)


def _num_draws(sequence: Sequence, count: int) -> int:
    last = sequence.num_uncomputed == count
    return _num_scores(sequence, count) + (1 + sequence.num_unborn + len(sequence.drafts) if last else 0)


def _batch(scheduled: list[tuple[Sequence, int]], copies: list[tuple[int, int]]) -> Batch:
    offsets, lengths = [0], list[int]()
    tokens, positions = list[int](), list[int]()
    sampled_rows, draws = list[int](), list[Drawing]()
    for sequence, count in scheduled:
        start, total = sequence.num_computed, count + len(sequence.drafts)
        first_row = len(tokens)
        tokens += sequence.tokens[start : start + count]
        tokens += sequence.drafts
        positions += range(start, start + total)
        offsets.append(len(tokens))
        lengths.append(start + total)
        for ahead in range(num_scores := _num_scores(sequence, count)):
            position = max(start, len(sequence.prompt_logprobs)) + ahead
            draws.append(_scoring(sequence, position, len(sampled_rows)))
            sampled_rows.append(first_row + position - start)
        if count == sequence.num_uncomputed:
            draws += sequence.drawings(len(sampled_rows))
            sampled_rows += range(len(tokens) - 1 - len(sequence.drafts), len(tokens))
        assert num_scores == 0 or not sequence.drafts
    return Batch(
        request_ids=tuple(s.request.id for s, _ in scheduled),
        tokens=tuple(tokens),
        positions=tuple(positions),
        offsets=tuple(offsets),
        lengths=tuple(lengths),
        tables=tuple(tuple(s.pages) for s, _ in scheduled),
        expanded=tuple(s.is_expanded for s, _ in scheduled),
        sampled_rows=tuple(sampled_rows),
        draws=tuple(draws),
        copies=tuple(copies),
    )


def _scoring(sequence: Sequence, position: int, row: int) -> Drawing:
    """The prompt token after `position`, given."""
    return Drawing(row, sequence.scoring_params, 0, 0, token=sequence.request.prompt[position + 1])


def _draft_batch(part: list[Computed], drafting: set[Sequence]) -> DraftBatch:
    offsets, rows, positions, tokens = [0], list[int](), list[int](), list[int]()
    sampled_rows, draws = list[int](), list[Drawing]()
    for sequence, first_row, start in part:
        count = sequence.num_computed - start
        rows += range(first_row, first_row + count)
        positions += range(start, start + count)
        tokens += sequence.tokens[start + 1 : start + count + 1]
        offsets.append(len(tokens))
        if sequence in drafting:
            params = sequence.drafting_params
            draws += (replace(drawing, params=params) for drawing in sequence.drawings(len(sampled_rows)))
            sampled_rows.append(len(tokens) - 1)
    batch = Batch(
        request_ids=tuple(s.request.id for s, _, _ in part),
        tokens=tuple(tokens),
        positions=tuple(positions),
        offsets=tuple(offsets),
        lengths=tuple(s.num_computed for s, _, _ in part),
        tables=tuple(tuple(s.pages) for s, _, _ in part),
        expanded=tuple(start < s.expanded_until for s, _, start in part),
        sampled_rows=tuple(sampled_rows),
        draws=tuple(draws),
    )
    return DraftBatch(batch, rows)
