"""Gates and draws on a GPU, by the kernels of select.py. Importing this registers the bodies and does not import
Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porcelet.kernels import Key
from porcelet.kernels.experts import route, route_softmax
from porcelet.kernels.sample import sample
from porcelet.kernels.triton.device import available, serves

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def _is_served(key: Key) -> bool:
    return serves(key, key.format, dtypes=(torch.float32,))


@route.body("triton", when=_is_served, available=available)
def route_triton(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, "E"],
    num_groups: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """A token a program."""
    from porcelet.kernels.triton.select import gate

    return gate(logits, bias.float(), num_groups, topk_group, top_k, scale, normalize=normalize)


@route_softmax.body("triton", when=_is_served, available=available)
def route_softmax_triton(
    logits: Float[Tensor, "T E"], num_groups: int, topk_group: int, top_k: int, scale: float
) -> tuple[Int[Tensor, "T A"], Float[Tensor, "T A"]]:
    """A token a program."""
    from porcelet.kernels.triton.select import gate

    return gate(logits, None, num_groups, topk_group, top_k, scale, normalize=False)


@sample.body("triton", when=_is_served, available=available)
def sample_triton(
    logits: Float[Tensor, "rows V"],
    rows: Int[Tensor, "B"],
    temperature: Float[Tensor, "B"],
    top_k: Int[Tensor, "B"],
    top_p: Float[Tensor, "B"],
    min_p: Float[Tensor, "B"],
    uniform: Float[Tensor, "B"],
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """A draw a program, without a sort and without asking the device."""
    from porcelet.kernels.triton.select import draw

    return draw(logits, rows, temperature, top_k, top_p, min_p, uniform)
