"""What a model is: shape and constants of every architecture in one flat record, and what follows by counting.

Field names are those of a Hugging Face `config.json`. The counts (parameters, cache, operations) are the ones that the
engine, the trainer's utilisation figure and the planner all use. Every field is taken from the checkpoint, none from
what a family of models usually has (hf.py, gguf.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from porcelet.errors import ModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3")
ROPE_KINDS = ("linear", "yarn", "llama3")
MAX_LAYERS = 4096
TOPK_METHODS = {"deepseek_v2": ("greedy", "group_limited_greedy"), "deepseek_v3": ("noaux_tc",)}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model stretches rotary positions beyond the context it was first trained on.

    `kind` "linear" divides every frequency by `factor`; "yarn" (Peng et al. 2023) only the slow ones, between the
    frequencies that turn `beta_slow` and `beta_fast` times in the original context; "llama3" does so between two
    wavelengths. `mscale` and `mscale_all_dim` are DeepSeek's, read from the checkpoint: V2-Lite has 0.707, V3 has 1.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require(self.kind in ROPE_KINDS, f"RoPE scaling {self.kind!r} is not supported; supported: {ROPE_KINDS}")
        names = ["factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"]
        values = {name: getattr(self, name) for name in names}
        optional = {name: getattr(self, name) for name in ("mscale", "mscale_all_dim", "attention_factor")}
        values |= {name: value for name, value in optional.items() if value is not None and value != 0}
        for name, value in values.items():
            require(is_positive(value), f"RoPE scaling: {name} is {value!r}; it must be a positive number")
        require(self.factor >= 1, f"RoPE scaling: factor is {self.factor!r}; it must be at least 1")
        require(isinstance(self.truncate, bool), f"RoPE scaling: truncate is {self.truncate!r}; it must be a boolean")
        original = self.original_max_position_embeddings
        require(
            self.kind == "linear" or (is_count(original)),
            f"RoPE scaling: original_max_position_embeddings is {original!r}; it must be a positive integer",
        )
        require(
            self.kind != "llama3" or self.low_freq_factor < self.high_freq_factor,
            f"RoPE scaling: low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
            f"{self.high_freq_factor}",
        )

    @property
    def angle_factor(self) -> float:
        """What cos and sin are multiplied by: 1 for every released DeepSeek model, whose two mscales are equal."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def softmax_factor(self) -> float:
        """What MLA multiplies its softmax scale by: m² with m = 0.1 · mscale_all_dim · ln(factor) + 1."""
        return self._mscale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _mscale(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one model. MLA fields are 0 where attention is grouped-query; MoE fields are 0 where all
    layers are dense."""

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
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # q, k, v and output projections of llama and qwen3; qwen2 always has the first three
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
    topk_method: str = "noaux_tc"  # noaux_tc (V3) | greedy (V2-Lite) | group_limited_greedy (V2)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    # multi-token prediction (section 2.2)
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        require_architecture(self.architecture, "model config")
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        required += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
        if self.is_mla:
            required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
            required += [] if self.q_lora_rank is None else ["q_lora_rank"]
        if self.n_routed_experts:
            required += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"]
        for name in required:
            value = getattr(self, name)
            require(is_count(value), f"model config: {name} is {value!r}; it must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"):
            value = getattr(self, name)
            require(is_positive(value), f"model config: {name} is {value!r}; it must be a positive number")
        require(self.rope_theta > 1, f"model config: rope_theta is {self.rope_theta!r}; it must be above 1")
        for name in ("rope_interleave", "attention_bias", "tie_word_embeddings", "norm_topk_prob"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"model config: {name} is {value!r}; it must be true or false")
        experts, layers = self.n_routed_experts, self.num_hidden_layers
        require(type(experts) is int and experts >= 0, f"model config: n_routed_experts is {experts!r}")
        require(layers <= MAX_LAYERS, f"model config: num_hidden_layers is {layers}; at most {MAX_LAYERS} are built")
        shared = self.n_shared_experts
        require(shared == 0 or is_count(shared), f"model config: n_shared_experts is {shared!r}")
        dense = self.first_k_dense_replace
        require(type(dense) is int and dense >= 0, f"model config: first_k_dense_replace is {dense!r}")
        ids = (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,)))
        for token in ids:
            valid = type(token) is int and 0 <= token < self.vocab_size
            require(valid, f"model config: token id {token!r} lies outside the vocabulary of {self.vocab_size}")
        self._check_divisions()
        if self.n_routed_experts:
            self._check_gate()

    def _check_divisions(self) -> None:
        heads, kv_heads, mtp = self.num_attention_heads, self.num_key_value_heads, self.num_nextn_predict_layers
        where = "model config:"
        require(heads % kv_heads == 0, f"{where} {heads} attention heads are no multiple of {kv_heads} key/value heads")
        require(self.rope_dim % 2 == 0, f"{where} the rotary dimension {self.rope_dim} is odd")
        require(type(mtp) is int and mtp in (0, 1), f"{where} num_nextn_predict_layers is {mtp}; 0 and 1 are supported")
        require(
            mtp == 0 or self.architecture == "deepseek_v3",
            f"{where} num_nextn_predict_layers is {mtp}; only deepseek_v3 has an MTP layer",
        )
        require(
            not (self.is_mla and self.attention_bias), f"{where} attention_bias is not supported with latent attention"
        )

    def _check_gate(self) -> None:
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        methods = TOPK_METHODS.get(self.architecture, ())
        require(
            self.topk_method in methods,
            f"model config: topk_method is {self.topk_method!r}; {self.architecture} has {' and '.join(methods)}",
        )
        # Implementations disagree on what V2 would do with renormalised weights; no released model asks for it.
        require(
            self.topk_method == "noaux_tc" or not self.norm_topk_prob,
            f"model config: norm_topk_prob with topk_method {self.topk_method} has no agreed meaning; it must be false",
        )
        require(experts % groups == 0, f"model config: {experts} experts do not divide into n_group {groups}")
        require(
            experts // groups > 1 or self.topk_method != "noaux_tc",
            f"model config: n_group {groups} leaves less than the 2 experts the V3 gate adds up",
        )
        require(kept <= groups, f"model config: topk_group {kept} exceeds n_group {groups}")
        reach = experts if self.topk_method == "greedy" else kept * (experts // groups)
        active = self.num_experts_per_tok
        require(active <= reach, f"model config: num_experts_per_tok {active} exceeds the {reach} experts in reach")

    @property
    def is_mla(self) -> bool:
        return self.architecture in ("deepseek_v2", "deepseek_v3")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.architecture == "qwen2" or self.attention_bias

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normed a head."""
        return self.architecture == "qwen3"

    @property
    def has_gate_bias(self) -> bool:
        """Whether the gate's choice is corrected by a bias an expert."""
        return self.topk_method == "noaux_tc"

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by; MLA under YaRN adds its mscale squared."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim) ** -0.5
        return scale * self.rope_scaling.softmax_factor if self.is_mla and self.rope_scaling else scale

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

    def packed_bytes(self, bits: int) -> int:
        """Memory of the weights, without the MTP layer, when loaded as int8 or int4: one more bit a value for a scale
        and a minimum for every 32; embedding and head in 8 bits; 4 bytes a value in what stays float32: the gate,
        norms and biases. Exact where widths are multiples of 32; weights of GGUF's symmetric formats take half a bit a
        value less."""
        embedding, quantised = self._num_embedding_parameters(), 0
        for layer in range(self.num_hidden_layers):
            width = self.intermediate_size
            if self.is_moe_layer(layer):
                width = (self.n_routed_experts + self.n_shared_experts) * self.moe_intermediate_size
            quantised += self.num_attention_weights() + 3 * self.hidden_size * width
        floats = self.num_parameters() - embedding - quantised
        return (embedding * 9 + quantised * (bits + 1)) // 8 + 4 * floats

    def cache_values_per_token(self) -> int:
        """Values the cache keeps for one token over all layers: kv_lora_rank + rope for MLA, keys and values for
        GQA."""
        if self.is_mla:
            return self.num_hidden_layers * (self.kv_lora_rank + self.qk_rope_head_dim)
        return self.num_hidden_layers * 2 * self.num_key_value_heads * self.head_dim

    def absorbed_below(self) -> int:
        """New tokens of a request below which MLA's absorbed form needs fewer operations than the expanded one.

        A new token pays (2C + R) a cached token and head absorbed, (N + R + V) expanded; expanding costs C · (N + V)
        a cached token and head, once for all new ones. They meet at C(N + V) / (2C - N - V), 171 for V2 and V3, and
        there the native forms cross, with packed weights and without (benchmarks/mla.py, 2026-11-23). Other attention
        has one form only: the number is then out of reach.
        """
        expand, latent = self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank
        gain = 2 * latent - expand
        return -(-latent * expand // gain) if gain > 0 else 2**31 - 1

    def flops_per_token(self, context: int = 0) -> int:
        """Multiply-adds of one token's forward pass, counted twice, at `context` attended tokens (expanded form of
        MLA)."""
        embedding = self.vocab_size * self.hidden_size
        linear = self.num_active_parameters() - (0 if self.tie_word_embeddings else embedding)
        return 2 * linear + self.num_hidden_layers * self.attention_flops(context)

    def num_multiplied(self, layer: int) -> int:
        """Weights of a block that one token is multiplied with; the MTP layer's number is `num_hidden_layers`."""
        attention, width = self.num_attention_weights(), self.hidden_size
        joined = 2 * width**2 if layer == self.num_hidden_layers else 0  # the MTP layer's eh_proj
        if not self.is_moe_layer(layer):
            return attention + joined + 3 * width * self.intermediate_size
        active = self.num_experts_per_tok + self.n_shared_experts
        return attention + joined + width * (self.n_routed_experts + 3 * active * self.moe_intermediate_size)

    def num_attention_weights(self) -> int:
        """Weights of a layer's projections, without biases and norms."""
        heads, width = self.num_attention_heads, self.hidden_size
        if not self.is_mla:
            return width * self.head_dim * (2 * heads + 2 * self.num_key_value_heads)
        query_out = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        query = width * query_out if rank is None else rank * (width + query_out)
        latent = width * (self.kv_lora_rank + self.qk_rope_head_dim)
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + expand + heads * self.v_head_dim * width

    def attention_flops(self, num_pairs: int) -> int:
        """Operations of one layer's scores and sums for `num_pairs` pairs of a query and a key (expanded MLA)."""
        widths = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim if self.is_mla else 2 * self.head_dim
        return 2 * self.num_attention_heads * widths * num_pairs

    def _num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def _num_layer_parameters(self, layer: int, *, active: bool) -> int:
        total = 2 * self.hidden_size + self._num_attention_parameters()
        if not self.is_moe_layer(layer):
            return total + 3 * self.hidden_size * self.intermediate_size
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        router = self.n_routed_experts * (self.hidden_size + (1 if self.has_gate_bias else 0))
        return total + router + (routed + self.n_shared_experts) * expert

    def _num_attention_parameters(self) -> int:
        """Weights, biases and norms."""
        weights = self.num_attention_weights()
        if self.is_mla:
            return weights + (self.q_lora_rank or 0) + self.kv_lora_rank
        biases = self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads) if self.has_qkv_bias else 0
        biases += self.hidden_size if self.attention_bias else 0
        return weights + biases + (2 * self.head_dim if self.has_qk_norm else 0)


# ---- checks ---------------------------------------------------------------------------------------------------------


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ModelError(message)


def require_architecture(architecture: object, source: str) -> None:
    supported = ", ".join(ARCHITECTURES)
    require(
        architecture in ARCHITECTURES, f"{source}: model_type {architecture!r} is not supported; supported: {supported}"
    )


def is_count(value: object) -> bool:
    """A positive number that torch can size a tensor by, twice over."""
    return type(value) is int and 0 < value < 2**28


def is_positive(value: object) -> bool:
    """A positive number far from float32's ends, so that products of two stay within."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-18 < value < 1e18
