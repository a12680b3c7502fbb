"""The transformer: blocks, head and multi-token prediction, for every architecture and every use.

`forward` takes flat tokens [T], their positions [T] and a view of the batch, and returns hidden states after the final
norm; `logits` scores them, the MTP layer (DeepSeek-V3 report, section 2.2) goes on from them. Module names make
parameter names equal the checkpoint's. The model knows no file format, no rank and no quantisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from porcelet.config import ModelConfig
from porcelet.kernels.pointwise import add, concat
from porcelet.models.attention import GQA, MLA, View
from porcelet.models.experts import MoE
from porcelet.models.layers import MLP, Embedding, Linear, RMSNorm
from porcelet.models.rope import Angles, angles

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MLA(config, layer) if config.is_mla else GQA(config, layer)
        moe = config.is_moe_layer(layer)
        self.mlp: MLP | MoE = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Float[Tensor, "T D"], angles: Angles, view: View) -> Float[Tensor, "T D"]:
        attended = self.self_attn(self.input_layernorm(x), angles, view)
        x, normed = self.post_attention_layernorm.of_sum(x, attended)
        return add(x, self.mlp(normed, view) if isinstance(self.mlp, MoE) else self.mlp(normed))


class SharedHead(nn.Module):
    """The MTP layer's final norm; the head itself is the main model's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(Block):
    """One more block, fed with [norm(embedding of the next token); norm(hidden)], that predicts one token further.

    The order of the two halves is the released weights' one, the reverse of the report's equation 21; the hidden state
    is taken after the main model's final norm, as `transformers` does when it drafts with released weights.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def join(self, embedded: Float[Tensor, "T D"], hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.eh_proj(concat(self.enorm(embedded), self.hnorm(hidden)))


class Decoder(nn.Module):
    """Embedding, blocks (the MTP layer last, numbered as one block more), final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        L = config.num_hidden_layers
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer) for layer in range(L)]
        self.layers = nn.ModuleList(blocks + [MTP(config, L + i) for i in range(config.num_nextn_predict_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A whole model. Build it with `build`, fill it with `weights.load` or `initialize`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], view: View) -> Float[Tensor, "T D"]:
        """Hidden states after the final norm: `logits` scores them, `predict_further` goes on from them."""
        x = self.model.embed_tokens(tokens)
        rotations = angles(self.config, positions, x.dtype)
        for block in self.model.layers[: self.config.num_hidden_layers]:
            x = block(x, rotations, view)
        return self.model.norm(x)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Scores of the next token."""
        return self.lm_head(hidden)

    def predict_further(
        self, hidden: Float[Tensor, "T D"], next_tokens: Int[Tensor, "T"], positions: Int[Tensor, "T"], view: View
    ) -> Float[Tensor, "T D"]:
        """The MTP layer's normed hidden states: through `lm_head` they score the token after `next_tokens`."""
        layer = self.model.layers[self.config.num_hidden_layers]
        assert isinstance(layer, MTP)
        joined = layer.join(self.model.embed_tokens(next_tokens), hidden)
        return layer.shared_head.norm(layer(joined, angles(self.config, positions, hidden.dtype), view))


def build(config: ModelConfig, device: str = "cpu") -> Transformer:
    """An uninitialised model; device "meta" allocates nothing."""
    with torch.device(device):
        return Transformer(config)


def initialize(model: Transformer, seed: int) -> Transformer:
    """Fill a model with random weights: normal(0, initializer_range), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, model.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model
