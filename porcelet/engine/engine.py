"""The engine: a step is schedule, run, sample, commit.

A library first; the server runs it in a process of its own (worker.py), reinforcement learning in the trainer's. It
works on token ids; of text it only knows the tokens' bytes, to find stop strings and to keep constraints.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from porcelet.config import REPLAYED_TOKENS, EngineConfig, parse_memory
from porcelet.engine.cache import count_pages
from porcelet.engine.gpu import DTYPE, device_of, move, within_memory
from porcelet.engine.runner import Runner, choose_cache_dtype
from porcelet.engine.sampler import Sampler
from porcelet.engine.scheduler import Scheduler
from porcelet.engine.speculative import choose_drafter
from porcelet.errors import EngineError, InputError
from porcelet.kernels import cpu
from porcelet.memory.fit import check_engine
from porcelet.models.experts import residency_of
from porcelet.models.transformer import Transformer
from porcelet.types import Batch, Constraint, Output, Progress, Request, SamplingParams, join_outputs
from porcelet.weights.load import load, no_progress
from porcelet.weights.memory import available_memory
from porcelet.weights.offload import Offload

if TYPE_CHECKING:
    from porcelet.engine.grammar import GrammarCompiler, Matcher
    from porcelet.tokenizer import Tokenizer

MAX_FAILURES = 3
# Of experts that stay on disk; what a `Residency` counts.
EXPERT_COUNTS = (
    "num_expert_hits",
    "num_expert_misses",
    "num_expert_prefetches",
    "num_expert_bytes_read",
    "num_expert_bytes_resident",
)
log = logging.getLogger(__name__)


@dataclass
class Decoding:
    """Steps that gave each sequence its next token and did nothing else: what planning ahead can be compared with."""

    num_decode_steps: int = 0
    num_decode_tokens: int = 0
    num_decode_cached: int = 0  # tokens that these attended to, summed
    decode_seconds: float = 0.0

    def add(self, batch: Batch, seconds: float) -> None:
        self.num_decode_steps += 1
        self.num_decode_tokens += len(batch.tokens)
        self.num_decode_cached += sum(batch.lengths)
        self.decode_seconds += seconds


class Engine:
    """Continuous batching over a paged cache.

    The model's parameters are used as they are at each step: a trainer that changes them between calls needs to copy
    nothing, but must not change them while requests are in flight, and says so by `weights_changed`. `token_bytes`
    says what a token adds to the text, which requests with stop strings need, `compile_constraint` serves constrained
    ones.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig = EngineConfig(),
        *,
        seed: int | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
        compile_constraint: Callable[[Constraint], Matcher] | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = device_of(config)
        with within_memory(self.device):
            if self.device.type == "cuda":
                move(model, self.device, activations=config.activations)
            self.model = model
        num_layers = model.config.num_hidden_layers
        if choose_drafter(config.speculation, model.config) == "mtp":
            num_layers += 1
        self._residency = residency_of(model)
        promised = self._residency.budget() if self._residency else 0
        cache_dtype = choose_cache_dtype(config.cache_dtype, model) if self.device.type == "cpu" else DTYPE
        memory = torch.cuda.mem_get_info(self.device) if self.device.type == "cuda" else None
        num_pages = count_pages(config, model.config, num_layers, cache_dtype.itemsize, promised, memory)
        with within_memory(self.device):
            self.runner = Runner(
                model,
                num_pages,
                num_layers,
                cache_dtype=cache_dtype,
                capacity=max(REPLAYED_TOKENS, config.max_batch_tokens),
                device=self.device,
                max_sequences=config.max_sequences,
            )
        self.scheduler = Scheduler(model.config, config, num_pages, token_bytes, compile_constraint, seed)
        self.sampler = Sampler()
        self._ended: list[Output] = []
        self._num_failures = 0
        self.predicted_bytes = 0  # the most that its process will take; 0: nobody has said
        self._decoding = Decoding()
        self._drafting = 0.0  # seconds the MTP layer took since they were last recorded
        self._ids = itertools.count()

    @classmethod
    def load(cls, path: Path, config: EngineConfig = EngineConfig(), progress: Progress = no_progress) -> Engine:
        """An engine for a GGUF file or a Hugging Face folder; `progress` hears of the bytes loaded.

        Raises:
            CapacityError: it needs more memory than there is; names what would fit. Nothing was read.
            InputError: its device is not there.
            ModelError: the files are missing, damaged or not supported.
        """
        on_cpu = device_of(config).type == "cpu"  # a GPU's memory is not forecast
        forecast = check_engine(path, config, native=cpu.available()).peak if on_cpu else 0
        model = load(path, config.weights, progress, _offload(config))
        cpu.return_freed_memory()
        lock = threading.Lock()

        # Most engines never need these two, and their libraries take 6 MB (2026-11-23).
        @functools.cache
        def tokenizer() -> Tokenizer:
            from porcelet.engine.codec import open_tokenizer

            return open_tokenizer(path)

        @functools.cache
        def grammars() -> GrammarCompiler:
            from porcelet.engine.grammar import GrammarCompiler

            return GrammarCompiler(tokenizer(), model.config.eos_token_ids)

        def compile_constraint(constraint: Constraint) -> Matcher:
            with lock:  # from `prepare`'s thread and the steps' own
                return grammars().compile(constraint)

        engine = cls(
            model,
            config,
            token_bytes=lambda token: tokenizer().token_bytes(token),
            compile_constraint=compile_constraint,
        )
        engine.predicted_bytes = forecast
        return engine

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._ended)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InputError: it can never be served; nothing was queued.
            ModelError: it has stop strings or a constraint, and the model's tokenizer cannot be opened.
        """
        self.scheduler.add(request)

    def prepare(self, request: Request) -> None:
        """Compile a request's constraint, from any thread: `submit` then finds it done.

        Raises:
            InputError: the constraint cannot be kept.
        """
        if request.params.constraint:
            self.scheduler.compile(request.params.constraint)

    def abort(self, request_id: str) -> None:
        """Stop a request; the next step reports it as finished by "abort". Unknown ids (already finished) are
        ignored."""
        self._ended += self.scheduler.abort(request_id)

    def step(self) -> list[Output]:
        """Compute one batch; what each request gained.

        A request whose logits are not finite ends alone, by "error". If the computation itself fails, the requests
        that took part end so, and the others go on.

        Raises:
            EngineError: several steps in a row have failed, so it is not the requests' fault.
        """
        start = time.perf_counter()
        batch = self.scheduler.schedule()
        if batch is None:
            self.check_idle()
        else:
            self._ended += self._compute(batch, start)
        ended, self._ended = self._ended, []
        return ended

    def weights_changed(self) -> None:
        """The model's parameters are others now: nothing that was computed with the old ones is found again.

        Raises:
            InputError: requests are in flight.
        """
        if self.has_work:
            raise InputError("the weights cannot change while requests are in flight; finish or abort them first")
        self.scheduler.weights_version += 1

    def check_idle(self) -> None:
        """Asserts that an engine without work holds nothing: free and cached pages are all there are."""
        if not self.has_work:
            self.scheduler.check()

    def _compute(self, batch: Batch, start: float) -> list[Output]:
        num_recordings = self.runner.num_recordings
        try:
            # Who decodes was here in the step before, and weights do not change meanwhile.
            logits = self.runner.run(batch, same_weights=self.scheduler.only_decodes)
            draws = self.sampler.draw(logits, batch.draws)
        except Exception as problem:  # whatever it was, it is told to everybody who took part
            return self._fail(problem)
        self._num_failures = 0
        is_measure = self.scheduler.only_decodes and self.runner.num_recordings == num_recordings
        outputs = self.scheduler.commit(draws)
        if is_measure:
            seconds = time.perf_counter() - start
            self.scheduler.pace.record(len(batch.tokens), seconds)  # the price of a guess
            if len(batch.tokens) == len(batch.lengths):  # without any guesses, as forecasts are
                self._decoding.add(batch, seconds)
        self._draft(is_measure)
        return outputs

    def _draft(self, is_measure: bool) -> None:
        """Let the MTP layer guess, where the model has one. A guess is never needed: one that fails is left out."""
        start, num_recordings = time.perf_counter(), self.runner.num_recordings
        drafts = self.scheduler.draft_batch()
        if drafts is None:
            return
        try:
            logits = self.runner.draft(drafts.batch, drafts.hidden_rows)
            draws = self.sampler.draw(logits, drafts.batch.draws)
        except Exception:
            log.exception("the MTP layer failed; its guesses are left out of this step")
            return
        self.scheduler.take_drafts(draws)
        if self.runner.num_recordings == num_recordings:
            self._drafting += time.perf_counter() - start
        if is_measure:  # what the layer took in prompts' steps is part of the price, too
            self.scheduler.pace.record_drafting(self._drafting)
            self._drafting = 0.0

    def _fail(self, problem: Exception) -> list[Output]:
        self._num_failures += 1
        reason = f"the step failed: {type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"
        log.error(reason, exc_info=problem)
        outputs = self.scheduler.fail(reason)
        if self._num_failures >= MAX_FAILURES:
            self._ended += outputs
            raise EngineError(f"{self._num_failures} steps in a row have failed; the last: {reason}") from problem
        return outputs

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
            self.scheduler.abort(request_id)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Output]:
        """Run all prompts to their ends; the whole output of each of their samples, in order. `params` is one for all
        or one a prompt.

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
            pieces = {(request.id, i): list[Output]() for request in requests for i in range(request.params.n)}
            while self.has_work:
                for output in self.step():
                    _raise_error(output)
                    pieces[output.request_id, output.index].append(output)
        finally:
            for request in requests:
                self.scheduler.abort(request.id)
        return [join_outputs(outputs) for outputs in pieces.values()]

    def stats(self) -> dict[str, int | float]:
        """Gauges of this moment, and counters since the start."""
        scheduler = self.scheduler
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "num_pages": scheduler.pool.num_pages,
            "num_free_pages": scheduler.pool.num_free,
            "num_cached_pages": scheduler.pool.num_cached,
            "num_preempted": scheduler.num_preempted,
            "num_prompt_tokens": scheduler.num_prompt_tokens,
            "num_hit_tokens": scheduler.num_hit_tokens,
            "num_drafts": scheduler.num_drafts,
            "num_drafted": scheduler.num_drafted,
            "num_accepted": scheduler.num_accepted,
            **dataclasses.asdict(self._decoding),
            **{f"num_accepted_at_{place}": count for place, count in enumerate(scheduler.num_accepted_at) if count},
            **(dict(zip(EXPERT_COUNTS, self._residency.counts(), strict=True)) if self._residency else {}),
        }

    def _require_idle(self) -> None:
        if self.has_work:
            raise InputError("generate and stream need an idle engine; use submit and step beside other requests")


def _offload(config: EngineConfig) -> Offload | None:
    if not config.expert_memory:
        return None
    from porcelet import hub  # its imports take memory, and few models need it here

    amount = parse_memory(config.expert_memory, "expert_memory")
    return Offload(hub.experts(), int(amount * available_memory()) if amount <= 1 else int(amount))


def _raise_error(output: Output) -> None:
    if output.finish_reason == "error":
        raise EngineError(output.error)
