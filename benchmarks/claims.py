"""Every figure that README and docs publish, the result line it comes from, and what it measures now.

    python -m benchmarks.claims            list and compare with results.jsonl
    python -m benchmarks.claims --rerun    measure again what this machine can, and show both

A figure stands in the text before an invisible mark that names its source, benchmark and path within `results`:

    about 80<!-- decode:stored_1.decode --> tokens/s

The newest line of that benchmark must hold that number, rounded as the text writes it. A number with a unit of speed
and without a mark is a claim without a source: both are errors.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, portable

ROOT = RESULTS.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLAIM = re.compile(r"((?:(?<!\w)-)?(?:\d[\d,.]*\d|\d))<!-- ([a-z0-9_]+):([\w.]+) -->")
# A measured-looking number: what follows makes it a speed, a time, a share or a ratio.
UNIT = re.compile(r"(?<![\w.:<])(\d[\d,.]*)(?: ?(?:tokens/s|tok/s|GB/s|GOP/s|GFLOP/s|TOP/s|µs|ms)\b|×)")
# The log tells history, each entry with its own date; its figures are not compared with today's.
WITHOUT_UNIT_CHECK = {"log.md"}


@dataclass(frozen=True)
class Claim:
    """A figure in a text and where it says it comes from."""

    place: str
    text: str
    benchmark: str
    path: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rerun", action="store_true", help="run each cited benchmark once more on this machine")
    options = parser.parse_args()
    claims = [claim for page in PAGES for claim in claims_of(page)]
    lines = newest_lines()
    cited = sorted({claim.benchmark for claim in claims} & set(lines))
    fresh = {name: line for name in cited if (line := rerun(name, lines[name]))} if options.rerun else {}
    problems = [problem for page in PAGES for problem in unmarked(page)]
    for claim in claims:
        problem = mismatch(claim, lines)
        problems += [problem] if problem else []
        source = lines.get(claim.benchmark, {})
        now = value_at(fresh.get(claim.benchmark, {}), claim.path)
        again = "" if now is None else f"  now {now:g}"
        where = f"{claim.benchmark}:{claim.path}"
        print(
            f"{claim.place:24} {claim.text:>9}  {where:52} {source.get('date', '?')} {source.get('commit', '?')}{again}"
        )
    print(f"{len(claims)} figures, {len(problems)} problems")
    if problems:
        sys.exit("\n".join(problems))


def claims_of(page: Path) -> Iterator[Claim]:
    """The marked figures of one page, in order."""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        for text, benchmark, path in CLAIM.findall(line):
            yield Claim(f"{page.relative_to(ROOT)}:{number}", text, benchmark, path)


def unmarked(page: Path) -> Iterator[str]:
    """Complaints about figures with a unit of speed or a ratio and without a source."""
    if page.name in WITHOUT_UNIT_CHECK:
        return
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        for text in UNIT.findall(line):
            yield f"{page.relative_to(ROOT)}:{number}: {text} has a unit and no source; benchmarks/claims.py says how"


def newest_lines() -> dict[str, dict[str, Any]]:
    """The last line of each benchmark in results.jsonl."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {line["benchmark"]: line for line in map(json.loads, lines)}


def value_at(line: dict[str, Any], path: str) -> float | None:
    """The number at `a.b.c` within a line's results; None if there is none."""
    node: Any = line.get("results")
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return None if node is None else float(node)


def mismatch(claim: Claim, lines: dict[str, dict[str, Any]]) -> str | None:
    """Why a claim does not follow from the results, if it does not."""
    value = value_at(lines.get(claim.benchmark, {}), claim.path)
    if value is None:
        return f"{claim.place}: results.jsonl has no {claim.benchmark}:{claim.path}"
    plain = claim.text.replace(",", "")
    places = len(plain.partition(".")[2])
    # As the text rounds: to its decimals, or, where it ends in zeros, to the digits before them.
    zeros = 0 if places else len(plain) - len(plain.rstrip("0"))
    if abs(value - float(plain)) > 0.5 * 10 ** (zeros - places) * (1 + 1e-9):
        return f"{claim.place}: the text says {claim.text}, {claim.benchmark}:{claim.path} measured {value:g}"
    return None


def rerun(name: str, line: dict[str, Any]) -> dict[str, Any] | None:
    """Run a benchmark again as its line was made; its new line, or None, with a word, where it cannot run."""
    module = name.partition("_")[0]  # one of several that a module measures has its arguments besides
    command = [sys.executable, "-m", f"benchmarks.{module}", *portable(line.get("arguments", []))]
    print(f"running {name} ...", file=sys.stderr)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} cannot run here: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    fresh: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return fresh


if __name__ == "__main__":
    main()
