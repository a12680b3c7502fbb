"""What is computed with: whether each model of the store fits into this machine's memory."""

from __future__ import annotations

from collections.abc import Iterator

from porcelet import hub
from porcelet.config import EngineConfig
from porcelet.doctor.finding import Finding, told
from porcelet.errors import CapacityError, ModelError


def model_memory() -> Iterator[Finding]:
    """For each model of the store, whether an engine with the settings of `EngineConfig` fits into memory."""
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
    """Raises CapacityError for a model that does not fit, ModelError for files that are no model."""
    from porcelet.kernels import cpu
    from porcelet.memory.fit import Wanted, check_engines, gigabytes, largest_parts
    from porcelet.memory.tensors import read_inventory
    from porcelet.weights.memory import available_memory

    wanted, available = Wanted(read_inventory(model.path), EngineConfig(), cpu.available()), available_memory()
    forecast = check_engines({model.name: wanted}, available)[model.name]
    return Finding(
        "memory",
        "ok",
        f"{model.name} takes up to {gigabytes(forecast.peak)} ({largest_parts(forecast)}); {gigabytes(available)} are "
        "available",
    )
