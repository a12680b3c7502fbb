"""The one model against `transformers`, and its forms against each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from porcelet.config import PAGE_SIZE, EngineConfig, read_hf
from porcelet.engine.engine import Engine
from porcelet.engine.runner import _layer_cache
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView, PagedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import SamplingParams
from porcelet.weights.load import load, save
from tests.models.variants import V3, VARIANTS, published_v2, published_v2_lite, published_v3

LENGTH = 80  # crosses a page


@pytest.fixture(params=VARIANTS, scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    made = initialize(build(VARIANTS[request.param]), seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        if "norm" in name or "bias" in name:  # ones and zeros would hide mistakes
            tensor.data += 0.2 * torch.randn(tensor.shape, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def saved(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(model, folder)
    return folder


@pytest.fixture(scope="module")
def rival(saved: Path) -> PreTrainedModel:
    """What `transformers` makes of our file; every tensor must have found its place."""
    made, info = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return made


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def packed(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of both sequences computed side by side."""
    with torch.inference_mode():
        view = PackedView(Segments.of(LENGTH, LENGTH))
        return model.logits(model(tokens.flatten(), torch.arange(LENGTH).repeat(2), view)).view(2, LENGTH, -1)


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_logits_are_those_of_transformers(rival: PreTrainedModel, tokens: Tensor, packed: Tensor) -> None:
    """The same file, the same logits."""
    with torch.inference_mode():
        assert difference(packed, rival(tokens).logits) < 2e-5


def test_greedy_tokens_are_those_of_transformers(model: Transformer, rival: PreTrainedModel, tokens: Tensor) -> None:
    """64 greedy tokens from the engine, its prompt in chunks of 16 (for MLA expanded, then absorbed), equal theirs."""
    prompt = tokens[:1]
    assert not model.config.is_mla or model.config.absorbed_below() <= LENGTH
    theirs = rival.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    engine = Engine(model, EngineConfig(cache_tokens=256, max_batch_tokens=16))
    (ours,) = engine.generate([prompt[0].tolist()], SamplingParams(max_tokens=64, temperature=0))
    assert list(ours.tokens) == theirs[0, LENGTH:].tolist()


def test_saved_model_is_read_back_bit_for_bit(model: Transformer, saved: Path) -> None:
    """`load` inverts `save`, and what is stored is what the config counts."""
    again = load(saved)
    assert again.config == model.config
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    stored = [*model.parameters(), *model.buffers()]
    assert sum(tensor.numel() for tensor in stored) == model.config.num_parameters(mtp=True)


def test_mtp_layer_equals_transformers(tokens: Tensor, tmp_path: Path) -> None:
    """The MTP layer's hidden states are those of the MTP model that `transformers` builds from the same file."""
    model = initialize(build(V3), seed=1).eval()
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    save(model, tmp_path)
    rival = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rival._keys_to_ignore_on_load_unexpected = [
        r"model\.layers\.3\..*"
    ]  # how it finds MTP layers; its own list says 61
    mtp = MtpModel.from_pretrained(rival).eval()
    sequence, positions = tokens[:1], torch.arange(LENGTH - 1)
    view = PackedView(Segments.of(LENGTH - 1))
    with torch.inference_mode():
        hidden = model(sequence[0, :-1], positions, view)
        ours = model.predict_further(hidden, sequence[0, 1:], positions, view)
        # What its own drafting takes from the main model (generation/candidate_generator.py), so not our choice of
        # norm.
        last = rival(sequence[:, :-1], output_hidden_states=True).hidden_states[-1]
        theirs = mtp.forward_layer(0, last, positions[None], None, input_ids=sequence[:, 1:])
    assert difference(ours, theirs[0]) < 2e-5
    assert len(view.routing) == 3  # two MoE layers and the MTP layer


def chunked(model: Transformer, tokens: Tensor, chunks: tuple[int, ...], absorbed: int = 2) -> Tensor:
    """Logits of both sequences, computed chunk by chunk over pages that hold NaN at first; MLA attends the first
    `absorbed` of them absorbed."""
    cache = [_layer_cache(model.config, 5) for _ in range(model.config.num_hidden_layers)]
    for layer in cache:
        for pages in layer:
            pages.fill_(torch.nan)
    tables = torch.tensor([[4, 1], [0, 3]])
    pieces, start = [], 0
    for chunk in chunks:
        places = torch.arange(start, start + chunk)
        slots = (tables[:, places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE).flatten()
        offsets, lengths = torch.tensor([0, chunk, 2 * chunk]), torch.full((2,), start + chunk)
        view = PagedView(offsets, lengths, tables, slots, cache, torch.tensor([absorbed * chunk]))
        with torch.inference_mode():
            hidden = model(tokens[:, start : start + chunk].flatten(), places.repeat(2), view)
            pieces.append(model.logits(hidden).view(2, chunk, -1))
        start += chunk
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("chunks", [(LENGTH,), (56, *(1,) * 24), (63, 2, 15)], ids=["whole", "ones", "odd"])
def test_cached_equals_uncached(model: Transformer, tokens: Tensor, packed: Tensor, chunks: tuple[int, ...]) -> None:
    """Reading the cache in any chunks, absorbed for MLA, gives the logits of the whole sequence, expanded."""
    assert difference(chunked(model, tokens, chunks), packed) < 2e-5


@pytest.mark.parametrize("absorbed", [1, 0], ids=["one", "both"])
@pytest.mark.parametrize("model", [name for name, config in VARIANTS.items() if config.is_mla], indirect=True)
def test_expanded_equals_absorbed(model: Transformer, tokens: Tensor, absorbed: int) -> None:
    """MLA's two forms over the same pages, side by side in one batch or not, give the same logits."""
    whole, mixed = (chunked(model, tokens, (63, 1, 16), count) for count in (2, absorbed))
    assert difference(mixed, whole) < 2e-5


def test_sequences_do_not_see_each_other(model: Transformer, tokens: Tensor, packed: Tensor) -> None:
    """A sequence alone gives what it gives in a batch."""
    with torch.inference_mode():
        alone = model.logits(model(tokens[1], torch.arange(LENGTH), PackedView(Segments.of(LENGTH))))
    assert difference(alone, packed[1]) < 2e-5


def test_counts_of_the_published_v3() -> None:
    """DeepSeek-V3 has 671.03 B parameters and caches 70,272 bytes a token in bf16; 37.6 B are active, embedding
    included (the report's 37 B leaves it out)."""
    config = read_hf(published_v3())
    assert round(config.num_parameters() / 1e9, 2) == 671.03
    assert config.cache_values_per_token() * 2 == 70272
    assert round(config.num_active_parameters() / 1e9, 1) == 37.6
    assert round((config.num_parameters(mtp=True) - config.num_parameters()) / 1e9, 1) == 11.6


def test_counts_of_the_published_v2_and_v2_lite() -> None:
    """V2 has 236 B parameters, 21 B of them active; V2-Lite 15.7 B and 2.4 B without its embedding (V2 paper,
    section 3 and appendix B); they cache 34,560 and 15,552 values a token."""
    large, lite = read_hf(published_v2()), read_hf(published_v2_lite())
    assert round(large.num_parameters() / 1e9) == 236
    assert round(large.num_active_parameters() / 1e9) == 21
    assert round(lite.num_parameters() / 1e9, 1) == 15.7
    assert 2.4e9 <= lite.num_active_parameters() - lite.vocab_size * lite.hidden_size < 2.5e9
    assert (large.cache_values_per_token(), lite.cache_values_per_token()) == (34560, 15552)


def test_a_mixture_without_shared_experts_is_the_routed_ones_alone(tokens: Tensor) -> None:
    """The logits are those of the same model with shared experts that say nothing."""
    silent = initialize(build(V3), seed=1).eval()
    alone = build(dataclasses.replace(V3, n_shared_experts=0)).eval()
    for name, parameter in silent.named_parameters():
        if "shared_experts.down_proj" in name:
            parameter.data.zero_()
    alone.load_state_dict(
        {name: value for name, value in silent.state_dict().items() if "shared" not in name or "shared_head" in name}
    )
    positions, view = torch.arange(LENGTH), PackedView(Segments.of(LENGTH))
    with torch.inference_mode():
        assert difference(alone(tokens[0], positions, view), silent(tokens[0], positions, view)) == 0
    assert alone.config.num_parameters(mtp=True) == sum(t.numel() for t in [*alone.parameters(), *alone.buffers()])
