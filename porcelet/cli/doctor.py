"""`porcelet doctor`: what is right and wrong on this machine."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

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
        Path | None, typer.Option("--config", help="The server's TOML file: for its database, and for the bundle.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Also write a ZIP file for whoever helps, without what is private.")
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option("--log", help="A file with the server's standard error, for the bundle."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list of code, state, cause and remedy.")
    ] = False,
) -> None:
    """See what porcelet finds on this machine: hardware, libraries, memory, store, database, network; and what to do.

    Each finding is ok, a note (works, with less than it could) or a problem. Ends with exit code 1 if one is a problem.
    """
    from porcelet.doctor import examine
    from porcelet.doctor.bundle import check_free

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks characters is a finding, not the end
    if bundle is not None:
        check_free(bundle)
    elif log is not None:
        raise InputError(f"--log {log} was given without --bundle; add --bundle FILE.zip")
    findings = list(examine(network=network, deep=deep, also=[partial(_database, config, deep), _sandbox]))
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(findings)))
    if bundle is not None:
        _pack(bundle, findings, log, config, sys.stderr if as_json else sys.stdout)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def _pack(file: Path, findings: list[Finding], log: Path | None, config: Path | None, output: TextIO) -> None:
    """Write the bundle, and say what is in it and what was taken out."""
    from porcelet.doctor.bundle import REDACTIONS, contents, write

    texts = contents(findings, log, config)
    size = write(file, texts)
    print(f"\n{file}: {size:,} bytes", file=output)
    for name, text in texts.items():
        print(f"  {name:<18} {len(text.encode()):>8,} bytes", file=output)
    taken = json.loads(texts[REDACTIONS])
    kinds = ", ".join(f"{count} {kind}" for kind, count in taken["taken_out"].items()) or "nothing"
    print(f"taken out: {kinds}; {taken['lines_of_the_log_left_out']} lines of the log", file=output)
    print("Nothing was sent. Look through it before you do.", file=output)


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
