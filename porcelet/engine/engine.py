"""The engine: a step is schedule, run, sample, commit.

A library first; the server runs it in a process of its own (worker.py), reinforcement learning in the trainer's. It
works on token ids; of text it only knows the tokens' bytes, to find stop strings.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from porcelet.config import EngineConfig
from porcelet.engine.codec import open_tokenizer
from porcelet.engine.runner import Runner
from porcelet.engine.sampler import Sampler
from porcelet.engine.scheduler import Scheduler
from porcelet.errors import EngineError, InputError
from porcelet.models.transformer import Transformer
from porcelet.types import Output, Progress, Request, SamplingParams, join_outputs
from porcelet.weights.load import load, no_progress


class Engine:
    """Continuous batching over a paged cache.

    The model's parameters are used as they are at each step: a trainer that changes them between calls needs to copy
    nothing, but must not change them while requests are in flight. `token_bytes` says what a token adds to the text;
    requests with stop strings need it.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig = EngineConfig(),
        *,
        seed: int | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.model = model
        self.runner = Runner(model, config.num_pages)  # first: it refuses a cache that cannot be had
        self.scheduler = Scheduler(model.config, config, token_bytes, seed)
        self.sampler = Sampler()
        self._aborted: list[Output] = []
        self._ids = itertools.count()

    @classmethod
    def load(cls, path: Path, config: EngineConfig = EngineConfig(), progress: Progress = no_progress) -> Engine:
        """An engine for a GGUF file or a Hugging Face folder; `progress` hears of the bytes loaded.

        Raises:
            ModelError: the files are missing, damaged or not supported.
        """
        return cls(load(path, config.weights, progress), config, token_bytes=_token_bytes(path))

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._aborted)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it can never be served; nothing was queued.
            ModelError: it has stop strings, and the model's tokenizer cannot be opened.
        """
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Stop a request; the next step reports it as finished by "abort". Unknown ids (already finished) are
        ignored."""
        output = self.scheduler.abort(request_id)
        if output:
            self._aborted.append(output)

    def step(self) -> list[Output]:
        """Compute one batch; what each request gained. A request that fails ends alone, by "error"."""
        aborted, self._aborted = self._aborted, []
        batch = self.scheduler.schedule()
        if batch is None:
            return aborted
        return aborted + self.scheduler.commit(self.sampler.draw(self.runner.run(batch), batch.draws))

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Output]:
        """Run one prompt and yield its outputs; closing the iterator ends the request.

        Raises:
            InputError: it can never be served.
            EngineError: the model gave logits that are not finite.
        """
        self._require_idle()
        request_id = f"stream-{next(self._ids)}"
        self.submit(Request(id=request_id, prompt=tuple(prompt), params=params))
        try:
            while self.has_work:
                for output in self.step():
                    _raise_error(output)
                    yield output
        finally:
            self.scheduler.remove(request_id)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Output]:
        """Run all prompts to their ends; one whole output each, in order. `params` is one for all or one a prompt.

        Raises:
            InputError: a prompt can never be served; then none was run.
            EngineError: the model gave logits that are not finite.
        """
        self._require_idle()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        requests = [
            Request(id=f"generate-{next(self._ids)}", prompt=tuple(prompt), params=own)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        try:
            for request in requests:
                self.submit(request)
            pieces: dict[str, list[Output]] = {request.id: [] for request in requests}
            while self.has_work:
                for output in self.step():
                    _raise_error(output)
                    pieces[output.request_id].append(output)
        finally:
            for request in requests:
                self.scheduler.remove(request.id)
        return [join_outputs(pieces[request.id]) for request in requests]

    def stats(self) -> dict[str, int]:
        """Gauges of this moment."""
        return {
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_pages": self.scheduler.pool.num_pages,
            "num_free_pages": self.scheduler.pool.num_free,
            "num_preempted": self.scheduler.num_preempted,
        }

    def _require_idle(self) -> None:
        if self.has_work:
            raise InputError("generate and stream need an idle engine; use submit and step beside other requests")


def _raise_error(output: Output) -> None:
    if output.finish_reason == "error":
        raise EngineError(output.error)


def _token_bytes(path: Path) -> Callable[[int], bytes]:
    """The model's own, its tokenizer opened at the first call: most engines never need it."""
    opened = functools.cache(lambda: open_tokenizer(path))
    return lambda token: opened().token_bytes(token)
