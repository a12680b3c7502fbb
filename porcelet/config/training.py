"""`TrainConfig`: one training run, as the tables of a recipe.

    [train]  what is run, for how long          [task]    problems, with the task's own options
    [data]   texts and conversations            [policy]  reinforcement learning      [[reward]]  what an answer earns
    [optimizer]  how parameters move            [lora]    adapters                    [log]       where metrics go
    [model]  the architecture of a new model (`ModelConfig`), unless [train] model names a folder to start from

Every default is the published one where there is a published one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porcelet.errors import InputError

METHODS = ("pretrain", "sft", "grpo")
POLICY_LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where texts come from. `corpus` are token stores that `porcelet data tokenize` made, `conversations` are files.

    A step of pre-training predicts `tokens_per_step` tokens in pieces of at most `context`; a piece sees no other
    document unless `document_mask` is off, as in V3 (report, section 4.1). `weights` are the stores' shares of the
    tokens; without them a store's share is its size. A new model gets the first store's tokenizer. `held_out` are
    documents on which the trained model is measured, in bits a byte.
    """

    corpus: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    held_out: str = ""
    conversations: tuple[str, ...] = ()
    tokens_per_step: int = 4096
    context: int = 512
    document_mask: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "tokens_per_step")
        _at_least(self, 2, "context")
        if self.weights and len(self.weights) != len(self.corpus):
            raise InputError(f"there are {len(self.weights)} weights for {len(self.corpus)} corpora; give each one")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Problems with answers that can be checked; `options` are the task's own and checked by it."""

    name: str = "sums"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move.

    The rate rises over `warmup_steps`, then follows `schedule`: "cosine" falls to `min_learning_rate` at the last
    step, "wsd" stays until `decay_steps` before it (warmup-stable-decay), "constant" stays. Muon moves the matrices of
    blocks at `muon_learning_rate`, times the same schedule, and leaves the rest to AdamW.
    """

    name: str = "adamw"  # adamw | muon
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup_steps: int = 20
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    muon_learning_rate: float = 2e-2
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        _one_of(self, "name", ("adamw", "muon"))
        _one_of(self, "schedule", ("cosine", "wsd", "constant"))
        _positive(self, "learning_rate", "max_grad_norm", "muon_learning_rate")
        _at_least(self, 0, "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Reinforcement learning: how many answers a prompt gets, how they are drawn, and how the policy learns from them.

    `loss` names the member of GRPO's family (train/loss.py). Clips are those of the ratio, 1 - `clip_low` to 1 +
    `clip_high`. `kl_weight` is beta of the divergence to a reference that is replaced every `reference_every` steps (0:
    never). `importance_cap` C corrects for a sampler that computes unlike the trainer by min(p_trainer / p_sampler, C);
    0 is off. `redraws` is how often a step draws further problems in the place of groups without a signal (DAPO's
    dynamic sampling). Answers within `overlong_buffer` tokens of `max_new_tokens` lose up to 1 (DAPO, eq. 13).
    """

    loss: str = "grpo"
    group_size: int = 8  # G: answers a prompt
    max_new_tokens: int = 8
    temperature: float = 1.0
    updates_per_rollout: int = 1  # mu of GRPO's algorithm 1; the clip acts from the second on
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0  # R1: 0.001
    reference_every: int = 0  # R1: 400
    importance_cap: float = 0.0
    redraws: int = 0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        _one_of(self, "loss", POLICY_LOSSES)
        _at_least(self, 1, "group_size", "max_new_tokens", "updates_per_rollout")
        _positive(self, "temperature")
        _at_least(self, 0, "clip_low", "clip_high", "kl_weight", "reference_every", "importance_cap", "redraws")
        _within(self, 0, self.max_new_tokens, "overlong_buffer")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One of the rewards whose weighted sum an answer earns: a built-in one's name or `file.py:function`."""

    name: str = "exact"
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InputError(f"weight of the reward {self.name!r} is {self.weight}; it must be a finite number")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): rank 0 trains the whole model. `targets` are names of linear layers."""

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()  # empty: all of attention and the dense MLPs

    def __post_init__(self) -> None:
        _at_least(self, 0, "rank")
        _positive(self, "alpha")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl: TensorBoard, or a trackio project."""

    tensorboard: bool = False
    trackio: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The methods differ in where samples come from and in their weights.

    `model` is a folder to start from; without one, `ModelConfig` fields come from the recipe's [model] table. `output`
    receives `checkpoint/` (exact resume), `metrics.jsonl` and, at the end, the model in Hugging Face form. A step's
    samples go through the model in pieces of about `tokens_per_pass` tokens, which bounds memory; 0 is all at once.
    """

    method: str = "pretrain"
    model: str = ""
    output: str = "runs/run"
    steps: int = 300
    seed: int = 0
    samples_per_step: int = 64
    tokens_per_pass: int = 0
    dtype: str = "float32"  # float32 | bfloat16 | fp8 (emulated)
    mtp_weight: float = 0.3  # lambda of the MTP loss, V3 report section 4.2
    bias_update_speed: float = 0.001  # gamma of the balancing rule, V3 report section 2.1.2
    balance_weight: float = 0.0  # alpha of the sequence-wise balance loss; V3: 0.0001
    on_spike: str = "stop"  # stop | skip: what happens to a step whose loss or gradient is not finite or jumps
    checkpoint_every: int = 100
    threads: int = 0  # 0: as torch decides
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)
    lora: LoraConfig = field(default_factory=LoraConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _one_of(self, "method", METHODS)
        _one_of(self, "dtype", ("float32", "bfloat16", "fp8"))
        _one_of(self, "on_spike", ("stop", "skip"))
        _at_least(self, 1, "steps", "samples_per_step", "checkpoint_every")
        _at_least(self, 0, "seed", "threads", "tokens_per_pass", "mtp_weight", "bias_update_speed", "balance_weight")
        if self.method == "grpo" and self.samples_per_step % self.policy.group_size:
            raise InputError(
                f"samples_per_step {self.samples_per_step} is not a multiple of group_size {self.policy.group_size}"
            )


def _one_of(config: object, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise InputError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(allowed)}")


def _at_least(config: object, lowest: int, *names: str) -> None:
    for name in names:
        if not lowest <= getattr(config, name) < math.inf:  # also refuses NaN
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least {lowest}")


def _within(config: object, lowest: float, highest: float, name: str) -> None:
    if not lowest <= getattr(config, name) <= highest:
        raise InputError(f"{name} is {getattr(config, name)}; it must lie in {lowest}..{highest}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not 0.0 < getattr(config, name) < math.inf:  # also refuses NaN
            raise InputError(f"{name} is {getattr(config, name)}; it must be positive")
