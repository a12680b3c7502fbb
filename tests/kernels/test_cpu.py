"""The native linear layers with packed weights: against their formula, and bit for bit against themselves."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from porcelet.doctor.computing import openmp_runtimes
from porcelet.errors import InputError
from porcelet.kernels import Key, cpu
from porcelet.kernels.linear import GROUP, KINDS, WIDE_FROM, Int8Weight, PackedWeight, linear, pack, round_activations
from tests.kernels.cases import activations

ISAS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni")
SHAPES = [*itertools.product((1, 15, 17, 37), (32, 96)), (37, 576), (192, 576)]  # N, K
TOKENS = (1, 2, 3, 5, 8, 9, 17, 64)

# Only a machine that cannot build the module may go without: where there is a compiler, its absence fails.
NO_COMPILER = shutil.which("g++") is None
pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")


def runs_here(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORCELET_ISA", isa)
        try:
            return cpu.isa() == isa
        except InputError:
            return False


HERE = [isa for isa in ISAS if cpu.available() and runs_here(isa)]


def make_weight(N: int, K: int, kind: type[PackedWeight] = Int8Weight, seed: int = 0) -> PackedWeight:
    """Values over their whole range, so that an instruction that saturates shows."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**kind.bits, (N, K), generator=random, dtype=torch.uint8)
    scale = torch.rand(N, K // GROUP, generator=random) * 0.01
    minimum = -scale * 2 ** (kind.bits - 1) * torch.rand(N, K // GROUP, generator=random)
    return pack(q, scale.half(), None if kind.symmetric else minimum.half(), kind.bits)


def make_tokens(T: int, K: int, seed: int = 1) -> Tensor:
    """Some values far beyond the others, whose groups take two bytes a value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return activations(T, K)


def run(isa: str, x: Tensor, weight: PackedWeight) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORCELET_ISA", isa)
        return cpu.linear_packed(x, weight)


def formula(x: Tensor, weight: PackedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The definition in float64 from activations quantised as the body does, and the sum of its terms' magnitudes."""
    q, scale, minimum = (None if t is None else t.numpy() for t in weight.unpack())
    assert q is not None and scale is not None
    centred = q.astype(np.int64) - (0 if minimum is not None else 2 ** (weight.bits - 1))
    grouped = x.numpy().reshape(x.shape[0], -1, GROUP)
    largest = np.abs(grouped).max(-1)
    top = np.where(largest > WIDE_FROM * largest.mean(-1, keepdims=True), np.float32(127 * 256), np.float32(127))
    with np.errstate(divide="ignore"):
        reciprocal = np.where(largest > 0, top / largest, np.float32(0))
    x_q = np.rint(grouped * reciprocal[..., None]).astype(np.int64)
    x_scale = (largest / top).astype(np.float64)
    dot = np.einsum("tgi,ngi->tng", x_q, centred.reshape(q.shape[0], -1, GROUP))
    products = scale.astype(np.float64) * x_scale[:, None] * dot
    lowest = np.float64(0) if minimum is None else minimum.astype(np.float64)
    minima = lowest * (x_scale * x_q.sum(-1))[:, None]
    return (products + minima).sum(-1), (np.abs(products) + np.abs(minima)).sum(-1)


def test_the_module_was_built() -> None:
    """Where there is a compiler, the installation has the native module."""
    assert cpu.available() and HERE[0] == "scalar"


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_isa_computes_the_formula(isa: str, kind: type[PackedWeight], N: int, K: int) -> None:
    """The float32 result is the float64 formula's, within the rounding of its own additions."""
    weight = make_weight(N, K, kind)
    for T in TOKENS:
        x = make_tokens(T, K)
        expected, magnitude = formula(x, weight)
        difference = np.abs(run(isa, x, weight).numpy() - expected)
        assert (difference <= 2e-6 * magnitude).all(), (T, difference.max())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_all_isas_agree_bitwise(isa: str, kind: type[PackedWeight], N: int, K: int) -> None:
    """Every instruction set gives the bits of the scalar body, extreme activations included."""
    weight = make_weight(N, K, kind)
    for T in TOKENS:
        x = make_tokens(T, K)
        x[0, ::2] = 1e35
        x[-1, :GROUP] = 1e-37  # below what counts as zero
        assert torch.equal(run(isa, x, weight), run("scalar", x, weight)), T


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_products_are_exact(isa: str, kind: type[PackedWeight]) -> None:
    """The largest weights times the largest activations, in one byte and in two: no step in between saturates."""
    highest, centre = 2**kind.bits - 1, 2 ** (kind.bits - 1)
    minima = None if kind.symmetric else torch.zeros(16, 4).half()
    for q, sign in itertools.product((highest, 0), (1, -1)):
        weight = pack(torch.full((16, 4 * GROUP), q, dtype=torch.uint8), torch.ones(16, 4).half(), minima, kind.bits)
        value = (q - centre if kind.symmetric else q) * sign
        x = torch.zeros(5, 4 * GROUP)
        x[:, :GROUP] = 32512.0 * sign  # alone: four times the mean of the groups' largest
        assert torch.equal(run(isa, x, weight), torch.full((5, 16), float(value * 32512 * GROUP)))
        x = torch.full((5, 4 * GROUP), 127.0 * sign)
        assert torch.equal(run(isa, x, weight), torch.full((5, 16), float(value * 127 * 4 * GROUP)))


@pytest.mark.parametrize("isa", HERE)
def test_half_precision_subnormals_and_signs(isa: str) -> None:
    """Scales and minima of every kind of finite half are read exactly."""
    halves = (
        torch.tensor([0.0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, 1.0, -65504.0]).half().repeat(2)[:, None]
    )
    zero = torch.zeros(16, 1).half()
    ones = torch.ones(16, GROUP, dtype=torch.uint8)
    x = torch.full((1, GROUP), 127.0)
    expected = (halves.double() * 127 * GROUP).float().T
    for bits in (8, 4):
        assert torch.equal(run(isa, x, pack(ones, halves, zero, bits)), expected)
        assert torch.equal(run(isa, x, pack(ones, zero, halves, bits)), expected)
        above = ones + 2 ** (bits - 1)  # one more than the centre
        assert torch.equal(run(isa, x, pack(above, halves, None, bits)), expected)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_its_batch(isa: str, kind: type[PackedWeight]) -> None:
    """A token alone, in any batch and at any place in it has the same bits."""
    weight, x = make_weight(37, 96, kind), make_tokens(64, 96)
    alone = torch.cat([run(isa, x[t : t + 1], weight) for t in range(64)])
    for T in TOKENS:
        assert torch.equal(run(isa, x[:T], weight), alone[:T]), T
        assert torch.equal(run(isa, x[-T:], weight), alone[-T:]), T


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_poisons_its_own_token_only(isa: str, bad: float) -> None:
    """One bad activation makes all outputs of its token NaN and leaves the bits of all others."""
    weight, x = make_weight(37, 96), make_tokens(9, 96)
    clean = run(isa, x, weight)
    x[4, 50] = bad
    poisoned = run(isa, x, weight)
    assert poisoned[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("isa", HERE)
def test_zero_tokens_and_zero_values(isa: str) -> None:
    """No tokens give no outputs; a token of zeros gives zeros."""
    weight = make_weight(17, 96)
    assert run(isa, torch.empty(0, 96), weight).shape == (0, 17)
    assert torch.equal(run(isa, torch.zeros(2, 96), weight), torch.zeros(2, 17))


@pytest.mark.parametrize("T", [1, 9, 64])
def test_threads_share_the_work_without_a_trace(T: int) -> None:
    """One, two and three threads give the same bits, and torch keeps its own number."""
    weight, x = make_weight(192, 576), make_tokens(T, 576)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.linear_packed(x, weight))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_one_openmp_library() -> None:
    """The native module runs on torch's thread pool: one OpenMP runtime is mapped into the process."""
    cpu.linear_packed(make_tokens(1, 32), make_weight(16, 32))
    runtimes = openmp_runtimes()
    assert len(runtimes) == 1, runtimes


def test_an_isa_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown or missing instruction set is an error that names those there are, not an illegal instruction."""
    for isa in {*ISAS, "avx1024", ""} - set(HERE):
        monkeypatch.setenv("PORCELET_ISA", isa)
        with pytest.raises(InputError, match=f"PORCELET_ISA is '{isa}'.*scalar"):
            cpu.isa()
        with pytest.raises(InputError, match="PORCELET_ISA"):
            cpu.linear_packed(make_tokens(1, 32), make_weight(1, 32))


def test_strided_activations() -> None:
    """Activations that are not contiguous are read as what they are."""
    weight, x = make_weight(37, 96), make_tokens(5, 192)
    assert torch.equal(cpu.linear_packed(x[:, ::2], weight), cpu.linear_packed(x[:, ::2].contiguous(), weight))


def test_wrong_shapes_and_dtypes_assert() -> None:
    """What the caller got wrong never reaches the addresses."""
    weight = make_weight(16, 64)
    for x in (make_tokens(1, 32), make_tokens(1, 64).double()):
        with pytest.raises(AssertionError):
            cpu.linear_packed(x, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(576, 576), (192, 576), (576, 1536)])
def test_linear_takes_the_native_body_and_stays_near_the_reference(N: int, K: int, kind: type[PackedWeight]) -> None:
    """`linear` on a packed weight runs natively and is the definition but for the order of sums; what that rounds
    stays within 1 % of the largest value."""
    assert linear.chosen(Key("cpu", kind.__name__, torch.float32, False)) == "cpu_packed"
    assert linear.chosen(Key("cpu", kind.__name__, torch.float32, True)) != "cpu_packed"
    weight, x = make_weight(N, K, kind), make_tokens(17, K)
    assert type(weight) is kind
    exact = x @ weight.dequantize().T
    out, largest = linear(x, weight), exact.abs().max()
    assert torch.equal(out, cpu.linear_packed(x, weight))
    assert (out - linear.reference(x, weight)).abs().max() <= 1e-5 * largest
    assert (out - exact).abs().max() <= 1e-2 * largest


def test_all_activations_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PORCELET_ACTIVATIONS=16 stays within 1e-4 of the largest value of the exact product; other words are refused."""
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "16")
    weight, x = make_weight(192, 576), make_tokens(17, 576)
    exact = x @ weight.dequantize().T
    for out in (linear(x, weight), linear.reference(x, weight)):
        assert (out - exact).abs().max() <= 1e-4 * exact.abs().max()
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "12")
    with pytest.raises(InputError, match="PORCELET_ACTIVATIONS is '12'; it must be 8 or 16"):
        linear(x, weight)


def test_outliers_are_rounded_by_themselves() -> None:
    """A group of outliers is rounded to two bytes a value, the others to one, each within half a step."""
    x = torch.randn(7, 20 * GROUP)
    x[:, 3 * GROUP + 5] = 100.0
    moved = (round_activations(x) - x).abs().view(7, 20, GROUP).amax(-1)
    largest = x.abs().view(7, 20, GROUP).amax(-1)
    steps = torch.full((20,), 127.0)
    steps[3] = 127.0 * 256
    assert (moved <= largest / steps / 2 * 1.001).all() and (moved[:, 3] < 100 / 127 / 50).all()
