from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from porcelet.config import ModelConfig
from porcelet.errors import InputError, ModelError
from porcelet.kernels.attention import Segments
from porcelet.models.attention import PackedView
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.weights.adapters import Adapter, apply_adapter, find_targets, merge, read_adapter, write_adapter
from porcelet.weights.load import load, save
from tests.models.variants import LLAMA, V3

TOKENS = torch.tensor([5, 17, 3, 96, 41, 8, 8, 60])
SHAPES = {"llama": LLAMA, "deepseek_v3": V3}
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TARGETS = {"llama": "all-linear", "deepseek_v3": ATTENTION}  # PEFT's own meaning takes in routed experts


def random_adapter(model: Transformer, *targets: str, rank: int = 3, alpha: float = 7.5) -> Adapter:
    draw = torch.Generator().manual_seed(1)
    matrices = {
        name: (torch.randn(rank, layer.weight.shape[1], generator=draw) * 0.1,
               torch.randn(layer.weight.shape[0], rank, generator=draw) * 0.1)
        for name, layer in find_targets(model, targets).items()
    }  # fmt: skip
    return Adapter(rank, alpha, matrices, base="base")


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, torch.arange(len(TOKENS)), PackedView(Segments.of(len(TOKENS)))))


def saved(config: ModelConfig, folder: Path) -> Transformer:
    model = initialize(build(config), seed=0)
    save(model, folder)
    return load(folder)


def close(mine: Tensor, theirs: Tensor) -> bool:
    return bool((mine - theirs).abs().max() <= 2e-5 * theirs.abs().max())


old_word = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, of transformers


@old_word
@pytest.mark.parametrize("name", SHAPES)
def test_peft_reads_what_we_write(tmp_path: Path, name: str) -> None:
    """On `transformers`' model it computes the same logits as ours with the adapter, and others than without."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = saved(SHAPES[name], tmp_path / "base")
    adapter, plain = random_adapter(model, "all-linear"), logits(model)
    write_adapter(tmp_path / "adapter", adapter)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    apply_adapter(model, adapter, "adapter")
    assert close(logits(model), expected) and not close(plain, expected)


@old_word
@pytest.mark.parametrize("name", SHAPES)
def test_we_read_what_peft_writes(tmp_path: Path, name: str) -> None:
    """The same the other way round, and merged into a folder of its own."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = saved(SHAPES[name], tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(load(tmp_path / "merged")), expected) and not close(logits(model), expected)
    assert set(read_adapter(tmp_path / "adapter").matrices) == set(find_targets(model, ("all-linear",)))


def test_written_adapter_comes_back(tmp_path: Path) -> None:
    """Bit for bit, with its scale and its base; a folder that is merged from must not be merged into."""
    adapter = random_adapter(build(LLAMA), "q_proj", "mlp.down_proj")
    write_adapter(tmp_path, adapter)
    back = read_adapter(tmp_path)
    assert (back.rank, back.scale, back.base) == (3, 2.5, "base") and back.matrices.keys() == adapter.matrices.keys()
    for name, pair in adapter.matrices.items():
        assert all(map(torch.equal, pair, back.matrices[name]))
    with pytest.raises(InputError, match="is what is to be merged"):
        merge(tmp_path / "base", tmp_path, tmp_path)


def test_merging_replaces_nothing(tmp_path: Path) -> None:
    """A folder that holds something, another model for one, and a file stay as they are."""
    base, output = tmp_path / "base", tmp_path / "output"
    write_adapter(tmp_path / "adapter", random_adapter(saved(LLAMA, base), "q_proj"))
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="output .*/output exists"):
        merge(base, tmp_path / "adapter", output)
    output.unlink()
    merge(base, tmp_path / "adapter", output)
    with pytest.raises(InputError, match="output .*/output exists"):
        merge(base, tmp_path / "adapter", output)


REFUSED: dict[str, Any] = {
    "use_rslora": True, "use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "alpha_pattern": {"q": 1},
    "rank_pattern": {"q": 1}, "target_parameters": ["mlp.experts.gate_up_proj"], "init_lora_weights": "pissa",
    "fan_in_fan_out": True, "lora_bias": True, "peft_type": "IA3", "alora_invocation_tokens": [5, 17],
}  # fmt: skip
UNUSABLE: list[tuple[str, Any]] = [
    ("r", 0), ("r", True), ("lora_alpha", None), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
    ("lora_alpha", -3), ("lora_alpha", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*REFUSED.items(), *UNUSABLE])
def test_unsupported_setting_is_named(tmp_path: Path, name: str, value: Any) -> None:
    """What would change the numbers is never read over."""
    write_adapter(tmp_path, random_adapter(build(LLAMA), "q_proj"))
    values = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {name: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=f"adapter_config.json: .*{name} "):
        read_adapter(tmp_path)


def test_damaged_or_foreign_adapter_is_named(tmp_path: Path) -> None:
    """A missing file, half a pair, a tensor of another kind, another rank, another model."""
    with pytest.raises(ModelError, match="adapter_config.json cannot be read"):
        read_adapter(tmp_path)
    adapter = random_adapter(build(LLAMA), "q_proj")
    write_adapter(tmp_path, adapter)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = "base_model.model.model.layers.0.self_attn.q_proj"
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        ({f"{first}.lora_B.weight": None}, "q_proj has lora_A alone"),
        ({f"{first}.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector' of shape"),
        ({f"{first}.lora_A.weight": torch.ones(2, 64)}, "its rank must be 3"),
    ]
    for change, named in changes:
        kept = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=named):
            read_adapter(tmp_path)
    with pytest.raises(ModelError, match=r"no linear layer model.layers.0.self_attn.q_proj; .* 'base'"):
        apply_adapter(build(V3), adapter, "there")
    with pytest.raises(ModelError, match=r"is for \[64, 64\]; the model has \[96, 64\]"):
        apply_adapter(build(SHAPES["llama"].__class__(**{**vars(LLAMA), "head_dim": 24})), adapter, "there")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "gate", "experts", "experts.0.up_proj", "q_prj", "proj"])
def test_target_without_effect_is_refused(target: str) -> None:
    """Head, embedding, router, routed experts, MTP layer, misspelt names: none is ignored in silence."""
    with pytest.raises(InputError, match=f"target '{target}' .*; this model has q_a_proj, q_b_proj"):
        find_targets(build(V3), ("q_b_proj", target))


def test_all_linear_stands_alone() -> None:
    """Beside another target it is no name of a layer, and the message does not say so."""
    with pytest.raises(InputError, match=r"'all-linear' stands alone; it was given with q_a_proj"):
        find_targets(build(V3), ("all-linear", "q_a_proj"))


def test_all_linear_is_what_peft_can_load() -> None:
    """Every linear layer but the head's; in DeepSeek's architectures attention's, and others by name, never the MTP
    layer's. A longer name narrows a target down."""
    names = set(find_targets(build(V3), ("all-linear",)))
    assert names == {f"model.layers.{layer}.self_attn.{leaf}" for layer in range(3) for leaf in ATTENTION}
    assert len(find_targets(build(LLAMA), ("all-linear",))) == 2 * 7
    assert set(find_targets(build(V3), ("shared_experts.up_proj",))) == {
        f"model.layers.{layer}.mlp.shared_experts.up_proj" for layer in (1, 2)
    }
    assert len(find_targets(build(V3), ("up_proj",))) == 3
