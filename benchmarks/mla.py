"""MLA's two forms, native and recorded: where do they cross on this machine?

    python -m benchmarks.mla [--shape lite] [--weights int8] [--rounds 5] [--append]

`attention_<new>_<cached>` is one layer's attention (everything between its projections) for so many new tokens behind
so many cached ones; `prompt_<tokens>` a whole prompt through the engine, in steps of 512 tokens. Each has absorbed over
expanded, in time: above 1 the expanded form is the faster one. `ModelConfig.absorbed_below` puts the crossing where
operations say, 171 for V2, V2-Lite and V3. `lite` has V2-Lite's widths in two layers, with 16 experts; `small` is the
model that benchmarks.deepseek measures; weights are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.decode import make_prompts
from benchmarks.harness import interleave, report
from benchmarks.rivals.deepseek import CONFIG
from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig
from porcelet.engine.engine import Engine
from porcelet.engine.runner import choose_cache_dtype
from porcelet.kernels import cpu
from porcelet.kernels.attention import attention_latent
from porcelet.kernels.record import Tape
from porcelet.models.attention import MLA
from porcelet.models.transformer import Transformer, build, initialize
from porcelet.types import Request, SamplingParams
from porcelet.weights.load import quantized

STEP = 512  # tokens
NEW_TOKENS = (1, 16, 64, 128, 171, 256, 512)
CACHED = (0, 512, 2048)
PROMPTS = (128, 512, 1024, 2048, 4096)
LITE = ModelConfig(
    architecture="deepseek_v2",
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=192,
    max_position_embeddings=8192,
    rope_interleave=True,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    topk_method="greedy",
    norm_topk_prob=False,
)
FORMS = ("absorbed", "expanded")
Run = Callable[[], dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("lite", "small"), default="lite")
    parser.add_argument("--weights", choices=("int8", "float32"), default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    config = {"lite": LITE, "small": CONFIG}[options.shape]
    model = initialize(build(config), seed=0).eval()
    model = quantized(model) if options.weights == "int8" else model
    runs = attention_runs(model) | prompt_runs(model)
    results, note = interleave({f"{name}_{form}": runs[name][form] for name in runs for form in FORMS}, options.rounds)
    for name in runs:
        absorbed, expanded = (results[f"{name}_{form}"]["milliseconds"] for form in FORMS)
        results[name] = {"absorbed_over_expanded": float(f"{absorbed / expanded:.3g}")}
    counted = {"threads": torch.get_num_threads(), "by_operations": config.absorbed_below()}
    report("mla", counted | vars(options), results, note, append=options.append)


@torch.no_grad()
def attention_runs(model: Transformer) -> dict[str, dict[str, Run]]:
    """One layer's attention, recorded once for all numbers of tokens."""
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, MLA)
    num_pages = -(-(max(CACHED) + STEP) // PAGE_SIZE)
    latents = torch.randn(num_pages, PAGE_SIZE, 1, layer.latent + layer.rope).to(choose_cache_dtype("auto", model))
    queries = torch.randn(STEP, layer.heads, layer.nope + layer.rope).split((layer.nope, layer.rope), dim=-1)
    offsets, lengths, num_absorbed = torch.tensor([0, STEP]), torch.tensor([STEP]), torch.tensor([STEP])
    past = offsets, lengths, torch.arange(num_pages)[None], num_absorbed
    tape = Tape(cpu.new_program(), STEP, num_pages * PAGE_SIZE)
    with tape:
        out = attention_latent(queries[0], *layer._absorbed_weights(), queries[1], latents, *past, layer.scale)
    for tensor in (*queries, latents, *past, out):  # the program knows addresses alone
        tape.keep(tensor)

    def run(count: int, cached: int, form: str) -> dict[str, float]:
        offsets[1], lengths[0], num_absorbed[0] = count, cached + count, count if form == "absorbed" else 0
        start = time.perf_counter()
        tape.program.run(count, 0, torch.get_num_threads())
        return {"milliseconds": (time.perf_counter() - start) * 1e3}

    return {
        f"attention_{count}_{cached}": {form: partial(run, count, cached, form) for form in FORMS}
        for cached in CACHED
        for count in NEW_TOKENS
    }


def prompt_runs(model: Transformer) -> dict[str, dict[str, Run]]:
    """Whole prompts, up to their first token."""
    engine_config = EngineConfig(
        max_batch_tokens=STEP, speculation="off", prefix_cache="off", cache_tokens=max(PROMPTS) + PAGE_SIZE
    )
    engine = Engine(model, engine_config)

    def run(length: int, form: str) -> dict[str, float]:
        engine.scheduler.absorbed_below = length + 1 if form == "absorbed" else 0
        prompt = tuple(make_prompts(1, length)[0].tolist())
        engine.submit(Request(id="a", prompt=prompt, params=SamplingParams(max_tokens=1)))
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return {"milliseconds": (time.perf_counter() - start) * 1e3}

    return {f"prompt_{length}": {form: partial(run, length, form) for form in FORMS} for length in PROMPTS}


if __name__ == "__main__":
    main()
