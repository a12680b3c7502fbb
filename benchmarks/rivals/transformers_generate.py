"""transformers' `generate`: what waits forms a batch, padded on the left, that runs to its longest answer.

Options: format (a torch dtype); speculation ("lookup": its own prompt lookup, which takes one request at a time).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.rivals.protocol import MAX_SEQUENCES, Asked, Came, installed, main

PADDING = 0
LOOKUP_TOKENS = 8


class Steps(StoppingCriteria):
    """Stops nothing; `generate` calls it after each of its steps, so it knows when each token came."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        num_new = input_ids.shape[1] - self.num_prompt_tokens - len(self.times)
        self.times += [time.perf_counter()] * num_new
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Generate:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = installed("transformers", "torch")
        torch.set_num_threads(options["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=getattr(torch, options["format"]))
        self.model.generation_config.eos_token_id = None  # answers of a given length
        self.lookup: dict[str, Any] = (
            {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if options.get("speculation") == "lookup" else {}
        )
        self.waiting: list[Asked] = []

    def submit(self, request: Asked) -> None:
        self.waiting.append(request)

    def step(self, deadline: float) -> Iterable[Came]:
        batch = self.waiting[: 1 if self.lookup else MAX_SEQUENCES]
        self.waiting = self.waiting[len(batch) :]
        width = max(len(request.prompt) for request in batch)
        steps = Steps(width)
        tokens = self.model.generate(
            torch.tensor([[PADDING] * (width - len(r.prompt)) + list(r.prompt) for r in batch]),
            attention_mask=torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch]),
            do_sample=False,
            max_new_tokens=max(request.max_tokens for request in batch),
            max_time=max(deadline - time.perf_counter(), 0.0),
            pad_token_id=PADDING,
            stopping_criteria=StoppingCriteriaList([steps]),
            **self.lookup,
        )[:, width:].tolist()
        return [
            Came(request.id, [token], moment)
            for request, row in zip(batch, tokens, strict=True)
            for token, moment in zip(row[: request.max_tokens], steps.times, strict=False)
        ]

    def cancel(self, ids: Sequence[str]) -> None:
        self.waiting.clear()


if __name__ == "__main__":
    main(Generate)
