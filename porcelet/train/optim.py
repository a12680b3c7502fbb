"""How parameters move: AdamW, or Muon for the matrices of blocks and AdamW for the rest, as one optimizer.

A step reads and writes every parameter once. The gradients' norm is taken once, and clipping is a factor inside the
update, so no pass over the gradients scales them. The state is a table of tensors a parameter, which checkpoint.py
saves as it is; the rate comes from outside (schedule.py), so there is nothing else to save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from porcelet.config import OptimizerConfig
from porcelet.models.experts import Experts, Gate
from porcelet.models.transformer import Transformer
from porcelet.train.muon import muon_step

EPSILON = 1e-8


@dataclass(frozen=True)
class Part:
    """A parameter and how it moves: by AdamW, or by Muon as this many matrices above one another."""

    parameter: Tensor
    num_matrices: int = 0  # 0: AdamW


def make_optimizer(model: Transformer, config: OptimizerConfig) -> Optimizer:
    """An optimizer of all that asks for a gradient.

    Muon takes the matrices of blocks: attention, MLPs and experts, whose gate and up projections are two matrices each.
    Embedding, head, routers, norms and biases stay with AdamW (Liu et al. 2025, section 2.2; DeepSeek-V4's choice too).
    """
    counts = _block_matrices(model) if config.name == "muon" else {}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Optimizer([Part(parameter, counts.get(parameter, 0)) for parameter in learnt], config)


class Optimizer:
    """Moves parameters. `state[parameter]` appears with its first step.

    AdamW's state is `step`, `exp_avg` and `exp_avg_sq`, Muon's `momentum`. A parameter without a gradient stays.
    """

    def __init__(self, parts: Sequence[Part], config: OptimizerConfig) -> None:
        self.parts, self.config = tuple(parts), config
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.parameter.grad = None

    def gradient_norm(self) -> float:
        """The norm of all gradients as one vector."""
        gradients = [part.parameter.grad for part in self.parts if part.parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients, error_if_nonfinite=False))

    @torch.no_grad()
    def step(self, norm: float, rate: float) -> None:
        """One step at AdamW's learning rate; `norm`, that of the gradients, is clipped to `max_grad_norm`.

        Gradients may be scaled in place. A norm that is not finite changes nothing.
        """
        if not math.isfinite(norm):
            return
        excess = max(1.0, norm / self.config.max_grad_norm)
        moving = [part for part in self.parts if part.parameter.grad is not None]
        plain = [part.parameter for part in moving if not part.num_matrices]
        self._adamw([p for p in plain if p.dim() > 1], self.config.weight_decay, rate, excess)
        self._adamw([p for p in plain if p.dim() <= 1], 0.0, rate, excess)
        for part in moving:
            if part.num_matrices:
                self._muon(part, rate, excess)

    def _adamw(self, parameters: list[Tensor], decay: float, rate: float, excess: float) -> None:
        """Loshchilov & Hutter 2019, fused over all parameters; gradients are divided by `excess` on the way."""
        if not parameters:
            return
        states = [self.state.setdefault(p, {}) or self._new_state(p) for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=torch.tensor(excess, device=parameters[0].device) if excess > 1.0 else None,
            amsgrad=False,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=rate,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        self.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        return self.state[parameter]

    def _muon(self, part: Part, rate: float, excess: float) -> None:
        """Muon's step at AdamW's rate, or at that of its own in the same schedule."""
        parameter, gradient, config = part.parameter, part.parameter.grad, self.config
        assert gradient is not None
        state = self.state.setdefault(parameter, {})
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        muon_step(
            parameter,
            gradient,
            state["momentum"],
            num_matrices=part.num_matrices,
            rate=rate * (config.muon_learning_rate or config.learning_rate) / config.learning_rate,
            decay=config.weight_decay,
            friction=config.muon_momentum,
            excess=excess,
        )


def _block_matrices(model: Transformer) -> dict[Tensor, int]:
    """The matrices of blocks, and how many lie above one another in each."""
    routers = {id(module.weight) for module in model.modules() if isinstance(module, Gate)}
    double = {id(module.gate_up_proj) for module in model.modules() if isinstance(module, Experts)}
    return {
        parameter: 2 if id(parameter) in double else 1
        for parameter in model.model.layers.parameters()
        if parameter.dim() > 1 and id(parameter) not in routers
    }
