"""OpenVINO GenAI's continuous batching pipeline over weights that optimum-intel exported.

Options: format (int8 or int4: the exported folder's); speculation ("lookup": its prompt lookup).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import openvino
import openvino_genai as genai

from benchmarks.rivals.protocol import MAX_BATCH_TOKENS, MAX_SEQUENCES, Asked, Came, installed, main

CACHE_GIGABYTES = 1  # its cache is 8-bit by default: 32,768 tokens of the default model are 0.4
LOOKUP_TOKENS, LOOKUP_MATCH = 8, 4


class OpenVINO:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = installed("openvino-genai", "openvino")
        scheduling = genai.SchedulerConfig()
        scheduling.cache_size = CACHE_GIGABYTES
        scheduling.max_num_batched_tokens = MAX_BATCH_TOKENS
        scheduling.max_num_seqs = MAX_SEQUENCES
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = True
        self.looks_up = options.get("speculation") == "lookup"
        properties = {"INFERENCE_NUM_THREADS": options["threads"]}
        if self.looks_up:
            properties["prompt_lookup"] = True
        self.pipeline = genai.ContinuousBatchingPipeline(options["folder"], scheduling, "CPU", properties)
        self.handles: dict[str, Any] = {}
        self.num_submitted = 0

    def submit(self, request: Asked) -> None:
        config = genai.GenerationConfig(max_new_tokens=request.max_tokens, ignore_eos=True, do_sample=False)
        if self.looks_up:
            config.num_assistant_tokens, config.max_ngram_size = LOOKUP_TOKENS, LOOKUP_MATCH
        tokens = openvino.Tensor(numpy.array([request.prompt], dtype=numpy.int64))
        self.handles[request.id] = self.pipeline.add_request(self.num_submitted, tokens, config)
        self.num_submitted += 1

    def step(self, deadline: float) -> Iterable[Came]:
        self.pipeline.step()
        now = time.perf_counter()
        readable = [(id, handle) for id, handle in self.handles.items() if handle.can_read()]
        return [
            Came(id, list(output.generated_ids), now) for id, handle in readable for output in handle.read().values()
        ]

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.handles[id].cancel()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        self.handles.clear()


if __name__ == "__main__":
    main(OpenVINO)
