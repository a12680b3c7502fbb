"""MLA's two forms over the same cache, one layer of DeepSeek-V2-Lite's shape: where do they cross on this machine?

    python -m benchmarks.mla [--cached 2048] [--rounds 5] [--append]

For each number of new tokens behind `cached` ones, the time of both forms and absorbed over expanded; above 1 the
expanded form is the faster one. `ModelConfig.absorbed_below` puts the crossing at 171 by counting operations.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.harness import interleave, report
from porcelet.config import PAGE_SIZE, ModelConfig
from porcelet.models.attention import MLA, PagedView
from porcelet.models.rope import angles

NEW_TOKENS = (1, 16, 64, 128, 171, 256, 512)
V2_LITE = ModelConfig(
    architecture="deepseek_v2",
    vocab_size=64,
    hidden_size=2048,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=192,
    max_position_embeddings=8192,
    rope_interleave=True,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cached", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    layer = MLA(V2_LITE, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    names = {f"{form}_{count}": (form, count) for count in NEW_TOKENS for form in ("absorbed", "expanded")}
    runs = {
        name: lambda form=form, count=count: {"milliseconds": measure(layer, options.cached, count, form == "expanded")}
        for name, (form, count) in names.items()
    }
    results, note = interleave(runs, options.rounds)
    for count in NEW_TOKENS:
        absorbed, expanded = (results[f"{form}_{count}"]["milliseconds"] for form in ("absorbed", "expanded"))
        results[f"ratio_{count}"] = {"absorbed_over_expanded": float(f"{absorbed / expanded:.3g}")}
    report("mla", {"by_operations": V2_LITE.absorbed_below(), **vars(options)}, results, note, append=options.append)


@torch.inference_mode()
def measure(layer: MLA, cached: int, count: int, expanded: bool) -> float:
    """Milliseconds of one call with `count` new tokens behind `cached` ones."""
    length = cached + count
    num_pages = -(-length // PAGE_SIZE)
    cache = [(torch.randn(num_pages, PAGE_SIZE, 1, V2_LITE.kv_lora_rank + V2_LITE.qk_rope_head_dim),)]
    places = torch.arange(cached, length)
    table = torch.arange(num_pages)[None]
    view = PagedView(
        torch.tensor([0, count]), torch.tensor([length]), table, places, cache, torch.tensor([0 if expanded else count])
    )
    rotations, x = angles(V2_LITE, places, torch.float32), torch.randn(count, V2_LITE.hidden_size)
    start = time.perf_counter()
    layer(x, rotations, view)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
