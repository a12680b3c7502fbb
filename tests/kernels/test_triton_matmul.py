"""Products over FP8 and half-precision weights in Triton against their definitions: interpreted on the CPU in small
shapes, DeepGEMM's own shapes on a GPU.

The interpreter multiplies bfloat16 wrongly, so float16 stands for it there, and it widens FP8, as cards do that have no
instructions for it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from porcelet.errors import InputError
from porcelet.kernels import Key
from porcelet.kernels.experts import experts
from porcelet.kernels.linear import FP8_BLOCK, FP8Operand, FP8Weight, linear
from porcelet.kernels.triton import products

pytest.importorskip("triton")
from porcelet.kernels.triton import matmul  # noqa: E402
from porcelet.kernels.triton.matmul import (  # noqa: E402
    FP8Rows,
    multiply,
    multiply_contiguous,
    multiply_masked,
    quantize_rows,
)

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
HALF = torch.bfloat16 if HAS_GPU else torch.float16
SHAPES = [(1, 136, 256), (5, 64, 1100), (17, 130, 384), (70, 192, 128)]  # rows, rows of weights, columns
# DeepGEMM's (N, K), of V3's layers.
WIDE = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
FORMATS = ["fp8", "weights", "half"]


@pytest.fixture(autouse=True)
def arch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU that of Ampere, whose kernels widen."""
    torch.manual_seed(0)
    if not HAS_GPU:
        monkeypatch.setattr(matmul, "arch_of", lambda device: 80)


def fp8_weight(*shape: int) -> FP8Weight:
    """Random, each block by its largest magnitude."""
    values = torch.randn(*shape, device=DEVICE) * torch.rand(*shape[:-1], 1, device=DEVICE)
    *stack, N, K = shape
    blocks = -(-N // FP8_BLOCK), -(-K // FP8_BLOCK)
    padded = torch.zeros(*stack, blocks[0] * FP8_BLOCK, blocks[1] * FP8_BLOCK, device=DEVICE)
    padded[..., :N, :K] = values
    scale = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK)).abs().amax((-3, -1)) / 448
    wide = scale.repeat_interleave(FP8_BLOCK, -1).repeat_interleave(FP8_BLOCK, -2)[..., :N, :K]
    return FP8Weight((values / wide).to(torch.float8_e4m3fn), scale)


def widened(rows: FP8Rows) -> Tensor:
    scale = rows.scale.repeat_interleave(FP8_BLOCK, -1)[..., : rows.values.shape[-1]]
    return rows.values.float() * scale


def operands(form: str, rows: tuple[int, ...], weights: tuple[int, ...]) -> tuple[Tensor | FP8Rows, Tensor | FP8Weight]:
    """What is multiplied: both in FP8, only the weights, or neither."""
    x = torch.randn(*rows, device=DEVICE, dtype=HALF)
    if form == "fp8":
        quantized = quantize_rows(x.flatten(0, -2))
        values, scale = quantized.values.view(rows), quantized.scale.view(*rows[:-1], -1)
        return FP8Rows(values, scale), fp8_weight(*weights)
    return x, fp8_weight(*weights) if form == "weights" else torch.randn(*weights, device=DEVICE, dtype=HALF)


def exact(a: Tensor | FP8Rows, b: Tensor | FP8Weight) -> Tensor:
    left = widened(a) if isinstance(a, FP8Rows) else a.float()
    right = b.dequantize() if isinstance(b, FP8Weight) else b.float()
    return left.double() @ right.double().mT


def difference(found: Tensor, wanted: Tensor) -> float:
    """DeepGEMM's metric: 0 for what is the same up to nothing, below 1e-3 for FP8's own rounding."""
    x, y = found.double(), wanted.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


@pytest.mark.parametrize("power_of_two", [False, True])
def test_rows_round_as_torch_rounds_them(power_of_two: bool) -> None:
    """The same bytes as torch's own conversion, ties and numbers below the smallest normal one among them."""
    x = torch.randn(9, 300, device=DEVICE, dtype=HALF) * torch.logspace(-3, 2, 9, device=DEVICE, dtype=HALF)[:, None]
    x[0, :16] = torch.arange(16, device=DEVICE) / 8 + 1  # ties
    rows = quantize_rows(x, power_of_two=power_of_two)
    padded = torch.nn.functional.pad(x.float(), (0, 84)).unflatten(-1, (3, FP8_BLOCK))
    scale = padded.abs().amax(-1).clamp_min(1e-4) / 448
    if power_of_two:
        scale = torch.exp2(scale.log2().ceil())
    torch.testing.assert_close(rows.scale, scale, rtol=1e-6, atol=0)
    values = (padded / rows.scale[..., None]).flatten(-2)[:, :300]
    assert torch.equal(rows.values.view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_every_e4m3_number_is_its_own_nearest() -> None:
    """All 254 finite ones come back, and what lies between goes to the nearer one, as torch has it."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    between = (every[1:] + every[:-1]) / 2
    row = torch.cat((every, between, between * 1.001, torch.full((1,), 448.0, device=DEVICE)))
    row = torch.nn.functional.pad(row, (0, -len(row) % FP8_BLOCK)).view(-1, FP8_BLOCK)
    row[:, 0] = 448.0  # so that the scale is 1
    rows = quantize_rows(row)
    assert torch.equal(rows.scale, torch.ones_like(rows.scale))
    assert torch.equal(rows.values.view(torch.uint8), row.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_products_equal_their_definition(form: str, shape: tuple[int, int, int]) -> None:
    """Few rows and many, edges that fill no block, K in one part and in several."""
    M, N, K = shape
    a, b = operands(form, (M, K), (N, K))
    found = multiply(a, b, dtype=torch.float32)
    wanted = exact(a, b)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().mean()))


def test_a_row_does_not_depend_on_its_batch() -> None:
    """The same bits alone and among seventy."""
    a, b = operands("fp8", (70, 384), (130, 384))
    assert isinstance(a, FP8Rows)
    whole = multiply(a, b)
    for row in (0, 40, 69):
        alone = multiply(FP8Rows(a.values[row : row + 1], a.scale[row : row + 1]), b)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("form", FORMATS)
def test_grouped_rows_meet_their_experts(form: str) -> None:
    """Groups of 16 rows; one expert has none, and rows that belong to nobody are left alone."""
    a, b = operands(form, (64, 256), (4, 72, 256))
    owners = torch.tensor([2, -1, 0, 3], device=DEVICE, dtype=torch.int32).repeat_interleave(16)
    found = multiply_contiguous(a, b, owners, aligned=16, dtype=torch.float32)
    each = exact(a, b)  # [E, rows, N]
    for row in (0, 15, 32, 40, 63):
        wanted = each[int(owners[row]), row]
        torch.testing.assert_close(found[row].double(), wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().mean()))


@pytest.mark.parametrize("form", FORMATS)
def test_masked_rows_meet_their_experts(form: str) -> None:
    """As many rows of each expert as it has tokens, none of one."""
    a, b = operands(form, (3, 24, 256), (3, 72, 256))
    counts = torch.tensor([5, 0, 24], device=DEVICE, dtype=torch.int32)
    found = multiply_masked(a, b, counts, dtype=torch.float32)
    wanted = exact(a, b)
    for expert, count in enumerate(counts.tolist()):
        if count:
            ours, theirs = found[expert, :count].double(), wanted[expert, :count]
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().mean()))


def test_no_rows_give_no_rows() -> None:
    """Empty batches are products like others."""
    _, b = operands("weights", (1, 256), (72, 256))
    assert multiply(torch.empty(0, 256, device=DEVICE, dtype=HALF), b).shape == (0, 72)
    assert quantize_rows(torch.empty(0, 256, device=DEVICE, dtype=HALF)).values.shape == (0, 256)


def test_what_does_not_belong_together_is_refused() -> None:
    """Widths, precisions, rows in FP8 without such weights, and rows of groups that are none."""
    a, b = operands("fp8", (4, 256), (72, 256))
    half = torch.randn(4, 256, device=DEVICE, dtype=HALF)
    with pytest.raises(InputError, match="do not meet"):
        multiply(half[:, :128].contiguous(), b)
    with pytest.raises(InputError, match="meet weights in FP8, not"):
        multiply(a, half)
    with pytest.raises(InputError, match="one precision"):
        multiply(half, half.float())
    with pytest.raises(InputError, match="neighbouring columns"):
        multiply(half.t().contiguous().t(), b)
    with pytest.raises(InputError, match="128 are a group"):
        multiply_contiguous(half, b, torch.zeros(4, dtype=torch.int32, device=DEVICE))
    with pytest.raises(InputError, match="experts, M, K"):
        multiply_masked(half, b, torch.zeros(4, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 128, 4096])
@pytest.mark.parametrize("weights", WIDE, ids=str)
def test_deepgemms_shapes_agree_on_a_gpu(weights: tuple[int, int], M: int) -> None:
    """By DeepGEMM's metric, in FP8 and with weights alone in it."""
    for form in ("fp8", "weights"):
        a, b = operands(form, (M, weights[1]), weights)
        assert difference(multiply(a, b), exact(a, b)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "rows"), [(4, 8192), (8, 4096)])
@pytest.mark.parametrize("weights", [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)], ids=str)
def test_deepgemms_groups_agree_on_a_gpu(weights: tuple[int, int], groups: int, rows: int) -> None:
    """Its contiguous layout, whole groups."""
    a, b = operands("fp8", (groups * 256, weights[1]), (groups, *weights))
    owners = torch.arange(groups, device=DEVICE, dtype=torch.int32).repeat_interleave(256)
    found, each = multiply_contiguous(a, b, owners), exact(a, b)
    wanted = each[owners.long(), torch.arange(len(owners), device=DEVICE)]
    assert difference(found, wanted) < 1e-3


# ---- the bodies of ops ----------------------------------------------------------------------------------------------


def _experts_case(form: str, tokens: int) -> tuple[Tensor, Tensor | FP8Weight, Tensor | FP8Weight, Tensor, Tensor]:
    """Six experts of which each token has three; one is chosen by nobody."""
    E, D, F = 6, 136, 128
    x = torch.randn(tokens, D, device=DEVICE, dtype=HALF) / 4
    gate_up, down = operands("weights" if form == "fp8" else form, (1, D), (E, 2 * F, D))[1], fp8_weight(E, 1, D, F)
    if isinstance(gate_up, FP8Weight):
        gate_up = FP8Weight(gate_up.values.unflatten(1, (2, F)), gate_up.scale.unflatten(1, (2, -1)))
    else:
        down = torch.randn(E, D, F, device=DEVICE, dtype=HALF)
    indices = torch.stack([torch.randperm(E - 1, device=DEVICE)[:3] for _ in range(tokens)])
    return x, gate_up, down, indices, torch.rand(tokens, 3, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 7, 130])
@pytest.mark.parametrize("form", ["fp8", "half"])
def test_experts_equal_their_definition(form: str, tokens: int) -> None:
    """Few tokens in groups of 16 rows, many in groups of 128."""
    x, *rest = _experts_case(form, tokens)
    found = products.experts_triton(x, *rest)
    wanted = experts.reference(x.float(), *(w.float() if isinstance(w, Tensor) and w.dim() == 3 else w for w in rest))
    assert found.dtype == x.dtype and difference(found, wanted) < 1e-5
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().mean()))
    assert products.experts_triton(x[:0], *rest[:2], rest[2][:0], rest[3][:0]).shape == (0, x.shape[1])


def test_a_tokens_experts_do_not_depend_on_its_batch() -> None:
    """The same bits alone and among seven."""
    x, gate_up, down, indices, weights = _experts_case("fp8", 7)
    whole = products.experts_triton(x, gate_up, down, indices, weights)
    for row in (0, 3, 6):
        own = slice(row, row + 1)
        alone = products.experts_triton(x[own], gate_up, down, indices[own], weights[own])
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("aligned", [16, 128])
def test_rows_of_experts_begin_at_multiples(aligned: int) -> None:
    """Each assignment has a place of its own with its expert, and no block holds two experts."""
    indices = torch.randint(0, 9, (40, 3), device=DEVICE)
    places, owners = products.lay_out(indices, 10, aligned)
    assert len(owners) % aligned == 0 and len(places.unique()) == 120 == len(places)
    assert torch.equal(owners[places].long(), indices.flatten())
    assert (owners.view(-1, aligned) == owners.view(-1, aligned)[:, :1]).all()


def test_fp8_linear_is_its_definition() -> None:
    """The op's body over stored bytes, with activations as they are."""
    x, weight = operands("weights", (9, 256), (72, 256))
    assert isinstance(x, Tensor) and isinstance(weight, FP8Weight)
    found = products.linear_triton(x, weight)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.float(), x.float() @ weight.dequantize().T, rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of rows that belong to nobody
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_operands_round_what_they_are_multiplied_with(power_of_two: bool) -> None:
    """Linear layers and experts as their definitions: activations in E4M3, by scales a token and 128 columns."""
    x, weight = operands("weights", (9, 256), (72, 256))
    assert isinstance(x, Tensor) and isinstance(weight, FP8Weight)
    operand = FP8Operand(weight.values, weight.scale, power_of_two)
    found, wanted = products.linear_triton(x, operand), linear.reference(x.float(), operand)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=1e-2)
    unrounded = linear.reference(x.float(), weight)
    assert difference(found, wanted) < 1e-6 < 1e-4 < difference(unrounded, wanted) < 2e-3
    for tokens in (1, 7, 130):
        x, *stacks, indices, weights = _experts_case("fp8", tokens)
        rounding = [FP8Operand(stack.values, stack.scale, power_of_two) for stack in stacks]
        found = products.experts_triton(x, *rounding, indices, weights)
        wanted = experts.reference(x.float(), *rounding, indices, weights)
        assert difference(found, wanted) < 2e-4  # half precision between the products moves some values by a step
        assert isinstance(rounding[0][0], FP8Operand) and rounding[0][0].power_of_two == power_of_two


def test_bodies_of_products_serve_gpus_alone() -> None:
    """Half precision on a GPU without gradients; packed weights, float32 and training are others'."""
    for an_op, formats in (
        (linear, ["FP8Weight", "FP8Operand"]),
        (experts, ["Tensor", "Parameter", "FP8Weight", "FP8Operand"]),
    ):
        body = next(one for one in an_op.bodies if one.name == "triton")
        assert body.available() == HAS_GPU
        for form in formats:
            assert body.when(Key("cuda", form, torch.bfloat16, False))
            assert not body.when(Key("cpu", form, torch.bfloat16, False))
            assert not body.when(Key("cuda", form, torch.float32, False))
            assert not body.when(Key("cuda", form, torch.bfloat16, True))
        assert not body.when(Key("cuda", "PackedHeads", torch.bfloat16, False))
