"""Native bodies for the CPU, in C++: for AVX-512 VNNI, AVX-512, AVX-VNNI, AVX2 or any processor, chosen at run time.

Each is written once, as a function that appends an instruction to a program. As an op's instruction it appends to the
step under way (kernels/record.py); as an op's body, to a program of its own that runs at once.

Importing this package registers them on their ops. An installation that found no C++ compiler has no native module and
keeps the torch bodies. PORCELET_ISA in the environment names a lesser instruction set, for tests and comparison.
"""

from __future__ import annotations

from porcelet.kernels.cpu import (  # noqa: F401  register themselves
    gradients,
    gradients_experts,
    gradients_loss,
    latent,
    paged,
    pointwise,
    rows,
)
from porcelet.kernels.cpu.matrices import (
    experts_float,
    experts_fp8,
    heads_linear_float,
    linear_float,
    linear_fp8,
    linear_packed,
)
from porcelet.kernels.cpu.packed import attention_packed_float
from porcelet.kernels.cpu.sampling import sample_cpu
from porcelet.kernels.cpu.target import (
    available,
    isa,
    isas,
    keep_freed_memory,
    new_program,
    new_residency,
    return_freed_memory,
)

__all__ = [
    "attention_packed_float",
    "available",
    "experts_float",
    "experts_fp8",
    "heads_linear_float",
    "isa",
    "isas",
    "keep_freed_memory",
    "linear_float",
    "linear_fp8",
    "linear_packed",
    "new_program",
    "new_residency",
    "return_freed_memory",
    "sample_cpu",
]
