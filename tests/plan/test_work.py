"""What a step asks of a device, and how long it takes: checked with the model's own counts and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given as each
from hypothesis import strategies as st

from porcelet.plan.layout import Layout, layouts, shared_by, weights_on_device
from porcelet.plan.memory import device_memory
from porcelet.plan.model import find_model, known_models
from porcelet.plan.work import Batch, Kernel, seconds_figure, step_kernels, step_time
from tests.plan.machines import device, given

ONE = Layout()
V3, V2, LITE, DENSE = (find_model(name) for name in ("deepseek-v3", "v2", "deepseek-v2-lite", "r1-distill-llama-8b"))


def total(kernels: Iterator[Kernel], name: str = "flops") -> float:
    return sum(kernel.count * getattr(kernel, name) for kernel in kernels)


@pytest.mark.parametrize("name", known_models())
def test_one_device_does_what_the_model_counts(name: str) -> None:
    """A prompt's operations on one device are those of ModelConfig, attention's with them, but for the head, which
    multiplies the last token alone."""
    model, new = find_model(name), 1024
    config = model.config
    head = 2 * config.vocab_size * config.hidden_size
    products = sum(map(config.num_multiplied, range(config.num_hidden_layers)))
    gates = config.n_routed_experts * config.hidden_size  # the planner leaves out what the router multiplies
    gates *= sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    attended = config.num_hidden_layers * config.attention_flops(new * (new + 1) // 2)
    expected = new * 2 * (products - gates) + attended + head
    assert total(step_kernels(model, ONE, device(), Batch(1, new, 0))) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", known_models())
def test_a_crowd_reads_every_weight_once(name: str) -> None:
    """A step of very many tokens reads all bytes of the layers and the head, each once, and the cache beside them."""
    model = find_model(name)
    kernels = step_kernels(model, ONE, device(), Batch(1e6, 1, 0))
    cache = 1e6 * 2 * model.config.cache_values_per_token()
    left_out = ("pointwise",)
    read = sum(kernel.count * kernel.bytes for kernel in kernels if kernel.name not in left_out)
    parts = ("attention", "dense", "shared", "experts")
    weights = sum(model.sizes[part] for part in parts) + (model.sizes["head"] or model.sizes["embedding"])
    assert read == pytest.approx(weights + cache, rel=1e-6)


def test_one_token_reads_the_active_experts() -> None:
    """Alone, a token reads 8 of 256 experts; 256 tokens read nearly all, as many as chance would hit."""
    alone, crowd = (
        next(k.bytes for k in step_kernels(V3, ONE, device(), Batch(n, 1, 0)) if k.name == "routed experts")
        for n in (1, 256)
    )
    whole = V3.sizes["experts"] / 58
    assert alone == pytest.approx(whole * 8 / 256)
    assert crowd == pytest.approx(whole * (1 - (1 - 8 / 256) ** 256))


def test_decoding_mla_is_absorbed_and_prompts_are_not() -> None:
    """A new token behind 1,000 pays 2C + R values a head and pair; a prompt of 1,000 pays N + R + V."""
    pairs = {n: Batch(1, n, 1000).pairs for n in (1, 1000)}
    flops = {
        n: next(k.flops for k in step_kernels(V3, ONE, device(), Batch(1, n, 1000)) if k.name == "attention")
        for n in (1, 1000)
    }
    assert flops[1] == 2 * 128 * 1088 * pairs[1]
    assert flops[1000] == 2 * 128 * 320 * pairs[1000] + 2 * 1000 * 512 * 128 * 256


@pytest.mark.parametrize("model", [V3, V2, LITE, DENSE], ids=lambda model: model.name)
def test_layouts_share_the_weights_out(model: object) -> None:
    """No layout loses a weight: what its devices hold is at least the model, its experts exactly once."""
    for count in (1, 2, 8, 16):
        for layout in layouts(model.config, count, 8):  # type: ignore[attr-defined]
            assert layout.num_devices == count
            whole = sum(size for part, size in model.sizes.items() if part != "mtp")  # type: ignore[attr-defined]
            assert weights_on_device(model, layout) * count >= whole * 0.999  # type: ignore[arg-type]
            shares = shared_by(model.config, layout)  # type: ignore[attr-defined]
            assert shares["experts"] == 1 / (layout.expert if layout.expert > 1 else layout.tensor)


def test_mla_cache_is_not_cut_by_tensor_parallelism() -> None:
    """Eight devices that share heads hold MLA's latent eight times, and a grouped model's keys once."""
    tensor = Layout(tensor=8)
    v3, dense = (device_memory(model, tensor, device()).token for model in (V3, DENSE))
    assert v3 == 2 * 61 * 576
    assert dense == 2 * 2 * 32 * 8 * 128 / 8


def test_time_is_the_roofline() -> None:
    """Decoding alone on ideal kernels takes the bytes over the bandwidth; a long one the operations over the rate."""
    ideal = device(rates={"bf16": given(1e14)})
    step = step_time(DENSE, ONE, ideal, Batch(1, 1, 0))
    moved = total(step_kernels(DENSE, ONE, ideal, Batch(1, 1, 0)), "bytes")
    assert step.seconds == pytest.approx(moved / 1e12) and step.limit == "memory"
    prompt = step_time(DENSE, ONE, ideal, Batch(1, 4096, 0))
    flops = total(step_kernels(DENSE, ONE, ideal, Batch(1, 4096, 0)))
    assert prompt.limit == "compute" and prompt.seconds == pytest.approx(flops / 1e14, rel=0.05)


def test_fp8_weights_run_on_cards_without_it() -> None:
    """A card without FP8 computes such a model in BF16: half the rate, the same bytes."""
    batch = Batch(1, 4096, 0)
    new, old = device(), device(rates={"bf16": given(1e14)})
    assert step_time(V3, ONE, old, batch).seconds > 1.5 * step_time(V3, ONE, new, batch).seconds


def test_a_range_holds_the_value() -> None:
    """Uncertain shares make an uncertain time, and its figure cites them."""
    shaky = device(compute_share=given(0.6, 0.4, 0.8), launch=given(2e-6, 1e-6, 5e-6))
    step = step_time(V3, Layout(data=8, expert=8), shaky, Batch(64, 1, 4000))
    assert step.low < step.seconds < step.high
    figure = seconds_figure(step, shaky)
    assert figure.range == (step.low, step.high) and any("compute_share" in source for source in figure.sources)


@each(st.sampled_from([V3, LITE, DENSE]), st.integers(1, 512), st.integers(0, 30000), st.integers(1, 4))
def test_more_work_never_takes_less_time(model: object, sequences: int, cached: int, factor: int) -> None:
    """More sequences or more context make no step shorter; a faster device makes none longer."""
    layout = Layout(data=8, expert=8) if model is not DENSE else Layout(tensor=8)
    base = step_time(model, layout, device(), Batch(sequences, 1, cached)).seconds  # type: ignore[arg-type]
    assert step_time(model, layout, device(), Batch(sequences * factor, 1, cached)).seconds >= base  # type: ignore[arg-type]
    assert step_time(model, layout, device(), Batch(sequences, 1, cached * factor)).seconds >= base  # type: ignore[arg-type]
    faster = device(bandwidth=given(2e12), network=given(2e10))
    assert step_time(model, layout, faster, Batch(sequences, 1, cached)).seconds <= base  # type: ignore[arg-type]


def test_experts_across_nodes_send_over_the_network() -> None:
    """Inside a node traffic takes its link; beyond, a token goes to at most as many nodes as the gate allows."""
    inside = [k for k in step_kernels(V3, Layout(data=8, expert=8), device(), Batch(1, 4096, 0)) if k.sent]
    beyond = [k for k in step_kernels(V3, Layout(data=64, expert=64), device(), Batch(1, 4096, 0)) if k.sent]
    assert [k.over_network for k in inside + beyond] == [False, True]
    assert beyond[0].sent == 4096 * 4 * 7168 * 3 * (1 - 1 / 8)
    few = [k for k in step_kernels(V3, Layout(data=64, expert=64), device(), Batch(64, 1, 100)) if k.sent]
    assert few[0].sent == 64 * 8 * 7168 * 3 * (1 - 1 / 8)


def test_a_shorter_cache_type_moves_less() -> None:
    """An 8-bit cache halves what attention reads, and doubles what fits."""
    half = device_memory(V3, Layout(data=16, expert=16), device(), cache_bytes=1)
    full = device_memory(V3, Layout(data=16, expert=16), device(), cache_bytes=2)
    assert half.room == pytest.approx(2 * full.room)
    assert replace(full, token=full.token / 2) == half
