"""The three configs, and what follows from them by counting.

`ModelConfig` is one flat record for every architecture; its field names are those of a Hugging Face `config.json`, so
reading one is nearly the identity. Its counts (parameters, cache, operations) are the ones the engine, the trainer's
utilisation figure and the planner all use. `EngineConfig` and `TrainConfig` are what a user may change, as
`key=value` or TOML.

Left out so far: YaRN and other RoPE scaling, softmax gates (deepseek_v2), q/k norms (qwen3); each is refused by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from porcelet.errors import InputError, ModelError

ARCHITECTURES = ("llama", "deepseek_v3")
PAGE_SIZE = 64  # tokens a cache page holds; FlashMLA's block size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one model. MLA fields are 0 for llama; MoE fields are 0 where all layers are dense."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    # MLA (DeepSeek-V2 paper, section 2.1)
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # DeepSeekMoE (DeepSeek-V3 report, section 2.1.2)
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction (section 2.2)
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"architecture {self.architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        required += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
        if self.is_mla:
            required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
        if self.n_routed_experts:
            required += ["num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group"]
        for name in required:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ModelError(f"model config: {name} is {value!r}; it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"):
            if not isinstance(getattr(self, name), (int, float)):
                raise ModelError(f"model config: {name} is {getattr(self, name)!r}; it must be a number")
        self._check_divisions()

    def _check_divisions(self) -> None:
        heads, kv_heads, mtp = self.num_attention_heads, self.num_key_value_heads, self.num_nextn_predict_layers
        self._require(heads % kv_heads == 0, f"{heads} attention heads are no multiple of {kv_heads} key/value heads")
        self._require(self.rope_dim % 2 == 0, f"the rotary dimension {self.rope_dim} is odd")
        self._require(mtp in (0, 1), f"num_nextn_predict_layers is {mtp}; 0 and 1 are supported")
        if self.n_routed_experts:
            experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
            self._require(experts % groups == 0, f"{experts} experts do not divide into n_group {groups}")
            self._require(experts // groups > 1, f"n_group {groups} leaves less than the 2 experts the V3 gate adds up")
            self._require(kept <= groups, f"topk_group {kept} exceeds n_group {groups}")
            fits = self.num_experts_per_tok <= kept * (experts // groups)
            self._require(fits, f"num_experts_per_tok {self.num_experts_per_tok} exceeds the experts of {kept} groups")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ModelError(f"model config: {message}")

    @property
    def is_mla(self) -> bool:
        return self.architecture == "deepseek_v3"

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.qk_rope_head_dim if self.is_mla else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    # ---- counts -------------------------------------------------------------------------------------------------

    def num_parameters(self, *, mtp: bool = False) -> int:
        """Stored parameters; the MTP layer's own ones (its embedding and head are the main model's) if `mtp`."""
        total = self._num_embedding_parameters() + self.hidden_size  # final norm
        total += sum(self._num_layer_parameters(i, active=False) for i in range(self.num_hidden_layers))
        if mtp and self.num_nextn_predict_layers:
            total += self._num_layer_parameters(self.num_hidden_layers, active=False)
            total += 2 * self.hidden_size**2 + 3 * self.hidden_size  # eh_proj, enorm, hnorm, shared_head.norm
        return total

    def num_active_parameters(self) -> int:
        """Parameters one token meets: routed experts count `num_experts_per_tok` times, embeddings count once."""
        total = self._num_embedding_parameters() + self.hidden_size
        return total + sum(self._num_layer_parameters(i, active=True) for i in range(self.num_hidden_layers))

    def cache_values_per_token(self) -> int:
        """Values the cache keeps for one token over all layers: kv_lora_rank + rope for MLA, keys and values for
        GQA."""
        if self.is_mla:
            return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim

    def flops_per_token(self, context: int = 0) -> int:
        """Multiply-adds of one token's forward pass, counted twice, at `context` attended tokens (expanded form of
        MLA)."""
        embedding = self.vocab_size * self.hidden_size
        linear = self.num_active_parameters() - (0 if self.tie_word_embeddings else embedding)
        widths = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim if self.is_mla else 2 * self.head_dim
        return 2 * linear + 2 * self.num_hidden_layers * self.num_attention_heads * widths * context

    def _num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def _num_layer_parameters(self, layer: int, *, active: bool) -> int:
        total = 2 * self.hidden_size + self._num_attention_parameters()
        if not self.is_moe_layer(layer):
            return total + 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        router = self.n_routed_experts * (self.hidden_size + 1)  # gate and its correction bias
        return total + router + (routed + self.n_shared_experts) * expert

    def _num_attention_parameters(self) -> int:
        heads, width = self.num_attention_heads, self.hidden_size
        if not self.is_mla:
            return width * self.head_dim * (2 * heads + 2 * self.num_key_value_heads)
        query_out = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        query = width * query_out if rank is None else rank * (width + 1 + query_out)
        latent = width * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + expand + heads * self.v_head_dim * width

    # ---- files --------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a Hugging Face `config.json` (either RoPE spelling: `rope_theta` or `rope_parameters`).

        Raises:
            ModelError: unknown architecture, missing or unusable field, or a feature that is not supported.
        """
        architecture = values.get("model_type")
        if architecture not in ARCHITECTURES:
            raise ModelError(
                f"{source}: model_type {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        _refuse_unsupported(values, source)
        needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        needed += ["qk_nope_head_dim", "qk_rope_head_dim"] if architecture == "deepseek_v3" else []
        for name in [*needed, "max_position_embeddings"]:
            if not isinstance(values.get(name), int):
                raise ModelError(f"{source}: {name} is {values.get(name)!r}; it must be a positive integer")
        known = {field.name for field in dataclasses.fields(cls)}
        read = {name: value for name, value in values.items() if name in known and value is not None}
        read.pop("head_dim", None)
        rope = values.get("rope_parameters") or {}
        eos = values.get("eos_token_id")
        try:
            head_dim = values.get("head_dim") or values["hidden_size"] // max(1, values["num_attention_heads"])
            derived = {
                "architecture": architecture,
                "head_dim": head_dim
                if architecture == "llama"
                else values["qk_nope_head_dim"] + values["qk_rope_head_dim"],
                "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
                "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
                "rope_interleave": bool(values.get("rope_interleave", architecture == "deepseek_v3")),
                "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            }
            return cls(**{**read, **derived})
        except (KeyError, TypeError, ValueError) as problem:
            raise ModelError(f"{source}: missing or unusable field: {problem}") from problem

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers` (4 and 5) and `from_hf` read back."""
        values = dataclasses.asdict(self)
        architecture = values.pop("architecture")
        eos = values.pop("eos_token_ids")
        if not self.is_mla:
            mla_or_moe = {f.name for f in dataclasses.fields(self)} & set(_DEEPSEEK_FIELDS)
            values = {name: value for name, value in values.items() if name not in mla_or_moe}
        else:
            values.pop("head_dim")  # transformers means the rotary width by it
        return values | {
            "architectures": ["DeepseekV3ForCausalLM" if self.is_mla else "LlamaForCausalLM"],
            "model_type": architecture,
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            **({"topk_method": "noaux_tc", "scoring_func": "sigmoid"} if self.is_mla else {}),
            "torch_dtype": "float32",
        }

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, tied: bool, source: str = "GGUF") -> ModelConfig:
        """Read GGUF metadata of architecture `llama`; `tied` says that the file holds no separate output head.

        Raises:
            ModelError: another architecture, a missing key, or a feature that is not supported.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelError(f"{source}: GGUF architecture {architecture!r} is not supported; supported: llama")
        if metadata.get("llama.rope.scaling.type", "none") != "none":
            raise ModelError(f"{source}: RoPE scaling {metadata['llama.rope.scaling.type']!r} is not supported yet")
        if metadata.get("llama.rope.scale_linear", 1.0) != 1.0:
            raise ModelError(f"{source}: RoPE scaling by {metadata['llama.rope.scale_linear']} is not supported yet")
        try:
            heads = metadata["llama.attention.head_count"]
            width = metadata["llama.embedding_length"]
            head_dim = metadata.get("llama.attention.key_length") or width // heads
            if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
                raise ModelError(f"{source}: heads rotated in part are not supported yet")
            eos = metadata.get("tokenizer.ggml.eos_token_id")
            return cls(
                architecture="llama",
                vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
                hidden_size=width,
                intermediate_size=metadata["llama.feed_forward_length"],
                num_hidden_layers=metadata["llama.block_count"],
                num_attention_heads=heads,
                num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
                head_dim=head_dim,
                max_position_embeddings=metadata["llama.context_length"],
                rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
                rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
                tie_word_embeddings=tied,
                bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
                eos_token_ids=() if eos is None else (eos,),
            )
        except (KeyError, TypeError, ZeroDivisionError) as problem:
            raise ModelError(f"{source}: missing or unusable metadata: {problem}") from problem

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read `config.json`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as problem:
            raise ModelError(f"{path} does not exist; a model folder needs config.json and *.safetensors") from problem
        except (OSError, ValueError, RecursionError) as problem:
            raise ModelError(f"{path} is not valid JSON: {problem}") from problem
        if not isinstance(values, dict):
            raise ModelError(f"{path} holds a {type(values).__name__}; a JSON object was expected")
        return cls.from_hf(values, str(path))


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine may use.

    `weights` "auto" is int8 for a quantised GGUF file where the native body exists, else float32; "float32" and "int8"
    insist. `cache_tokens` is the size of the paged cache; `max_batch_tokens` the token budget of a step.
    """

    weights: str = "auto"
    cache_tokens: int = 16384
    max_batch_tokens: int = 512
    max_sequences: int = 64
    threads: int = 0  # 0: as torch decides

    def __post_init__(self) -> None:
        if self.weights not in ("auto", "float32", "int8"):
            raise InputError(f"weights is {self.weights!r}; it must be auto, float32 or int8")
        if self.cache_tokens < PAGE_SIZE:
            raise InputError(f"cache_tokens is {self.cache_tokens}; a page holds {PAGE_SIZE}")
        if self.max_batch_tokens < 1 or self.max_sequences < 1 or self.threads < 0:
            raise InputError("max_batch_tokens and max_sequences must be at least 1, threads 0 or more")

    @property
    def num_pages(self) -> int:
        return self.cache_tokens // PAGE_SIZE


Config = TypeVar("Config", EngineConfig, "TrainConfig")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The methods differ in where samples come from (`data` or `task`) and in their weights.

    `model` is a folder to start from; without one, `ModelConfig` fields come from the recipe's [model] table. `output`
    receives `checkpoint/` (exact resume), `metrics.jsonl` and, at the end, the model in Hugging Face form.
    """

    method: str = "pretrain"  # pretrain | grpo
    task: str = "sums"
    model: str = ""
    output: str = "runs/run"
    steps: int = 300
    seed: int = 0
    samples_per_step: int = 64
    learning_rate: float = 3e-3
    min_learning_rate: float = 3e-4
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100
    threads: int = 0  # 0: as torch decides
    mtp_weight: float = 0.3  # lambda of the MTP loss, V3 report section 4.2
    bias_update_speed: float = 0.001  # gamma of the balancing rule, V3 report section 2.1.2
    max_number: int = 20  # operands of the task "sums" are below it
    group_size: int = 8  # G: rollouts a prompt (grpo)
    max_new_tokens: int = 8
    temperature: float = 1.0
    updates_per_rollout: int = 1  # mu of GRPO's algorithm 1; the clip acts from the second on
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.method not in ("pretrain", "grpo"):
            raise InputError(f"method is {self.method!r}; it must be pretrain or grpo")
        counts = "steps samples_per_step checkpoint_every group_size max_new_tokens max_number updates_per_rollout"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        not_negative = (
            "min_learning_rate warmup_steps weight_decay mtp_weight bias_update_speed clip_low clip_high seed"
        )
        for name in not_negative.split():
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.method == "grpo" and self.samples_per_step % self.group_size:
            raise InputError(
                f"samples_per_step {self.samples_per_step} is not a multiple of group_size {self.group_size}"
            )


def override(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """A copy of `config` with `values` set; strings are converted to the field's type.

    Raises:
        InputError: an unknown key (the nearest one is named) or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    converted = {}
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(fields)}"
            raise InputError(f"{source}: unknown key {name!r}{hint}")
        converted[name] = _convert(value, str(fields[name].type), f"{source}: {name}")
    return dataclasses.replace(config, **converted)


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """`key=value` words of a command line as a mapping for `override`.

    Raises:
        InputError: a word without "=".
    """
    for setting in settings:
        if "=" not in setting:
            raise InputError(f"{setting!r} is not of the form key=value")
    return dict(setting.split("=", 1) for setting in settings)


def _convert(value: Any, kind: str, place: str) -> Any:
    converters = {"int": int, "float": float, "str": str}
    matches = {"int": (int,), "float": (int, float), "str": (str,)}[kind]
    if isinstance(value, bool) or not isinstance(value, (str, *matches)):
        raise InputError(f"{place} is {value!r}; a value of type {kind} was expected")
    try:
        return converters[kind](value)
    except ValueError as problem:
        raise InputError(f"{place} is {value!r}; a value of type {kind} was expected") from problem


_DEEPSEEK_FIELDS = """
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts
    num_experts_per_tok moe_intermediate_size first_k_dense_replace n_group topk_group norm_topk_prob
    routed_scaling_factor num_nextn_predict_layers rope_interleave
    """.split()  # noqa: SIM905  sixteen quoted names would be harder to read


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{source}: RoPE scaling is {scaling!r}; an object was expected")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    wanted = {
        "RoPE scaling": (rope_type, ("default",)),
        "partial_rotary_factor": (partial, (1.0, None)),
        "hidden_act": (values.get("hidden_act", "silu"), ("silu",)),
        "attention_bias": (values.get("attention_bias", False), (False,)),
        "mlp_bias": (values.get("mlp_bias", False), (False,)),
        "scoring_func": (values.get("scoring_func", "sigmoid"), ("sigmoid",)),
        "topk_method": (values.get("topk_method", "noaux_tc"), ("noaux_tc",)),
        "moe_layer_freq": (values.get("moe_layer_freq", 1), (1,)),
        "quantization_config": (values.get("quantization_config"), (None,)),
    }
    for name, (value, supported) in wanted.items():
        if value not in supported:
            raise ModelError(f"{source}: {name} {value!r} is not supported yet; supported: {supported[0]!r}")
