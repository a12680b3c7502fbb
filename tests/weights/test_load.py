"""From files to models: every format and architecture, whole, quantised and wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from porcelet.config import EngineConfig, ModelConfig, read_gguf
from porcelet.engine.engine import Engine
from porcelet.errors import ModelError
from porcelet.kernels import OPS
from porcelet.kernels.attention import Segments
from porcelet.kernels.experts import PackedExperts
from porcelet.kernels.linear import FP8Weight, PackedHeads, PackedWeight
from porcelet.models.attention import MLA, PackedView
from porcelet.models.experts import Experts
from porcelet.models.layers import Linear
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import SamplingParams
from porcelet.weights.files import Source, Stored, open_checkpoint
from porcelet.weights.load import fill, load, save
from tests.models.variants import QWEN2, V2_LITE, V3
from tests.weights import tiny_gguf

TOKENS = torch.randint(0, 40, (24,), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer) -> Tensor:
    with torch.inference_mode():
        return model.logits(model(TOKENS, torch.arange(24), PackedView(Segments.of(24))))


@contextmanager
def definitions() -> Iterator[None]:
    """Every op computes by its definition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORCELET_KERNELS", "reference")
        for an_op in OPS.values():
            patch.setattr(an_op, "_resolved", {})
        yield


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def same_parameters(one: Transformer, other: Transformer) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


# ---- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["F32", "Q4_0", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_is_read_as_transformers_reads_it(tmp_path: Path, architecture: str, type_name: str) -> None:
    """A GGUF file gives the logits of the model that `transformers` makes of it."""
    options = {"layers": 2, "scale": 0.2, "tied": architecture == "qwen3"}
    options |= {"head_dim": 128} if architecture == "qwen3" else {}  # transformers reads no other from a GGUF
    tiny_gguf.write(tmp_path / "tiny.gguf", type_name, architecture=architecture, **options)
    model = load(tmp_path / "tiny.gguf")
    rival = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.inference_mode():
        assert difference(logits(model), rival(TOKENS[None]).logits[0]) < 2e-5


DEEPSEEK2 = {
    "v3": {"groups": 4, "groups_used": 2, "yarn": (40.0, 64, 1.0)},
    "v2": {"sigmoid": False, "groups": 4, "groups_used": 2, "weights_scale": 16.0, "yarn": (40.0, 64, 0.707)},
    "v2_lite": {"sigmoid": False, "q_rank": None, "weights_scale": 1.0},
}


@pytest.mark.parametrize("options", DEEPSEEK2.values(), ids=DEEPSEEK2)
def test_deepseek2_gguf_is_the_model_that_it_describes(tmp_path: Path, options: dict[str, object]) -> None:
    """Old files with kv_b whole and new ones with it cut give one model, and `transformers` computes its logits."""
    common = {"architecture": "deepseek2", "layers": 3, "scale": 0.2, "tied": False, **options}
    models = []
    for split in (True, False):
        tiny_gguf.write(tmp_path / f"{split}.gguf", "F32", split_kv_b=split, **common)
        models.append(load(tmp_path / f"{split}.gguf"))
    assert models[0].config == models[1].config and same_parameters(*models)
    config = models[0].config
    assert config.architecture == ("deepseek_v3" if options.get("sigmoid", True) else "deepseek_v2")
    assert (config.n_group, config.topk_group) == (options.get("groups", 1), options.get("groups_used", 1))
    if "yarn" in options:
        assert config.rope_scaling and config.rope_scaling.mscale_all_dim == options["yarn"][2]
    save(models[0], tmp_path / "saved")
    rival = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.inference_mode():
        assert difference(logits(models[0]), rival(TOKENS[None]).logits[0]) < 2e-5


@pytest.mark.parametrize("type_name", ["Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("architecture", ["qwen2", "deepseek2"])
def test_int8_follows_float32_from_every_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str, type_name: str
) -> None:
    """Loaded as int8, every weight stays near the same file's in float32: equal from formats of one scale a group."""
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "16")  # the weights alone are looked at
    options = {"width": 256, "inner": 512, "head_dim": 64, "expert_inner": 256, "scale": 0.1, "tied": False}
    tiny_gguf.write(tmp_path / "tiny.gguf", type_name, architecture=architecture, **options)
    exact, quick = load(tmp_path / "tiny.gguf"), load(tmp_path / "tiny.gguf", "int8")
    assert_near(quick, exact, 0.0 if type_name.endswith(("_0", "_1")) else 0.005)
    if architecture == "qwen2":  # elsewhere a token may go to another expert
        assert difference(logits(quick), logits(exact)) < 2e-2


def assert_near(quick: Transformer, exact: Transformer, share: float) -> None:
    """Every quantised layer's weights lie within a share of its largest; the others are equal; some are quantised."""
    num_quantised, num_absorbed, c = 0, 0, quick.config
    for name, module in exact.named_modules():
        if isinstance(module, Experts):
            for leaf in ("gate_up_proj", "down_proj"):
                stack, dense = getattr(quick.get_submodule(name), leaf), getattr(module, leaf)
                assert isinstance(stack, PackedExperts) == (c.hidden_size % 32 == c.moe_intermediate_size % 32 == 0)
                if not isinstance(stack, PackedExperts):
                    continue
                values = torch.stack([stack.dequantize(expert) for expert in range(len(dense))])
                assert (values - dense).abs().max() <= share * dense.abs().max(), (name, leaf)
        if isinstance(module, MLA):
            packed = quick.get_submodule(name)
            for weight, expected in zip(packed._absorbed_weights(), module._absorbed_weights(), strict=True):
                if isinstance(weight, PackedHeads):
                    assert (weight.dequantize() - expected).abs().max() <= share * expected.abs().max(), name
                    num_absorbed += 1
        if not isinstance(module, Linear) or is_cut(quick, name):
            continue
        weight, expected = quick.get_submodule(name).weight, module.weight
        assert isinstance(weight, (Tensor, PackedWeight)) and isinstance(expected, Tensor)
        values = weight if isinstance(weight, Tensor) else weight.dequantize()
        num_quantised += isinstance(weight, PackedWeight)
        assert (values - expected).abs().max() <= share * expected.abs().max(), name
    assert num_quantised
    fits = c.is_mla and c.qk_nope_head_dim % 32 == c.kv_lora_rank % 32 == c.v_head_dim % 16 == 0
    assert num_absorbed == 2 * c.num_hidden_layers * fits


def is_cut(model: Transformer, name: str) -> bool:
    """Whether that is a kv_b_proj of which the model has packed parts."""
    return name.endswith(".kv_b_proj") and bool(model.get_submodule(name.rpartition(".")[0]).packed_w_uk)


PARTS = {"Q4_0": (4, 4), "Q4_1": (4, 4), "Q5_0": (8, 8), "Q8_0": (8, 8), "F32": (8, 8)}


@pytest.mark.parametrize("type_name", PARTS)
def test_the_parts_of_kv_b_are_packed_as_they_lie(tmp_path: Path, type_name: str) -> None:
    """As stored both have the file's bits and, where it is quantised, its numbers; kv_b_proj is not there beside them.
    An old file's whole kv_b_proj is as exact in W_UV, and W_UK is rounded once, in 8 bits."""
    for split in (True, False):
        path = tmp_path / f"{split}.gguf"
        tiny_gguf.write(path, type_name, architecture="deepseek2", scale=0.2, split_kv_b=split)
        exact, packed = (load(path, weights).model.layers[1].self_attn for weights in ("float32", "stored"))
        assert packed.kv_b_proj is None and packed.packed_w_uk and packed.packed_w_uv
        w_uk, w_uv = exact._absorbed_weights()
        lossless = type_name != "F32"
        for part, expected, bits, share in [
            (packed.packed_w_uk, w_uk, PARTS[type_name][0] if split else 8, 0 if lossless and split else 0.005),
            (packed.packed_w_uv, w_uv, PARTS[type_name][1], 0 if lossless else 0.005),
        ]:
            assert part[0].bits == bits
            assert (part.dequantize() - expected).abs().max() <= share * expected.abs().max()
            assert part.packed.untyped_storage().nbytes() == part.packed.numel(), "a slice would hold the whole"


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.005), ("int4", 0.07)])
def test_both_parts_of_kv_b_have_the_bits_of_the_mode(tmp_path: Path, weights: str, bound: float) -> None:
    """From full precision each part is rounded once."""
    config = dataclasses.replace(V3, qk_nope_head_dim=32, v_head_dim=32, kv_lora_rank=32)
    save(initialize(build(config), seed=1), tmp_path)
    exact, packed = (load(tmp_path, kind).model.layers[1].self_attn for kind in ("float32", weights))
    for part, expected in zip(packed._absorbed_weights(), exact._absorbed_weights(), strict=True):
        assert isinstance(part, PackedHeads) and part[0].bits == int(weights.removeprefix("int"))
        assert (part.dequantize() - expected).abs().max() <= bound * expected.abs().max()


def test_groups_that_old_gguf_files_leave_out() -> None:
    """Files made before the group counts were stored hold V3 with 256 experts or V2 with 160: 8 groups, 4 or 3 kept."""
    head = {
        "general.architecture": "deepseek2", "deepseek2.embedding_length": 64, "deepseek2.attention.head_count": 4,
        "deepseek2.feed_forward_length": 64, "deepseek2.context_length": 64, "deepseek2.block_count": 2,
        "deepseek2.attention.layer_norm_rms_epsilon": 1e-6, "deepseek2.vocab_size": 40,
        "deepseek2.rope.dimension_count": 8, "deepseek2.attention.key_length": 24,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.kv_lora_rank": 16, "deepseek2.expert_shared_count": 1, "deepseek2.expert_used_count": 6,
        "deepseek2.expert_feed_forward_length": 32, "deepseek2.leading_dense_block_count": 1,
    }  # fmt: skip
    for experts, gating, expected in [(256, 2, (8, 4)), (160, 1, (8, 3)), (64, 1, (1, 1))]:
        metadata = head | {"deepseek2.expert_count": experts, "deepseek2.expert_gating_func": gating}
        config = read_gguf(metadata, tied=False)
        assert (config.n_group, config.topk_group) == expected


# ---- FP8 ------------------------------------------------------------------------------------------------------------

# Wider than a block and no multiple of one, so that edge blocks exist everywhere.
FP8_CONFIG = dataclasses.replace(
    V3, hidden_size=160, intermediate_size=200, moe_intermediate_size=136, q_lora_rank=144, kv_lora_rank=136
)
# transformers takes whole blocks only.
WHOLE_BLOCKS = dataclasses.replace(
    FP8_CONFIG,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=128,
    head_dim=256,
    v_head_dim=128,
)
BLOCK = 128


def e4m3(codes: numpy.ndarray) -> numpy.ndarray:
    """float32 of e4m3fn codes, from the format's definition: sign, 4 exponent bits of bias 7, 3 mantissa bits."""
    sign = numpy.where(codes & 128, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent.astype(float) - 7)
    value = numpy.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    return numpy.where((codes & 127) == 127, numpy.nan, sign * value).astype(numpy.float32)


def write_fp8(folder: Path, *, ue8m0: bool, config: ModelConfig = FP8_CONFIG) -> dict[str, Tensor]:
    """A checkpoint as DeepSeek releases them; returns the float32 values that it stands for."""
    save(initialize(build(config), seed=1), folder)
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        if tensor.dim() != 2 or parts[-2] in ("embed_tokens", "lm_head", "gate", "eh_proj"):
            stored[name] = meant[name] = tensor.bfloat16() if tensor.dim() == 2 else tensor
            continue
        blocks = [-(-size // BLOCK) for size in tensor.shape]
        scale, expected = torch.empty(blocks), torch.empty_like(tensor)
        codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                factor = tensor[place].abs().max() / 448
                scale[i, j] = 2.0 ** torch.ceil(torch.log2(factor)) if ue8m0 else factor
                codes[place] = (tensor[place] / scale[i, j]).to(torch.float8_e4m3fn)
                values = e4m3(codes[place].view(torch.uint8).numpy()) * numpy.float32(scale[i, j])
                expected[place] = torch.from_numpy(values)
        stored[name], meant[name] = codes, expected
        stored[name + "_scale_inv"] = scale.to(torch.float8_e8m0fnu) if ue8m0 else scale
    save_file(stored, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    quantization |= {"scale_fmt": "ue8m0"} if ue8m0 else {}
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))
    return meant


@pytest.fixture(scope="module", params=[False, True], ids=["float_scales", "ue8m0"])
def fp8(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("fp8")
    return folder, write_fp8(folder, ue8m0=request.param)


def test_fp8_is_dequantised_bit_for_bit(fp8: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Every weight, edge blocks too, is its code's value times its block's scale, rounded once to float32."""
    folder, meant = fp8
    save(load(folder), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_fp8_kept_gives_the_same_logits(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    """Kept as stored, a quarter of the memory gives the logits, bit for bit, by native bodies as by the definitions;
    "auto" keeps it; all but kv_b_proj is kept."""
    kept, exact = load(fp8[0], "fp8"), load(fp8[0], "float32")
    assert torch.equal(logits(kept), logits(exact))
    with definitions():
        assert torch.equal(logits(kept), logits(exact))
        assert torch.equal(logits(load(fp8[0], "auto")), logits(exact))
    experts = kept.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, FP8Weight) and isinstance(experts.down_proj, FP8Weight)
    layers = {name: module for name, module in kept.named_modules() if isinstance(module, Linear)}
    dense = {name.split(".")[-1] for name, module in layers.items() if isinstance(module.weight, Tensor)}
    assert dense == {"kv_b_proj", "eh_proj", "lm_head"}
    with pytest.raises(ModelError, match="quantised"):
        save(kept, fp8[0])


def test_the_engine_serves_fp8(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    """Through the engine, too, an FP8 checkpoint kept as it is draws the tokens of its float32 values."""
    params = SamplingParams(max_tokens=8, temperature=0)
    engines = (Engine.load(fp8[0], EngineConfig(weights=weights, cache_tokens=256)) for weights in ("fp8", "float32"))
    kept, exact = (engine.generate([TOKENS.tolist()], params)[0].tokens for engine in engines)
    assert kept == exact


def test_fp8_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """`transformers`, told to dequantise the checkpoint, computes the same logits."""
    write_fp8(tmp_path, ue8m0=False, config=WHOLE_BLOCKS)
    rival = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    ).float()  # what is stored as bfloat16 stays so there
    with torch.inference_mode():
        assert difference(logits(load(tmp_path)), rival(TOKENS[None]).logits[0].float()) < 2e-5


def test_an_fp8_embedding_is_expanded(tmp_path: Path) -> None:
    """No released checkpoint has one, but a table cannot be read in FP8: it becomes float32."""
    write_fp8(tmp_path, ue8m0=False)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.ones(1, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    with definitions():
        assert torch.equal(logits(load(tmp_path, "fp8")), logits(load(tmp_path, "float32")))


def test_int8_from_fp8(fp8: tuple[Path, dict[str, Tensor]]) -> None:
    """An FP8 checkpoint can be loaded as int8; every weight stays near."""
    assert_near(load(fp8[0], "int8"), load(fp8[0]), 0.005)


def test_fp8_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """A scale without weight, a weight without scale, and scales of another grid are errors with their names."""
    write_fp8(tmp_path, ue8m0=False)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(path)
    scale = tensors.pop(name + "_scale_inv")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"{name}.*without '{name}_scale_inv'"):
        load(tmp_path)
    save_file(tensors | {name + "_scale_inv": scale[:1].clone()}, path)
    with pytest.raises(ModelError, match=rf"{name}_scale_inv.*\[1, 2\].*\[2, 2\] was expected"):
        load(tmp_path)
    save_file(tensors | {name + "_scale_inv": scale, "stray_scale_inv": scale.clone()}, path)
    with pytest.raises(ModelError, match="stray_scale_inv"):
        load(tmp_path)
    save(initialize(build(V2_LITE), seed=1), tmp_path / "plain")
    with pytest.raises(ModelError, match="no FP8"):
        load(tmp_path / "plain", "fp8")


# ---- wrong, and how -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    save(initialize(build(V3), seed=1), tmp_path)
    yield tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"1 tensors are missing, the first is model\.norm\.weight \(64,\)"),
        ({"model.layers.9.odd": torch.ones(2)}, r"model\.layers\.9\.odd does not belong"),
        ({"model.norm.weight": torch.ones(63)}, r"model\.norm\.weight has shape \(63,\); the config asks for \(64,\)"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, r"model\.norm\.weight.*I32"),
        ({"model.layers.1.mlp.experts.7.up_proj.weight": None}, r"experts\.7\.up_proj"),
    ],
    ids=["missing", "surplus", "misshapen", "integers", "expert"],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_read(
    folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    """One error names file, tensor and number, and no byte of a tensor was placed until then."""
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in {**load_file(path), **change}.items() if tensor is not None}
    save_file(tensors, path)
    placed: list[int] = []
    with pytest.raises(ModelError, match=message) as raised:
        load(folder, progress=lambda done, total: placed.append(done))
    assert str(folder) in str(raised.value) and not placed


def test_a_checkpoint_without_its_mtp_layer_is_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tools that rewrite checkpoints drop the MTP layer: the model loads without it, and says so; half of it fails."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}, path)
    model = load(folder)
    assert model.config.num_nextn_predict_layers == 0 and "no MTP layer" in caplog.text
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.3.mlp" not in name}, path)
    with pytest.raises(ModelError, match=r"missing.*layers\.3\.mlp"):
        load(folder)


def test_copies_that_a_checkpoint_repeats_are_not_kept(folder: Path) -> None:
    """Released V3 files repeat embedding and head in the MTP layer; old llama files store the frequencies."""
    before = load(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert same_parameters(load(folder), before)


def test_progress_ends_at_the_total(folder: Path) -> None:
    """Progress counts the stored bytes, never backwards, up to all of them."""
    seen: list[tuple[int, int]] = []
    load(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_tensor_is_let_go_of_before_the_next_is_read(folder: Path, weights: str) -> None:
    """Unless it is a parameter now: two embeddings in float32 would be more than a packed model."""
    read: list[weakref.ref[Tensor]] = []

    def watched(stored: Stored) -> Stored:
        def read_one(as_stored: bool) -> Source:
            kept = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
            assert all(held is None or held.data_ptr() in kept for held in (before() for before in read))
            tensor = stored._read(as_stored)
            if isinstance(tensor, Tensor):
                read.append(weakref.ref(tensor))
            return tensor

        return dataclasses.replace(stored, _read=read_one)

    checkpoint = open_checkpoint(folder)
    model = build(checkpoint.config, device="meta")
    fill(model, [watched(stored) for stored in checkpoint.tensors], str(folder), weights)
    assert len(read) > 10


PEAK = """
import sys
from pathlib import Path
from porcelet.weights.load import load
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
load(Path(sys.argv[1]))  # code and allocator come into memory
before = peak()
model = load(Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gguf"])
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path, kind: str) -> None:
    """Loading takes the loaded model and the largest tensor in hand, whatever the size of the file."""
    small = dataclasses.replace(QWEN2, vocab_size=64)
    large = dataclasses.replace(small, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, vocab_size=4096)
    largest = 4 * 4096 * 1024
    if kind == "gguf":
        paths = [tmp_path / "small.gguf", tmp_path / "large.gguf"]
        tiny_gguf.write(paths[0], "Q8_0", architecture="qwen2")
        sizes = {"width": 1024, "inner": 4096, "layers": 3, "heads": 8, "head_dim": 128, "kv_heads": 4}
        tiny_gguf.write(paths[1], "Q8_0", architecture="qwen2", **sizes)
        count = load(paths[1]).config.num_parameters()
    else:
        paths = [tmp_path / "small", tmp_path / "large"]
        for config, path in zip((small, large), paths, strict=True):
            save(initialize(build(config), seed=1), path)
            if kind == "bfloat16":
                tensors = load_file(path / "model.safetensors")
                save_file({name: value.bfloat16() for name, value in tensors.items()}, path / "model.safetensors")
        count = large.num_parameters()
    command = [sys.executable, "-c", PEAK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 4 * count * 0.9 < int(done.stdout) < 4 * count + largest
