"""What the planner knows of a model: every byte in one part, from headers exactly, from a config by counting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from porcelet import hub
from porcelet.config import write_hf
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import build, initialize
from porcelet.plan import model as planned
from porcelet.plan.model import FORMATS, counted, find_model, known_models, part_values, read_model
from porcelet.weights.load import save
from tests.models.variants import VARIANTS


@pytest.mark.parametrize("name", known_models())
def test_named_models_have_the_size_their_makers_say(name: str) -> None:
    """Parameters of every model known by name, and those a token meets, within the rounding of the published number;
    the embedding is looked up, not multiplied, so it may count or not."""
    row, config = planned._table()[name], find_model(name).config
    embedding = config.vocab_size * config.hidden_size
    assert abs(config.num_parameters() / row["parameters"] - 1) < 0.005
    met = (config.num_active_parameters(), config.num_active_parameters() - embedding)
    assert min(abs(count / row["active"] - 1) for count in met) < 0.025  # published with two digits


@pytest.mark.parametrize("name", known_models())
def test_every_value_is_in_one_part(name: str) -> None:
    """The parts' values add up to the model's, the MTP layer's with them, and none is negative."""
    config = find_model(name).config
    values = part_values(config)
    assert sum(values.values()) == config.num_parameters(mtp=True)
    assert min(values.values()) >= 0


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_headers_give_the_bytes_of_the_files(name: str, tmp_path: Path) -> None:
    """Of a saved model the parts' bytes add up to its tensors' and are, part by part, those counted from the config."""
    save(initialize(build(VARIANTS[name]), seed=0), tmp_path)
    model = read_model(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    assert model.num_bytes == size - headers
    expected = counted(name, model.config, FORMATS["float32"])
    assert {part: model.sizes[part] for part in planned.PARTS} == dict(expected.sizes)


def test_default_model_from_its_header() -> None:
    """The GGUF file's tensors, part by part: a tied head has no bytes, and attention's output is no head."""
    model = find_model(hub.DEFAULT_MODEL)
    assert model.format.name == "int4" and model.sizes["head"] == 0
    values = part_values(model.config)
    assert all(0.4 < model.sizes[part] / values[part] <= 4 for part in ("attention", "dense", "embedding", "norms"))


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    """Without weights the bytes are counted in the config's dtype, and an FP8 checkpoint's with its scales."""
    config = find_model("r1").config
    values = write_hf(config) | {"torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    plain = read_model(tmp_path)
    assert plain.num_bytes == 2 * config.num_parameters(mtp=True)
    values["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model(tmp_path / "config.json").num_bytes == find_model("r1").num_bytes


def test_another_format_is_counted() -> None:
    """A model asked for in other weights takes their bytes, and says so."""
    model = find_model("deepseek-v2-lite", "int4")
    assert model.format.name == "int4" and "int4" in model.source
    assert 0.6 * 15.7e9 < model.num_bytes < 0.7 * 15.7e9


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [("deepseek-v33", "", "near: deepseek-v3"), ("zzzz", "", "known by name"), ("r1", "int3", "known formats")],
)
def test_what_is_not_known_names_what_is(name: str, weights: str, told: str) -> None:
    """A model or format that there is none of is refused with those that come near."""
    with pytest.raises(InputError, match=told):
        find_model(name, weights)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A truncated shard is named, not counted."""
    (tmp_path / "config.json").write_text(json.dumps(write_hf(find_model("v2-lite").config)))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ModelError, match="model.safetensors"):
        read_model(tmp_path)
