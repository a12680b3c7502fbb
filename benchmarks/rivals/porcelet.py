"""porcelet through its library: `Engine.submit` and `Engine.step`.

Options: format (`weights` of EngineConfig); speculation (off, or lookup: drafts from the prompt).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rivals.protocol import CACHE_TOKENS, MAX_BATCH_TOKENS, MAX_SEQUENCES, Asked, Came, installed, main
from porcelet import Engine, SamplingParams
from porcelet.config import EngineConfig
from porcelet.types import Request


class Porcelet:
    def __init__(self, options: Mapping[str, Any]) -> None:
        self.versions = installed("porcelet", "torch")
        config = EngineConfig(
            weights=options["format"],
            cache_tokens=CACHE_TOKENS,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_sequences=MAX_SEQUENCES,
            threads=options["threads"],
            speculation=options["speculation"],
        )
        self.engine = Engine.load(Path(options["model"]), config)

    def submit(self, request: Asked) -> None:
        params = SamplingParams(max_tokens=request.max_tokens, temperature=0, ignore_eos=True)
        self.engine.submit(Request(id=request.id, prompt=tuple(request.prompt), params=params))

    def step(self, deadline: float) -> Iterable[Came]:
        outputs = self.engine.step()
        now = time.perf_counter()
        return [Came(output.request_id, output.tokens, now) for output in outputs]

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            self.engine.abort(id)
        while self.engine.has_work:
            self.engine.step()


if __name__ == "__main__":
    main(Porcelet)
