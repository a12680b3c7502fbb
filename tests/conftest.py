"""Shapes are checked in tests: every function of the kernels and models with a jaxtyping annotation is wrapped.

The package imports jaxtyping for type checkers only, so the names its annotations use are made known here. Without a
GPU Triton's kernels are interpreted, which Triton decides when it is first imported.
"""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

for name in ("Float", "Float16", "Int", "Shaped", "UInt8"):
    setattr(builtins, name, getattr(jaxtyping, name))
# Not the package kernels itself: it holds no shapes, and its dispatch is timed.
OP_FILES = ("attention", "cpu", "experts", "linear", "loss", "pointwise", "sample")
HOOKED = tuple(f"porcelet.kernels.{name}" for name in OP_FILES) + ("porcelet.models", "porcelet.weights.quantize")
jaxtyping.install_import_hook(HOOKED, "beartype.beartype")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real default model, from the store that `make test` fills. Its absence is a failure, not a reason to skip."""
    from porcelet import hub

    return hub.resolve(hub.DEFAULT_MODEL)
