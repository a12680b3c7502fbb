"""What the GPU kernels can do on each generation of NVIDIA's GPUs: compute capability, largest block of shared memory,
how tiles are loaded and FP8 is multiplied. Facts: CUDA C++ Programming Guide, table of technical specifications."""

from __future__ import annotations

from dataclasses import dataclass

OLDEST = 80  # what the kernels' matrix instructions on bfloat16 and asynchronous copies need


@dataclass(frozen=True)
class Generation:
    """One compute capability, 80 for 8.0. `shared_kib` is the most that a block may have."""

    arch: int
    name: str
    cards: str
    shared_kib: int
    has_tensor_memory_accelerator: bool = False
    multiplies_fp8: bool = False

    @property
    def is_served(self) -> bool:
        return self.arch >= OLDEST

    def __str__(self) -> str:
        """What runs there, in a line."""
        if not self.is_served:
            return f"{self.name} (sm_{self.arch}): nothing; the kernels need sm_{OLDEST}"
        loads = "the tensor memory accelerator" if self.has_tensor_memory_accelerator else "asynchronous copies"
        fp8 = "by its own instructions" if self.multiplies_fp8 else "widened to half precision"
        return f"{self.name} (sm_{self.arch}): attention loads by {loads}, FP8 is multiplied {fp8}"


GENERATIONS = (
    Generation(70, "Volta", "V100", 96),
    Generation(75, "Turing", "T4, RTX 20", 64),
    Generation(80, "Ampere", "A100, A800", 163),
    Generation(86, "Ampere", "A10, A40, RTX 30", 99),
    Generation(87, "Ampere", "Orin", 163),
    Generation(89, "Ada", "L4, L40, RTX 40", 99, multiplies_fp8=True),
    Generation(90, "Hopper", "H100, H200, H800, H20", 227, True, True),
    Generation(100, "Blackwell", "B200, GB200", 227, True, True),
    Generation(103, "Blackwell", "B300, GB300", 227, True, True),
    Generation(110, "Blackwell", "Thor", 227, True, True),
    Generation(120, "Blackwell", "RTX 50, RTX PRO 6000", 99, True, True),
    Generation(121, "Blackwell", "GB10", 99, True, True),
)


def generation_of(arch: int) -> Generation:
    """That of a compute capability; for one that is not listed the nearest older one, under its own number."""
    older = max((one for one in GENERATIONS if one.arch <= arch), key=lambda one: one.arch, default=GENERATIONS[0])
    if older.arch == arch:
        return older
    return Generation(arch, "unknown", "", older.shared_kib, older.has_tensor_memory_accelerator, older.multiplies_fp8)
