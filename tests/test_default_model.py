"""The real default model: our reader and our model against `transformers`, and int8 against float32."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.decode import as_transformers
from porcelet.config import EngineConfig
from porcelet.engine.codec import open_codec
from porcelet.engine.engine import Engine
from porcelet.engine.text import TextModel
from porcelet.kernels import Key, cpu
from porcelet.kernels.attention import Segments
from porcelet.kernels.linear import TILE, PackedWeight, linear
from porcelet.models.attention import PackedView
from porcelet.models.layers import Embedding, Linear
from porcelet.models.transformer import Transformer
from porcelet.types import SamplingParams
from porcelet.weights.load import load

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "What is 12 + 30? Think step by step.",
    "Explique la photosynthèse en une phrase.",
    "用一句话介绍北京。",
]
GREEDY = SamplingParams(max_tokens=40, temperature=0)


@pytest.fixture(scope="module")
def exact(default_model: Path) -> Transformer:
    return load(default_model, "float32")


@pytest.fixture(scope="module")
def quick(default_model: Path) -> Transformer:
    return load(default_model, "auto")


@pytest.fixture
def finely(monkeypatch: pytest.MonkeyPatch) -> None:
    """All activations rounded to 16 bits."""
    monkeypatch.setenv("PORCELET_ACTIVATIONS", "16")


def encode(path: Path, prompt: str) -> list[int]:
    tokenizer, chat_format = open_codec(path)
    return chat_format.render([{"role": "user", "content": prompt}], tokenizer).tokens


def assert_same_greedy(rival: torch.nn.Module, model: Transformer, path: Path, tolerance: float = 1e-3) -> None:
    """40 greedy tokens a prompt: each is the rival's likeliest after the ones before, or ties with it within tolerance.

    By induction the rival's greedy text is ours up to the first tie, and one forward pass a prompt shows it.
    """
    ties = 0
    prompts = [encode(path, prompt) for prompt in PROMPTS]
    for prompt, ours in zip(prompts, Engine(model).generate(prompts, GREEDY), strict=True):
        drawn = [*ours.tokens, *([] if ours.stop_token is None else [ours.stop_token])]
        logits = rival(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
        gap = logits.amax(-1) - logits.gather(-1, torch.tensor(drawn)[:, None])[:, 0]
        assert gap.max() < tolerance, f"token {int(gap.argmax())} is {float(gap.max())} below the likeliest"
        ties += int((gap > 0).sum())
    assert ties <= 1


@torch.inference_mode()
def test_greedy_text_equals_transformers(
    exact: Transformer, quick: Transformer, default_model: Path, finely: None
) -> None:
    """Engine, pages and all give the tokens of `transformers` with the same weights, in float32 and as stored."""
    rival = as_transformers(exact)
    assert_same_greedy(rival, exact, default_model)
    assert_same_greedy(rival, quick, default_model, tolerance=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.inference_mode()
def test_greedy_text_equals_transformers_from_the_file(exact: Transformer, default_model: Path) -> None:
    """The same with `transformers` reading the GGUF file itself: tensors, tokenizer, chat template and tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rival = AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    )
    theirs = rival.state_dict()
    for name, tensor in exact.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    tokenizer = AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    for prompt in PROMPTS:
        conversation = [{"role": "user", "content": prompt}]
        expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert encode(default_model, prompt) == expected
    assert_same_greedy(rival.eval(), exact, default_model)


def test_answers_in_text(quick: Transformer, default_model: Path) -> None:
    """The model, as a user gets it, knows the capital of France; asked so that its two likeliest words are not 0.08
    apart in float32, as for the question alone."""
    model = TextModel(Engine(quick), *open_codec(default_model))
    assert "Paris" in model.chat("Name the capital city of France.", GREEDY)


def test_the_native_body_serves_the_default_model(quick: Transformer) -> None:
    """Where a compiler was there, and CI has one, int8 runs natively."""
    assert cpu.available()
    assert linear.chosen(Key("cpu", type(quick.lm_head.weight).__name__, torch.float32, False)) == "cpu_packed"


@pytest.mark.parametrize("weights", ["exact", "quick"])
def test_prompts_are_replayed(weights: str, request: pytest.FixtureRequest) -> None:
    """As many tokens as a step may have, float32 or packed; a small budget leaves room for guesses."""
    model = request.getfixturevalue(weights)
    engine = Engine(model)
    assert engine.runner.capacity == 512 and Engine(model, EngineConfig(max_batch_tokens=8)).runner.capacity == 64
    engine.generate([list(range(100, 300))], SamplingParams(max_tokens=2))
    assert engine.runner.recorded and engine.runner.num_recordings == 1


@torch.inference_mode()
def test_rounding_keeps_the_perplexity(exact: Transformer, quick: Transformer, default_model: Path) -> None:
    """On English prose, rounded activations change the perplexity by less than 0.5 %, and the distribution of the next
    token by less than 0.001 nats."""
    text = pydoc_data.topics.topics["objects"][:6000]
    tokens = torch.tensor(open_codec(default_model)[0].encode(text))[:640]

    def logprobs(model: Transformer) -> Tensor:
        view = PackedView(Segments.of(len(tokens) - 1))
        return model.logits(model(tokens[:-1], torch.arange(len(tokens) - 1), view)).log_softmax(-1)

    true, rounded = logprobs(exact), logprobs(quick)
    change = (true - rounded).gather(-1, tokens[1:, None]).mean()
    assert abs(float(change.exp()) - 1) < 0.005
    assert (true.exp() * (true - rounded)).sum(-1).mean() < 0.001


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("stored", 4)])
def test_packed_weights_take_the_memory_that_the_config_counts(default_model: Path, weights: str, bits: int) -> None:
    """`porcelet show` and the loaded model agree on the bytes of packed weights, but for tile padding and
    for the minima that Q8_0's weights do without."""
    quick = load(default_model, weights)
    layers = (module for module in quick.modules() if isinstance(module, (Linear, Embedding)))
    weights = {id(layer.weight): layer.weight for layer in layers}  # the head is the embedding
    packed = [weight for weight in weights.values() if isinstance(weight, PackedWeight)]
    total = sum(weight.packed.nbytes for weight in packed)
    spared = sum(weight.packed[..., :2].numel() * TILE for weight in packed if weight.symmetric)  # a half a group
    dense = sum(parameter.nbytes for parameter in quick.parameters())
    assert spared and 0 <= total + spared + dense - quick.config.packed_bytes(bits) < 1e-3 * total
