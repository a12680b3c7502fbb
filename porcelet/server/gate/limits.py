"""What a key may use: models, requests and tokens a minute, answers at a time, tokens in all. And the count of it.

Everything is decided where a job is admitted, in one turn of the event loop, so a burst cannot overshoot: of 200
requests at once exactly the allowed ones pass. A prompt counts at its admission, an answer's tokens as they come; an
answer under way is never cut off, so the last ones may overdraw a budget by what they still say.

A job that fails before its first token costs nothing: its tokens and its request are given back. One that the client
gives up costs its prompt and what was generated so far. A call with several prompts makes several jobs, but is one
request. The minutes are this process's own; the budget's past is read from the database at the start.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

from porcelet.config import Alias
from porcelet.errors import CapacityError, InputError
from porcelet.server.gate import usage
from porcelet.server.gate.keys import KeyLimits, Keys
from porcelet.server.gate.usage import Amounts
from porcelet.server.generation.watch import Caller, Job
from porcelet.server.store import Database
from porcelet.types import Output

MINUTE = 60


class RateLimitError(CapacityError):
    """Too much at a time for this key."""

    status = 429
    kind = "rate_limit_error"
    code = "rate_limit_exceeded"


class BalanceError(InputError):
    """The key's budget is spent."""

    status = 402
    kind = "insufficient_balance"
    code = "insufficient_balance"


class ModelForbiddenError(InputError):
    """A model that the key may not use."""

    status = 403
    kind = "permission_error"
    code = "model_not_allowed"
    param = "model"


class Window:
    """How much there was in the last minute. It counts whole seconds, so an amount stays for 60 to 61 s."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()  # at most 62
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] == second:
            amount_before = self._seconds.pop()[1]
            self._seconds.append((second, amount_before + amount))
        else:
            self._seconds.append((second, amount))
        self._total += amount
        self._forget(now)

    def give_back(self, then: float, amount: int) -> None:
        """Take away what was added at `then`, unless its minute is over."""
        for index, (second, there) in enumerate(self._seconds):
            if second == math.floor(then):
                self._seconds[index] = (second, there - amount)
                self._total -= amount

    def total(self, now: float) -> int:
        self._forget(now)
        return self._total

    def wait(self, now: float, room: int) -> int:
        """Seconds until the total is at most `room`."""
        left = self.total(now)
        for second, amount in self._seconds:
            if left <= room:
                break
            left -= amount
            freed = second + MINUTE + 1
        return math.ceil(freed - now) if self._total > room else 0

    def _forget(self, now: float) -> None:
        while self._seconds and now >= self._seconds[0][0] + MINUTE + 1:
            self._total -= self._seconds.popleft()[1]


@dataclass
class _Used:
    """One key's counts."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    num_running: int = 0
    num_tokens: int = 0  # ever


@dataclass(eq=False)
class Call:
    """One HTTP request: its jobs share one place, and count once a minute, at `admitted`."""

    num_running: int = 0
    admitted: float | None = None
    served: bool = False  # any of its jobs


# Not the request's id, which its sender may choose.
current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)


@dataclass
class _Counted:
    """What a job under way has cost so far."""

    call: Call
    admitted: float
    num_tokens: int = 0


class Limits:
    """The `Watch` that holds every key to its limits and counts its usage."""

    def __init__(
        self,
        database: Database,
        keys: Keys,
        aliases: Mapping[str, Alias] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._keys = keys
        self._aliases = aliases or {}
        self._clock = clock
        self._used = {key: _Used(num_tokens=count) for key, count in database.run_now(usage.tokens).items()}
        self._counted: dict[str, _Counted] = {}  # of each job under way

    def admit(self, job: Job) -> None:
        limits, used, now = self._keys.limits(job.caller.key), self._of(job), self._clock()
        call = current_call.get() or Call()
        _check_model(limits, self._aliases, job)
        _check_room(limits, used, job, now)
        _check_requests(limits, used, call, now)
        if call.num_running == 0:
            used.num_running += 1
        if call.admitted is None:
            used.requests.add(now, 1)
            call.admitted = now
        call.num_running += 1
        self._counted[job.id] = _Counted(call, now)
        self._count(job, job.num_prompt_tokens)

    def progressed(self, job: Job, output: Output) -> None:
        self._count(job, job.num_prompt_tokens + sum(job.num_generated))

    def ended(self, job: Job, reason: str) -> None:
        generated = sum(job.num_generated)
        wasted = reason == "refused" or (reason == "error" and not generated)
        prompt = 0 if wasted else job.num_prompt_tokens
        used, counted = self._of(job), self._counted.pop(job.id)
        used.num_tokens += prompt + generated - counted.num_tokens
        if wasted:
            used.tokens.give_back(counted.admitted, counted.num_tokens)
        _leave(used, counted.call, served=not wasted)
        if reason == "refused":
            return
        amounts = Amounts(1, int(reason == "error"), prompt, job.num_cached_tokens, generated, job.num_reasoning)
        day, key, model = usage.today(), job.caller.key, job.model
        self._database.defer(partial(usage.add, day=day, key=key, model=model, amounts=amounts))

    def tokens_left(self, key: str) -> int | None:
        """Of a key's budget; None where it has none."""
        budget = self._keys.limits(key).token_budget
        return None if budget is None else max(budget - self._used.get(key, _Used()).num_tokens, 0)

    def headers(self, caller: Caller) -> dict[str, str]:
        """What clients are told of the limits a minute, under the names that OpenAI gave them."""
        limits, used, now = self._keys.limits(caller.key), self._used.get(caller.key, _Used()), self._clock()
        found = {}
        for name, limit, window in (
            ("requests", limits.requests_per_minute, used.requests),
            ("tokens", limits.tokens_per_minute, used.tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{name}"] = str(limit)
                found[f"x-ratelimit-remaining-{name}"] = str(max(limit - window.total(now), 0))
                found[f"x-ratelimit-reset-{name}"] = f"{window.wait(now, 0)}s"
        return found

    def _of(self, job: Job) -> _Used:
        return self._used.setdefault(job.caller.key, _Used())

    def _count(self, job: Job, total: int) -> None:
        """The job has `total` tokens by now."""
        used, more = self._of(job), total - self._counted[job.id].num_tokens
        self._counted[job.id].num_tokens = total
        used.tokens.add(self._clock(), more)
        used.num_tokens += more


def _leave(used: _Used, call: Call, served: bool) -> None:
    """One of a call's jobs is over."""
    call.num_running -= 1
    call.served |= served
    if call.num_running == 0:
        used.num_running -= 1
        if not call.served and call.admitted is not None:
            used.requests.give_back(call.admitted, 1)
            call.admitted = None


def _check_model(limits: KeyLimits, aliases: Mapping[str, Alias], job: Job) -> None:
    allowed = {aliases.get(name, Alias(name)).model for name in limits.models}
    if allowed and job.model not in allowed:
        names = ", ".join(limits.models)
        raise ModelForbiddenError(f"this API key may not use the model {job.model}; it may use: {names}")


def _check_room(limits: KeyLimits, used: _Used, job: Job, now: float) -> None:
    prompt = job.num_prompt_tokens
    if limits.token_budget is not None and used.num_tokens + prompt > limits.token_budget:
        left = max(limits.token_budget - used.num_tokens, 0)
        raise BalanceError(f"this API key's budget has {left} tokens left; the prompt has {prompt}")
    if limits.tokens_per_minute is not None:
        if prompt > limits.tokens_per_minute:
            most = limits.tokens_per_minute
            raise InputError(f"the prompt has {prompt} tokens; this API key may use {most} a minute: shorten it")
        _check_rate(used.tokens, limits.tokens_per_minute, prompt, now, "tokens")


def _check_requests(limits: KeyLimits, used: _Used, call: Call, now: float) -> None:
    if limits.concurrency is not None and call.num_running == 0 and used.num_running >= limits.concurrency:
        raise RateLimitError(
            f"this API key may have {limits.concurrency} requests under way at a time; wait for one", 1
        )
    if limits.requests_per_minute is not None and call.admitted is None:
        _check_rate(used.requests, limits.requests_per_minute, 1, now, "requests")


def _check_rate(window: Window, limit: int, more: int, now: float, what: str) -> None:
    if window.total(now) + more > limit:
        wait = window.wait(now, limit - more)
        raise RateLimitError(f"this API key may use {limit} {what} a minute; come back in {wait} s", wait)
