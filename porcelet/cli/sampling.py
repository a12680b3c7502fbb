"""The options that say how tokens are drawn, the same for every command that answers.

    @sampling_options
    def generate(prompt: Prompt, params: SamplingParams = SamplingParams(max_tokens=256)) -> None: ...

typer reads a command's options off its signature, so they are written there, in the place of `params`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Annotated, Any

import typer

from porcelet.types import SamplingParams

OPTIONS: dict[str, Any] = {
    "max_tokens": Annotated[int, typer.Option(help="Longest answer, in tokens.")],
    "temperature": Annotated[float, typer.Option(help="0 always takes the likeliest token.")],
    "top_p": Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that reach this probability together.")
    ],
    "top_k": Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 is off.")],
    "min_p": Annotated[
        float, typer.Option(help="Draw from tokens of at least this part of the likeliest one's probability.")
    ],
    "repetition_penalty": Annotated[
        float, typer.Option(help="Makes tokens of the prompt and the answer less likely; 1 is off.")
    ],
    "presence_penalty": Annotated[float, typer.Option(help="Taken once from the logits of tokens in the answer.")],
    "frequency_penalty": Annotated[
        float, typer.Option(help="Taken from the logits of the answer's tokens at each use.")
    ],
    "stop": Annotated[list[str], typer.Option(help="End the answer before this text; may be given several times.")],
    "seed": Annotated[int | None, typer.Option(help="Makes the draw repeatable.")],
}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a command's parameter `params` into options; its default says what they are if they are not given."""

    def run(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in OPTIONS}
        command(**values, params=SamplingParams(**chosen | {"stop": tuple(chosen["stop"])}))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(list(_parameters(command)))  # type: ignore[attr-defined]
    return run


def _parameters(command: Callable[..., None]) -> Iterator[Parameter]:
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "params":
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
            continue
        for name, annotation in OPTIONS.items():
            default = getattr(parameter.default, name)
            shown = list(default) if isinstance(default, tuple) else default
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)
