"""`porcelet keys create`, `list`, `revoke`: API keys for a server that others can reach.

They are kept in the server's database, so a running server knows of a change within a few seconds. A new key is printed
once, alone on standard output; only its hash is stored.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from porcelet.server.gate.keys import Key
    from porcelet.server.gate.usage import Day

Result = TypeVar("Result")
Config = Annotated[Path | None, typer.Option("--config", help="The server's TOML file, which may name its database.")]
Limit = Annotated[int | None, typer.Option(min=1)]
UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.", rich_markup_mode=None)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; keys of one name share history.")],
    expires: Annotated[str | None, typer.Option(help="After 12h, 90d or 8w it is no longer good.")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A model it may use; several may be given; else all.")
    ] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at a time.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens of prompts and answers in all.")] = None,
    config: Config = None,
) -> None:
    """Make a key and print it, once: nobody can show it again."""
    from porcelet.server.gate import keys

    limits = keys.KeyLimits(
        models=tuple(models or ()),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        token_budget=token_budget,
    )
    end = None if expires is None else time.time() + _seconds(expires)

    def work(connection: Connection) -> tuple[Key, str, int]:
        others = sum(key.name == name for key in keys.list_keys(connection))
        return *keys.create(connection, name, limits, end), others

    key, secret, others = _in_database(config, work)
    if others:
        print(f"{name} has had {others} key(s) before; they share its history", file=sys.stderr)
    print(f"key {key.id} of {name}; it is shown this once:", file=sys.stderr)
    print(secret)


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    with_usage: Annotated[bool, typer.Option("--usage", help="What each key has used, by day and model.")] = False,
    config: Config = None,
) -> None:
    """List the keys with their limits, and what they have used."""
    from porcelet.server.gate import keys, usage

    def work(connection: Connection) -> tuple[list[Key], list[Day]]:
        return keys.list_keys(connection), usage.days(connection) if with_usage else []

    found, days = _in_database(config, work)
    if as_json:
        entries = [_entry(key) | ({"usage": _days(key.id, days)} if with_usage else {}) for key in found]
        local = {"without_key": _days("", days)} if with_usage else {}
        print(json.dumps({"keys": entries, **local}, indent=2, ensure_ascii=False))
        return
    for key in found:
        print("  ".join([key.id, key.name, _state(key), *_limits(key)]))
        _print_days(key.id, days)
    if any(day.key == "" for day in days):
        print("without a key, on this machine")
        _print_days("", days)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="A key's id, or a name to revoke all of its keys.")], config: Config = None
) -> None:
    """Revoke a key; a running server refuses it within a few seconds, and ends its logins."""
    from porcelet.server.gate import keys

    revoked = _in_database(config, lambda connection: keys.revoke(connection, key))
    for found in revoked:
        print(f"{found.id} of {found.name} is revoked")
    if not revoked:
        print(f"{key} was revoked already")


def _in_database(config: Path | None, work: Callable[[Connection], Result]) -> Result:
    from porcelet.config import read_serve_config
    from porcelet.server.store import Database, default_url

    url = read_serve_config(config, {}).server.database if config else ""
    with closing(Database.open(url or default_url())) as database:
        return database.run_now(work)


def _seconds(duration: str) -> int:
    from porcelet.errors import InputError

    found = re.fullmatch(r"([1-9][0-9]{0,4})([hdw])", duration, re.ASCII)
    if found is None:
        raise InputError(f"--expires is {duration!r}; give a number of hours, days or weeks, such as 12h, 90d or 8w")
    return int(found[1]) * UNITS[found[2]]


def _entry(key: Key) -> dict[str, Any]:
    """A key as JSON, without its hash."""
    times = {"created": key.created, "expires": key.expires, "revoked": key.revoked}
    return {"id": key.id, "name": key.name, "state": _state(key), **times, "limits": vars(key.limits)}


def _state(key: Key) -> str:
    if key.revoked is not None:
        return f"revoked {_date(key.revoked)}"
    if key.expires is None:
        return "valid"
    return f"{'valid until' if key.is_valid(time.time()) else 'expired'} {_date(key.expires)}"


def _limits(key: Key) -> list[str]:
    given = {name: value for name, value in vars(key.limits).items() if value}
    return [f"{name}={','.join(value) if isinstance(value, tuple) else value}" for name, value in given.items()]


def _days(key: str, days: Sequence[Day]) -> list[dict[str, Any]]:
    return [{"date": day.date, "model": day.model, **vars(day.amounts)} for day in days if day.key == key]


def _print_days(key: str, days: Sequence[Day]) -> None:
    for row in _days(key, days):
        print(
            "    "
            + "  ".join(f"{name}={value}" if name not in ("date", "model") else value for name, value in row.items())
        )


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
