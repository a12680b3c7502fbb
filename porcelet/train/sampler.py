"""The engine that a policy draws with: the trainer's own parameters, or a copy of them in 8 bits.

A copy draws faster where reading weights takes the time, and from a slightly other distribution than the trainer's:
metrics show by how much (`mismatch`, `mismatch_kl`), and `importance_cap` corrects for it.
"""

from __future__ import annotations

from porcelet.config import EngineConfig, PolicyConfig
from porcelet.engine.engine import Engine
from porcelet.models.transformer import Transformer
from porcelet.weights.load import quantize_from, quantized


def make_engine(model: Transformer, config: PolicyConfig) -> Engine:
    """An engine for rollouts of `model`; `refresh` it before each."""
    is_copy = config.sampler_weights == "int8"
    # How often a guess pays is measured by the clock, so guesses fall differently in a run that is resumed, and with
    # them the shapes of steps and, through torch's products, the last bits of log-probabilities.
    settings = EngineConfig(weights=config.sampler_weights, speculation="off")
    return Engine(quantized(model) if is_copy else model, settings)


def refresh(engine: Engine, model: Transformer) -> None:
    """Let the engine draw with the model's parameters of this moment."""
    if engine.model is not model:
        quantize_from(engine.model, model)
    engine.weights_changed()
