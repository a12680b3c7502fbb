"""How long our engine takes on a machine that was measured, for a model that was not.

A step is put together from the costs of machine.py as models/*.py put it together from ops: products by the number of
tokens, attention by multiply-adds, experts by the tokens that each one has, and what each instruction, step and
sequence costs besides. Every row names its kernel, so one sees where the time goes. In a whole model kernels share
caches and memory and wait for one another: the sum is scaled by what that costs the reference model, which was measured
too (engine/measure.py).

Left out: guesses (speculation), adapters, experts on disk, prompts that find pages in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from porcelet.config import EngineConfig, ModelConfig
from porcelet.errors import InputError
from porcelet.plan.machine import Machine

FORMATS = ("float32", "int8", "int4")
PACKED = ("int8", "int4")


@dataclass(frozen=True)
class Part:
    """Seconds of one kind of kernel in a step, all layers together."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """What a step computes: `tokens` new ones of `sequences`, each behind `cached`; whether MLA attends absorbed."""

    sequences: float
    new: float
    cached: float
    absorbed: bool = True

    @property
    def tokens(self) -> float:
        return self.sequences * self.new

    @property
    def pairs(self) -> float:
        return self.tokens * (self.cached + (self.new + 1) / 2)


@dataclass(frozen=True)
class EngineTime:
    """A model in a format (float32, int8, int4) on a measured machine; the cache's type follows it, as the engine's
    does.

    Raises:
        InputError: the format has not been measured.
    """

    config: ModelConfig
    weights: str
    machine: Machine
    max_batch_tokens: int = EngineConfig().max_batch_tokens

    def __post_init__(self) -> None:
        if self.weights not in FORMATS:
            raise InputError(f"weights are {self.weights!r}; times are known for {', '.join(FORMATS)}")

    @property
    def cache(self) -> str:
        return "float16" if self.weights in PACKED else "float32"

    def decode(self, sequences: float, context: float) -> list[Part]:
        """A step that writes one token of each sequence, with so many cached tokens."""
        step = Step(sequences, 1, context)
        parts = [*self._step(step, sampled=sequences), Part("step", self.machine.cost("step", sequences))]
        return _scaled(parts, self.machine.cost(f"scale.{self.weights}", sequences))

    def prompt(self, sequences: int, length: int) -> list[Part]:
        """All steps that compute the prompts of so many sequences, up to each one's first token."""
        absorbed = length < self.config.absorbed_below()
        parts: dict[str, float] = {}
        for step, sampled in self._pieces(sequences, length, absorbed):
            for part in self._step(step, sampled=sampled):
                parts[part.name] = parts.get(part.name, 0.0) + part.seconds
        parts["step"] = sequences * length * self.machine.cost("prompt")
        found = [Part(name, seconds) for name, seconds in parts.items()]
        return _scaled(found, self.machine.cost(f"scale_prompt.{self.weights}"))

    def _pieces(self, sequences: int, length: int, absorbed: bool) -> Iterator[tuple[Step, float]]:
        """Prompts in pieces of the step's budget: several short ones together, or a long one in turns."""
        budget = self.max_batch_tokens
        if length <= budget:
            left = sequences * length
            while left > 0:
                tokens = min(left, budget)
                yield Step(tokens / length, length, 0, absorbed), tokens / length
                left -= tokens
            return
        for _ in range(sequences):
            for cached in range(0, length, budget):
                new = min(budget, length - cached)
                yield Step(1, new, cached, absorbed), 1.0 if cached + new == length else 0.0

    def decode_rate(self, sequences: float, context: float) -> float:
        """Tokens a second of all sequences."""
        return sequences / sum(part.seconds for part in self.decode(sequences, context))

    def prompt_rate(self, sequences: int, length: int) -> float:
        """Prompt tokens a second."""
        return sequences * length / sum(part.seconds for part in self.prompt(sequences, length))

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _step(self, step: Step, sampled: float) -> Iterator[Part]:
        config, layers = self.config, self.config.num_hidden_layers
        moe = sum(map(config.is_moe_layer, range(layers)))
        yield Part("projections", layers * self._projections(step))
        yield Part("attention", layers * self._attention(step))
        yield Part("MLP", (layers - moe) * self._mlp(config.intermediate_size, step.tokens))
        if moe:
            shared = self._mlp(config.n_shared_experts * config.moe_intermediate_size, step.tokens)
            yield Part("shared experts", moe * shared)
            yield Part("routed experts", moe * self._experts(step.tokens))
        yield Part("pointwise", layers * self._pointwise(step.tokens))
        if sampled:
            yield Part("head", self._head(sampled))

    def _product(self, values: float, tokens: float, weights: str = "", calls: int = 1) -> float:
        """Seconds of a product of so many weights; `calls` are those that round their input anew."""
        name = weights or self.weights
        machine = self.machine
        return values * machine.cost(f"product.{name}", tokens) + calls * machine.cost(f"product_call.{name}", tokens)

    def _projections(self, step: Step) -> float:
        """All but MLA's W_UK and W_UV, which count as attention."""
        config = self.config
        values = config.num_attention_weights()
        if config.is_mla:
            values -= self._head_values()
        return self._product(values, step.tokens, calls=2 + (config.is_mla and config.q_lora_rank is not None))

    def _head_values(self) -> int:
        """W_UK and W_UV of a layer."""
        config = self.config
        return config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)

    def _attention(self, step: Step) -> float:
        config, machine, cache = self.config, self.machine, self.cache
        heads = config.num_attention_heads
        if not config.is_mla:
            done = step.pairs * heads * 2 * config.head_dim
            if step.new > 8:
                return done * machine.cost(f"attention_prompt.{cache}")
            return done * machine.cost(f"attention.{cache}", step.sequences)
        if step.absorbed:
            width = heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
            attended = step.pairs * width * machine.cost(f"absorbed.{cache}", step.sequences)
            return attended + self._absorbing(step.tokens)
        width = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        expanded = step.sequences * (step.cached + step.new) * self._head_values()
        return (step.pairs * width + expanded) * machine.cost(f"expanded.{cache}")

    def _absorbing(self, tokens: float) -> float:
        """The products with W_UK and W_UV, which a packed model keeps in 8 bits a head."""
        if self.weights not in PACKED:
            return self._product(self._head_values(), tokens, calls=2)
        if tokens <= 16:
            return self._head_values() * self.machine.cost("absorbing." + self.cache, tokens)
        return self._product(self._head_values(), tokens, "int8", calls=2)

    def _mlp(self, width: int, tokens: float) -> float:
        if not width:
            return 0.0
        gate = width * tokens * self.machine.cost("pointwise", tokens)
        return self._product(3 * self.config.hidden_size * width, tokens, calls=2) + gate

    def _experts(self, tokens: float) -> float:
        """The gate, in float32, and the experts that so many tokens meet, if each is as likely as another."""
        config = self.config
        total, active = config.n_routed_experts, config.num_experts_per_tok
        met = total * (1 - (1 - active / total) ** tokens)
        values = 3 * config.hidden_size * config.moe_intermediate_size
        cost = self.machine.cost(f"experts.{self.weights}", max(1.0, tokens * active / met))
        return met * values * cost + self._product(total * config.hidden_size, tokens, "float32", calls=1)

    def _pointwise(self, tokens: float) -> float:
        """Two norms, two sums, rotation and writing to the cache of a layer."""
        config = self.config
        turned = (config.num_attention_heads + config.num_key_value_heads) * config.rope_dim
        written = config.cache_values_per_token() / config.num_hidden_layers
        values = 4 * config.hidden_size + (
            turned if not config.is_mla else config.num_attention_heads * config.rope_dim
        )
        calls = 9 + config.is_mla + config.has_qk_norm * 2
        each = self.machine.cost("pointwise", tokens)
        return tokens * (values + written) * each + calls * self.machine.cost("pointwise_call", tokens)

    def _head(self, sampled: float) -> float:
        """Scores of the vocabulary, in 8 bits where the model is packed, and the draws from them."""
        config = self.config
        name = "int8" if self.weights in PACKED else "float32"
        drawn = sampled * config.vocab_size * self.machine.cost("token")
        return self._product(config.vocab_size * config.hidden_size, sampled, name) + drawn


def _scaled(parts: list[Part], scale: float) -> list[Part]:
    return [Part(part.name, part.seconds * scale) for part in parts]


def scaled_to(machine: Machine, reference: ModelConfig, prompt: int, steps: int) -> Machine:
    """The machine with the scales that make its costs give what the reference model took, which was measured behind
    prompts of `prompt` tokens, in the middle of `steps` steps."""
    even = {f"scale.{weights}.1": 1.0 for weights in FORMATS} | {f"scale_prompt.{weights}": 1.0 for weights in FORMATS}
    plain = replace(machine, costs={**machine.costs, **even})
    scales = {}
    for weights in FORMATS:
        time = EngineTime(reference, weights, plain)
        for sequences in (1, 4, 16):
            expected = sum(part.seconds for part in time.decode(sequences, prompt + steps / 2))
            scales[f"scale.{weights}.{sequences}"] = machine.costs[f"reference.{weights}.{sequences}"] / expected
        expected = 1 / time.prompt_rate(16, prompt)
        scales[f"scale_prompt.{weights}"] = machine.costs[f"reference_prompt.{weights}"] / expected
    return replace(machine, costs={**machine.costs, **scales})
