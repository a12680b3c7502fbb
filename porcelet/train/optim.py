"""How parameters move: AdamW on gradients, and the balancing rule on the experts' biases.

The learning rate is a function of the step alone, so the schedule has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from porcelet.config import OptimizerConfig, TrainConfig
from porcelet.models.experts import Gate
from porcelet.models.transformer import Transformer


def make_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and leaves norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then half a cosine down to `min_learning_rate` at the last step."""
    rates = config.optimizer
    if step < rates.warmup_steps:
        return rates.learning_rate * (step + 1) / rates.warmup_steps
    progress = (step - rates.warmup_steps) / max(1, config.steps - 1 - rates.warmup_steps)
    span = rates.learning_rate - rates.min_learning_rate
    return rates.min_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def balance_experts(model: Transformer, routing: Sequence[Tensor], speed: float) -> float:
    """Move each expert's bias by `speed` towards the mean load; the worst layer's MaxVio before the move.

    b_i += speed · sign(mean load - load_i), DeepSeek-V3 report, section 2.1.2. MaxVio = max load / mean load - 1
    (arXiv 2408.15664). `routing` holds the MoE layers' [T, A] choices in order; the MTP layer's come last, if at all.
    """
    gates = [module for module in model.modules() if isinstance(module, Gate) and module.config.has_gate_bias]
    worst = 0.0
    for gate, indices in zip(gates, routing, strict=False):
        bias = gate.e_score_correction_bias
        load = torch.bincount(indices.flatten(), minlength=len(bias)).float()
        bias += speed * (load.mean() - load).sign()
        worst = max(worst, float(load.max() / load.mean()) - 1.0)
    return worst
