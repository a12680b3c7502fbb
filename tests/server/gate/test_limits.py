"""What keys may use: nobody gets more than the limit, and what was used is counted once, whichever way a job ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from contextvars import copy_context
from pathlib import Path

import pytest

from porcelet.config import Alias
from porcelet.errors import InputError, PorceletError
from porcelet.server.gate import keys, usage
from porcelet.server.gate.keys import NO_LIMITS, KeyLimits, Keys
from porcelet.server.gate.limits import (
    BalanceError,
    Call,
    Limits,
    ModelForbiddenError,
    RateLimitError,
    Window,
    current_call,
)
from porcelet.server.gate.usage import Amounts
from porcelet.server.generation.queue import OverloadedError
from porcelet.server.generation.watch import LOCAL, Caller, Job, watched
from porcelet.server.store import Database
from porcelet.types import Output
from tests.server.doors import House, bearer, in_house


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.5

    def __call__(self) -> float:
        return self.now


class Counter:
    """Limits over a database of their own, one key, and a clock."""

    def __init__(self, folder: Path, limits: KeyLimits, aliases: dict[str, Alias] | None = None) -> None:
        self.clock = Clock()
        self.database = Database.open(f"sqlite:///{folder / 'limits.db'}")
        self.key, secret = self.database.run_now(lambda connection: keys.create(connection, "ada", limits))
        self.caller = self.key.caller
        self.keys = Keys(self.database)
        asyncio.run(self.keys.find(secret))
        self.limits = Limits(self.database, self.keys, aliases, self.clock)
        self.number = 0

    def job(self, prompt: int = 10, model: str = "tiny", caller: Caller | None = None, samples: int = 1) -> Job:
        self.number += 1
        return Job(f"job{self.number}", model, caller or self.caller, prompt, 100, samples)

    def say(self, job: Job, num_tokens: int) -> None:
        """The engine has generated so many tokens by now."""
        job.num_generated[0] = num_tokens
        self.limits.progressed(job, None)  # type: ignore[arg-type]  # the job says it all

    def used(self) -> list[usage.Day]:
        """What the database says, once all is written."""
        self.database._thread.submit(lambda: None).result()
        return self.database.run_now(usage.days)


@pytest.fixture
def counter(tmp_path: Path) -> Callable[..., Counter]:
    return lambda limits=NO_LIMITS, aliases=None: Counter(tmp_path, limits, aliases)


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        (KeyLimits(concurrency=7), RateLimitError),
        (KeyLimits(requests_per_minute=7), RateLimitError),
        (KeyLimits(tokens_per_minute=79), RateLimitError),
        (KeyLimits(token_budget=79), BalanceError),
    ],
)
def test_a_burst_does_not_overshoot(
    counter: Callable[..., Counter], limits: KeyLimits, error: type[PorceletError]
) -> None:
    """Of 200 jobs at once exactly seven pass, whatever it is that limits them."""
    found = counter(limits)
    refused = 0

    async def ask() -> None:
        nonlocal refused
        try:
            with watched([found.limits], found.job(prompt=11)):
                await asyncio.sleep(0.01)
        except error:
            refused += 1

    async def burst() -> None:
        await asyncio.gather(*(ask() for _ in range(200)))

    asyncio.run(burst())
    assert refused == 193
    assert sum(day.amounts.requests for day in found.used()) == 7


@pytest.mark.parametrize("limits", [KeyLimits(concurrency=1), KeyLimits(requests_per_minute=1)])
def test_a_call_with_several_prompts_is_one_request(counter: Callable[..., Counter], limits: KeyLimits) -> None:
    """Jobs of one HTTP request share its place and its turn in the minute; another request has to wait until the last
    of them is over."""
    found = counter(limits)

    def call(ask: Callable[[], None]) -> None:
        context = copy_context()
        context.run(current_call.set, Call())
        context.run(ask)

    def three_prompts() -> None:
        with ExitStack() as jobs:
            for _ in range(3):
                jobs.enter_context(watched([found.limits], found.job()))
                with pytest.raises(RateLimitError):
                    call(lambda: found.limits.admit(found.job()))
        assert found.limits._used[found.key.id].num_running == 0

    call(three_prompts)
    found.clock.now += 61
    call(three_prompts)


@pytest.mark.parametrize("problem", [PorceletError("the engine restarts"), OverloadedError("no token came", 1)])
def test_a_failed_request_is_given_back(counter: Callable[..., Counter], problem: PorceletError) -> None:
    """Who got nothing may ask again at once: the request and its tokens leave the minute's count, however late it
    failed; one that was refused by another watch, too. A client that gives up before its first token has used both."""
    found = counter(KeyLimits(requests_per_minute=1, tokens_per_minute=10, token_budget=10))
    told = found.limits.headers(found.caller)
    for seconds in (0, 7, 70):
        with suppress(PorceletError), watched([found.limits], found.job()):
            found.clock.now += seconds
            raise problem
        assert found.limits.headers(found.caller) == told
        with suppress(PorceletError), watched([found.limits, Refusing(problem)], found.job()):
            pass
        assert found.limits.headers(found.caller) == told
    with suppress(GeneratorExit), watched([found.limits], found.job()):
        raise GeneratorExit
    with pytest.raises(BalanceError):
        found.limits.admit(found.job())
    assert found.limits.headers(found.caller)["x-ratelimit-remaining-requests"] == "0"
    assert found.limits.tokens_left(found.key.id) == 0


class Refusing:
    """A watch that refuses every job."""

    def __init__(self, problem: PorceletError) -> None:
        self.problem = problem

    def admit(self, job: Job) -> None:
        raise self.problem

    def progressed(self, job: Job, output: Output) -> None:
        raise AssertionError

    def ended(self, job: Job, reason: str) -> None:
        raise AssertionError


def test_a_call_counts_if_one_of_its_prompts_was_served(counter: Callable[..., Counter]) -> None:
    """Of two prompts in one call one fails: its tokens come back, the request does not."""
    found = counter(KeyLimits(requests_per_minute=1, tokens_per_minute=100))

    def ask() -> None:
        current_call.set(Call())
        with suppress(PorceletError), watched([found.limits], found.job(30)):
            with watched([found.limits], found.job(20)):
                pass
            raise PorceletError("died")

    copy_context().run(ask)
    told = found.limits.headers(found.caller)
    assert (told["x-ratelimit-remaining-requests"], told["x-ratelimit-remaining-tokens"]) == ("0", "80")


def test_no_minute_has_more_than_the_limit(counter: Callable[..., Counter]) -> None:
    """Whatever the times of the requests, any 60 seconds hold at most the limit, and all of it comes back."""
    found = counter(KeyLimits(requests_per_minute=5))
    passed: list[float] = []
    for _ in range(3000):
        found.clock.now += 0.1
        with suppress(RateLimitError), watched([found.limits], found.job()):
            passed.append(found.clock.now)
    assert all(later - earlier > 60 for earlier, later in zip(passed, passed[5:], strict=False))
    assert len(passed) == 25  # 300 s at 5 for each 60 to 61 s


def test_retry_after_is_true(counter: Callable[..., Counter]) -> None:
    """Who waits as long as the refusal says gets in; a second less is too early."""
    found = counter(KeyLimits(requests_per_minute=2, tokens_per_minute=100))
    for prompt, seconds in ((60, 7), (30, 3)):
        with watched([found.limits], found.job(prompt)):
            found.clock.now += seconds
    with pytest.raises(RateLimitError, match="2 requests a minute") as refused:
        found.limits.admit(found.job(1))
    wait = refused.value.retry_after
    assert wait and 50 <= wait <= 51
    found.clock.now += wait - 1
    with pytest.raises(RateLimitError):
        found.limits.admit(found.job(1))
    found.clock.now += 1
    with pytest.raises(RateLimitError, match="100 tokens a minute"):
        found.limits.admit(found.job(71))
    found.limits.admit(found.job(70))


def test_generated_tokens_count_as_they_come(counter: Callable[..., Counter]) -> None:
    """A stream under way uses up the minute's tokens; the next request is refused before it has ended."""
    found = counter(KeyLimits(tokens_per_minute=100))
    job = found.job(10)
    found.limits.admit(job)
    found.say(job, 50)
    found.limits.admit(found.job(40))
    found.say(job, 51)
    with pytest.raises(RateLimitError):
        found.limits.admit(found.job(1))
    with pytest.raises(InputError, match="shorten it"):
        found.limits.admit(found.job(101))


def test_a_budget_is_for_life(counter: Callable[..., Counter], tmp_path: Path) -> None:
    """Prompts and answers use it up; another server process begins with what was spent before."""
    found = counter(KeyLimits(token_budget=100))
    with watched([found.limits], job := found.job(30)):
        found.say(job, 50)
    with pytest.raises(BalanceError, match="20 tokens left") as refused:
        found.limits.admit(found.job(21))
    assert (refused.value.status, refused.value.code) == (402, "insufficient_balance")
    found.used()
    again = Limits(found.database, found.keys)
    with pytest.raises(BalanceError, match="20 tokens left"):
        again.admit(found.job(21))
    again.admit(found.job(20))


def test_models_are_allowed_by_name_or_alias(counter: Callable[..., Counter]) -> None:
    """A key for an alias may use the model behind it, and no other."""
    found = counter(KeyLimits(models=("deepseek-chat", "other")), {"deepseek-chat": Alias("tiny", False)})
    found.limits.admit(found.job(model="tiny"))
    found.limits.admit(found.job(model="other"))
    with pytest.raises(ModelForbiddenError, match="may not use the model large") as refused:
        found.limits.admit(found.job(model="large"))
    assert refused.value.status == 403


def end(counter: Counter, job: Job, num_tokens: int, problem: BaseException | None) -> None:
    with suppress(PorceletError, GeneratorExit), watched([counter.limits], job):
        job.num_cached_tokens, job.num_reasoning = 4, min(num_tokens, 3)
        if num_tokens:
            counter.say(job, num_tokens)
        if problem:
            raise problem


@pytest.mark.parametrize(
    ("num_tokens", "problem", "amounts"),
    [
        (20, None, Amounts(1, 0, 10, 4, 20, 3)),
        (20, GeneratorExit(), Amounts(1, 0, 10, 4, 20, 3)),  # the client left in the middle of a stream
        (0, GeneratorExit(), Amounts(1, 0, 10, 4, 0, 0)),
        (20, PorceletError("died"), Amounts(1, 1, 10, 4, 20, 3)),
        (0, InputError("too long"), Amounts(1, 1, 0, 4, 0, 0)),
    ],
)
def test_usage_is_counted_whichever_way_it_ends(
    counter: Callable[..., Counter], num_tokens: int, problem: BaseException | None, amounts: Amounts
) -> None:
    """Done, given up or failed: a request and its tokens are counted once, for its key and for the local caller, and
    the key's place is free again."""
    found = counter(KeyLimits(concurrency=1))
    for _ in range(2):
        end(found, found.job(), num_tokens, problem)
    end(found, found.job(caller=LOCAL), num_tokens, problem)
    local, own = sorted(found.used(), key=lambda day: day.key)
    twice = Amounts(*(2 * value for value in vars(amounts).values()))
    assert (local.key, local.amounts) == ("", amounts)
    assert (own.key, own.model, own.date, own.amounts) == (found.key.id, "tiny", usage.today(), twice)
    assert found.limits._counted == {}


def test_headers_tell_what_is_left(counter: Callable[..., Counter]) -> None:
    """Clients read limit, rest and time to the reset; who has no limit is told nothing."""
    found = counter(KeyLimits(requests_per_minute=3, tokens_per_minute=100))
    assert found.limits.headers(found.caller)["x-ratelimit-remaining-requests"] == "3"
    with watched([found.limits], job := found.job(30)):
        found.say(job, 5)
    assert found.limits.headers(found.caller) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "61s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "65",
        "x-ratelimit-reset-tokens": "61s",
    }
    assert found.limits.headers(LOCAL) == {}


def test_window_stays_small() -> None:
    """However much is counted, a minute takes at most 62 entries."""
    window = Window()
    for step in range(100_000):
        window.add(step / 100, 1)
    assert len(window._seconds) <= 62
    assert 6000 <= window.total(999.99) <= 6100


def test_usage_route_tells_the_key_its_own(tmp_path: Path) -> None:
    """A key sees its days and its limits, and nobody else's."""

    async def visit(house: House) -> None:
        ada, secret = house.key("ada", KeyLimits(token_budget=100))
        bob, other = house.key("bob")
        for key, tokens in ((ada.id, 5), (ada.id, 6), (bob.id, 1000)):
            house.database.defer(
                lambda c, k=key, n=tokens: usage.add(c, usage.today(), k, "tiny", Amounts(1, 0, n, 0, 7))
            )
        found = (await house.client.get("/v1/usage", headers=bearer(secret))).json()
        (day,) = found["data"]
        assert (day["date"], day["requests"], day["prompt_tokens"], day["generated_tokens"]) == (
            usage.today(),
            2,
            11,
            14,
        )
        assert found["tokens_left"] == 100
        with watched([house.gate.limits], job := Job("job", "tiny", ada.caller, 11, 100)):
            job.num_generated[0] = 14
            house.gate.limits.progressed(job, None)  # type: ignore[arg-type]  # the job says it all
            live = (await house.client.get("/v1/usage", headers=bearer(secret))).json()
            assert live["tokens_left"] == 75  # what is under way counts, before any of it is stored
        assert "1000" not in json.dumps(found)
        assert (await house.client.get("/v1/usage?days=0", headers=bearer(other))).status_code == 400

    in_house(tmp_path, visit)
