from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from porcelet.config import ModelConfig, read_hf
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import build, initialize
from porcelet.train.flops import num_pairs, train_flops
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.packing import Packed, pack
from porcelet.types import Sample
from tests.train.test_balance import V2
from tests.train.tiny_run import FIELDS, config
from tests.weights.test_load import definitions

V3 = FIELDS | {"vocab_size": 261}
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SHAPES = {"v3": V3, "v3_plain_queries": V3 | {"q_lora_rank": None}, "v2": V2, "dense": DENSE}


def counted(
    shape: ModelConfig, samples: list[Sample], batch: Packed, output: Path, *, frozen: bool = False
) -> tuple[int, int]:
    """Operations that torch sees in matrix products and in attention, where nothing is fused so that it sees all."""
    network = initialize(build(shape), 0)
    if frozen:
        network.requires_grad_(False)
        network.model.embed_tokens.weight.requires_grad_()  # no product, and the first layer's input wants a gradient
    with definitions(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        view = PackedView(batch.segments)
        compute_loss(network, batch, view, config(output), Totals.of(samples))[0].backward()
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm]
    return products, sum(counts.values()) - products


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("num_prompt", [0, 6])
def test_counts_are_those_that_torch_sees(tmp_path: Path, kind: str, num_prompt: int) -> None:
    """Matrix products to the last operation, with MTP, weights on some tokens, shared prompts or none; attention is
    torch's count of whole squares, less what causality forbids."""
    shape, length = read_hf(SHAPES[kind]), 12
    weights = (0.0,) * 6 + (1.0,) * (length - 6)
    samples = [
        Sample(tokens=(*range(10, 16), *range(20 + i, 26 + i)), weights=weights, num_prompt=num_prompt)
        for i in range(3)
    ]
    batch, mtp = pack(samples), bool(shape.num_nextn_predict_layers)
    products, attention = counted(shape, samples, batch, tmp_path)
    mine = train_flops(shape, batch, mtp=mtp, attention=False)
    assert mine == products
    pairs, squares = num_pairs(batch.segments), 0
    for own, prefix in zip(batch.segments.lengths, batch.segments.prefixes, strict=True):
        squares += own * (own + (batch.segments.lengths[prefix] if prefix >= 0 else 0))
    further = 3 * shape.attention_flops(num_pairs(batch.further.segments)) if mtp else 0
    whole = 3 * shape.attention_flops(sum(n * n for n in batch.further.segments.lengths)) if mtp else 0
    own = train_flops(shape, batch, mtp=mtp) - mine - further
    assert own == 3 * shape.num_hidden_layers * shape.attention_flops(pairs)
    assert own * squares // pairs + whole == attention


@pytest.mark.parametrize("kind", SHAPES)
def test_frozen_weights_have_no_gradient_to_compute(tmp_path: Path, kind: str) -> None:
    """Without the weights' gradients there are two products where there were three; attention is the same."""
    shape = read_hf(SHAPES[kind] | {"tie_word_embeddings": False})
    samples = [Sample(tokens=tuple(range(10, 22)), weights=(0.0, *(1.0,) * 11))]
    batch, mtp = pack(samples), bool(shape.num_nextn_predict_layers)
    products, _ = counted(shape, samples, batch, tmp_path, frozen=True)
    assert train_flops(shape, batch, mtp=mtp, attention=False, frozen=True) == products
    saved = train_flops(shape, batch, mtp=mtp) - train_flops(shape, batch, mtp=mtp, frozen=True)
    assert 2 * saved == products


def test_drawn_tokens_count_whatever_their_advantage(tmp_path: Path) -> None:
    """An answer with a reference and an advantage of zero is computed for the KL term, and counts as computed."""
    shape = read_hf(DENSE)
    logprobs, zeros = (-1.0,) * 12, (0.0,) * 12
    advantages = (0.0,) * 6 + (1.0,) * 6
    samples = [
        Sample(
            tokens=tuple(range(10, 22)),
            advantages=given,
            old_logprobs=logprobs,
            reference_logprobs=logprobs,
            num_prompt=6,
        )
        for given in (zeros, advantages)
    ]
    batch = pack(samples)
    products, _ = counted(shape, samples, batch, tmp_path)
    assert train_flops(shape, batch, mtp=False, attention=False) == products


def test_pairs_by_hand() -> None:
    """A prompt of 3, two answers of 2 behind it, and a sequence of 1: 6 + 2 · (6 + 3) + 1."""
    assert num_pairs(Segments((0, 3, 5, 7, 8), (-1, 0, 0, -1))) == 6 + 2 * (6 + 3) + 1


def test_a_token_of_v3_costs_six_times_its_active_parameters() -> None:
    """The rule of thumb at V3's size: 6 · 36.7 billion without the embedding, within 1 %."""
    shape = read_hf(
        {
            "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
            "num_hidden_layers": 61, "num_attention_heads": 128, "max_position_embeddings": 4096, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        }
    )  # fmt: skip
    batch = pack([Sample(tokens=tuple(range(101)), weights=(0.0, *(1.0,) * 100))])
    assert train_flops(shape, batch, mtp=False, attention=False) / 100 == pytest.approx(6 * 36.7e9, rel=0.01)
