"""Where a run's samples come from: one source a method, a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from porcelet.config import EngineConfig, TrainConfig
from porcelet.engine.engine import Engine
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer
from porcelet.train.corpus.packing import Pretraining
from porcelet.train.corpus.store import open_store, tokenizer_sha256
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Reward
from porcelet.train.rollout import Rollout
from porcelet.train.tasks import Task, load_task
from porcelet.types import Sample

Metrics = dict[str, float]
Source = Callable[[int], tuple[list[Sample], Metrics]]  # step → its samples, and what is to log about them


def make_source(config: TrainConfig, model: Transformer, renderer: Renderer, reward: Reward) -> Source:
    """The source that the recipe asks for.

    Raises:
        InputError: the recipe's task or data cannot be used.
        ModelError: the model names no token that ends an answer.
    """
    if not model.config.eos_token_ids:
        raise ModelError(f"model {config.model} names no eos_token_id; an answer could not end")
    if config.method == "pretrain" and config.data.corpus:
        return _pretraining(config, model)
    task = load_task(config.task.name, config.task.options)
    if config.method == "grpo":
        return Rollout(Engine(model, EngineConfig(weights="float32")), task, renderer, config, reward)
    return Answers(task, renderer, model.config.eos_token_ids[0], config)


def _pretraining(config: TrainConfig, model: Transformer) -> Pretraining:
    longest = model.config.max_position_embeddings
    if config.data.context > longest:
        raise InputError(f"[data] context is {config.data.context}; the model has max_position_embeddings {longest}")
    stores = [open_store(Path(name)) for name in config.data.corpus]
    if stores[0].header.tokenizer_sha256 != tokenizer_sha256(Path(config.output)):
        raise InputError(f"{stores[0].path} was not tokenized with the tokenizer of {config.model}; tokenize it anew")
    return Pretraining(
        stores,
        tokens_per_step=config.data.tokens_per_step,
        context=config.data.context,
        seed=config.seed,
        weights=config.data.weights,
        document_mask=config.data.document_mask,
    )


@dataclass(frozen=True)
class Answers:
    """A task's problems with their answers, which are to be learnt."""

    task: Task
    renderer: Renderer
    stop: int
    config: TrainConfig

    def __call__(self, step: int) -> tuple[list[Sample], Metrics]:
        count = self.config.samples_per_step
        positions = range(step * count, (step + 1) * count)
        return [self.renderer.sample(self.task.draw(self.config.seed, i), self.stop) for i in positions], {}
