"""The served models as every dialect sees them: a conversation in, events out.

Text lives on this side of the engines: prompt.py turns a conversation into tokens, reader.py tokens into events. What
looks on (limits, usage, metrics) is a `Watch`.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from porcelet import __version__
from porcelet.chat import ChatFormat, Splitter
from porcelet.config import Alias, ServeConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.messages import Ready
from porcelet.engine.supervisor import Supervisor
from porcelet.errors import CapacityError, InputError, PorceletError
from porcelet.server.generation.ask import Ask
from porcelet.server.generation.events import Event, Events, Started, Usage
from porcelet.server.generation.prompt import Loaded, prompt_of
from porcelet.server.generation.queue import OverloadedError, Queue
from porcelet.server.generation.reader import Reader
from porcelet.server.generation.watch import Caller, Job, Watch, watched
from porcelet.tokenizer import Tokenizer
from porcelet.types import Output, Progress, Request, SamplingParams

LOAD_PATIENCE = 20.0  # seconds that a request waits for a model that is still loading
TEXT_THREADS = 4  # that render and tokenize
MAX_COUNTING = 2  # of them for requests that nothing is generated for
DRAINING_SECONDS = 10  # until a server that ends may have a successor

Result = TypeVar("Result")


class UnknownModelError(InputError):
    """A model that is not served here."""

    status = 404
    code = "model_not_found"
    param = "model"


class UnableError(InputError):
    """An alias that asks its model for what it cannot do."""

    code = "model_cannot_think"
    param = "model"


class ContextError(InputError):
    """A prompt that leaves no room for an answer."""

    code = "context_length_exceeded"


class Model:
    """One served model: its engine process, and its text side. `created` is in Unix seconds; `examples` show what a
    model of the package can be asked."""

    def __init__(self, name: str, path: Path, engine: Supervisor, config: ServeConfig) -> None:
        self.name = name
        self.path = path
        self.engine = engine
        self.config = config
        self.examples = config.models[name].examples
        self.watches: tuple[Watch, ...] = ()
        self.created = int(time.time())
        self.progress: tuple[int, int] | None = (0, 0)  # bytes loaded and in all; None once it is loaded
        self.queue = Queue(name, config.server.max_waiting, config.server.queue_timeout)
        self._threads = ThreadPoolExecutor(TEXT_THREADS, "text")  # long texts hold up nothing else that needs one
        self._counting = asyncio.Semaphore(MAX_COUNTING)
        self._loaded: Loaded | None = None
        self._ready = asyncio.Event()

    async def load(self, progress: Progress) -> None:
        """Wait for the engine, and read the text side meanwhile. `progress` hears of the bytes.

        Raises:
            ModelError, InputError, CapacityError, EngineError: the reason for not starting.
        """
        codec = asyncio.create_task(asyncio.to_thread(open_codec, self.path))

        def report(done: int, total: int) -> None:
            self.progress = (done, total)
            progress(done, total)

        facts = await self.engine.ready(report)
        self._loaded = Loaded(facts, *await codec)
        _return_memory()
        self.progress = None
        self._ready.set()

    @property
    def loaded(self) -> Loaded | None:
        """None while it loads."""
        return self._loaded

    @property
    def facts(self) -> Ready:
        return self._parts.facts

    @property
    def max_length(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self.facts.max_length

    @property
    def fingerprint(self) -> str:
        """Tells one configuration from another: DeepSeek's and OpenAI's `system_fingerprint`."""
        served = f"{__version__} {self.path} {self.facts.model} {self.facts.weights}"
        return f"fp_{sha256(served.encode()).hexdigest()[:10]}"

    @property
    def tokenizer(self) -> Tokenizer:
        return self._parts.tokenizer

    @property
    def format(self) -> ChatFormat:
        return self._parts.format

    @property
    def thinks(self) -> bool:
        """Whether its answers may begin with reasoning."""
        return self.format.thinking(self.tokenizer) != "never"

    @property
    def _parts(self) -> Loaded:
        assert self._loaded, "find() waits until a model is loaded"
        return self._loaded

    async def wait(self) -> None:
        """Wait until the model is loaded.

        Raises:
            CapacityError: that takes too long.
        """
        try:
            await asyncio.wait_for(self._ready.wait(), LOAD_PATIENCE)
        except TimeoutError:
            done, total = self.progress or (0, 0)
            percent = f" ({100 * done // total} %)" if total else ""
            raise CapacityError(f"the model {self.name} is still loading{percent}; come back in a while", 10) from None

    # ---- answers ----------------------------------------------------------------------------------------------------

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of work on text, which for long ones takes a while; the other streams go on meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def beside(self, work: Callable[[], Result]) -> Result:
        """The same for what is not generated for: few at a time, so that answers do not wait for it."""
        async with self._counting:
            return await self.in_thread(work)

    async def tokens(self, ask: Ask) -> Sequence[int]:
        """A conversation's prompt.

        Raises:
            InputError: the conversation cannot be written in the model's format.
        """
        return (await self.beside(lambda: prompt_of(ask, self._parts))).tokens

    async def count(self, ask: Ask) -> int:
        """Tokens of a conversation's prompt.

        Raises:
            InputError: the conversation cannot be written in the model's format.
        """
        return len(await self.tokens(ask))

    async def answer(self, ask: Ask, caller: Caller) -> Events:
        """The events of one answered conversation. Close it (`aclosing`) to stop the engine's work.

        Raises:
            PorceletError: the conversation or the request cannot be served, or the engine failed.
        """
        with self.place(caller):  # before the work of rendering, which one too many shall not cause
            prompt = await self.in_thread(lambda: prompt_of(ask, self._parts))
            splitters = [prompt.splitter() for _ in range(ask.params.n)]
            async with aclosing(self._run(prompt.tokens, prompt.params, caller, splitters)) as events:
                async for event in events:
                    yield event

    def place(self, caller: Caller, count: int = 1) -> AbstractContextManager[None]:
        """Places in the queue; see `Queue.place`."""
        return self.queue.place(caller, count)

    def complete(self, prompt: Sequence[int], params: SamplingParams, caller: Caller) -> Events:
        """The events of a plain continuation of `prompt`, all of it content. Whoever asks for it has a `place`.

        Raises:
            PorceletError: the request cannot be served, or the engine failed.
        """
        return self._run(prompt, params, caller, [None] * params.n)

    async def _run(
        self, prompt: Sequence[int], params: SamplingParams, caller: Caller, splitters: Sequence[Splitter | None]
    ) -> Events:
        if len(prompt) >= self.max_length:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens; with room for an answer {self.name} takes at most "
                f"{self.max_length - 1}; shorten the conversation"
            )
        job = Job(uuid4().hex, self.name, caller, len(prompt), params.max_tokens, params.n)
        request = Request(id=job.id, prompt=tuple(prompt), params=params, tenant=caller.id)
        readers = [Reader(self.tokenizer, splitter) for splitter in splitters]
        with watched(self.watches, job):
            submitted = self.engine.submit(request, lambda output: self._count(job, output))
            async with aclosing(submitted) as outputs:
                async for event in self._events(job, outputs, readers):
                    yield event
        # It is over by now for those who look on, too: who has the last event reads no further.
        yield Usage(job.num_prompt_tokens, job.num_cached_tokens, sum(job.num_generated), job.num_reasoning)

    async def _events(self, job: Job, outputs: AsyncGenerator[Output, None], readers: list[Reader]) -> Events:
        started = False
        async for output in self._in_time(outputs):
            events: list[Event] = []
            if not started:
                events.append(Started(job.num_prompt_tokens, job.num_cached_tokens, output.prompt_logprobs))
                started = True
            events += readers[output.index].read(output)
            job.num_reasoning = sum(reader.num_reasoning for reader in readers)
            for event in events:
                yield event

    def _count(self, job: Job, output: Output) -> None:
        """One step's output has arrived: it counts now, whether or not a slow reader ever takes it."""
        job.num_generated[output.index] = output.num_generated
        job.num_cached_tokens = max(job.num_cached_tokens, output.num_cached_tokens)
        for watch in self.watches:
            watch.progressed(job, output)

    async def _in_time(self, outputs: AsyncGenerator[Output, None]) -> AsyncGenerator[Output, None]:
        """The outputs, if the first comes before the queue's time is over."""
        try:
            async with asyncio.timeout(self.queue.timeout):
                first = await anext(outputs)
        except TimeoutError:
            raise self.queue.given_up() from None
        yield first
        async for output in outputs:
            yield output


def _return_memory() -> None:
    """Give the system back what the allocator holds and nobody uses: reading a vocabulary of 49,152 tokens leaves 10 of
    100 MB so (2026-11-22)."""
    with suppress(AttributeError):  # glibc's allocator alone does not do it by itself
        ctypes.CDLL(None).malloc_trim(0)


# ---- several models -------------------------------------------------------------------------------------------------


class Models:
    """All that is served, by name and by alias. The first model is the default one."""

    def __init__(self, config: ServeConfig, models: Sequence[Model]) -> None:
        self.config = config
        self.draining = False  # once the server has been told to end
        self.all = {model.name: model for model in models}

    def watch(self, *watches: Watch) -> None:
        """Let these look on at every model's generations."""
        for model in self.all.values():
            model.watches = watches

    @property
    def default(self) -> Model:
        return next(iter(self.all.values()))

    @property
    def names(self) -> list[str]:
        """Models, then aliases."""
        return [*self.all, *self.config.aliases]

    @property
    def able(self) -> list[str]:
        """The names without those that ask a loaded model for thinking that it cannot do."""
        found = ((name, *self.named(name)) for name in self.names)
        return [name for name, model, thinking in found if not thinking or not model.loaded or model.thinks]

    async def load(self, progress: Progress) -> None:
        """Wait until every model is loaded; `progress` hears of the bytes of all of them.

        Raises:
            ModelError, InputError, CapacityError, EngineError: the first reason for not starting.
        """

        def report(done: int, total: int) -> None:
            known = [model.progress for model in self.all.values() if model.progress]
            progress(sum(done for done, _ in known), sum(total for _, total in known))

        await asyncio.gather(*(model.load(report) for model in self.all.values()))

    def named(self, name: str) -> tuple[Model, bool | None]:
        """The model of that name, which may still be loading, and whether its alias thinks.

        Raises:
            UnknownModelError: none is called so.
        """
        alias = self.config.aliases.get(name, Alias(name))
        model = self.all.get(alias.model)
        if model is None:
            raise UnknownModelError(f"model {name[:200]!r} is not served here; served: {', '.join(self.able)}")
        return model, alias.thinking

    async def find(self, name: str) -> tuple[Model, bool | None]:
        """The model of that name, loaded, and whether its alias thinks.

        Raises:
            UnknownModelError: none is called so.
            UnableError: its alias thinks, and it cannot.
            CapacityError: it is still loading, or the server is about to end.
        """
        if self.draining:
            raise OverloadedError("the server is shutting down; ask again once it has started", DRAINING_SECONDS)
        model, thinking = self.named(name)
        await model.wait()
        if thinking and not model.thinks:
            able = ", ".join(self.able)
            raise UnableError(f"model {name!r} is {model.name} thinking, which it cannot; take one of {able}")
        return model, thinking

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return sum(model.queue.num_running for model in self.all.values())

    @property
    def failure(self) -> PorceletError | None:
        """Why a model cannot serve at this moment."""
        return next((model.engine.failure for model in self.all.values() if model.engine.failure), None)

    def close(self) -> None:
        """End every engine process."""
        for model in self.all.values():
            model.engine.close()
