"""Which calls the GPU kernels serve, and whether this machine has what they need.

`PORCELET_KERNELS=interpreted`, with TRITON_INTERPRET=1, runs them on CPU tensors through Triton's interpreter: for
tests, thousands of times slower.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from porcelet.errors import InputError
from porcelet.kernels import Key
from porcelet.kernels.generations import generation_of

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def serves(key: Key, *formats: str, dtypes: tuple[torch.dtype, ...] = HALVES, trained: bool = False) -> bool:
    """Whether a call's tensors are on a GPU, of one of the types and formats, and without gradients unless the kernel
    can be trained through."""
    kind = "cpu" if _is_interpreted() else "cuda"
    return key.device == kind and key.dtype in dtypes and key.format in formats and (trained or not key.needs_grad)


def available() -> bool:
    """Triton, and an NVIDIA GPU of Ampere's or a later generation."""
    return _is_interpreted() or _has_gpu()


def arch_of(device: torch.device) -> int:
    """80 for compute capability 8.0. Raises InputError for what is no GPU."""
    if _is_interpreted():
        return 80
    if device.type != "cuda":
        raise InputError(f"tensors are on {device}, and these kernels run on NVIDIA GPUs; move them to one")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    """How many blocks of the largest kind run at once."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _is_interpreted() -> bool:
    return os.environ.get("PORCELET_KERNELS") == "interpreted"


def why_not() -> str:
    """Why this machine's GPU cannot run the kernels, were Triton installed; nothing if it can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.cuda is None:
        return "the GPU is none of NVIDIA's"
    generation = generation_of(arch_of(torch.device("cuda")))
    return "" if generation.is_served else f"the GPU is {generation}"


@cache
def _has_gpu() -> bool:
    return not why_not() and find_spec("triton") is not None
