"""`porcelet generate` and `porcelet chat`: one answer, or a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.cli.models import DEFAULT
from porcelet.cli.progress import progress_bar
from porcelet.errors import InputError

if TYPE_CHECKING:
    from porcelet.engine.text import Message, TextModel
    from porcelet.types import SamplingParams

Model = Annotated[str, typer.Option("--model", "-m", help="A name in the store, a GGUF file or a model folder.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability together.")]
TopK = Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens of at least this part of the likeliest one's probability.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Makes tokens of the prompt and the answer less likely; 1 is off.")
]
PresencePenalty = Annotated[float, typer.Option(help="Taken once from the logits of tokens in the answer.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Taken from the logits of the answer's tokens at each use.")]
Stop = Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be given several times.")]
Seed = Annotated[int | None, typer.Option(help="Makes the draw repeatable.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Engine settings, such as weights=float32 or threads=2.")
]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = DEFAULT,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    stop: Stop = None,
    seed: Seed = None,
    settings: Settings = None,
) -> None:
    """Answer one prompt and print it as it comes; speed goes to standard error."""
    from porcelet.types import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    text_model = _open(model, settings)
    _answer(text_model, [{"role": "user", "content": prompt}], params)


def chat(
    model: Model = DEFAULT,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    stop: Stop = None,
    seed: Seed = None,
    settings: Settings = None,
) -> None:
    """Talk to a model. /new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from porcelet.types import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    text_model = _open(model, settings)
    print(f"{model}: /new starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
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


def _open(model: str, settings: list[str] | None) -> TextModel:
    from porcelet import hub
    from porcelet.config import EngineConfig, override, parse_settings

    config = override(EngineConfig(), parse_settings(settings or []), "--set")
    hub.resolve(model)  # mistakes are answered before torch is imported, which takes seconds

    from porcelet.engine.text import load

    with progress_bar(f"loading {model}") as progress:
        return load(model, config, progress)


def _answer(model: TextModel, messages: list[Message], params: SamplingParams) -> str:
    """Print an answer as it comes; the whole of it, or what there was when Ctrl-C stopped it."""
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
