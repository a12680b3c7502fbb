"""`porcelet doctor`: what is right and wrong on this machine."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.errors import InputError

if TYPE_CHECKING:
    from porcelet.doctor import Finding


def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Also ask whether the proxy and the model hub answer.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every byte of the stored models, and the whole database.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="The server's TOML file, for the database that it names.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list of code, state, cause and remedy.")
    ] = False,
) -> None:
    """See what porcelet finds on this machine: hardware, libraries, memory, store, database, network; and what to do.

    Each finding is ok, a note (works, with less than it could) or a problem. Ends with exit code 1 if one is a problem.
    """
    from porcelet.doctor import examine

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks characters is a finding, not the end
    findings = list(examine(network=network, deep=deep, also=[partial(_database, config, deep), _sandbox]))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(findings)))
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def _database(config: Path | None, deep: bool) -> Finding:
    """The server's database, which only the server's side can name."""
    from porcelet.config import read_serve_config
    from porcelet.doctor import Finding, told
    from porcelet.doctor.database import database
    from porcelet.server.store import SCHEMA, default_file, sqlite_file

    try:
        url = read_serve_config(config, {}).server.database if config else ""
        file = sqlite_file(url) if url else default_file()
    except InputError as problem:
        return told("database", "problem", problem)
    if file is None:
        return Finding("database", "ok", "not looked at: it is not a file of SQLite's; its own tools can tell")
    return database(file, SCHEMA, deep)


def _sandbox() -> Finding:
    """Whether programs that a model wrote can be run safely; the training side knows, which `porcelet.doctor` is below
    of."""
    from porcelet.doctor import Finding, told
    from porcelet.train.sandbox import require_sandbox

    try:
        require_sandbox(unsafe=False)
    except InputError as problem:
        return told("sandbox", "note", problem)
    return Finding("sandbox", "ok", "bubblewrap works: rewards may run what a model wrote")


def _lines(findings: list[Finding]) -> Iterator[str]:
    """The findings as a person reads them."""
    for finding in findings:
        yield f"{finding.state:<8} {finding.code:<16} {finding.cause}"
        if finding.remedy:
            yield f"{'':<25} → {finding.remedy}"
    counts = {state: sum(finding.state == state for finding in findings) for state in ("problem", "note")}
    yield ", ".join(f"{count} {state}{'' if count == 1 else 's'}" for state, count in counts.items())
