"""Norms, gates, rotation and cache writes on a GPU, by the kernels of rows.py. Importing this registers the bodies and
does not import Triton. Those that training uses have backward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from porcelet.kernels import Key
from porcelet.kernels.attention import write_keys_values, write_latents
from porcelet.kernels.pointwise import add_rms_norm, rms_norm, rope, silu_mul
from porcelet.kernels.triton.device import FLOATS, available, serves

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WEIGHTS = ("Tensor", "Parameter")


def _is_inference(key: Key) -> bool:
    return serves(key, *WEIGHTS, dtypes=FLOATS)


def _is_served(key: Key) -> bool:
    return serves(key, *WEIGHTS, dtypes=FLOATS, trained=True)


@rms_norm.body("triton", when=_is_served, available=available)
def rms_norm_triton(x: Float[Tensor, "*rows W"], weight: Float[Tensor, "W"], eps: float) -> Float[Tensor, "*rows W"]:
    """One pass; backward the same, and sums of the weight's gradient."""
    return _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from porcelet.kernels.triton.rows import norm

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm(_rows(x), weight, eps)[0].view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from porcelet.kernels.triton.rows import norm_backward

        x, weight = ctx.saved_tensors
        x_grad, weight_grad = norm_backward(_rows(x), weight, _rows(grad), ctx.eps)
        return x_grad.view(x.shape), weight_grad, None


@add_rms_norm.body("triton", when=_is_inference, available=available)
def add_rms_norm_triton(
    first: Float[Tensor, "T W"], second: Float[Tensor, "T W"], weight: Float[Tensor, "W"], eps: float
) -> tuple[Float[Tensor, "T W"], Float[Tensor, "T W"]]:
    """The sum is normed as it is made."""
    from porcelet.kernels.triton.rows import norm

    normed, total = norm(_rows(first), weight, eps, _rows(second))
    return total, normed


@silu_mul.body("triton", when=_is_served, available=available)
def silu_mul_triton(gate: Float[Tensor, "*rows F"], up: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
    """One pass each way."""
    return _Gate.apply(gate, up)  # type: ignore[no-untyped-call]


class _Gate(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from porcelet.kernels.triton import rows

        ctx.save_for_backward(gate, up)
        return rows.gate(_rows(gate), _rows(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from porcelet.kernels.triton import rows

        gate, up = ctx.saved_tensors
        gate_grad, up_grad = rows.gate_backward(_rows(gate), _rows(up), _rows(grad))
        return gate_grad.view(gate.shape), up_grad.view(up.shape)


@rope.body("triton", when=_is_served, available=available)
def rope_triton(
    x: Float[Tensor, "T heads R"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"], interleaved: bool
) -> Float[Tensor, "T heads R"]:
    """Backward the rotation goes the other way."""
    return _Rope.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        from porcelet.kernels.triton.rows import rotate

        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(_dense(x), cos.contiguous(), sin.contiguous(), interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from porcelet.kernels.triton.rows import rotate

        cos, sin = (one.contiguous() for one in ctx.saved_tensors)
        return rotate(_dense(grad), cos, sin, ctx.interleaved, backward=True), None, None, None


@write_latents.body("triton", when=_is_inference, available=available)
def write_latents_triton(
    cache: Float[Tensor, "P page 1 CR"],
    latent: Float[Tensor, "T C"],
    k_rope: Float[Tensor, "T R"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    interleaved: bool,
    slots: Int[Tensor, "T"],
) -> None:
    """Both parts of a row in one pass."""
    from porcelet.kernels.triton.rows import write_rotated

    latents, keys = cache.split((latent.shape[1], k_rope.shape[1]), dim=-1)
    angles = cos.contiguous(), sin.contiguous()
    write_rotated(latents, keys, _dense(latent)[:, None], _dense(k_rope)[:, None], *angles, interleaved, slots)


@write_keys_values.body("triton", when=_is_inference, available=available)
def write_keys_values_triton(
    k_cache: Float[Tensor, "P page K Hd"],
    v_cache: Float[Tensor, "P page K Vd"],
    k: Float[Tensor, "T K Hd"],
    v: Float[Tensor, "T K Vd"],
    cos: Float[Tensor, "T half"],
    sin: Float[Tensor, "T half"],
    slots: Int[Tensor, "T"],
) -> None:
    """Keys and values in one pass."""
    from porcelet.kernels.triton.rows import write_rotated

    write_rotated(v_cache, k_cache, _dense(v), _dense(k), cos.contiguous(), sin.contiguous(), False, slots)


def _dense(x: Tensor) -> Tensor:
    """With neighbouring columns, which almost all have."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """[rows, width] with neighbouring columns; a view where it can be."""
    return _dense(x.flatten(0, -2) if x.dim() != 2 else x)
