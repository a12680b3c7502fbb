"""The scheduler against a model on paper, which reads its context back through pages and tables.

The paper model's next token is a hash of everything that its sequence's pages hold, so a page that was lost, shared
by mistake, overwritten or left uncopied shows as a wrong token.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence as ReadOnly
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from porcelet.config import PAGE_SIZE, EngineConfig
from porcelet.engine.scheduler import DraftBatch, Scheduler
from porcelet.engine.sequence import sample_seed
from porcelet.errors import InputError
from porcelet.types import Batch, Draw, Drawing, Output, Request, SamplingParams, join_outputs
from tests.models.variants import LLAMA, V3

VOCABULARY = 4  # few tokens, so that prompts share beginnings and guesses come true


def next_token(context: ReadOnly[int], seed: int, index: int) -> int:
    """Depends on all of the context, and often enough on its last two tokens alone, so that texts repeat themselves."""
    far = hashlib.blake2b(repr((tuple(context), seed, index)).encode(), digest_size=2).digest()
    if far[0] < 20:
        return far[1] % VOCABULARY
    return (3 * sum(context[-2:]) + len(set(context))) % VOCABULARY


class PaperModel:
    """Pages of tokens instead of tensors."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.contexts: list[tuple[int, ...]] = []
        self.pages = [[-1] * PAGE_SIZE for _ in range(scheduler.pool.num_pages)]

    def run(self, batch: Batch) -> list[Draw]:
        for source, target in batch.copies:
            self.pages[target] = list(self.pages[source])
        self._write(batch)
        self.contexts = [self._context(batch, row) for row in range(len(batch.tokens))]
        rows = [row for cut in zip(batch.offsets, batch.offsets[1:], strict=False) for row in range(*cut)]
        assert rows == list(range(len(batch.tokens)))
        return [self._draw(batch, drawing) for drawing in batch.draws]

    def draft(self, drafts: DraftBatch) -> list[Draw]:
        """Guesses, of which two in three are right, from the contexts of the step's rows and the tokens after them."""
        batch, texts = drafts.batch, list[tuple[int, ...]]()
        for row, token, position in zip(drafts.hidden_rows, batch.tokens, batch.positions, strict=True):
            assert len(self.contexts[row]) == position + 1
            texts.append((*self.contexts[row], token))
        assert all(text[-1] >= 0 for text in texts)
        right = [(texts[batch.sampled_rows[drawing.row]], drawing) for drawing in batch.draws]
        return [Draw(next_token(text, d.seed, d.index) if d.index % 3 else 0, -1.0) for text, d in right]

    def _write(self, batch: Batch) -> None:
        owners = [page for s in (*self.scheduler.running, *self.scheduler.waiting) for page in s.pages]
        written = set()
        for b, table in enumerate(batch.tables):
            assert len(table) * PAGE_SIZE >= batch.lengths[b]
            for row in range(batch.offsets[b], batch.offsets[b + 1]):
                page, place = table[batch.positions[row] // PAGE_SIZE], batch.positions[row] % PAGE_SIZE
                assert owners.count(page) == 1 and page not in self.scheduler.pool._hash_of, "a shared page is written"
                assert (page, place) not in written
                written.add((page, place))
                self.pages[page][place] = batch.tokens[row]

    def _draw(self, batch: Batch, drawing: Drawing) -> Draw:
        context = self.contexts[batch.sampled_rows[drawing.row]]
        if drawing.params.penalizes and drawing.token is None:
            assert drawing.history == context
        if drawing.token is not None:
            return Draw(drawing.token, 0.0, -float(len(context)))
        return Draw(next_token(context, drawing.seed, drawing.index), -1.0)

    def _context(self, batch: Batch, row: int) -> tuple[int, ...]:
        """What a row's attention sees, read back through its sequence's pages."""
        b = next(b for b, end in enumerate(batch.offsets[1:]) if row < end)
        context = [token for page in batch.tables[b] for token in self.pages[page]][: batch.positions[row] + 1]
        assert context[-1] == batch.tokens[row]
        return tuple(context)


def lone(request: Request, index: int, max_length: int) -> tuple[int, ...]:
    """The answer of one sample, without pages, steps or neighbours."""
    assert request.params.seed is not None
    tokens, seed = list(request.prompt), sample_seed(request.params.seed, index)
    for number in range(min(request.params.max_tokens, max_length - len(tokens))):
        tokens.append(next_token(tokens, seed, number))
        if tokens[-1] in request.params.stop_token_ids:
            tokens.pop()
            break
    return tuple(tokens[len(request.prompt) :])


@st.composite
def requests(draw: st.DrawFn) -> Request:
    # Beginnings from a common stock, ends of one's own.
    common = draw(st.sampled_from([0, 0, 63, 64, 65, 128, 200]))
    own = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=90))
    return Request(
        id="",
        prompt=(*(draw(st.integers(0, 1)) if i == 5 else i * i % 3 for i in range(common)), *own),
        params=SamplingParams(
            max_tokens=draw(st.integers(1, 70)),
            seed=draw(st.integers(0, 3)),
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
            ignore_eos=True,
        ),
        tenant=draw(st.sampled_from(["a", "a", "b"])),
        priority=draw(st.sampled_from([0, 0, 1])),
    )


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests()),
        st.tuples(st.just("submit"), requests()),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("fail"), st.just(1)),
        st.tuples(st.just("step"), st.integers(1, 30)),
    ),
    min_size=3,
    max_size=25,
)
configs = st.builds(
    EngineConfig,
    max_batch_tokens=st.sampled_from([1, 7, 60, 64, 100, 200]),
    max_sequences=st.integers(3, 6),
    prefix_cache=st.sampled_from(["on", "on", "off"]),
    speculation=st.sampled_from(["off", "auto", "lookup", "mtp"]),
)


@given(events, st.integers(5, 8), configs)
@settings(max_examples=100, deadline=None)
def test_any_events_give_the_lone_answers(
    happenings: list[tuple[str, Request | int]], num_pages: int, config: EngineConfig
) -> None:
    """Whatever happens, failing steps too: no page is lost or written while shared, every sample ends once, with the
    tokens that it has alone, prompts are scored once a token, and an idle scheduler owns nothing."""
    scheduler = Scheduler(V3 if config.speculation == "mtp" else LLAMA, config, num_pages)
    model = PaperModel(scheduler)
    asked: dict[str, Request] = {}
    pieces: dict[tuple[str, int], list[Output]] = {}

    def take(outputs: list[Output]) -> None:
        for output in outputs:
            told = pieces.setdefault((output.request_id, output.index), [])
            assert not told or told[-1].finish_reason is None, "a sample ended twice"
            told.append(output)

    def step(fails: bool = False) -> bool:
        batch = scheduler.schedule()
        if batch is None:
            return False
        if fails:
            take(scheduler.fail("tried"))
            scheduler.check()
            return True
        assert len(batch.tokens) <= config.max_batch_tokens
        assert len(scheduler.running) + sum(s.num_unborn for s in scheduler.running) <= config.max_sequences
        take(scheduler.commit(model.run(batch)))
        drafts = scheduler.draft_batch()
        if drafts:
            scheduler.take_drafts(model.draft(drafts))
        scheduler.check()
        return True

    for number, (kind, what) in enumerate(happenings):
        if isinstance(what, Request):
            request = dataclasses.replace(what, id=str(number))
            if len(request.prompt) < scheduler.max_length:
                scheduler.add(request)
                asked[request.id] = request
        elif kind == "abort":
            take(scheduler.abort(str(what)))
        elif kind == "fail":
            step(fails=True)
        else:
            for _ in range(what):
                step()
    while step():
        pass
    for request in asked.values():
        for index in range(request.params.n):
            whole = join_outputs(pieces.pop((request.id, index)))
            expected = lone(request, index, scheduler.max_length)
            if whole.finish_reason in ("abort", "error"):
                assert whole.tokens == expected[: len(whole.tokens)]
                continue
            assert whole.tokens == expected and len(whole.logprobs) == whole.num_generated
            if request.params.prompt_logprobs is not None and index == 0:
                assert [score for score, _ in whole.prompt_logprobs] == [-i for i in range(1, len(request.prompt))]
    assert not pieces
    for name in ("num_preempted", "num_hit_tokens", "num_accepted"):
        if getattr(scheduler, name):
            event(name)


LONG = dataclasses.replace(LLAMA, max_position_embeddings=4096)


def run(scheduler: Scheduler, most: int = 10_000) -> list[Output]:
    """What the paper model answers in so many steps."""
    model, outputs = PaperModel(scheduler), list[Output]()
    for _ in range(most):
        batch = scheduler.schedule()
        if batch is None:
            break
        outputs += scheduler.commit(model.run(batch))
    return outputs


def ask(name: str, length: int, max_tokens: int = 5, start: int = 0, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)
    return Request(id=name, prompt=tuple((start + i * i) % 3 for i in range(length)), params=params, **fields)


def ends(outputs: list[Output]) -> list[str]:
    """Request ids in the order in which they ended."""
    return [output.request_id for output in outputs if output.finish_reason]


def test_a_beginning_is_found_again() -> None:
    """A second request with the same beginning computes its tail alone and reports what it found; so does one that
    begins with the first one's answer; an unlike one finds nothing."""
    scheduler = Scheduler(LONG, EngineConfig(), num_pages=40)
    for request, hit in [
        (ask("first", 1000, max_tokens=100), 0),
        (ask("same", 1000), 960),  # 15 pages of the 15.6; at least one token is computed
        (ask("half", 640), 576),  # ten whole pages, of which the last holds its last token
        (ask("unlike", 1000, start=1), 0),
    ]:
        scheduler.add(request)
        outputs = run(scheduler)
        assert {output.num_cached_tokens for output in outputs} == {hit}
    answered = ask("first", 1000).prompt + lone(ask("first", 1000, max_tokens=100), 0, 2560)
    scheduler.add(Request(id="on", prompt=(*answered, 1), params=SamplingParams(max_tokens=1)))
    assert run(scheduler)[-1].num_cached_tokens == 1088


@pytest.mark.parametrize("change", ["tenant", "weights"])
def test_what_must_not_meet_does_not(change: str) -> None:
    """Another tenant, or other weights, find nothing of what was computed before."""
    scheduler = Scheduler(LONG, EngineConfig(), num_pages=40)
    scheduler.add(ask("first", 300, tenant="a"))
    run(scheduler)
    scheduler.weights_version += change == "weights"
    scheduler.add(ask("second", 300, tenant="b" if change == "tenant" else "a"))
    assert run(scheduler)[-1].num_cached_tokens == 0


def test_the_least_recently_used_goes_first_from_its_tail() -> None:
    """When pages run out the oldest text loses its end, and what was used since stays whole."""
    scheduler = Scheduler(LONG, EngineConfig(), num_pages=16)
    for name, start in (("old", 0), ("new", 1)):
        scheduler.add(ask(name, 6 * PAGE_SIZE, start=start, max_tokens=1))
        run(scheduler)
    scheduler.add(ask("fresh", 7 * PAGE_SIZE, start=2, max_tokens=1))  # takes the 4 unused ones, 3 of the oldest
    run(scheduler)
    for name, start, hit in (("new again", 1, 5), ("old again", 0, 2)):
        scheduler.add(ask(name, 6 * PAGE_SIZE, start=start, max_tokens=1))
        assert run(scheduler)[-1].num_cached_tokens == hit * PAGE_SIZE


def test_samples_share_their_prompt() -> None:
    """Eight samples of a prompt hold its full pages once, and one page of their own each."""
    scheduler = Scheduler(LONG, EngineConfig(speculation="off"), num_pages=40)
    request = ask("many", 1000)
    scheduler.add(dataclasses.replace(request, params=dataclasses.replace(request.params, n=8)))
    outputs = run(scheduler, most=4)
    assert len(outputs) == 24 and scheduler.pool.num_free == 40 - 15 - 8
    assert scheduler.num_prompt_tokens == 1000


def test_priorities_decide() -> None:
    """A request of lower number overtakes those that wait and takes the place of those that run; these end, too."""
    scheduler = Scheduler(LONG, EngineConfig(max_sequences=2), num_pages=40)
    for name in ("a", "b", "c"):
        scheduler.add(ask(name, 10, max_tokens=30, priority=1))
    outputs = run(scheduler, most=3)
    scheduler.add(ask("urgent", 10, max_tokens=10, priority=0))
    outputs += run(scheduler)
    assert ends(outputs) == ["urgent", "a", "b", "c"] and scheduler.num_preempted == 1


def test_an_urgent_request_takes_nothing_in_vain() -> None:
    """Where the pages of lesser requests would not suffice, they keep them."""
    scheduler = Scheduler(LONG, EngineConfig(), num_pages=8)
    scheduler.add(ask("equal", 5 * PAGE_SIZE - 9, max_tokens=9, priority=0))
    scheduler.add(ask("lesser", PAGE_SIZE, max_tokens=5, priority=1))
    outputs = run(scheduler, most=1)
    scheduler.add(ask("large", 5 * PAGE_SIZE, max_tokens=5, priority=0, start=1))
    outputs += run(scheduler)
    assert ends(outputs) == ["lesser", "equal", "large"] and scheduler.num_preempted == 0


def test_tenants_get_equal_shares() -> None:
    """A tenant that asks once is not behind the other's queue, and two that ask for much advance evenly."""
    scheduler = Scheduler(LONG, EngineConfig(max_sequences=1, prefix_cache="off"), num_pages=40)
    for number in range(6):
        scheduler.add(ask(f"busy {number}", 100, tenant="busy"))
    outputs = run(scheduler, most=2)
    for number in range(3):
        scheduler.add(ask(f"late {number}", 100, tenant="late"))
    order = [name.split()[0] for name in ends(outputs + run(scheduler))]
    assert order[1:7].count("late") == 3


def test_a_tenant_that_leaves_takes_its_debt_along() -> None:
    """Who asks for much, one request at a time, does not come first each time against another's many small ones."""
    scheduler = Scheduler(LONG, EngineConfig(max_sequences=1, prefix_cache="off"), num_pages=64)
    model, computed = PaperModel(scheduler), Counter[str]()
    for number in range(300):
        scheduler.add(ask(f"small {number}", 20, tenant="a", max_tokens=2))
    while any(s.request.tenant == "a" for s in (*scheduler.running, *scheduler.waiting)):
        if not any(s.request.tenant == "b" for s in (*scheduler.running, *scheduler.waiting)):
            scheduler.add(ask(f"large {sum(computed.values())}", 2000, tenant="b", max_tokens=2))
        batch = scheduler.schedule()
        assert batch
        (sequence,) = scheduler.running
        computed[sequence.request.tenant] += len(batch.tokens)
        scheduler.commit(model.run(batch))
    assert computed["a"] == 300 * 21 and abs(computed["a"] - computed["b"]) < 2100


@pytest.mark.parametrize("samples", [(8, 1), (1, 8)], ids=["slots", "shared pages"])
def test_nothing_is_preempted_for_what_still_could_not_run(samples: tuple[int, int]) -> None:
    """Slots that equals hold, and pages that several samples share, are not counted as gained."""
    urgent, lesser = samples
    scheduler = Scheduler(LONG, EngineConfig(max_sequences=16, prefix_cache="off", speculation="off"), num_pages=24)

    def many(name: str, length: int, n: int, priority: int) -> Request:
        request = ask(name, length, max_tokens=9, priority=priority)
        return dataclasses.replace(request, params=dataclasses.replace(request.params, n=n))

    if urgent > 1:
        for number in range(5):
            scheduler.add(many(f"equal {number}", 10, 2, 0))
    else:
        scheduler.add(ask("equal", 6 * PAGE_SIZE - 30, max_tokens=30))
    scheduler.add(many("lesser", 500, lesser, 1))
    outputs = run(scheduler, most=3)
    scheduler.add(many("urgent", 10 if urgent > 1 else 18 * PAGE_SIZE + 30, urgent, 0))
    outputs += run(scheduler)
    assert scheduler.num_preempted == 0 and "urgent" in ends(outputs)


def test_what_can_never_be_served_is_refused() -> None:
    """More samples than may run at once, and an adapter that is not there, are refused by name."""
    scheduler = Scheduler(LONG, EngineConfig(max_sequences=4), num_pages=8)
    with pytest.raises(InputError, match="n is 5.*max_sequences"):
        scheduler.add(Request(id="a", prompt=(1,), params=SamplingParams(n=5)))
    with pytest.raises(InputError, match="adapter 'x'"):
        scheduler.add(Request(id="a", prompt=(1,), params=SamplingParams(), adapter="x"))
    assert scheduler.schedule() is None


def test_mla_expands_long_prompts_and_absorbs_the_rest() -> None:
    """The form follows from the request: a long prompt is expanded in all its chunks, short ones and answers are not,
    whatever shares the batch; recomputed after preemption, a long text is expanded again."""
    long, short = V3.absorbed_below(), V3.absorbed_below() - 1
    scheduler = Scheduler(V3, EngineConfig(max_batch_tokens=64), num_pages=8)
    for name, count in (("long", long), ("short", short)):
        scheduler.add(Request(id=name, prompt=(1,) * count, params=SamplingParams(max_tokens=4)))
    seen: list[tuple[str, int, bool]] = []
    while batch := scheduler.schedule():
        counts = [end - start for start, end in zip(batch.offsets, batch.offsets[1:], strict=False)]
        seen += zip(batch.request_ids, counts, batch.expanded, strict=True)
        scheduler.commit([Draw(2, 0.0)] * len(batch.draws))
    expanded = [(name, count) for name, count, form in seen if form]
    assert sum(count for name, count in expanded) == long and {name for name, _ in expanded} == {"long"}
    assert [count for name, count, form in seen if name == "long" and not form] == [1, 1, 1]
    assert Scheduler(LLAMA, EngineConfig(), num_pages=8).absorbed_below > LLAMA.max_position_embeddings
