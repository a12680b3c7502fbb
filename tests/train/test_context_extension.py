from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import pytest
import torch

from porcelet.config import TrainConfig
from porcelet.errors import InputError
from porcelet.models.attention import PackedView
from porcelet.models.rope import frequencies
from porcelet.models.transformer import Transformer
from porcelet.train.loop import train
from porcelet.train.loss import Totals, compute_loss
from porcelet.train.optim import make_optimizer
from porcelet.train.packing import pack
from porcelet.train.spikes import SpikeRule
from porcelet.train.start import extend_context
from porcelet.train.step import Run, take_step
from porcelet.train.types import Source
from porcelet.types import Sample
from porcelet.weights.load import load
from tests.train.tiny_run import FIELDS, config, model

PERIOD = 8


def test_extended_model_is_saved_with_the_published_formula(tmp_path: Path) -> None:
    """V3's s = 40, alpha 1, beta 32: the saved config says so, its frequencies are YaRN's pair by pair, attention is
    sharper by (0.1 ln s + 1)², and the weights are the old ones."""
    wide = FIELDS | {"qk_rope_head_dim": 64, "max_position_embeddings": 4096}
    start = train(config(tmp_path / "start", steps=1), wide)
    run = config(tmp_path / "long", model=str(start), steps=1, context_extension=40.0, learning_rate=1e-9)
    old, new = load(start), load(train(run, {}))
    assert new.config.max_position_embeddings == 163840
    scaling = new.config.rope_scaling
    assert scaling and (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", 40, 4096)
    plain, found = (frequencies(m.config, torch.device("cpu")).tolist() for m in (old, new))
    edges = [64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(10000)) for turns in (32, 1)]
    low, high = math.floor(edges[0]), math.ceil(edges[1])
    assert (low, high) == (10, 23)  # what V3's own code gives
    for pair, (before, after) in enumerate(zip(plain, found, strict=True)):
        ramp = min(1.0, max(0.0, (pair - low) / (high - low)))
        assert after == pytest.approx(before / 40 * ramp + before * (1 - ramp), rel=1e-5)
    sharper = (0.1 * math.log(40) + 1) ** 2
    assert new.model.layers[0].self_attn.scale == pytest.approx(old.model.layers[0].self_attn.scale * sharper)
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter, old.get_parameter(name), rtol=0, atol=1e-6)


def test_an_extension_happens_once_and_to_a_model_that_exists(tmp_path: Path) -> None:
    """A second stage of the same extension asks for none; a new model's table has rope_scaling."""
    extended = extend_context(model(), 4.0)
    assert extend_context(extended, 1.0) is extended
    with pytest.raises(InputError, match=r"extended already \(yarn by 4.0\)"):
        extend_context(extended, 2.0)
    with pytest.raises(InputError, match="context_extension continues a model"):
        train(config(tmp_path, context_extension=4.0), FIELDS)
    with pytest.raises(InputError, match="context_extension is 0.5"):
        TrainConfig(context_extension=0.5)


def periodic(count: int, length: int, seed: int) -> list[Sample]:
    """Texts that repeat every eight tokens."""
    draw = random.Random(seed)
    texts = [tuple(draw.randrange(16) for _ in range(PERIOD)) * (length // PERIOD) for _ in range(count)]
    return [Sample(tokens=text, weights=(0.0,) * PERIOD + (1.0,) * (length - PERIOD)) for text in texts]


def loss(network: Transformer, length: int, run: TrainConfig) -> float:
    samples = periodic(8, length, 999)
    batch = pack(samples)
    with torch.no_grad():
        _, parts = compute_loss(network, batch, PackedView(batch.segments), run, Totals.of(samples))
    return parts["cross_entropy"].item()


def teach(network: Transformer, run: TrainConfig, steps: int, source: Source) -> None:
    """Some steps of a run, without its files."""
    state = Run(run, {}, network, make_optimizer(network, run.optimizer), source, SpikeRule(2, 0.0))
    for step in range(steps):
        state.step = step
        assert not take_step(state).objection


def test_continuing_at_four_times_the_context_improves_there(tmp_path: Path) -> None:
    """Trained on 16 tokens, extended to 64, continued on 64: the loss at 64 falls far below that of the extended model
    before, and below what a model gets that knows the alphabet alone."""
    run = config(tmp_path, steps=100, learning_rate=1e-2, warmup_steps=0, schedule="constant")
    network = model(num_nextn_predict_layers=0, max_position_embeddings=16, initializer_range=0.1)
    teach(network, run, 90, lambda step: (periodic(16, 16, step), {}))
    assert loss(network, 16, run) < 0.5
    extended = extend_context(network, 4.0)
    before = loss(extended, 64, run)
    slower = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=3e-3))
    teach(extended, slower, 20, lambda step: (periodic(4, 64, step), {}))
    assert loss(extended, 64, run) < min(0.5 * before, math.log(16))
