"""`TrainConfig`: one training run, as the tables of a recipe.

    [train]  what is run, for how long          [task]    problems, with the task's own options
    [data]   texts and conversations            [policy]  reinforcement learning      [[reward]]  what an answer earns
    [optimizer]  how parameters move            [lora]    adapters                    [log]       where metrics go
    [evaluate]   what the model can do afterwards
    [model]  the architecture of a new model (`ModelConfig`), unless [train] model names a folder to start from

Defaults are published ones where one suits all. Learning rates are for new small models, and clips are GRPO's under
every loss: DAPO raises `clip_high` to 0.28, GSPO's are 3e-4 and 4e-4, and a trained model wants rates near 1e-6 there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porcelet.errors import InputError

METHODS = ("pretrain", "sft", "grpo", "distill", "sample")
DRAWING = ("grpo", "distill", "sample")  # methods whose samples a model draws
POLICY_LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where texts come from. `corpus` are token stores that `porcelet data tokenize` made, `conversations` are files.

    A step of pre-training predicts `tokens_per_step` tokens in pieces of at most `context`; a piece sees no other
    document unless `document_mask` is off, as in V3 (report, section 4.1). `weights` are the stores' shares of the
    tokens; without them a store's share is its size. A new model gets the first store's tokenizer. `held_out` are
    documents on which the trained model is measured, in bits a byte.

    Conversations are JSON Lines (train/conversations.py). What the assistant says is trained, its end included: every
    answer, or the `last` one of each conversation (`train_on`). A step takes `samples_per_step` conversations, or as
    many as `tokens_per_step` hold (`step_of`). Its loss is the mean over all trained tokens, or over conversations,
    whatever their lengths (`weigh`). One longer than `context` or the model's own is refused, dropped, or cut at its
    end (`too_long`). Fields of a file that are no part of its form are refused unless `ignore` names them.
    """

    corpus: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    held_out: str = ""
    conversations: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    train_on: str = "all"  # all | last: the assistant's answers that are learnt
    step_of: str = "samples"  # samples | tokens
    weigh: str = "tokens"  # tokens | conversations: what counts equally
    too_long: str = "refuse"  # refuse | drop | cut
    tokens_per_step: int = 4096
    context: int = 512
    document_mask: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "tokens_per_step")
        _at_least(self, 2, "context")
        _one_of(self, "train_on", ("all", "last"))
        _one_of(self, "step_of", ("samples", "tokens"))
        _one_of(self, "weigh", ("tokens", "conversations"))
        _one_of(self, "too_long", ("refuse", "drop", "cut"))
        if self.weights and len(self.weights) != len(self.corpus):
            raise InputError(f"there are {len(self.weights)} weights for {len(self.corpus)} corpora; give each one")
        if self.weights and not (all(0 <= weight < math.inf for weight in self.weights) and any(self.weights)):
            raise InputError(f"weights are {self.weights}; they must be shares from 0 up, and not all 0")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Problems with answers that can be checked; `options` are the task's own and checked by it."""

    name: str = "sums"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters move (train/optim.py, train/schedule.py).

    The rate rises over `warmup_steps`, stays, falls to `min_learning_rate` over `decay_steps` and stays there for
    `final_steps`, by `schedule`: "cosine" (decay_steps 0: all after the warm-up), "wsd" (warmup-stable-decay, whose
    `decay_shape` is "linear" or "sqrt"), "step" (V2's drops at 60 and 90 % of the run) or "constant". "muon" moves the
    matrices of blocks by Muon, at `muon_learning_rate` in the same schedule, and leaves the rest to AdamW.
    """

    name: str = "adamw"  # adamw | muon
    learning_rate: float = 3e-3
    min_learning_rate: float = -1.0  # -1: a tenth of learning_rate
    schedule: str = "cosine"  # cosine | wsd | step | constant
    warmup_steps: int = 20
    decay_steps: int = 0
    decay_shape: str = "linear"  # linear | sqrt
    final_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    muon_learning_rate: float = 0.0  # 0: learning_rate, as Muon's updates are scaled to AdamW's size
    muon_momentum: float = 0.95

    def __post_init__(self) -> None:
        _one_of(self, "name", ("adamw", "muon"))
        _one_of(self, "schedule", ("cosine", "wsd", "step", "constant"))
        _one_of(self, "decay_shape", ("linear", "sqrt"))
        _positive(self, "learning_rate", "max_grad_norm")
        if self.min_learning_rate != -1:
            _within(self, 0, self.learning_rate, "min_learning_rate")
        _at_least(self, 0, "warmup_steps", "decay_steps", "final_steps", "weight_decay")
        _at_least(self, 0, "muon_learning_rate")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.schedule == "wsd" and not self.decay_steps:
            raise InputError("schedule is wsd and decay_steps is 0; say over how many steps the rate falls")

    @property
    def floor(self) -> float:
        """The rate at the end of the fall."""
        return self.learning_rate / 10 if self.min_learning_rate == -1 else self.min_learning_rate


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Reinforcement learning: how many answers a prompt gets, how they are drawn, and how the policy learns from them.

    `loss` names the member of GRPO's family (train/policy.py). A rollout is learnt from `updates_per_rollout` times,
    each time in `minibatches` steps of the optimizer. Clips are those of the ratio, 1 - `clip_low` to 1 + `clip_high`.
    `kl_weight` is beta of the divergence to a reference that is replaced every `reference_every` steps (0: never);
    `kl_estimator` is "k3" or V3.2's "unbiased" one.

    `sampler_weights` "int8" draws with a copy of the model in 8 bits. `importance_cap` C corrects for a sampler that
    computes unlike the trainer, by min(p_trainer / p_sampler, C); 0 is off. `off_policy_limit` (0: off) leaves out
    answers worse than their group's mean whose tokens have become less likely by more than that many nats a token since
    they were drawn (V3.2).

    With method = "distill" the policy learns from `teacher`, a model with the same tokenizer, instead of rewards, which
    are only logged: each token's advantage is log p_teacher - log p_student. With method = "sample" nothing is learnt:
    `keep` of each problem's right answers are written down (train/collect.py).

    `redraws` is how often a step draws further problems in the place of groups without a signal (DAPO's dynamic
    sampling). Answers within `overlong_buffer` tokens of `max_new_tokens` lose up to 1 (DAPO, eq. 13); with
    `overlong_filter`, answers that were cut off are not learnt from at all.
    """

    loss: str = "grpo"
    group_size: int = 8  # G: answers a prompt
    max_new_tokens: int = 8
    temperature: float = 1.0
    sampler_weights: str = "float32"  # float32 | int8
    updates_per_rollout: int = 1  # mu of GRPO's algorithm 1; the clip acts from the second on
    minibatches: int = 1  # R1: 16
    clip_low: float = 0.2  # GSPO: 0.0003
    clip_high: float = 0.2  # DAPO: 0.28; GSPO: 0.0004; R1: 10
    kl_weight: float = 0.0  # R1: 0.001
    kl_estimator: str = "k3"  # k3 | unbiased
    reference_every: int = 0  # R1: 400
    importance_cap: float = 0.0  # TRL: 3
    off_policy_limit: float = 0.0
    redraws: int = 0
    overlong_buffer: int = 0
    overlong_filter: bool = False
    teacher: str = ""
    keep: int = 1  # right answers a problem

    def __post_init__(self) -> None:
        _one_of(self, "loss", POLICY_LOSSES)
        _one_of(self, "sampler_weights", ("float32", "int8"))
        _one_of(self, "kl_estimator", ("k3", "unbiased"))
        _at_least(self, 1, "max_new_tokens", "updates_per_rollout", "minibatches", "keep")
        _positive(self, "temperature")
        _at_least(self, 0, "clip_low", "clip_high", "kl_weight", "reference_every", "importance_cap", "redraws")
        _at_least(self, 0, "off_policy_limit")
        _within(self, 0, self.max_new_tokens, "overlong_buffer")
        if self.group_size < 2:
            raise InputError(f"group_size is {self.group_size}; a group compares answers, so it needs at least 2")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One of the rewards whose weighted sum an answer earns: a built-in one's name or `file.py:function`.

    Whether an answer is right, which evaluation counts and method "sample" asks, is decided by the first of them alone,
    by the value 1: write the one that checks the answer first.
    """

    name: str = "exact"
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InputError(f"weight of the reward {self.name!r} is {self.weight}; it must be a finite number")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): rank 0 trains the whole model.

    A layer's weight becomes W + alpha / rank · B·A, and A and B alone are trained: the base stays as it is, the
    experts' biases included. `targets` are names as in PEFT, such as q_proj or self_attn.o_proj, or "all-linear": every
    linear layer of attention and MLPs; of attention alone in DeepSeek's architectures, whose MLPs PEFT cannot adapt.
    With `adapter`, a folder in PEFT's format, they begin as they are there; else A is random and B zero.

    The run leaves them in `adapter/` of its output, in PEFT's format. With `merge` the output is a whole model besides,
    the base with the adapter in it, for `porcelet chat --model` and all others who know nothing of adapters.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)
    adapter: str = ""
    merge: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 0, "rank")
        _positive(self, "alpha")
        if not self.targets:
            raise InputError('[lora] targets is empty; name linear layers such as q_proj, or "all-linear"')
        if self.adapter and not self.rank:
            raise InputError(f"[lora] adapter is {self.adapter!r} and rank 0; give the rank of the adapter")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl: TensorBoard's files in `output`/tensorboard, or a trackio project.

    Rollouts are written to `output`/rollouts; those of the newest `rollouts` steps behind a checkpoint stay there.

    `report` is a language: after every finished stage, what has been done so far is a page in it, report.html in the
    recipe's `output`.
    """

    tensorboard: bool = False
    trackio: str = ""
    rollouts: int = 100
    report: str = ""  # en | fr | zh; empty: no page

    def __post_init__(self) -> None:
        _at_least(self, 0, "rollouts")
        if self.report:
            _one_of(self, "report", ("en", "fr", "zh"))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a model is measured with held-out problems of the task: `num_samples` answers to each of the first
    `num_problems`, drawn at `temperature`; at 0 one greedy answer each. `num_problems` 0 measures nothing.

    An answer has at most `max_new_tokens`, and ends where the model's context does. 0 is as many as [policy] says;
    256 where the recipe leaves that table as it is and the method draws no answers. Right is an answer to which the
    first reward gives 1.
    """

    num_problems: int = 0
    num_samples: int = 16
    temperature: float = 1.0
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0, "num_problems", "temperature", "max_new_tokens")
        _at_least(self, 1, "num_samples")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The methods differ in where samples come from and in their weights.

    `model` is what to start from: a folder, a GGUF file or a name in the store. Without one, `ModelConfig` fields come
    from the recipe's [model] table, and the new model speaks in `chat_format`: V3's, or R1's, which thinks before it
    answers. It reads letter by letter, and numbers of up to `digits` digits at once.

    `output` receives `checkpoint/` (exact resume), `metrics.jsonl` and, at the end, the model in Hugging Face form. A
    step's samples go through the model in pieces of about `tokens_per_pass` tokens, which bounds memory; 0 is
    all at once. `mtp_weight` and `bias_update_speed` take their late values once the share `*_late_from` of the steps
    is done.

    A step is refused whose loss or gradient norm is not finite or, with `spike_deviations` k, above mean + k standard
    deviations of the last `spike_window` steps. `on_spike` "stop" ends the run there; "skip" goes on without it, but
    stops after more than `spike_limit` in a row. Its batch is kept in `output`/spikes. Of a step with several updates,
    those before the refused one stand.
    """

    method: str = "pretrain"
    model: str = ""
    chat_format: str = "V3"  # V3 | R1
    digits: int = 1  # that a token may join; V3: 3
    output: str = "runs/run"
    steps: int = 300
    seed: int = 0
    samples_per_step: int = 64
    tokens_per_pass: int = 0
    dtype: str = "float32"  # float32 | bfloat16 | fp8 (emulated)
    context_extension: float = 1.0  # YaRN's factor on the context of the model to start from; V3: 40
    mtp_weight: float = 0.3  # lambda of the MTP loss, V3 report section 4.2
    mtp_weight_late: float = 0.1
    mtp_late_from: float = 1.0  # V3: 0.676, 10T of 14.8T tokens
    bias_update_speed: float = 0.001  # gamma of the balancing rule, V3 report section 2.1.2
    bias_update_speed_late: float = 0.0
    bias_late_from: float = 1.0  # V3: 0.966, all but the last 500B tokens
    balance_weight: float = 0.0  # alpha of the sequence-wise balance loss; V3: 0.0001
    on_spike: str = "stop"  # stop | skip
    spike_window: int = 128
    spike_deviations: float = 0.0  # OLMo 2: 6
    spike_limit: int = 3
    checkpoint_every: int = 100
    keep_checkpoints: int = 1
    threads: int = 0  # 0: as torch decides, or as many as the checkpoint was made with
    device: str = "cpu"  # cpu | cuda
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rewards: tuple[RewardConfig, ...] = ()  # none: the task's own; the first says whether an answer is right
    lora: LoraConfig = field(default_factory=LoraConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _one_of(self, "method", METHODS)
        _one_of(self, "chat_format", ("V3", "R1"))
        _within(self, 1, 3, "digits")
        _one_of(self, "dtype", ("float32", "bfloat16", "fp8"))
        _one_of(self, "on_spike", ("stop", "skip"))
        _one_of(self, "device", ("cpu", "cuda"))
        _at_least(self, 1, "steps", "samples_per_step", "checkpoint_every", "keep_checkpoints")
        _at_least(self, 2, "spike_window")
        _at_least(self, 0, "spike_deviations", "spike_limit")
        if not self.output:
            raise InputError("output is empty; name the folder that receives the run")
        _within(self, 0, 2**63 - 1, "seed")
        _within(self, 0, 1024, "threads")
        _at_least(self, 0, "tokens_per_pass", "mtp_weight", "bias_update_speed", "balance_weight")
        _at_least(self, 0, "mtp_weight_late", "bias_update_speed_late")
        _within(self, 0, 1, "mtp_late_from")
        _within(self, 0, 1, "bias_late_from")
        if not 1 <= self.context_extension < math.inf:
            raise InputError(f"context_extension is {self.context_extension}; it must be at least 1")
        if self.method in DRAWING:
            self._check_groups()
        if (self.method == "distill") != bool(self.policy.teacher):
            raise InputError(
                f"method is {self.method!r} and [policy] teacher {self.policy.teacher!r}; distillation needs one, and "
                "nothing else does"
            )
        if self.method == "sample" and not self.model:
            raise InputError("method is 'sample', which draws from a model that exists; name one with [train] model")
        if self.method == "sample" and (self.lora.rank or self.dtype != "float32" or self.context_extension != 1):
            raise InputError("method is 'sample', which trains nothing; leave [lora], dtype and context_extension out")
        idle = [name for name in ("redraws", "overlong_buffer") if getattr(self.policy, name)]
        if self.method == "distill" and idle:
            raise InputError(f"[policy] {idle[0]} needs rewards to learn from; method {self.method!r} has none")
        if self.lora.rank and not self.model:
            raise InputError("[lora] adapts a model that exists; name one with [train] model")
        if self.lora.rank and self.dtype != "float32":
            raise InputError(f"dtype is {self.dtype!r}; adapters are trained in float32")

    def _check_groups(self) -> None:
        size = self.policy.group_size
        if self.samples_per_step % size:
            raise InputError(f"samples_per_step {self.samples_per_step} is not a multiple of group_size {size}")
        num_groups = self.samples_per_step // size
        if self.method != "sample" and self.policy.minibatches > num_groups:
            raise InputError(f"minibatches is {self.policy.minibatches}; a step has {num_groups} groups to cut")


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
