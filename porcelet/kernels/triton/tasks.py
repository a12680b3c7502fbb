"""Tasks that several kernels do on a GPU: ours in Triton, ours for one generation, and vendors' where they are
installed. A call goes to the one that was taken, where that one can serve it, and else to ours in Triton, which can
serve all. Which is taken is measured (`porcelet.engine.contest`); until then it is ours in Triton.

A vendor's attention may cut a sequence by what else is in the batch, so a token's last bits can depend on its company
then; with ours they do not. `PORCELET_KERNELS=own` never takes a vendor's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from porcelet.errors import InputError
from porcelet.kernels.triton.device import arch_of

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from porcelet.kernels.linear import FP8Weight
    from porcelet.kernels.triton.matmul import FP8Rows

P = ParamSpec("P")
R = TypeVar("R")
OWN = "triton"  # the kernel that every task has
WORKSPACE = 128 << 20  # bytes that flashinfer asks for


@dataclass(frozen=True)
class Rival(Generic[P, R]):
    """Another kernel: for which generations (90 for compute capability 9.0), of which package, and which calls it
    serves."""

    function: Callable[P, R]
    archs: tuple[int, ...]
    package: str | None  # None is ours
    serves: Callable[..., bool]


class Task(Generic[P, R]):
    """Calls our kernel in Triton, or the rival that was taken."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.name: str = function.__name__
        self.own = function
        self.rivals: dict[str, Rival[P, R]] = {}
        self.taken = OWN

    def rival(
        self, name: str, *, archs: tuple[int, ...], package: str | None, serves: Callable[..., bool]
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register another kernel for the task."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.rivals[name] = Rival(function, archs, package, serves)
            return function

        return register

    def names(self, device: torch.device) -> list[str]:
        """What could be taken on `device`: of its generation, installed, and allowed."""
        arch, only_own = arch_of(device), os.environ.get("PORCELET_KERNELS") == "own"
        return [OWN] + [
            name
            for name, rival in self.rivals.items()
            if arch in rival.archs and (rival.package is None or (not only_own and find_spec(rival.package)))
        ]

    def take(self, name: str) -> None:
        """From now on.

        Raises:
            InputError: the task has no such kernel.
        """
        if name != OWN and name not in self.rivals:
            raise InputError(f"{self.name} has no kernel {name!r}; it has {', '.join((OWN, *self.rivals))}")
        self.taken = name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.taken != OWN and self.rivals[self.taken].serves(*args, **kwargs):
            return self.rivals[self.taken].function(*args, **kwargs)
        return self.own(*args, **kwargs)


TASKS: dict[str, Task[Any, Any]] = {}


def task(function: Callable[P, R]) -> Task[P, R]:
    """Make our kernel the first of a task, and enter it in the table of tasks."""
    made = Task(function)
    TASKS[made.name] = made
    return made


# ---- MLA's absorbed attention ---------------------------------------------------------------------------------------


@task
def latent_attention(
    q: Float[Tensor, "T H CR"],
    cache: Float[Tensor, "P page K CR"],
    num_values: int,
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
    *,
    causal: bool = True,
) -> tuple[Float[Tensor, "T H C"], Float[Tensor, "T H"]]:
    """`attention.attend` over keys whose first `num_values` columns are the values: results and log-sum-exps."""
    from porcelet.kernels.triton.attention import attend

    return attend(q, cache, num_values, offsets, lengths, tables, scale, causal=causal)


def _fits_hopper(q: Tensor, cache: Tensor, num_values: int, *past: Any, causal: bool = True) -> bool:
    from porcelet.kernels.triton.hopper import fits

    return fits(q, cache, num_values)


@latent_attention.rival("gluon", archs=(90,), package=None, serves=_fits_hopper)
def _by_gluon(
    q: Tensor,
    cache: Tensor,
    num_values: int,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    from porcelet.kernels.triton.hopper import attend

    return attend(q, cache, offsets, lengths, tables, scale, causal=causal)


def _fits_flash_mla(
    q: Tensor, cache: Tensor, num_values: int, offsets: Tensor, lengths: Tensor, *past: Any, causal: bool = True
) -> bool:
    """With as many tokens as sequences each has one, which the device need not be asked for."""
    is_latent = num_values == 512 and q.shape[2] == 576 and cache.shape[1] == 64
    return is_latent and q.dtype == cache.dtype and q.element_size() == 2 and len(q) == len(lengths)


@latent_attention.rival("flash_mla", archs=(90,), package="flash_mla", serves=_fits_flash_mla)
def _by_flash_mla(
    q: Tensor,
    cache: Tensor,
    num_values: int,
    offsets: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    import flash_mla

    metadata, splits = flash_mla.get_mla_metadata()
    past = cache, tables.int(), lengths.int(), num_values, metadata, splits
    out, lse = flash_mla.flash_mla_with_kvcache(q[:, None], *past, softmax_scale=scale, causal=causal)
    return out[:, 0], lse[:, :, 0]


# ---- grouped queries ------------------------------------------------------------------------------------------------


@task
def grouped_attention(
    q: Float[Tensor, "T H Hd"],
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    offsets: Int[Tensor, "B1"],
    lengths: Int[Tensor, "B"],
    tables: Int[Tensor, "B max_pages"],
    scale: float,
) -> Float[Tensor, "T H Vd"]:
    """`attention.attend` over keys and values of their own."""
    from porcelet.kernels.triton.attention import attend

    return attend(q, k_cache, v_cache, offsets, lengths, tables, scale)[0]


def _fits_flashinfer(q: Tensor, k_cache: Tensor, v_cache: Tensor, offsets: Tensor, lengths: Tensor, *past: Any) -> bool:
    """Of pages that lie as the engine's do, a head's tokens together."""
    has_width = q.shape[2] == v_cache.shape[3] and q.shape[2] in (64, 128, 256) and q.element_size() == 2
    lie_well = all(pages.transpose(1, 2).is_contiguous() for pages in (k_cache, v_cache))
    return has_width and lie_well and len(q) == len(lengths)


@grouped_attention.rival("flashinfer", archs=(90, 100, 103, 120, 121), package="flashinfer", serves=_fits_flashinfer)
def _by_flashinfer(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, offsets: Tensor, lengths: Tensor, tables: Tensor, scale: float
) -> Tensor:
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    pages = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    past = _workspace(q.device), tables.int(), lengths.int(), tables.shape[1] * k_cache.shape[1]
    out: Tensor = trtllm_batch_decode_with_kv_cache(q, pages, *past, bmm1_scale=scale, bmm2_scale=1.0, kv_layout="HND")
    return out


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


# ---- FP8 by FP8 -----------------------------------------------------------------------------------------------------


@task
def fp8_product(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> Float[Tensor, "M N"]:
    """A [M, K] · B [N, K]ᵀ with scales a row and 128 columns, and a block of 128 · 128."""
    from porcelet.kernels.triton.matmul import launch

    c = torch.empty(len(a.values), b.shape[-2], dtype=dtype, device=a.values.device)
    return launch(a, b, c)


def _fits_tensor_memory(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> bool:
    from porcelet.kernels.triton.hopper_products import fits

    return b.values.dim() == 2 and fits(a, b, dtype)


@fp8_product.rival("gluon", archs=(90,), package=None, serves=_fits_tensor_memory)
def _product_by_gluon(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> Tensor:
    from porcelet.kernels.triton.hopper_products import multiply_fp8

    return multiply_fp8(a, b, dtype)


def _fits_deep_gemm(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> bool:
    """Its own shapes; what does not fit together is ours to refuse."""
    (M, K), N = a.values.shape, b.shape[-2]
    return b.shape[-1] == K and K % 128 == N % 64 == 0 and dtype == torch.bfloat16 and M > 0


@fp8_product.rival(
    "deep_gemm",
    archs=(90,),
    package="deep_gemm",
    serves=lambda a, b, dtype: b.values.dim() == 2 and _fits_deep_gemm(a, b, dtype),
)
def _product_by_deep_gemm(a: FP8Rows, b: FP8Weight, dtype: torch.dtype) -> Tensor:
    import deep_gemm

    c = torch.empty(len(a.values), b.shape[0], dtype=dtype, device=a.values.device)
    deep_gemm.fp8_gemm_nt((a.values, a.scale), (b.values, b.scale), c)
    return c


@task
def fp8_experts(
    a: FP8Rows, b: FP8Weight, experts: Int[Tensor, "M"], aligned: int, dtype: torch.dtype
) -> Float[Tensor, "M N"]:
    """Each row of A [M, K] by its expert's matrix of B [E, N, K], as `matmul.multiply_contiguous` says."""
    from porcelet.kernels.triton.matmul import launch

    c = torch.empty(len(a.values), b.shape[-2], dtype=dtype, device=a.values.device)
    return launch(a, b, c, experts, most_rows=aligned)


def _fits_tensor_memory_grouped(a: FP8Rows, b: FP8Weight, experts: Tensor, aligned: int, dtype: torch.dtype) -> bool:
    from porcelet.kernels.triton.hopper_products import fits

    return b.values.dim() == 3 and fits(a, b, dtype)


@fp8_experts.rival("gluon", archs=(90,), package=None, serves=_fits_tensor_memory_grouped)
def _experts_by_gluon(a: FP8Rows, b: FP8Weight, experts: Tensor, aligned: int, dtype: torch.dtype) -> Tensor:
    from porcelet.kernels.triton.hopper_products import multiply_fp8

    return multiply_fp8(a, b, dtype, experts, aligned)


@fp8_experts.rival(
    "deep_gemm",
    archs=(90,),
    package="deep_gemm",
    serves=lambda a, b, experts, aligned, dtype: (
        b.values.dim() == 3 and aligned == 128 and _fits_deep_gemm(a, b, dtype)
    ),
)
def _experts_by_deep_gemm(a: FP8Rows, b: FP8Weight, experts: Tensor, aligned: int, dtype: torch.dtype) -> Tensor:
    import deep_gemm

    c = torch.empty(len(a.values), b.shape[-2], dtype=dtype, device=a.values.device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((a.values, a.scale), (b.values, b.scale), c, experts)
    return c
