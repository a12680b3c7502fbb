from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from porcelet.train.packing import pack, passes
from porcelet.types import Sample

entries = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(-3, 3)), min_size=2, max_size=9)


@given(st.lists(entries, min_size=1, max_size=6))
def test_packing_loses_no_token_and_no_weight(sequences: list[list[tuple[int, int, int]]]) -> None:
    """Every weighed token is a target once, beside its own weights, from the row that read the tokens before it."""
    samples = []
    for sequence in sequences:
        tokens, weights, advantages = zip(*sequence, strict=True)
        samples.append(
            Sample(tokens=tokens, weights=(0, *weights[1:]), advantages=(0, *advantages[1:]), old_logprobs=weights)
        )
    batch = pack(samples)
    assert batch.segments.lengths == tuple(len(sample.tokens) - 1 for sample in samples)
    assert batch.tokens.tolist() == [token for sample in samples for token in sample.tokens[:-1]]
    assert batch.positions.tolist() == [i for sample in samples for i in range(len(sample.tokens) - 1)]
    wanted, first = [], 0
    for number, sample in enumerate(samples):
        for i in range(1, len(sample.tokens)):
            entry = (sample.weights[i], sample.advantages[i], sample.old_logprobs[i])
            if any(entry[:2]):
                wanted.append((first + i - 1, sample.tokens[i], number, *entry))
        first += len(sample.tokens) - 1
    columns = (batch.rows, batch.targets, batch.samples, batch.weights, batch.advantages, batch.old_logprobs)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == wanted


prompts = st.sampled_from([(5,), (5, 6, 7), (8, 9)])
answers = st.lists(st.integers(10, 20), min_size=1, max_size=5)


@given(st.lists(st.tuples(prompts, answers), min_size=1, max_size=8))
def test_a_shared_prompt_lies_there_once_and_every_row_has_read_its_own_text(
    texts: list[tuple[tuple[int, ...], list[int]]],
) -> None:
    """Walking back from the row of a prediction gives exactly the sample's tokens before the target."""
    samples = [
        Sample(
            tokens=(*prompt, *answer),
            weights=(0.0,) * len(prompt) + (1.0,) * len(answer),
            num_prompt=len(prompt),
        )
        for prompt, answer in texts
    ]
    batch = pack(samples)
    asked = [prompt for prompt, _ in texts]
    repeated = sum(len(prompt) * (asked.count(prompt) - 1) for prompt in set(asked))
    assert len(batch.tokens) == sum(len(sample.tokens) - 1 for sample in samples) - repeated
    seen = []
    for row, target, number in zip(batch.rows.tolist(), batch.targets.tolist(), batch.samples.tolist(), strict=True):
        segment = next(b for b, end in enumerate(batch.segments.offsets[1:]) if row < end)
        prefix = batch.segments.prefixes[segment]
        before = batch.tokens[batch.segments.rows(prefix)].tolist() if prefix >= 0 else []
        read = before + batch.tokens[batch.segments.offsets[segment] : row + 1].tolist()
        assert tuple(read) == samples[number].tokens[: len(read)] and int(batch.positions[row]) == len(read) - 1
        assert samples[number].tokens[len(read)] == target
        seen.append((number, len(read)))
    assert seen == [(n, i) for n, s in enumerate(samples) for i in range(s.num_prompt, len(s.tokens))]
    alone = pack(samples, share=False)
    for name in ("tokens", "positions", "targets", "weights"):
        assert torch.equal(getattr(batch.further, name), getattr(alone.further, name))
    assert torch.equal(batch.tokens[batch.further.rows], alone.tokens[alone.further.rows])


@given(st.lists(st.integers(2, 9), min_size=1, max_size=9), st.integers(0, 20))
def test_passes_keep_order_and_bound(lengths: list[int], max_tokens: int) -> None:
    """All samples once and in order; no pass of several exceeds the bound, and none could take the next one too."""
    samples = [Sample(tokens=(number,) * length) for number, length in enumerate(lengths)]
    cut = passes(samples, max_tokens)
    assert [sample for some in cut for sample in some] == samples
    sizes = [sum(len(sample.tokens) - 1 for sample in some) for some in cut]
    if not max_tokens:
        assert len(cut) == 1
        return
    assert all(size <= max_tokens or len(some) == 1 for size, some in zip(sizes, cut, strict=True))
    assert all(size + len(after[0].tokens) - 1 > max_tokens for size, after in zip(sizes, cut[1:], strict=False))


def test_a_group_counts_its_prompt_once() -> None:
    """Eight answers of two tokens to a prompt of ten fit into 26."""
    group = [Sample(tokens=(*range(10), number, 1), num_prompt=10) for number in range(8)]
    assert len(passes(group, 26)) == 1 and len(passes(group, 17)) == 2


def test_absent_weights_are_zeros() -> None:
    """A method that leaves a list empty says that it weighs nothing."""
    batch = pack([Sample(tokens=(1, 2, 3), weights=(0.0, 1.0, 1.0)), Sample(tokens=(4, 5), advantages=(0.0, 2.0))])
    assert batch.weights.tolist() == [1, 1, 0] and batch.advantages.tolist() == [0, 0, 2]


def test_a_weight_on_the_first_token_is_our_own_mistake() -> None:
    """Nothing predicts it, so it would be lost."""
    with pytest.raises(AssertionError):
        pack([Sample(tokens=(1, 2), weights=(1.0, 1.0))])
    assert torch.is_tensor(pack([Sample(tokens=(1, 2), weights=(0.0, 1.0))]).weights)
