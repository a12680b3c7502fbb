"""The body of `porcelet generate --batch`: the requests of a file through one engine, many at a time.

Twice as many requests as the engine runs at once are with it, so that it never waits for the file and the file is never
in memory. A request that cannot be served becomes a line with its error, and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from porcelet.cli.jobs import Job, check_jobs, read_jobs
from porcelet.cli.progress import batch_bar
from porcelet.cli.results import Result, ResultFile, open_results
from porcelet.errors import InputError, ModelError, PorceletError
from porcelet.tokenizer import StreamDecoder, Tokenizer
from porcelet.types import Output, Progress, Request, SamplingParams, join_outputs

if TYPE_CHECKING:
    from porcelet.engine.text import TextModel

QUEUED = 2  # requests that the engine has, for each that it can run at once


def run_batch(source: Path, target: Path, defaults: SamplingParams, load: Callable[[], TextModel]) -> None:
    """Answer the requests of `source` that `target` does not hold yet; `load` is called if there are any.

    Raises:
        InputError: a mistake in `source`, or a `target` of something else; nothing was run.
        ModelError: the model cannot be loaded.
        CapacityError: `target` cannot be written any more; what it holds stays good.
        PorceletError: requests failed; their lines say why.
    """
    ids = check_jobs(source, defaults)
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the file of requests; give another --output")
    with open_results(target) as results:
        strange = next(iter(results.done - ids), None)
        if strange is not None:
            raise InputError(f"{target} answers {strange!r}, which {source} does not ask; give another --output")
        if len(results.done) < len(ids):
            model = load()
            jobs = (job for job in read_jobs(source, defaults) if job.id not in results.done)
            with batch_bar(len(results.done), len(ids)) as report:
                answer_jobs(model, jobs, results, report)
    print(f"[{len(ids)} requests, {results.num_failed} failed: {target}]", file=sys.stderr)
    if results.num_failed:
        raise PorceletError(f"{results.num_failed} of {len(ids)} requests failed; their lines in {target} say why")


def answer_jobs(model: TextModel, jobs: Iterator[Job], results: ResultFile, report: Progress) -> None:
    """Answer `jobs`; `report` hears of the results there are and of the tokens they took so far."""
    engine = model.engine
    answers: dict[str, Answer] = {}
    num_tokens = 0
    while True:
        while len(answers) < QUEUED * engine.scheduler.config.max_sequences and (job := next(jobs, None)):
            try:
                engine.submit(_request(job, model))
                answers[job.id] = Answer(job.id, job.params.n)
            except (InputError, ModelError) as problem:
                results.append(Result(id=job.id, error=str(problem)))
        if not answers:
            break
        for output in engine.step():
            num_tokens += len(output.tokens)
            answer = answers.get(output.request_id)  # None: a sample of a request that failed
            if answer and (result := answer.add(output, model.tokenizer)):
                results.append(result)
                del answers[result.id]
                if result.error:
                    engine.abort(result.id)
        results.sync_if_due()
        report(len(results.done), num_tokens)
    engine.check_idle()


def _request(job: Job, model: TextModel) -> Request:
    prompt = model.format.render(job.messages, model.tokenizer).tokens
    return Request(id=job.id, prompt=tuple(prompt), params=job.params)


class Answer:
    """What has come for one request so far: the outputs of each of its samples."""

    def __init__(self, id: str, num_samples: int) -> None:
        self.id = id
        self.samples: list[list[Output]] = [[] for _ in range(num_samples)]

    def add(self, output: Output, tokenizer: Tokenizer) -> Result | None:
        """Take one output; the result, once the last sample has ended or one has failed."""
        self.samples[output.index].append(output)
        if output.finish_reason == "error":
            return Result(id=self.id, error=output.error)
        if not all(outputs and outputs[-1].finish_reason for outputs in self.samples):
            return None
        wholes = [join_outputs(outputs) for outputs in self.samples]
        return Result(
            id=self.id,
            text=_one_or_all([_text(whole, tokenizer) for whole in wholes]),
            finish_reason=_one_or_all([whole.finish_reason or "" for whole in wholes]),
            usage=_usage(wholes),
        )


def _one_or_all(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def _text(whole: Output, tokenizer: Tokenizer) -> str:
    decoder = StreamDecoder(tokenizer)
    return decoder.push(whole.tokens) + decoder.flush(whole.tail)


def _usage(wholes: list[Output]) -> dict[str, int]:
    prompt, answers = wholes[0].num_prompt_tokens, sum(whole.num_generated for whole in wholes)
    return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}
