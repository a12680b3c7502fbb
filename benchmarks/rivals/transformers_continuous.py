"""transformers' own continuous batching: its manager's thread computes, its queue tells of each token.

Options: format (a torch dtype).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from benchmarks.rivals.protocol import CACHE_TOKENS, MAX_BATCH_TOKENS, MAX_SEQUENCES, Asked, Came, installed, main

PAGE = 64
WAIT_SECONDS = 0.05
NO_END = -1


class Continuous:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = installed("transformers", "torch")
        torch.set_num_threads(options["threads"])
        model = AutoModelForCausalLM.from_pretrained(options["folder"], dtype=getattr(torch, options["format"]))
        model.generation_config.eos_token_id = NO_END
        model.generation_config.do_sample = False
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=CACHE_TOKENS // PAGE,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests_per_batch=MAX_SEQUENCES,
        )
        self.manager = model.init_continuous_batching(continuous_batching_config=config)
        self.manager.start()
        self.num_known: dict[str, int] = {}
        self.num_runs = 0

    def submit(self, request: Asked) -> None:
        self.num_known[request.id] = 0
        self.manager.add_request(
            list(request.prompt),
            request_id=self._name(request.id),
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=NO_END,
        )

    def step(self, deadline: float) -> Iterable[Came]:
        result = self.manager.get_result(timeout=WAIT_SECONDS)
        if result is None:
            if not self.manager.is_running():
                raise RuntimeError("the manager's thread has ended")
            return []
        if result.error is not None:
            raise RuntimeError(result.error)
        run, _, id = result.request_id.partition("/")
        if run != str(self.num_runs):
            return []  # of a request cancelled in an earlier run
        new = result.generated_tokens[self.num_known[id] :]
        self.num_known[id] += len(new)
        return [Came(id, new, time.perf_counter())]

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.manager.cancel_request(self._name(id))
        self.num_runs += 1

    def _name(self, id: str) -> str:
        return f"{self.num_runs}/{id}"


if __name__ == "__main__":
    main(Continuous)
