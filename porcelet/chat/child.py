"""The process that runs a chat template: a program that came with a model file, and may be hostile.

So it gets an immutable sandbox, no loader of other templates, little memory, and a timer of the kernel's that ends the
process in the middle of anything, should the parent not be there to do so.

It is run by its path (`sandbox.py`), imports neither torch nor porcelet, and speaks frames: four bytes of length, then
JSON. First the template's source comes in, then one frame of variables a rendering; each is answered by
{"text": ...} or {"problem": "refused" | "long" | "failed", "message": ...}.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refused(TemplateError):
    """A template called `raise_exception`: it does not take this conversation."""


class Generation(Extension):
    """`{% generation %}` marks what to train on, for `transformers`; the mask is found without it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    raise Refused(message)


def to_json(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
) -> str:
    """As in `transformers`: without Jinja's own escapes for HTML, which no model was trained on."""
    if ensure_ascii:
        raise TemplateError("tojson(ensure_ascii=true) is not supported")
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)


def parse(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def render(template: Template, values: dict[str, Any], max_characters: int) -> dict[str, str]:
    parts, length = [], 0
    for part in template.generate(**values):
        length += len(part)
        if length > max_characters:
            return {"problem": "long", "message": ""}
        parts.append(part)
    return {"text": "".join(parts)}


def answer(template: Template, values: dict[str, Any], max_characters: int) -> dict[str, str]:
    try:
        return render(template, values, max_characters)
    except Refused as refusal:
        return {"problem": "refused", "message": str(refusal)[:1000]}
    except Exception as problem:  # a template is a program from outside: it can fail in any way
        return {"problem": "failed", "message": explain(problem)}


def explain(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:1000]


def receive(stream: BinaryIO) -> Any:
    """The next frame's value; ends the process when the parent is gone."""
    header = stream.read(4)
    if len(header) < 4:
        sys.exit()
    return json.loads(stream.read(*struct.unpack("<I", header)))


def send(stream: BinaryIO, value: Any) -> None:
    body = json.dumps(value).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


def serve(incoming: BinaryIO, outgoing: BinaryIO, seconds: float, max_characters: int) -> None:
    send(outgoing, {})  # what comes now is the template's own time
    source = receive(incoming)
    template: Template | None = None
    while True:
        values = receive(incoming)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            template = template or parse(source)
        except Exception as problem:  # Python's own compiler refuses some of what Jinja lets through
            reply = {"problem": "failed", "message": "it cannot be parsed: " + explain(problem)}
        else:
            reply = answer(template, values, max_characters)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(outgoing, reply)


def main(seconds: str, max_memory: str, max_characters: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(max_memory), int(max_memory)))
    serve(sys.stdin.buffer, sys.stdout.buffer, float(seconds), int(max_characters))


if __name__ == "__main__":
    main(*sys.argv[1:])
