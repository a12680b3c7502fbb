"""The end of a server's log, as far as it can be shown: lines whose form is known not to hold what people wrote.

The server logs no prompt and no answer, but other libraries and other programs may write into the same file. So of JSON
lines known fields of porcelet's own loggers are kept, of plain lines those that begin as porcelet's do, and of
tracebacks the places and the kind of the exception, not its message. Other lines are counted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from porcelet.errors import InputError

MOST_BYTES = 1 << 20
MOST_LINES = 1000
MOST_LETTERS = 500  # of a line
FIELDS = (
    *("time", "level", "logger", "message", "request_id", "kind", "exception"),
    *("method", "route", "status", "seconds", "prompt_tokens", "generated_tokens"),
)
LONG_QUOTE = re.compile(r"(['\"])(?:(?!\1).){60,}\1")  # a library's error may quote what it could not read
PLAIN = re.compile(
    r"(?:[A-Z]{3,7}|\(other\)) \S+ \d{3} in [\d.]+ s$"  # a request
    r"|(?:porcelet: |warning: |serving |ending: |the engine |the database |loading )"
    r"|Traceback \(most recent|  File \"[^\"]+\", line \d+, in "
)
EXCEPTION = re.compile(r"((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?::|$)")


def tail(file: Path) -> tuple[list[str], int]:
    """The last lines that can be shown, the oldest first; how many others were there.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with file.open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(size - MOST_BYTES, 0))
            text = log.read().decode("utf-8", errors="replace")
    except OSError as problem:
        cause = f"{file} cannot be read: {problem.strerror}"
        raise InputError(f"{cause}; --log takes a file with the server's standard error") from problem
    lines = text.splitlines()[size > MOST_BYTES :]  # the first one is cut
    shown = [kept for line in lines[-MOST_LINES:] if (kept := _shown(line))]
    return shown, len(lines) - len(shown)


def _shown(line: str) -> str:
    """What of a line can be shown; empty for nothing."""
    if line.startswith("{"):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return ""
        return _json(fields) if isinstance(fields, dict) else ""
    if PLAIN.match(line):
        return _cut(line)
    exception = EXCEPTION.match(line)
    return exception[1] if exception else ""


def _json(fields: dict[str, object]) -> str:
    if str(fields.get("logger", "")).partition(".")[0] not in ("porcelet", "uvicorn"):
        return ""
    kept = {name: fields[name] for name in FIELDS if isinstance(fields.get(name), str | int | float)}
    shown = {name: _cut(value) if isinstance(value, str) else value for name, value in kept.items()}
    if "exception" in kept:
        shown["exception"] = "\n".join(filter(None, map(_shown, str(kept["exception"]).splitlines())))
    return json.dumps(shown, ensure_ascii=False)


def _cut(line: str) -> str:
    return LONG_QUOTE.sub(r"\1…\1", line)[:MOST_LETTERS]
