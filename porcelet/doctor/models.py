"""What is computed with: whether each model of the store fits into this machine's memory."""

from __future__ import annotations

from collections.abc import Iterator

from porcelet import hub
from porcelet.config import EngineConfig
from porcelet.doctor.finding import Finding, told
from porcelet.errors import CapacityError, ModelError


def model_memory() -> Iterator[Finding]:
    """For each model of the store, whether its weights and the cache of `EngineConfig` fit into the memory there is."""
    models = hub.list_models()
    if hub.DEFAULT_MODEL not in {model.name for model in models}:
        yield Finding("default_model", "note", f"{hub.DEFAULT_MODEL} is not in the store", "run `porcelet pull`")
    for model in models:
        try:
            yield _memory_of(model)
        except CapacityError as problem:
            yield told("memory", "problem" if model.name == hub.DEFAULT_MODEL else "note", problem)
        except ModelError as problem:
            yield told("model", "problem", problem)


def _memory_of(model: hub.StoredModel) -> Finding:
    """Raises CapacityError for weights that do not fit, ModelError for files that are no model."""
    from porcelet.weights import memory
    from porcelet.weights.files import open_checkpoint
    from porcelet.weights.load import PACKED, chosen_format

    checkpoint = open_checkpoint(model.path)
    config, weights = checkpoint.config, chosen_format("auto", checkpoint)
    stored = sum(tensor.num_bytes for tensor in checkpoint.tensors)
    memory.check_fits(config, weights, model.name, stored)
    tokens = EngineConfig().cache_tokens
    size = memory.weight_bytes(config, weights, stored)
    cache = (2 if weights in PACKED else 4) * tokens * config.cache_values_per_token()  # `cache_dtype` "auto"
    available = memory.available_memory()
    cause = (
        f"{model.name}: {size / 1e6:,.0f} MB of weights ({weights}) and {cache / 1e6:,.0f} MB for {tokens:,} cached "
        f"tokens; {available / 1e6:,.0f} MB are available"
    )
    if size + cache > available:
        return Finding("memory", "note", cause, "serve it with --set cache_memory=0.5, or free some memory")
    return Finding("memory", "ok", cause)
