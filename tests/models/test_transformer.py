"""The one model against `transformers`, and its forms against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.engine.runner import _layer_cache
from porcelet.models.attention import PackedView, PagedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.weights.load import load, save
from tests.models.variants import V3, VARIANTS, published_v3

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
def tokens() -> Tensor:
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def packed(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits of both sequences computed side by side."""
    with torch.inference_mode():
        view = PackedView(torch.tensor([0, LENGTH, 2 * LENGTH]))
        return model.logits(model(tokens.flatten(), torch.arange(LENGTH).repeat(2), view)).view(2, LENGTH, -1)


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_saved_model_gives_the_logits_of_transformers(
    model: Transformer, tokens: Tensor, packed: Tensor, tmp_path: Path
) -> None:
    """What `save` writes, `transformers` loads whole and computes alike; `load` reads it back bit for bit."""
    save(model, tmp_path)
    rival, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        assert difference(packed, rival(tokens).logits) < 2e-5
    again = load(tmp_path)
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
    view = PackedView(torch.tensor([0, LENGTH - 1]))
    with torch.inference_mode():
        hidden = model(sequence[0, :-1], positions, view)
        ours = model.predict_further(hidden, sequence[0, 1:], positions, view)
        # What its own drafting takes from the main model (generation/candidate_generator.py), so not our choice of
        # norm.
        last = rival(sequence[:, :-1], output_hidden_states=True).hidden_states[-1]
        theirs = mtp.forward_layer(0, last, positions[None], None, input_ids=sequence[:, 1:])
    assert difference(ours, theirs[0]) < 2e-5
    assert len(view.routing) == 3  # two MoE layers and the MTP layer


@pytest.mark.parametrize("chunks", [(LENGTH,), (1,) * LENGTH, (63, 1, 1, 15), (64, 16)], ids=str)
def test_cached_equals_uncached(model: Transformer, tokens: Tensor, packed: Tensor, chunks: tuple[int, ...]) -> None:
    """Reading the cache in any chunks, absorbed for MLA, gives the logits of the whole sequence, expanded."""
    cache = [_layer_cache(model.config, 5) for _ in range(model.config.num_hidden_layers)]
    for layer in cache:
        for pages in layer:
            pages.fill_(torch.nan)
    tables = torch.tensor([[4, 1], [0, 3]])
    pieces, start = [], 0
    for chunk in chunks:
        places = torch.arange(start, start + chunk)
        slots = tables[:, places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE
        view = PagedView(
            torch.tensor([0, chunk, 2 * chunk]), torch.full((2,), start + chunk), tables, slots.flatten(), cache
        )
        with torch.inference_mode():
            hidden = model(tokens[:, start : start + chunk].flatten(), places.repeat(2), view)
            pieces.append(model.logits(hidden).view(2, chunk, -1))
        start += chunk
    assert difference(torch.cat(pieces, dim=1), packed) < 2e-5


def test_sequences_do_not_see_each_other(model: Transformer, tokens: Tensor, packed: Tensor) -> None:
    """A sequence alone gives what it gives in a batch."""
    with torch.inference_mode():
        alone = model.logits(model(tokens[1], torch.arange(LENGTH), PackedView(torch.tensor([0, LENGTH]))))
    assert difference(alone, packed[1]) < 2e-5


def test_counts_of_the_published_v3() -> None:
    """DeepSeek-V3 has 671.03 B parameters and caches 70,272 bytes a token in bf16; 37.6 B are active, embedding
    included."""
    config = ModelConfig.from_hf(published_v3())
    assert round(config.num_parameters() / 1e9, 2) == 671.03
    assert config.cache_values_per_token() * 2 == 70272
    assert round(config.num_active_parameters() / 1e9, 1) == 37.6
    assert round((config.num_parameters(mtp=True) - config.num_parameters()) / 1e9, 1) == 11.6
