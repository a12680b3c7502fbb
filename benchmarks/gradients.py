"""What training repeats, forward and backward: the native bodies beside the ops' definitions, and a whole step.

    python -m benchmarks.gradients [--tokens 4096] [--rounds 7] [--append]

Shapes are those of a DeepSeek-V3 of 10 M parameters. `ratio` is the definition's time over the native body's. The step
is forward, loss and backward of that model; `percent_of_matmul` is its arithmetic, as porcelet.train counts it, over
what one product of 2048 · 2048 reaches in the same round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Run, interleave, report
from porcelet.config import read_hf
from porcelet.kernels import OPS, cpu
from porcelet.kernels.loss import token_logprobs
from porcelet.models.attention import PackedView
from porcelet.models.transformer import build, initialize
from porcelet.train.flops import train_flops
from porcelet.train.packing import pack
from porcelet.types import Sample

SEQUENCE = 512
SIDE = 2048  # of the square product that the step is compared with
MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 192,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": SEQUENCE,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {SEQUENCE}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--append", action="store_true", help="add the line to results.jsonl")
    options = parser.parse_args()
    if options.tokens < 1 or options.tokens % SEQUENCE:
        parser.error(f"--tokens {options.tokens} is no multiple of {SEQUENCE}")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    config = {"threads": torch.get_num_threads(), "isa": cpu.isa(), "memory_kept": cpu.keep_freed_memory()}
    runs: dict[str, Run] = {name: paired(name, args) for name, args in inputs(options.tokens).items()}
    runs["step"] = whole_step(options.tokens)
    results, note = interleave(runs, options.rounds)
    report("gradients", config | vars(options), results, note, append=options.append)


def inputs(T: int) -> dict[str, tuple[Any, ...]]:
    """The arguments of every op, by its name."""
    D, F, E, A, H, V = 256, 192, 8, 2, 8, 8192
    angles = torch.rand(T, 8), torch.rand(T, 8)
    queries = torch.randn(T, H, 48)
    stacks = 0.02 * torch.randn(E, 2 * F, D), 0.02 * torch.randn(E, D, F)
    return {
        "rms_norm": (torch.randn(T, D), torch.ones(D), 1e-6),
        "rope": (queries[..., 32:], *angles, True),
        "silu_mul": (torch.randn(T, F), torch.randn(T, F)),
        "route": (torch.randn(T, E), torch.zeros(E), 1, 1, A, True, 2.5),
        "experts": (torch.randn(T, D), *stacks, torch.rand(T, E).topk(A).indices, torch.rand(T, A)),
        "token_logprobs": (torch.randn(T, D), 0.02 * torch.randn(V, D), torch.randint(0, V, (T,))),
    }


def paired(name: str, args: tuple[Any, ...]) -> Run:
    """An op's native body and its definition, forward and backward, one after the other."""
    constants = {"rope": (1, 2), "route": (1,), "experts": (3,), "token_logprobs": (2,)}.get(name, ())
    leaves = [x.requires_grad_(i not in constants) if isinstance(x, Tensor) else x for i, x in enumerate(args)]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]

    def seconds(function: Callable[..., Any]) -> float:
        start = time.perf_counter()
        out = function(*leaves)
        out = out[-1] if isinstance(out, tuple) else out
        torch.autograd.grad(out, wanted, torch.ones(out.shape))
        return time.perf_counter() - start

    def run() -> Mapping[str, float]:
        native, definition = seconds(OPS[name]), seconds(OPS[name].reference)
        return {"milliseconds": native * 1e3, "ratio": definition / native}

    return run


def make_matmul_rate() -> Callable[[], float]:
    """What measures the machine: operations a second of one product of SIDE · SIDE."""
    left, right = torch.randn(2, SIDE, SIDE)
    product = torch.empty(SIDE, SIDE)

    def measured() -> float:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        return 2 * SIDE**3 / (time.perf_counter() - start)

    return measured


def whole_step(T: int) -> Run:
    """Forward, loss and backward of the whole model on T random tokens in sequences of SEQUENCE."""
    model = initialize(build(read_hf(MODEL, "benchmark")), 0)
    drawn = torch.randint(0, model.config.vocab_size, (T // SEQUENCE, SEQUENCE + 1)).tolist()
    batch = pack([Sample(tokens=tuple(tokens), weights=(0.0, *(1.0,) * SEQUENCE)) for tokens in drawn])
    operations = train_flops(model.config, batch, mtp=False)
    matmul_rate = make_matmul_rate()

    def run() -> Mapping[str, float]:
        rate = matmul_rate()
        start = time.perf_counter()
        model.zero_grad()
        hidden = model(batch.tokens, batch.positions, PackedView(batch.segments))
        head = model.lm_head.weight
        assert isinstance(head, Tensor)
        token_logprobs(hidden, head, batch.targets).mean().backward()
        seconds = time.perf_counter() - start
        percent = 100 * operations / seconds / rate
        return {"tokens_per_second": T / seconds, "matmul_gflops": rate / 1e9, "percent_of_matmul": percent}

    return run


if __name__ == "__main__":
    main()
