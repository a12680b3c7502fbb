"""MLA over the cache: the native body of its two forms, alone and side by side, eager and recorded."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from porcelet.kernels import Key, cpu
from porcelet.kernels.attention import attention_latent
from porcelet.kernels.linear import PackedHeads
from porcelet.kernels.record import NotRecordable, Tape
from tests.kernels.cases import Case, latent_case, offsets
from tests.kernels.test_cpu import HERE, NO_COMPILER

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

SHAPES = [  # H, N, R, C, value; packed or not
    ((4, 16, 8, 32, 16), False),
    ((3, 7, 5, 19, 9), False),
    ((1, 1, 1, 1, 1), False),
    ((2, 32, 8, 64, 20), True),
    ((3, 64, 6, 32, 32), True),
    ((1, 32, 4, 32, 16), True),
]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def definition(args: Case) -> Tensor:
    """The op's, in float64 from float32 weights: what the expanded form rounds nowhere."""
    q_nope, w_uk, w_uv, q_rope, *rest = args
    weights = [w.dequantize() if isinstance(w, PackedHeads) else w for w in (w_uk, w_uv)]
    return attention_latent.reference(q_nope.double(), *(w.double() for w in weights), q_rope.double(), *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
@pytest.mark.parametrize("isa", HERE)
def test_expanded_equals_its_definition(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd widths, one token, lengths around pages, cached prefixes, several sequences, NaN behind their ends: every
    instruction set agrees with the formula, and packed weights count as the numbers that they hold."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    for (sizes, is_packed), (new, lengths) in itertools.product(
        SHAPES,
        [((1,), (1,)), ((1, 5), (64, 65)), ((64, 3), (128, 63)), ((90, 150, 2), (90, 300, 200)), ((600,), (640,))],
    ):
        args = latent_case(new, lengths, 0, dtype, sizes, is_packed)
        out, expected = attention_latent(*args), definition(args)
        assert (out - expected).abs().max() <= 3e-5 * expected.abs().max(), (sizes, lengths)


@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "packed"])
@pytest.mark.parametrize("isa", HERE)
def test_a_sequence_does_not_depend_on_its_batch(isa: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed or expanded, beside others of either form and on any threads: the same bits as alone."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    new, lengths, absorbed = (1, 70, 3, 90, 520), (300, 100, 513, 90, 600), 2
    args = latent_case(new, lengths, absorbed, torch.float32, (3, 32, 6, 32, 20), is_packed)
    q_nope, w_uk, w_uv, q_rope, cache, cuts, cached, tables, _, scale = args
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = attention_latent(*args)
            torch.set_num_threads(1)
            for row, count in enumerate(new):
                rows = slice(int(cuts[row]), int(cuts[row + 1]))
                past = offsets(count), cached[row : row + 1], tables[row : row + 1]
                form = torch.tensor([count if row < absorbed else 0])
                alone = attention_latent(q_nope[rows], w_uk, w_uv, q_rope[rows], cache, *past, form, scale)
                assert torch.equal(alone, whole[rows]), row
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("is_packed", [False, True], ids=["float32", "packed"])
def test_one_recording_serves_every_mix(is_packed: bool) -> None:
    """Replayed for any share of absorbed tokens, none and all among them, each run gives the eager op's bits."""
    args = latent_case((40, 9, 70), (100, 9, 200), 0, torch.float32, (3, 32, 6, 32, 20), is_packed)
    cuts, num_absorbed = args[5], args[8]
    with torch.no_grad(), Tape(cpu.new_program(), len(args[0]), 256) as tape:
        out = attention_latent(*args)
    for absorbed in (0, 3, 1, 2):
        num_absorbed[0] = cuts[absorbed]
        out.fill_(torch.nan)
        tape.program.run(len(args[0]), 0, 2)
        assert torch.equal(out, attention_latent(*args)), absorbed


def test_matrices_that_lie_otherwise_are_served_by_the_definition() -> None:
    """W_UK [H, C, N] whole cannot be read natively: eager calls are right, a recording says why there is none."""
    q_nope, w_uk, w_uv, *rest = latent_case((3, 70), (70, 70), 1, torch.float32, (3, 7, 5, 19, 9), False)
    args = q_nope, w_uk.contiguous(), w_uv, *rest
    assert attention_latent.chosen(Key("cpu", "Tensor", torch.float32, needs_grad=False)) == "cpu"
    assert torch.equal(attention_latent(*args), attention_latent.reference(*args))
    with torch.inference_mode(), pytest.raises(NotRecordable, match="rows of W_UK"), Tape(cpu.new_program(), 73, 70):
        attention_latent(*args)
