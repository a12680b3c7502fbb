"""How many operations a batch needs: what a step's time is measured against (model-flops utilisation, MFU).

Multiplications and additions of the matrix products and of attention, forward once and backward twice: for the inputs'
gradient and for the weights', which frozen weights do not have. Whatever is computed again to save memory does not
count, nor do norms and other pointwise work, nor the thin products of low-rank adapters. Attention counts the pairs
that causality allows, half of the square.
"""

from __future__ import annotations

from porcelet.config import ModelConfig
from porcelet.kernels.attention import Segments
from porcelet.train.packing import Packed


def train_flops(config: ModelConfig, batch: Packed, *, mtp: bool, attention: bool = True, frozen: bool = False) -> int:
    """Operations of a forward and a backward pass over `batch`, with the MTP layer's if `mtp`; `frozen`: the model's
    own weights take no gradient, as under adapters."""
    layers = range(config.num_hidden_layers)
    num_predictions = int(batch.weights.count_nonzero() + batch.num_drawn.count_nonzero())
    products = 2 * len(batch.tokens) * sum(map(config.num_multiplied, layers))
    attended = len(layers) * config.attention_flops(num_pairs(batch.segments))
    if mtp:
        further = batch.further
        num_predictions += int(further.weights.count_nonzero())
        products += 2 * len(further.rows) * config.num_multiplied(config.num_hidden_layers)
        attended += config.attention_flops(num_pairs(further.segments))
    products += 2 * num_predictions * config.vocab_size * config.hidden_size
    return (2 if frozen else 3) * products + (3 * attended if attention else 0)


def num_pairs(segments: Segments) -> int:
    """Pairs of a query and a key that it attends to, in one layer."""
    lengths = segments.lengths
    behind = [lengths[prefix] if prefix >= 0 else 0 for prefix in segments.prefixes]
    return sum(n * (n + 1) // 2 + n * before for n, before in zip(lengths, behind, strict=True))
