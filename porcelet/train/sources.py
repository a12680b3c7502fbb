"""Where a run's samples come from: one source a method, a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from porcelet import hub
from porcelet.config import ModelConfig, TrainConfig
from porcelet.engine.codec import open_tokenizer
from porcelet.errors import InputError, ModelError
from porcelet.models.transformer import Transformer
from porcelet.tokenizer import Tokenizer
from porcelet.train.conversations import read_conversations
from porcelet.train.corpus.packing import Pretraining
from porcelet.train.corpus.readers import files_of
from porcelet.train.corpus.store import open_store, tokenizer_sha256
from porcelet.train.inputs import unread
from porcelet.train.reference import Reference
from porcelet.train.rendering import Renderer
from porcelet.train.rewards import Reward, Term, rewards_of
from porcelet.train.rollout import Rollout, require_room
from porcelet.train.sampler import make_engine
from porcelet.train.tasks import FiniteTask, Problem, Task, load_task
from porcelet.train.types import ROLLOUTS, Metrics, Source
from porcelet.types import Sample
from porcelet.weights.load import load


def make_source(
    config: TrainConfig,
    model: Transformer,
    renderer: Renderer,
    reward: Reward | None,
    *,
    unsafe_sandbox: bool = False,
) -> Source:
    """The source that the recipe asks for.

    Raises:
        InputError: the recipe's task or data cannot be used.
        ModelError: the model names no token that ends an answer.
    """
    ends = model.config.eos_token_ids
    if not ends:
        raise ModelError(f"model {config.model} names no eos_token_id; an answer could not end")
    check_data(config)
    if config.data.conversations:
        return read_conversations(config, model.config, renderer)
    if config.data.corpus:
        return _pretraining(config, model)
    task = load_task(config.task.name, config.task.options)
    if config.method in ROLLOUTS:
        check_room(config, model.config, renderer, task)
        own = (Term("reward", reward),) if reward else ()
        rewards = own or rewards_of(config, unsafe_sandbox=unsafe_sandbox)
        engine, reference = make_engine(model, config.policy), _reference(config, model)
        return Rollout(engine, model, task, renderer, config, rewards, reference, _teacher(config, model))
    answers = Answers(task, renderer, config, model.config.max_position_embeddings)
    first = answers.sample(task.draw(config.seed, 0))
    learnt = [token for token, weight in zip(first.tokens, first.weights, strict=True) if weight]
    renderer.require_end(learnt[-1], ends, f"task {config.task.name}")
    if isinstance(task, FiniteTask):  # the longest by letters, lest a run end in the midst of it
        answers.sample(max(task.training, key=lambda one: len(one.question) + len(one.trace) + len(one.answer)))
    return answers


def check_data(config: TrainConfig) -> None:
    """Refuse texts that the method would not read.

    Raises:
        InputError: names them and the method that does.
    """
    for name, method in (("conversations", "sft"), ("corpus", "pretrain")):
        if getattr(config.data, name) and config.method != method:
            raise InputError(f"[data] {name} is for method = {method!r}; this is {config.method!r}")


def check_reads(config: TrainConfig, made: Sequence[Path], *, unsafe_sandbox: bool = False) -> None:
    """Refuse beforehand what a run or its evaluation could not read, or be judged by. What lies in the folders `made`
    by earlier runs need not be there yet.

    Raises:
        InputError: the recipe's texts, task or rewards cannot be used.
        MissingExtraError: a package that one of them needs is not installed.
    """
    check_data(config)
    for name in config.data.conversations:
        if not any(Path(name).is_relative_to(folder) for folder in made):
            list(files_of(name))
    for name in config.data.corpus:
        open_store(Path(name))
    if config.evaluate.num_problems or "task" not in unread(config):
        load_task(config.task.name, config.task.options)
        rewards_of(config, unsafe_sandbox=unsafe_sandbox)


def check_room(config: TrainConfig, model: ModelConfig, renderer: Renderer, task: Task) -> None:
    """Refuse answers, and the longest problem of a task that lists them, which leave no room for each other."""
    longest, asked = model.max_position_embeddings, config.policy.max_new_tokens
    if asked >= longest:
        raise InputError(
            f"[policy] max_new_tokens is {asked}; the model has max_position_embeddings {longest}, for prompt and "
            "answer: lower it"
        )
    if isinstance(task, FiniteTask):  # by letters, as rendering thousands of problems would take seconds
        question = max((problem.question for problem in (*task.training, *task.held_out)), key=len)
        require_room(question, renderer.prompt(question), longest)


def _reference(config: TrainConfig, model: Transformer) -> Reference | None:
    if not config.policy.kl_weight:
        return None
    return Reference(model, Path(config.output), config.policy.reference_every)


def _teacher(config: TrainConfig, model: Transformer) -> Transformer | None:
    """The model that distillation learns from.

    Raises:
        InputError: its tokens are not the student's, or it cannot read as far.
    """
    if not config.policy.teacher:
        return None
    path = hub.resolve(config.policy.teacher)
    teacher = load(path).requires_grad_(False).to(config.device)
    own, longest = Tokenizer.from_folder(Path(config.output)), model.config.max_position_embeddings
    if open_tokenizer(path).to_json() != own.to_json():
        raise InputError(
            f"[policy] teacher {config.policy.teacher} has another tokenizer than {config.model}; on-policy "
            "distillation compares token by token. Distil its traces instead: method = 'sample', then 'sft'"
        )
    if teacher.config.max_position_embeddings < longest:
        raise InputError(
            f"[policy] teacher {config.policy.teacher} has max_position_embeddings "
            f"{teacher.config.max_position_embeddings}, the student {longest}; choose a teacher that reads as far"
        )
    return teacher


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
    """A task's problems with their traces and answers, which are to be learnt."""

    task: Task
    renderer: Renderer
    config: TrainConfig
    longest: int  # what the model reads at once

    def __call__(self, step: int) -> tuple[list[Sample], Metrics]:
        count = self.config.samples_per_step
        positions = range(step * count, (step + 1) * count)
        return [self.sample(self.task.draw(self.config.seed, i)) for i in positions], {}

    def sample(self, problem: Problem) -> Sample:
        """A problem with its worked solution.

        Raises:
            InputError: they are more than the model reads.
        """
        sample = self.renderer.sample(problem)
        if len(sample.tokens) > self.longest:
            raise InputError(
                f"task {self.config.task.name}: {problem.question[:60]!r} and its worked solution are "
                f"{len(sample.tokens)} tokens; the model has max_position_embeddings {self.longest}: shorten it, or "
                "take a model that reads as far"
            )
        return sample
