"""A process whose memory is measured: `python -m tests.memory.memory_of engine|train JSON` prints its VmHWM in bytes.

VmHWM is the kernel's own record of the most that was resident, mapped files included: it misses no short peak, as
sampling would, and it is what a limit on the process is compared with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_of(kind: str, **settings: Any) -> int:
    """The peak of a fresh process."""
    command = [sys.executable, "-m", "tests.memory.memory_of", kind, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def _serve(path: str, engine: dict[str, Any], work: list[int]) -> None:
    """Fill cache and steps: `work` is the number of prompts, their length and how much is answered."""
    import porcelet.engine.worker  # noqa: F401  what an engine process imports
    from porcelet.config import EngineConfig
    from porcelet.engine.engine import Engine
    from porcelet.types import SamplingParams

    made = Engine.load(Path(path), EngineConfig(**engine))
    count, length, num_new = work
    size = made.model.config.vocab_size
    prompts = [[(7 * i + 13 * j) % size for i in range(length)] for j in range(count)]
    made.generate(prompts, SamplingParams(max_tokens=num_new, ignore_eos=True))


def _train(tables: dict[str, Any]) -> None:
    from porcelet.train.loop import train
    from porcelet.train.recipe import combine

    train(*combine((tables, "the test's recipe"), words={}))


def main() -> None:
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    {"engine": _serve, "train": _train}[kind](**settings)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))


if __name__ == "__main__":
    main()
