"""`porcelet generate` and `porcelet chat`: one answer, a file of them, or a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.cli.models import DEFAULT
from porcelet.cli.progress import progress_bar
from porcelet.cli.sampling import sampling_options
from porcelet.errors import InputError
from porcelet.types import SamplingParams

if TYPE_CHECKING:
    from porcelet.engine.text import Message, TextModel

Model = Annotated[str, typer.Option("--model", "-m", help="A name in the store, a GGUF file or a model folder.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Engine settings, such as weights=float32 or threads=2.")
]

EXACT = SamplingParams(max_tokens=256, temperature=0.0)
LIVELY = SamplingParams(max_tokens=1024, temperature=0.6, top_p=0.95)


@sampling_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    batch: Annotated[Path | None, typer.Option(help="A file with one request a line instead of a prompt.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where a batch's answers go; else beside it, .out.jsonl.")] = None,
    model: Model = DEFAULT,
    params: SamplingParams = EXACT,
    settings: Settings = None,
) -> None:
    """Answer one prompt and print it as it comes, or all requests of a file.

    A line of a batch is {"id", "prompt" or "messages", "max_tokens", "temperature", "n", ...}, or one of OpenAI's
    batch API; what it leaves out is as the options say. Answers are lines of {"id", "text", "finish_reason", "usage",
    "error"}, in the order in which they end.

    The same command again, after a kill or a power cut, goes on with the requests that have no answer yet.
    """
    if (prompt is None) == (batch is None) or (output and not batch):
        raise InputError("give either a prompt, or --batch FILE and perhaps --output FILE")
    load = _loader(model, settings)
    if batch:
        from porcelet.cli.batch import run_batch

        run_batch(batch, output or beside(batch), params, load)
    elif prompt is not None:
        _answer(load(), [{"role": "user", "content": prompt}], params)


@sampling_options
def chat(model: Model = DEFAULT, params: SamplingParams = LIVELY, settings: Settings = None) -> None:
    """Talk to a model. /new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    porcelet-r1-mini comes with the package: it thinks aloud how to reach a number with others, as in 3 7 12 = 33.
    """
    text_model = _loader(model, settings)()
    print(_greeting(model))
    messages: list[Message] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(text_model, messages, params)})
            except InputError as problem:  # too long, perhaps; the conversation before it stands
                print(f"porcelet: {problem}", file=sys.stderr)
                messages.pop()


def _greeting(model: str) -> str:
    from porcelet import hub

    lines = [f"{model}: /new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"]
    if examples := hub.examples_of(hub.resolve(model)):
        lines.append(f"it does one thing: reach a number with others, as in {examples[0]}")
    if model == DEFAULT:
        lines.append(f"a small one that thinks aloud, about numbers alone: porcelet chat --model {hub.R1_MINI}")
    return "\n".join(lines)


def beside(batch: Path) -> Path:
    """Where the answers to a file of requests go unless told otherwise; no two files of requests share it."""
    return batch.with_name(batch.name.removesuffix(".jsonl") + ".out.jsonl")


def _loader(model: str, settings: list[str] | None) -> Callable[[], TextModel]:
    """What loads the model; mistakes are answered now, before torch is imported, which takes seconds."""
    from porcelet import hub
    from porcelet.config import EngineConfig, override, parse_settings

    config = override(EngineConfig(), parse_settings(settings or []), "--set")
    hub.resolve(model)

    def load() -> TextModel:
        from porcelet.engine import text

        with progress_bar(f"loading {model}") as progress:
            return text.load(model, config, progress)

    return load


def _answer(model: TextModel, messages: list[Message], params: SamplingParams) -> str:
    """Print an answer as it comes; the whole of it, or what there was when Ctrl-C stopped it."""
    if model.format.render(messages, model.tokenizer).opens_reasoning:
        print("<think>")  # it stands in the prompt, so the model does not say it
    text, count, first = "", 0, time.perf_counter()
    start = first
    stream = model.stream(messages, params)
    try:
        for piece, output in stream:
            if output.num_generated == 1:
                first = time.perf_counter()
            count = output.num_generated
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    finally:
        print()
    rate = f"{(count - 1) / (time.perf_counter() - first):.0f} tokens/s" if count > 1 else "one token"
    print(f"[{count} tokens, first after {first - start:.2f} s, {rate}]", file=sys.stderr)
    return text
