"""`python -m benchmarks.shapes`: see the package."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import ModuleType

from benchmarks import shapes
from benchmarks.harness import processor_times, report, stolen_share
from benchmarks.shapes import balance, experts, grpo, mtp, muon, traces
from benchmarks.shapes.trials import Setting, results, table

SHAPES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module for module in (balance, experts, muon, mtp, traces, grpo)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=shapes.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs; the numbers mean nothing"
    )
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    if options.seeds < 1 or (options.quick and options.append):
        parser.error("at least one seed is needed, and what --quick measures is nothing to keep")
    before = processor_times()
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES[options.name].measure(Setting(Path(folder), options.seeds, options.quick))
    note = {"stolen_percent": round(100 * stolen_share(before, processor_times()), 2), **shape.facts}
    print(table(shape))
    report(f"shapes_{options.name}", vars(options), results(shape), note, append=options.append)


if __name__ == "__main__":
    main()
