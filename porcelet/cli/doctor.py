"""`porcelet doctor`: what is right and wrong on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from porcelet.errors import InputError

if TYPE_CHECKING:
    from porcelet.doctor import Finding


def doctor(
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the model hub answers.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list of code, state, cause and remedy.")
    ] = False,
) -> None:
    """See what porcelet finds on this machine: native library, threads, memory, store, port; and what to do about it.

    Each finding is ok, a note (works, with less than it could) or a problem. Ends with exit code 1 if one is a problem.
    """
    from porcelet.doctor import examine

    findings = [*examine(network=network), _sandbox()]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(findings)))
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


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
