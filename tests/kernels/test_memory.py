"""What the process does with memory that it frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from porcelet.kernels import cpu

# Half a gigabyte in blocks above and below the C library's own limit, taken and freed; page faults of each round.
ROUNDS = """
import resource, torch
from porcelet.kernels import cpu
assert cpu.keep_freed_memory()
for _ in range(12):  # small blocks between the large ones find their places first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(size << 18) for size in (1, 4, 64, 16, 40)]
    del blocks
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not cpu.available() or sys.platform != "linux", reason="only Linux's C library can be told")
def test_kept_memory_is_taken_again_without_page_faults() -> None:
    """The first round touches every page, the last of twelve none that is new."""
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True, timeout=60)
    first, *_, last = map(int, done.stdout.split())
    assert last < first / 100
