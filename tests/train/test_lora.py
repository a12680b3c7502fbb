from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from porcelet.config import LoraConfig
from porcelet.errors import InputError
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer
from porcelet.train.loop import train
from porcelet.train.lora import Adapted, adapted_layers, add_adapters, refresh
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.packing import pack
from porcelet.types import Sample
from porcelet.weights.adapters import merge, read_adapter
from porcelet.weights.load import load
from tests.train.test_checkpoint import assert_same_run, train_until
from tests.train.tiny_run import FIELDS, config, metrics_of, model, state_of

SAMPLES = [
    Sample(tokens=(5, 9, 200, 17, 40, 1), weights=(0.0, 0.0, 1.0, 1.0, 0.5, 1.0)),
    Sample(tokens=(7, 9, 1), weights=(0.0, 1.0, 1.0)),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A V3 model to adapt."""
    return str(train(config(tmp_path_factory.mktemp("start"), steps=1), FIELDS))


def with_adapters(**changes: Any) -> Transformer:
    """A model whose adapters do something."""
    network = model()
    add_adapters(network, LoraConfig(**{"rank": 4, "alpha": 6.0, **changes}), seed=3)
    draw = torch.Generator().manual_seed(0)
    for layer in adapted_layers(network).values():
        layer.lora_B.data.normal_(0.0, 0.1, generator=draw)
    refresh(network)
    return network


def loss_of(network: Transformer, tmp_path: Path) -> torch.Tensor:
    batch = pack(SAMPLES)
    return compute_loss(network, batch, PackedView(batch.segments), config(tmp_path), Totals.of(SAMPLES))[0]


def test_gradient_is_the_full_one_projected(tmp_path: Path) -> None:
    """dA = s · Bᵀ·dW and dB = s · dW·Aᵀ, with dW from a backward pass through the merged weights; dW itself is never
    made for a frozen layer."""
    network = with_adapters()
    layers = adapted_layers(network)
    loss = loss_of(network, tmp_path)
    loss.backward()
    whole = model()
    for name, layer in layers.items():
        whole.get_submodule(name).weight.data.copy_(layer.weight)
    expected = loss_of(whole, tmp_path)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, layer in layers.items():
        full = whole.get_submodule(name).weight.grad
        for mine, projected in (
            (layer.lora_A.grad, layer.lora_B.t() @ full),
            (layer.lora_B.grad, full @ layer.lora_A.t()),
        ):
            assert (mine - layer.scale * projected).abs().max() <= 1e-4 * mine.abs().max(), name
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        f"{name}.lora_{letter}" for name in layers for letter in "AB"
    }


def test_new_adapters_change_no_bit(tmp_path: Path) -> None:
    """B is zero, so the loss of step 0 is the base's; that of trained ones is not."""
    network, plain = model(), loss_of(model(), tmp_path)
    add_adapters(network, LoraConfig(rank=4), seed=3)
    assert torch.equal(loss_of(network, tmp_path), plain)
    assert not torch.equal(loss_of(with_adapters(), tmp_path), plain)


def test_targets_choose_layers_and_seeds_their_matrices() -> None:
    """Only the named layers are adapted; A depends on the seed and the layer's name alone."""
    some, others = with_adapters(targets=("o_proj",)), with_adapters(targets=("o_proj", "kv_b_proj"))
    assert set(adapted_layers(some)) == {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    for name, layer in adapted_layers(some).items():
        twin = adapted_layers(others)[name]
        assert torch.equal(layer.lora_A, twin.lora_A)
    first, second = (layer.lora_A for layer in adapted_layers(some).values())
    assert not torch.equal(first, second)


def test_resumed_run_with_adapters_equals_the_uninterrupted_one(start: str, tmp_path: Path) -> None:
    """Bit for bit; a checkpoint holds adapters and their optimizer alone, and the base has not moved."""
    changes: dict[str, Any] = {"method": "sft", "model": start, "rank": 2, "steps": 6, "bias_update_speed": 0.1}
    whole, broken = config(tmp_path / "whole", **changes), config(tmp_path / "broken", checkpoint_every=3, **changes)
    train(whole, {})
    train_until(broken, {}, 5)
    train(broken, {}, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    names = state_of(tmp_path / "whole").keys()
    assert all("lora_" in name for name in names if not name.startswith("buffer."))
    base, merged = load(Path(start)).state_dict(), load(tmp_path / "whole").state_dict()
    adapted = read_adapter(tmp_path / "whole" / "adapter").matrices
    for name, tensor in base.items():
        assert torch.equal(tensor, merged[name]) == (name.removesuffix(".weight") not in adapted), name


def test_adapter_and_base_merge_into_the_saved_model(start: str, tmp_path: Path) -> None:
    """The same bytes; without `merge` the adapter is all there is. A run may begin with it."""
    changes: dict[str, Any] = {
        "method": "sft",
        "model": start,
        "rank": 2,
        "steps": 3,
        "targets": ("q_b_proj", "up_proj"),
    }
    train(config(tmp_path / "run", **changes), {})
    merge(Path(start), tmp_path / "run" / "adapter", tmp_path / "merged")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    folder = str(tmp_path / "run" / "adapter")
    apart = train(config(tmp_path / "apart", **changes | {"merge": False, "adapter": folder, "steps": 1}), {})
    assert (apart / "adapter" / "adapter_model.safetensors").exists() and not (apart / "model.safetensors").exists()
    first = metrics_of(apart)[0]["cross_entropy"]
    assert first < metrics_of(tmp_path / "run")[0]["cross_entropy"]
    for change, named in (({"rank": 3}, "has rank=2"), ({"targets": ("q_b_proj",)}, "differ, for one in .*up_proj")):
        with pytest.raises(InputError, match=named):
            train(config(tmp_path / "other", **changes | {"adapter": folder} | change), {})


def test_engine_sees_the_adapters_of_the_moment(start: str, tmp_path: Path) -> None:
    """Adapters move far in few steps, and at each the sampler's log-probabilities are the trainer's."""
    run = config(
        tmp_path,
        method="grpo",
        model=start,
        steps=4,
        samples_per_step=32,
        max_new_tokens=3,
        rank=4,
        targets=("q_b_proj", "kv_b_proj", "o_proj", "down_proj"),
        learning_rate=5e-2,
        alpha=32.0,
    )
    train(run, {}, reward=lambda problem, answer: float(len(answer.text)))
    assert all(line.get("mismatch", 0.0) < 1e-4 for line in metrics_of(tmp_path))
    first, last = (load(folder).model.layers[1].self_attn.kv_b_proj.weight for folder in (Path(start), tmp_path))
    assert (first - last).abs().max() > 0.1 * first.abs().max()


def test_unusable_adapter_settings_are_refused(tmp_path: Path) -> None:
    """A new model has nothing to adapt; no targets, no adapters; an adapter needs its rank."""
    with pytest.raises(InputError, match="adapts a model that exists"):
        config(tmp_path, rank=2)
    with pytest.raises(InputError, match="targets is empty"):
        LoraConfig(rank=2, targets=())
    with pytest.raises(InputError, match="give the rank"):
        LoraConfig(adapter="somewhere")
    with pytest.raises(InputError, match="'lm_head' cannot have an adapter"):
        add_adapters(model(), LoraConfig(rank=2, targets=("lm_head",)), seed=0)
    assert not any(isinstance(module, Adapted) for module in model().modules())
