"""Products over packed weights in Triton against what the weights stand for: interpreted on the CPU, or on a GPU.

The interpreter multiplies bfloat16 wrongly, so float16 stands for it there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from porcelet.errors import InputError
from porcelet.kernels import Key
from porcelet.kernels.experts import PackedExperts, experts
from porcelet.kernels.linear import KINDS, PackedHeads, PackedWeight, linear
from porcelet.kernels.triton import products
from tests.kernels.cases import packed_experts, packed_weight

pytest.importorskip("triton")
from porcelet.kernels.triton.packed import multiply_packed, multiply_packed_contiguous  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def moved(weight: PackedWeight) -> PackedWeight:
    return type(weight)(weight.packed.to(DEVICE), weight.shape)


def close(found: Tensor, wanted: Tensor) -> None:
    """Up to the result's own rounding."""
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().mean()))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("shape", [(1, 136, 256), (5, 64, 1120), (70, 50, 96)], ids=str)
def test_products_equal_what_the_weights_stand_for(shape: tuple[int, int, int], kind: type[PackedWeight]) -> None:
    """Few rows and many, tiles that are not full, K in one part and in several; activations are not rounded."""
    M, N, K = shape
    weight, x = moved(packed_weight(N, K, kind)), torch.randn(M, K, device=DEVICE, dtype=HALF)
    found = products.linear_triton(x, weight)
    assert found.dtype == HALF
    close(found, x.double() @ weight.dequantize().double().T)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The same bits alone and among seventy."""
    weight, x = moved(packed_weight(130, 384)), torch.randn(70, 384, device=DEVICE, dtype=HALF)
    whole = multiply_packed(x, weight.packed, 130)
    for row in (0, 40, 69):
        assert torch.equal(multiply_packed(x[row : row + 1], weight.packed, 130)[0], whole[row])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_experts_equal_what_their_weights_stand_for(tokens: int, kind: type[PackedWeight]) -> None:
    """Gate and up of one kind, down of another; some experts have no token."""
    E, D, F = 6, 64, 96
    stacks = packed_experts(E, 2, F, D, kind), packed_experts(E, 1, D, F, KINDS[2])
    gate_up, down = (PackedExperts(stack.packed.to(DEVICE), stack.shape) for stack in stacks)
    x = torch.randn(tokens, D, device=DEVICE, dtype=HALF) / 4
    indices, weights = torch.rand(tokens, E - 1).topk(3).indices.to(DEVICE), torch.rand(tokens, 3, device=DEVICE)
    found = products.experts_triton(x, gate_up, down, indices, weights)
    wide = [torch.stack([stack.dequantize(e) for e in range(E)]) for stack in (gate_up, down)]
    wanted = experts.reference(x.float(), *wide, indices, weights).double()
    assert 1 - 2 * (found.double() * wanted).sum() / (found.double() ** 2 + wanted**2).sum() < 1e-5


def test_what_does_not_belong_together_is_refused() -> None:
    """Other widths, other numbers of rows, and groups that are none."""
    weight, x = moved(packed_weight(40, 64)), torch.randn(3, 96, device=DEVICE, dtype=HALF)
    with pytest.raises(InputError, match=r"rows \[3, 96\] do not meet 3 tiles of 2 groups"):
        multiply_packed(x, weight.packed, 40)
    with pytest.raises(InputError, match="do not meet"):
        multiply_packed(x[:, :64], weight.packed, 60)
    with pytest.raises(InputError, match="128 are a group"):
        owners = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        multiply_packed_contiguous(x[:, :64], weight.packed[None], 40, owners)
    assert multiply_packed(x[:0, :64], weight.packed, 40).shape == (0, 40)


def test_bodies_serve_every_packed_kind_on_gpus() -> None:
    """Of linear layers and of experts; heads are widened when a model is moved."""
    for an_op, formats in ((linear, [kind.__name__ for kind in KINDS]), (experts, [PackedExperts.__name__])):
        body = next(one for one in an_op.bodies if one.name == "triton")
        for form in formats:
            assert body.when(Key("cuda", form, torch.bfloat16, False))
            assert not body.when(Key("cpu", form, torch.bfloat16, False))
        assert not body.when(Key("cuda", PackedHeads.__name__, torch.bfloat16, False))
