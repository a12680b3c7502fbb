from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from porcelet.errors import InputError
from porcelet.train.data import Renderer, load_task, make_tokenizer, pack
from porcelet.types import Sample
from tests.train.tiny_run import config

entries = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(-3, 3)), min_size=2, max_size=9)


@given(st.lists(entries, min_size=1, max_size=6))
def test_packing_loses_no_token_and_no_weight(sequences: list[list[tuple[int, int, int]]]) -> None:
    """Every token but a sequence's first is a target once, beside its own weights and the tokens before it."""
    samples = []
    for sequence in sequences:
        tokens, weights, advantages = zip(*sequence, strict=True)
        samples.append(
            Sample(tokens=tokens, weights=(0, *weights[1:]), advantages=(0, *advantages[1:]), old_logprobs=weights)
        )
    batch = pack(samples)
    cuts = batch.offsets.tolist()
    assert len(cuts) == len(samples) + 1 and cuts[-1] == len(batch.tokens)
    for sample, a, b in zip(samples, cuts, cuts[1:], strict=False):
        assert batch.tokens[a:b].tolist() == list(sample.tokens[:-1])
        assert batch.targets[a:b].tolist() == list(sample.tokens[1:])
        assert batch.positions[a:b].tolist() == list(range(b - a))
        assert batch.weights[a:b].tolist() == list(sample.weights[1:])
        assert batch.advantages[a:b].tolist() == list(sample.advantages[1:])
        assert batch.old_logprobs[a:b].tolist() == list(sample.old_logprobs[1:])


def test_absent_weights_are_zeros() -> None:
    """A method that leaves a list empty says that it weighs nothing."""
    batch = pack([Sample(tokens=(1, 2, 3), weights=(0.0, 1.0, 1.0)), Sample(tokens=(4, 5), advantages=(0.0, 2.0))])
    assert batch.weights.tolist() == [1, 1, 0] and batch.advantages.tolist() == [0, 0, 2]


def test_stream_depends_on_the_position_alone_and_meets_no_held_out_problem(tmp_path: Path) -> None:
    """Any position can be drawn at any time; all training problems come up, held-out ones never do."""
    task = load_task(config(tmp_path, max_number=10))
    drawn = [task.draw(0, i) for i in range(2000)]
    assert drawn[777] == load_task(config(tmp_path, max_number=10)).draw(0, 777)
    assert set(drawn) == set(task.training)
    assert not set(drawn) & set(task.held_out) and len(task.training) + len(task.held_out) == 100
    assert [task.draw(1, i) for i in range(20)] != drawn[:20]


def test_only_answer_and_stop_carry_weight(tmp_path: Path) -> None:
    """The prompt is the chat format's, the rest is the answer and the end of sentence, and only that is weighed."""
    make_tokenizer(tmp_path)
    renderer = Renderer(tmp_path)
    problem = load_task(config(tmp_path)).training[0]
    sample = renderer.sample(problem, stop=1)
    num_prompt = len(sample.weights) - int(sum(sample.weights))
    text = renderer.tokenizer.decode(sample.tokens[:num_prompt])
    assert text == f"<｜begin▁of▁sentence｜><｜User｜>{problem.question}<｜Assistant｜>"
    assert renderer.tokenizer.decode(sample.tokens[num_prompt:-1]) == problem.answer and sample.tokens[-1] == 1
    assert sample.weights == (0.0,) * num_prompt + (1.0,) * (len(problem.answer) + 1)
    talk = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}]
    whole = renderer.chat.render(talk, renderer.tokenizer, add_generation_prompt=False)
    assert tuple(whole.tokens) == sample.tokens and whole.trainable == [weight == 1 for weight in sample.weights]


def test_transformers_reads_the_tokenizer_and_the_chat_format(tmp_path: Path) -> None:
    """Same ids for any text and any conversation, and the special tokens in their roles."""
    transformers = pytest.importorskip("transformers")
    make_tokenizer(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Renderer(tmp_path)
    for text in ("12+34=", "Grüße, 你好 \n\t 🐷", bytes(range(128)).decode()):
        ids = ours.tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.tokenizer.decode(ids) == text
    talk = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "?"},
    ]
    rendered = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert rendered == ours.chat.render(talk, ours.tokenizer).tokens
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


@pytest.mark.parametrize(("changes", "named"), [({"task": "sum"}, "sums"), ({"max_number": 1}, "max_number")])
def test_unusable_task_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    """An unknown task names the known ones; a task too small to hold problems out names its size."""
    with pytest.raises(InputError, match=named):
        load_task(config(tmp_path, **changes))


def test_a_weight_on_the_first_token_is_our_own_mistake() -> None:
    """Nothing predicts it, so it would be lost."""
    with pytest.raises(AssertionError):
        pack([Sample(tokens=(1, 2), weights=(1.0, 1.0))])
    assert torch.is_tensor(pack([Sample(tokens=(1, 2), weights=(0.0, 1.0))]).weights)
