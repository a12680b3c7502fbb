"""What changes over a run: the learning rate, and the weights that V3 lowers late. Functions of the step alone.

    warm-up (linear) → constant → fall over `decay_steps` → constant at the floor for `final_steps`

    "cosine"    half a cosine; without decay_steps it begins after the warm-up
    "wsd"       warmup-stable-decay (Hu et al. 2024): linear, or 1 - sqrt (Hägele et al. 2024)
    "step"      V2's (paper, section 3.1.2): times 0.316 at 60 % and again at 90 % of the run
    "constant"  no fall

V3's schedule (report, section 4.2) is "cosine" with 4.3 of 14.8 parts of the run as decay_steps and half a part as
final_steps; its last drop, to a third for the last 167B tokens, is a run of its own here.
"""

from __future__ import annotations

import dataclasses
import math

from porcelet.config import OptimizerConfig, TrainConfig
from porcelet.errors import InputError

STEPS = ((0.6, 0.316), (0.9, 0.316))  # V2's: share of the run, factor


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step 0, 1, ...; the last step of a fall has the floor."""
    rates = config.optimizer
    if step < rates.warmup_steps:
        return rates.learning_rate * (step + 1) / rates.warmup_steps
    if rates.schedule == "step":
        return rates.learning_rate * math.prod(factor for share, factor in STEPS if step >= share * config.steps)
    if rates.schedule == "constant":
        return rates.learning_rate
    end = config.steps - 1 - rates.final_steps
    begin = max(rates.warmup_steps, end - rates.decay_steps) if rates.decay_steps else rates.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return rates.floor + (rates.learning_rate - rates.floor) * _height(progress, rates)


def check_room(config: TrainConfig) -> None:
    """Refuse a schedule that is longer than its run.

    Raises:
        InputError: names its parts.
    """
    rates = config.optimizer
    if rates.warmup_steps + rates.decay_steps + rates.final_steps > config.steps:
        raise InputError(
            f"[optimizer] warmup_steps {rates.warmup_steps} + decay_steps {rates.decay_steps} + final_steps "
            f"{rates.final_steps} are more than the {config.steps} steps of the run; lower one, or raise steps"
        )


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """A config for fewer steps. The warm-up takes a sixth of them at most; where the fall and what is behind it have no
    room beside it, all are shortened as the run is."""
    rates, planned = config.optimizer, config.steps
    warm_up, fall, final = min(rates.warmup_steps, steps // 6), rates.decay_steps, rates.final_steps
    if warm_up + fall + final > steps:
        warm_up, final = min(warm_up, rates.warmup_steps * steps // planned), final * steps // planned
        fall = math.ceil(fall * steps / planned)  # never 0, which would mean another fall
    shorter = dataclasses.replace(rates, warmup_steps=warm_up, decay_steps=fall, final_steps=final)
    return dataclasses.replace(config, steps=steps, optimizer=shorter)


def _height(progress: float, rates: OptimizerConfig) -> float:
    """From 1 at the beginning of the fall to 0 at its end."""
    if rates.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (progress if rates.decay_shape == "linear" else math.sqrt(progress))


def at_step(config: TrainConfig, step: int) -> TrainConfig:
    """The settings in force in a step: the late values of those that have one, once their part of the run begins."""
    done = step / config.steps
    return dataclasses.replace(
        config,
        mtp_weight=config.mtp_weight_late if done >= config.mtp_late_from else config.mtp_weight,
        bias_update_speed=(
            config.bias_update_speed_late if done >= config.bias_late_from else config.bias_update_speed
        ),
    )
