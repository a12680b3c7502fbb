"""TRL's GRPOTrainer, a step at a time: python -m benchmarks.rivals.trl_grpo '{"folder": ..., "prompts": [...], ...}'

Options: folder (a Hugging Face model), prompts (token ids, one list a prompt), group_size, num_tokens (of an answer),
completions (a list of answers a prompt to replay; null: TRL generates them, all of `num_tokens`), threads, lengths of
micro-batches (`micro_batch`), learning_rate, and `more`: further fields of GRPOConfig.

The first line out is {"versions": {...}}. Then each line in, {"gradient": path or null}, is a step of the optimizer,
answered by {"seconds": ..., "loss": ..., "peak_bytes": ...}; with a path the gradients, clipped, are saved there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.rivals.protocol import forget_peak, installed, peak_bytes, private_output, tell

MAX_STEPS = 10_000


class Replayed(GRPOTrainer):  # type: ignore[misc]
    """Prompts are token ids, and answers come from the options where they are given."""

    options: Mapping[str, Any] = {}
    loss = 0.0

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self.asked = [int(prompt) for prompt in prompts]
        return [list(self.options["prompts"][number]) for number in self.asked], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **named: Any) -> Any:
        completions = self.options["completions"]
        if completions is None:
            return super()._generate_single_turn(prompt_ids, *others, **named)
        seen: dict[int, int] = {}
        answers = []
        for number in self.asked:
            answers.append(list(completions[number][seen.get(number, 0)]))
            seen[number] = seen.get(number, 0) + 1
        return answers, None

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self.loss += float(loss.detach())
        return loss


class Paced(TrainerCallback):  # type: ignore[misc]
    """Each step waits for its line, and is timed from there to its end."""

    def __init__(self, channel: int, trainer: Replayed) -> None:
        self.channel, self.trainer = channel, trainer
        self.command: dict[str, Any] = {}
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the trainer has no way out of a step that has begun
        self.command, self.trainer.loss = json.loads(line), 0.0
        forget_peak()
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.command["gradient"]:
            found = {name: p.grad for name, p in self.trainer.model.named_parameters() if p.grad is not None}
            save_file({name: grad.contiguous() for name, grad in found.items()}, self.command["gradient"])

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        seconds = time.perf_counter() - self.start
        tell(self.channel, {"seconds": seconds, "loss": self.trainer.loss, "peak_bytes": peak_bytes()})


def reward(completion_ids: Sequence[Sequence[int]], **others: Any) -> list[float]:
    """What both sides pay: cheap, and different in every group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def main() -> None:
    options, channel = json.loads(sys.argv[1]), private_output()
    torch.set_num_threads(options["threads"])
    num_answers = len(options["prompts"]) * options["group_size"]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=MAX_STEPS,
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=num_answers // options["micro_batch"],
        num_generations=options["group_size"],
        max_completion_length=options["num_tokens"],
        generation_kwargs={"min_new_tokens": options["num_tokens"]},
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        beta=0.0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        loss_type="dapo",
        scale_rewards="none",
        num_iterations=1,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options["more"],
    )
    trainer = Replayed(
        model=AutoModelForCausalLM.from_pretrained(options["folder"], dtype=torch.float32),
        args=config,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(options["prompts"]))]}),
        processing_class=AutoTokenizer.from_pretrained(options["folder"]),
    )
    trainer.options = options
    trainer.add_callback(Paced(channel, trainer))
    tell(channel, {"versions": installed("trl", "transformers", "accelerate", "torch")})
    trainer.train()


if __name__ == "__main__":
    main()
