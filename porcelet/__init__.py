"""porcelet: your own DeepSeek in one Python package.

    import porcelet
    model = porcelet.load()                      # the default model; `porcelet pull` fetches it
    print(model.chat("What is the capital of France?"))

Names are imported on first use, so that `import porcelet` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from porcelet.engine.engine import Engine
    from porcelet.engine.text import load
    from porcelet.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams", "__version__", "load"]

_HOMES = {"load": "porcelet.engine.text", "Engine": "porcelet.engine.engine", "SamplingParams": "porcelet.types"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'porcelet' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
