"""The native cache and the attention over it: every instruction set, both precisions, long sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from porcelet.config import PAGE_SIZE
from porcelet.kernels import cpu
from porcelet.kernels.attention import attention_paged, cache_write
from porcelet.kernels.linear import KINDS, PackedWeight, embedding
from tests.kernels.cases import offsets, packed_weight
from tests.kernels.test_cpu import HERE, NO_COMPILER

pytestmark = pytest.mark.skipif(not cpu.available() and NO_COMPILER, reason="no compiler, hence no native module")

SHAPES = [(4, 2, 16, 16), (9, 3, 20, 20), (12, 1, 40, 24), (3, 3, 7, 5)]  # H, K, key and value width


def past(
    lengths: tuple[int, ...], new: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Arguments of `attention_paged` but the scale, over pages in random order."""
    heads, kv_heads, width, value = shape
    random = torch.Generator().manual_seed(sum(lengths))
    pages = [-(-length // PAGE_SIZE) for length in lengths]
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int64)
    for row, own in enumerate(torch.randperm(sum(pages), generator=random).split(pages)):
        tables[row, : len(own)] = own
    k, v = (torch.randn(sum(pages), PAGE_SIZE, kv_heads, w, generator=random).to(dtype) for w in (width, value))
    q = torch.randn(sum(new), heads, width, generator=random)
    return q, k, v, offsets(*new), torch.tensor(lengths), tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("isa", HERE)
def test_attention_equals_its_definition(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd widths and groups, drafts, several parts, prompts: every instruction set agrees with the reference."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    for shape, (lengths, new) in itertools.product(
        SHAPES, [((1, 5), (1, 1)), ((130, 300, 64), (1, 3, 2)), ((20, 400), (8, 8)), ((90, 300), (90, 150))]
    ):
        args = past(lengths, new, shape, dtype)
        out, expected = attention_paged(*args, 0.3), attention_paged.reference(*args, 0.3)
        assert (out - expected).abs().max() <= 2e-5 * expected.abs().max(), (shape, lengths)


@pytest.mark.parametrize("isa", HERE)
def test_a_sequence_does_not_depend_on_its_batch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others of any length, prompts among them, and on any threads: the same bits."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    q, k, v, cuts, lengths, tables = past((300, 40, 513, 90), (1, 2, 3, 90), (9, 3, 20, 20), torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = attention_paged(q, k, v, cuts, lengths, tables, 0.3)
            for row in range(4):
                rows = slice(int(cuts[row]), int(cuts[row + 1]))
                count = rows.stop - rows.start
                own = lengths[row : row + 1], tables[row : row + 1]
                torch.set_num_threads(1)
                assert torch.equal(attention_paged(q[rows], k, v, offsets(count), *own, 0.3), whole[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", HERE)
def test_half_precision_is_rounded_as_torch_rounds(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, subnormals, overflow, infinities, NaN and signs are stored with torch's bits."""
    monkeypatch.setenv("PORCELET_ISA", isa)
    halves = torch.arange(-(2**15), 2**15 - 1, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].float().sort().values
    between = (halves[1:].double() + halves[:-1].double()) / 2  # exactly half way
    near = torch.cat([between.float(), between.float().nextafter(torch.tensor(9e9)), halves])
    special = torch.tensor([65519.0, 65520.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-9])
    values = torch.cat([near, special])
    values = torch.cat([values, values.new_zeros(-len(values) % 19)]).view(-1, 1, 19)  # a row has a vector and a rest
    cache = torch.zeros(-(-len(values) // PAGE_SIZE), PAGE_SIZE, 1, 19, dtype=torch.float16)
    cache_write(cache, values, torch.arange(len(values)))
    stored, expected = cache.flatten(0, 1)[: len(values)], values.half()
    assert torch.equal(stored.isnan(), expected.isnan())
    assert torch.equal(stored.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))


def test_part_of_a_slot_is_written() -> None:
    """Writing to a slice of the cache leaves the rest of each slot, and all other slots, as they were."""
    cache = torch.zeros(2, PAGE_SIZE, 1, 12)
    values, slots = torch.randn(3, 1, 5), torch.tensor([127, 0, 64])
    cache_write(cache[..., 4:9], values, slots)
    expected = torch.zeros(128, 1, 12)
    expected[slots, :, 4:9] = values
    assert torch.equal(cache.flatten(0, 1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_embedding_is_exact(kind: type[PackedWeight]) -> None:
    """Rows of a packed table have the definition's bits."""
    weight, tokens = packed_weight(37, 96, kind), torch.tensor([0, 36, 17, 16, 15, 36])
    assert torch.equal(embedding(tokens, weight), embedding.reference(tokens, weight))
    assert torch.equal(embedding(tokens, weight), weight.dequantize()[tokens])
