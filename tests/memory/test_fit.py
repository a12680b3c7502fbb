"""What cannot fit is refused before it is read, and every remedy that is named does fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from porcelet import hub
from porcelet.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    PolicyConfig,
    TrainConfig,
    override,
    parse_settings,
    read_hf,
)
from porcelet.engine.engine import Engine
from porcelet.errors import CapacityError
from porcelet.memory import fit
from porcelet.memory.engine import RUNTIME_BYTES, engine_memory
from porcelet.memory.fit import Wanted, changed, check_engine, check_engines, engine_ways
from porcelet.memory.process import resident_bytes
from porcelet.memory.tensors import counted, read_inventory
from porcelet.memory.training import training_memory
from porcelet.models.transformer import build, initialize
from porcelet.train.loop import train as run_training
from porcelet.train.stages import read_stages
from porcelet.types import SamplingParams
from porcelet.weights.load import save
from tests.memory.test_peaks import LLAMA, QWEN, SMALL, V3, V3_MTP
from tests.train import tiny_run

ENGINES: dict[str, tuple[ModelConfig, EngineConfig]] = {
    "llama": (LLAMA, EngineConfig(cache_tokens=131072)),
    "qwen2, a cache in bytes": (QWEN, EngineConfig(cache_memory="4GB")),
    "deepseek_v3": (V3, EngineConfig(weights="int8")),
    "deepseek_v3, experts on disk": (V3, EngineConfig(weights="int8", expert_memory="400MB")),
    "deepseek_v3 with its MTP layer": (V3_MTP, EngineConfig()),
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_what_an_engine_is_told_to_change_makes_it_fit(name: str, share: float) -> None:
    """Each way, set as on the command line, takes what it says, and no more than there is; the nearest comes first."""
    config, engine = ENGINES[name]
    wanted = Wanted(counted(config), engine)
    room = int(RUNTIME_BYTES + share * (wanted.forecast(10**11).peak - RUNTIME_BYTES))
    ways = engine_ways(wanted, room)
    assert len(ways) == 3
    assert [way.loss for way in ways] == sorted(way.loss for way in ways)
    assert len({way.words for way in ways}) == 3
    for way in ways:
        settings = override(engine, parse_settings(way.words.split()), "the way")
        found = engine_memory(config, settings, stored=wanted.inventory, available=room).peak
        assert found == way.peak <= room


def test_a_refusal_names_parts_and_three_ways() -> None:
    """In one line: what it would take, what of it takes most, what there is, and what fits."""
    wanted = Wanted(counted(LLAMA), EngineConfig(cache_tokens=65536))
    assert check_engines({"big": wanted}, 4 * 10**9)["big"].peak < 4 * 10**9
    with pytest.raises(CapacityError) as refused:
        check_engines({"big": wanted}, 2 * 10**9)
    assert re.fullmatch(
        r"big would take 2\.\d\d GB of memory \(cache 1\.61 GB, .*\), and 2\.00 GB are available; "
        r"what fits: cache_tokens=32768 \(.* GB\), .* \(.* GB\) or .* \(.* GB\)",
        str(refused.value),
    )


def test_several_engines_must_fit_together() -> None:
    """Each would fit alone; the ways say whose settings they are, or whom to leave out."""
    wanted = {name: Wanted(counted(SMALL), EngineConfig(weights="float32")) for name in ("one", "two")}
    alone = wanted["one"].forecast(10**10).peak
    with pytest.raises(CapacityError, match=r"one and two would take .*what fits: for one cache_tokens=4096 .*for two"):
        check_engines(wanted, int(1.9 * alone))
    with pytest.raises(CapacityError, match=r"what fits: without one .* or without two"):
        check_engines(wanted, int(1.01 * alone))


def test_where_nothing_fits_the_store_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model of the store, which comes with the package; and where there is no room for any, to make some."""
    wanted = Wanted(counted(LLAMA), EngineConfig(weights="int4", max_batch_tokens=128, max_sequences=8))
    with pytest.raises(CapacityError, match=rf"what fits: the model {hub.R1_MINI} "):
        check_engines({"big": wanted}, 300 * 10**6)
    with pytest.raises(CapacityError, match="what fits: no other setting of it: free some memory"):
        check_engines({"big": wanted}, 10**6)


def test_a_share_of_memory_is_of_what_is_left(tmp_path: Path) -> None:
    """A cache of half of the memory leaves the other half to everything else, whatever there is."""
    wanted = Wanted(counted(LLAMA), EngineConfig(weights="int8", cache_memory="0.5"))
    for available in (1 * 10**9, 4 * 10**9):
        parts = wanted.forecast(available).working
        left = available - parts["runtime"] - parts["weights"]
        assert 0.4 * left < parts["cache"] <= 0.5 * left


def test_an_engine_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Engine.load, so by chat, evaluation and each engine of a server; with a way set it loads and works."""
    save(initialize(build(SMALL), seed=0), tmp_path / "model")
    own = min(resident_bytes(), RUNTIME_BYTES)
    monkeypatch.setattr(fit, "available_memory", lambda: 700 * 10**6 - own)
    with pytest.raises(CapacityError) as refused, monkeypatch.context() as patched:
        patched.setattr("porcelet.engine.engine.load", _never)
        Engine.load(tmp_path / "model", EngineConfig(cache_tokens=65536))
    for words in re.findall(r"(?:fits: |, |or )([a-z_]+=[^(]*) \(", str(refused.value)):
        settings = override(EngineConfig(cache_tokens=65536), parse_settings(words.split()), "the way")
        assert check_engine(tmp_path / "model", settings).peak <= 700 * 10**6
        engine = Engine.load(tmp_path / "model", settings)
        assert 0 < engine.predicted_bytes <= 700 * 10**6
        assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0].num_generated == 2


def _never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was read")


def test_a_model_without_the_mtp_layer_it_names_is_counted_without(tmp_path: Path) -> None:
    """As it is loaded."""
    save(initialize(build(dataclasses.replace(V3_MTP, num_nextn_predict_layers=0)), seed=0), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1')
    )
    assert read_inventory(tmp_path).config.num_nextn_predict_layers == 0


# ---- training -------------------------------------------------------------------------------------------------------


PRETRAINING = TrainConfig(data=DataConfig(corpus=("store",), tokens_per_step=8192))
GRPO = TrainConfig(method="grpo", model="base", policy=PolicyConfig(sampler_weights="int8", kl_weight=0.001))


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("train", [PRETRAINING, GRPO], ids=["pretrain", "grpo"])
@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "deepseek_v3"])
def test_what_a_run_is_told_to_change_makes_it_fit(config: ModelConfig, train: TrainConfig, share: float) -> None:
    """Each override, applied to the recipe, takes what it says."""
    model = counted(config)
    room = int(share * training_memory(train, model).peak)
    ways = fit.training_ways(train, model, None, room)
    assert ways
    for way in ways:
        values = {name: _typed(value) for name, value in parse_settings(way.words.split()).items()}
        assert training_memory(changed(train, values), model).peak == way.peak <= room


def _typed(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def test_a_teacher_counts() -> None:
    """Distillation keeps another model in full precision."""
    train = TrainConfig(method="distill", model="base", policy=PolicyConfig(teacher="big"))
    with_teacher = training_memory(train, counted(SMALL), counted(LLAMA)).peak
    assert with_teacher - training_memory(train, counted(SMALL)).peak == 4 * LLAMA.num_parameters()


def test_a_run_is_refused_before_its_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By train itself; on a GPU nothing is said about this machine's memory."""
    monkeypatch.setattr(fit, "available_memory", lambda: 10**6)
    monkeypatch.setattr("porcelet.train.start.build", _never)
    with pytest.raises(CapacityError, match=rf"the run in {tmp_path}/run would take .* of memory \(runtime 0\.\d+ GB"):
        run_training(tiny_run.config(tmp_path / "run"), tiny_run.FIELDS)


def test_the_recipes_fit_a_laptop() -> None:
    """Every stage of the repository's recipes that makes a model takes less than 8 GB."""
    made = 0
    for recipe in sorted(Path("recipes").glob("*.toml")):
        for stage in read_stages(recipe, []):
            if stage.model_fields:
                shape = read_hf({"vocab_size": 32000, "eos_token_id": 1, "bos_token_id": 0} | stage.model_fields)
                assert training_memory(stage.config, counted(shape)).peak < 8 * 10**9
                made += 1
    assert made
