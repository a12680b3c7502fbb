"""The memory of an engine process, as the system counts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from porcelet import hub
from porcelet.errors import ModelError

PROGRAM = """
import sys
from pathlib import Path
import porcelet.engine.worker  # what an engine process imports
from porcelet.config import EngineConfig
from porcelet.engine.engine import Engine
from porcelet.types import SamplingParams

def pss():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

before = pss()
engine = Engine.load(Path(sys.argv[1]), EngineConfig(weights="auto", speculation="off"))
prompt = [100 + 7 * i % 40000 for i in range(2000)]
engine.generate([prompt], SamplingParams(max_tokens=48, ignore_eos=True, temperature=0))
cache = sum(layer.untyped_storage().nbytes() for layers in engine.runner.cache for layer in layers)
page = cache / engine.stats()["num_pages"]
print(before, pss() - before, 32 * page, "llguidance" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell")
def test_an_engine_holds_little_beside_weights_and_cache() -> None:
    """With 2,048 tokens of the default model cached: its file, the pages in use, and 50 MB; what only constrained
    answers need is not loaded."""
    try:
        path = hub.resolve(hub.DEFAULT_MODEL)
    except ModelError:
        pytest.skip("the default model is not in the store")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    imports, grown, pages, has_grammars = done.stdout.split()
    assert float(grown) < path.stat().st_size + float(pages) + 50e6, (imports, grown, pages)
    assert has_grammars == "False"
