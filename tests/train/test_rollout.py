from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from porcelet.config import PolicyConfig, TrainConfig
from porcelet.errors import InputError
from porcelet.models.transformer import Transformer
from porcelet.train.answers import read_answer
from porcelet.train.loop import train
from porcelet.train.loss import Totals
from porcelet.train.reference import Reference
from porcelet.train.rendering import Renderer, make_tokenizer
from porcelet.train.rewards import Answer, Reward, Term
from porcelet.train.rollout import Rollout, require_room, to_samples
from porcelet.train.sampler import make_engine, refresh
from porcelet.train.scoring import score_drawn
from porcelet.train.tasks import Problem
from porcelet.train.tasks.sums import sums
from porcelet.train.updates import batches
from porcelet.types import Episode, Output, Sample, SamplingParams
from tests.train.test_loss import naive_logprobs
from tests.train.tiny_run import FIELDS, config, metrics_of, model


def episode(reward: float, tokens: tuple[int, ...] = (7, 1), *, finished: bool = True) -> Episode:
    logprobs = tuple(-0.5 for _ in tokens)
    return Episode(prompt=(5, 6), tokens=tokens, logprobs=logprobs, text="", reward=reward, finished=finished)


def by_length(problem: Problem, answer: Answer) -> float:
    return float(len(answer.text))


def rollout(folder: Path, reward: Reward = by_length, network: Transformer | None = None, **changes: Any) -> Rollout:
    """A rollout of the untrained tiny model on sums."""
    make_tokenizer(folder)
    run = config(folder, method="grpo", **({"group_size": 4, "max_new_tokens": 3} | changes))
    network = network or model()
    reference = Reference(network, folder, run.policy.reference_every) if run.policy.kl_weight else None
    engine = make_engine(network, run.policy)
    return Rollout(engine, network, sums(max_number=10), Renderer(folder), run, (Term("exact", reward),), reference)


def test_only_drawn_tokens_carry_advantages() -> None:
    """Prompts weigh nothing, the stop token counts; an answer's tokens share its advantage."""
    right, wrong = to_samples([episode(1.0), episode(0.0, (8, 9, 1))], PolicyConfig())
    assert right.tokens == (5, 6, 7, 1) and right.old_logprobs == (0.0, 0.0, -0.5, -0.5)
    assert right.advantages == pytest.approx((0.0, 0.0, 1.0, 1.0), rel=1e-5) and not right.weights
    assert wrong.advantages == pytest.approx((0.0, 0.0, -1.0, -1.0, -1.0), rel=1e-5)
    assert (right.num_drawn, wrong.num_drawn) == (2, 3) and right.teaches


def test_a_group_without_a_signal_counts_and_is_not_computed() -> None:
    """Its answers divide the mean, as the papers' do, and nothing in them has a gradient."""
    samples = to_samples([episode(1.0)] * 3, PolicyConfig()) + to_samples([episode(1.0), episode(0.0)], PolicyConfig())
    assert [sample.teaches for sample in samples] == [False, False, False, True, True]
    totals = Totals.of(samples)
    assert (totals.num_answers, totals.num_policy_tokens, totals.num_computed_tokens) == (5, 10, 4)


def test_cut_answers_are_left_out_on_request() -> None:
    """They still count in their group's mean, as in DAPO's overlong filtering."""
    group = [episode(1.0), episode(0.0, finished=False), episode(0.0)]
    kept = to_samples(group, PolicyConfig(overlong_filter=True))
    assert kept == [to_samples(group, PolicyConfig())[i] for i in (0, 2)]


def test_rollout_is_a_function_of_step_and_parameters(tmp_path: Path) -> None:
    """Step 3 gives the same samples whatever was drawn before, and others than step 2 or other parameters."""
    draw = rollout(tmp_path)
    third = draw(3)
    assert draw(2) != third and draw(3) == third == rollout(tmp_path)(3)
    assert rollout(tmp_path, network=model(seed=1))(3) != third
    samples, metrics = third
    assert len(samples) == 8 and {len({s.tokens[: s.num_prompt] for s in samples[i : i + 4]}) for i in (0, 4)} == {1}
    assert metrics["reward"] == metrics["reward/exact"] and metrics["reward_failures"] == metrics["redrawn"] == 0
    assert metrics["completions/mean_length"] == sum(sample.num_drawn for sample in samples) / 8
    cut = sum(sample.tokens[-1] != 1 for sample in samples)
    assert metrics["completions/clipped_ratio"] == cut / 8


def test_groups_without_a_signal_are_replaced_within_bounds(tmp_path: Path) -> None:
    """Where half of the problems never differ, redraws fill the step up with those that do; each is counted."""

    def odd(problem: Problem, answer: Answer) -> float:
        return float(sum(answer.text.encode())) * (hash_of(problem) % 2)

    def hash_of(problem: Problem) -> int:
        return sum(map(int, problem.question.rstrip("=").split("+")))

    plain, redrawn = (rollout(tmp_path, odd, samples_per_step=32, redraws=count) for count in (0, 6))
    before, after = plain(0), redrawn(0)
    assert sum(sample.teaches for sample in before[0]) < 32 and before[1]["redrawn"] == 0
    assert all(sample.teaches for sample in after[0]) and len(after[0]) == 32
    assert 0 < after[1]["redrawn"] <= 6 * 8 and after == redrawn(0)
    never = rollout(tmp_path, lambda *_: 1.0, samples_per_step=8, redraws=2)(0)
    assert never[1]["redrawn"] == 4 and never[1]["no_signal"] == 1 and len(never[0]) == 8


def test_a_teacher_says_of_each_token_how_much_rather_it_would_have_said_it(tmp_path: Path) -> None:
    """Advantages are log p_teacher - log p_student, whatever the rewards; the distance is their negative mean, and a
    student that is its own teacher has nothing to learn."""
    network, teacher = model(), model(seed=1)
    draw = rollout(tmp_path, lambda *_: 1.0, network)
    samples, metrics = dataclasses.replace(draw, teacher=teacher)(0)
    drawn: list[float] = []
    for sample in samples:
        start = sample.num_prompt
        expected = naive_logprobs(teacher, sample.tokens) - naive_logprobs(network, sample.tokens)
        assert sample.advantages[start:] == pytest.approx(expected.tolist()[start - 1 :], abs=1e-4)
        assert not any(sample.advantages[:start])
        drawn += sample.advantages[start:]
    assert metrics["distance"] == pytest.approx(-sum(drawn) / len(drawn)) and metrics["reward"] == 1.0
    assert "no_signal" not in metrics
    own, nothing = dataclasses.replace(draw, teacher=network)(0)
    assert max(abs(value) for sample in own for value in sample.advantages) < 1e-4 and abs(nothing["distance"]) < 1e-5


def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """A few steps of on-policy distillation lower the divergence; another tokenizer is refused."""
    learnt: dict[str, Any] = {"samples_per_step": 32, "max_number": 4, "learning_rate": 1e-2}
    teacher = train(config(tmp_path / "teacher", steps=16, **learnt), FIELDS)
    student = train(config(tmp_path / "student", steps=8, seed=1, **learnt), FIELDS)
    run = config(tmp_path / "taught", method="distill", model=str(student), teacher=str(teacher), steps=20,
                 samples_per_step=64, group_size=8, max_new_tokens=3, max_number=4, learning_rate=3e-3)  # fmt: skip
    distances = [line["distance"] for line in metrics_of(train(run, {}))]
    assert sum(distances[-5:]) < 0.8 * sum(distances[:5])
    strange = train(config(tmp_path / "strange", steps=1, digits=2), FIELDS)
    policy = dataclasses.replace(run.policy, teacher=str(strange))
    with pytest.raises(InputError, match="has another tokenizer"):
        train(dataclasses.replace(run, output=str(tmp_path / "other"), policy=policy), {})


def test_overlong_answers_earn_less(tmp_path: Path) -> None:
    """Among equal rewards, only the lengths within the buffer tell answers apart."""
    samples, metrics = rollout(tmp_path, lambda *_: 1.0, max_new_tokens=3, overlong_buffer=3, samples_per_step=32)(0)
    assert metrics["reward"] == 1.0
    for start in range(0, 32, 4):
        group = samples[start : start + 4]
        by_count = sorted(group, key=lambda sample: sample.num_drawn)
        assert by_count[0].advantages[-1] >= by_count[-1].advantages[-1]
        assert len({sample.num_drawn for sample in group}) == len({sample.advantages[-1] for sample in group})


@pytest.mark.parametrize("tokens_per_pass", [0, 20])
def test_scores_are_those_of_single_sequences(tmp_path: Path, tokens_per_pass: int) -> None:
    """Packed, with shared prompts, in passes: each drawn token's log-probability as computed alone; no gradient."""
    network, run = model(), config(tmp_path, temperature=0.7, tokens_per_pass=tokens_per_pass)
    samples = to_samples([episode(1.0), episode(1.0, (9, 8, 7)), episode(1.0, (4,))], PolicyConfig())
    scores = score_drawn(network, samples, run)
    for sample, found in zip(samples, scores, strict=True):
        expected = naive_logprobs(network, sample.tokens, 0.7).tolist()[sample.num_prompt - 1 :]
        assert found == pytest.approx((0.0,) * sample.num_prompt + tuple(expected), abs=1e-5)


def test_trainer_recomputes_what_an_int8_sampler_drew(tmp_path: Path) -> None:
    """The sampler's log-probabilities stay beside the trainer's, which are those of full precision."""
    network = model()
    samples, _ = rollout(tmp_path, network=network, sampler_weights="int8", importance_cap=2.0)(0)
    for sample in samples:
        own = naive_logprobs(network, sample.tokens).tolist()[sample.num_prompt - 1 :]
        assert sample.old_logprobs[sample.num_prompt :] == pytest.approx(own, abs=1e-5)
    far = max(abs(a - b) for s in samples for a, b in zip(s.old_logprobs, s.sampler_logprobs, strict=True))
    assert 1e-4 < far < 0.5


def test_int8_copy_follows_the_model(tmp_path: Path) -> None:
    """After a change of the parameters and a refresh, the copy draws as one made anew."""
    network, policy = model(), PolicyConfig(sampler_weights="int8")
    engine = make_engine(network, policy)
    before = drawn_greedily(engine)
    network.load_state_dict(model(seed=1).state_dict())
    refresh(engine, network)
    assert drawn_greedily(engine) == drawn_greedily(make_engine(model(seed=1), policy)) != before


def drawn_greedily(engine: Any) -> list[tuple[float, ...]]:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    return [output.logprobs for output in engine.generate([(5, 6, 7), (8, 9)], params)]


def test_reference_is_replaced_on_schedule(tmp_path: Path) -> None:
    """With every=2: steps 0 and 1 compare with the parameters of step 0, 2 and 3 with those of step 2, and a run that
    goes on elsewhere finds them on the disk; without a period it is always step 0's."""
    for every, expected in ((2, [0, 0, 2, 2, 4]), (0, [0] * 5)):
        network, folder = model(), tmp_path / str(every)
        folder.mkdir()
        reference, states = Reference(network, folder, every), []
        for step, made_at in enumerate(expected):
            states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
            for held in (reference, Reference(network, folder, every)):
                found = held.at(step).state_dict()
                assert all(torch.equal(found[name], tensor) for name, tensor in states[made_at].items())
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.add_(0.1)


def test_kl_is_zero_at_first_and_holds_the_policy_back(tmp_path: Path) -> None:
    """Reference log-probabilities of step 0 are the model's own; groups without a signal are compared too."""
    samples, _ = rollout(tmp_path, lambda *_: 0.0, kl_weight=0.1)(0)
    assert all(sample.teaches and not any(sample.advantages) for sample in samples)
    for sample in samples:
        assert sample.reference_logprobs == pytest.approx(sample.old_logprobs, abs=1e-5)


class Stopped(Exception):
    """Ends a run from its report."""


def test_resumed_run_with_a_reference_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """The reference of step 4 outlives a run broken off in step 6 and continued behind the checkpoint of step 5."""
    start = str(train(config(tmp_path / "start", steps=5), FIELDS))
    changes: dict[str, Any] = {"method": "grpo", "model": start, "steps": 7, "max_new_tokens": 3, "group_size": 4}
    changes |= {"kl_weight": 0.1, "reference_every": 2, "learning_rate": 1e-2, "checkpoint_every": 5}

    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 6:
            raise Stopped

    train(config(tmp_path / "whole", **changes), {}, reward=by_length)
    with pytest.raises(Stopped):
        train(config(tmp_path / "broken", **changes), {}, stop, reward=by_length)
    train(config(tmp_path / "broken", **changes), {}, resume=True, reward=by_length)
    whole, broken = (tmp_path / name / "model.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")
    assert any(line["kl"] > 0 for line in metrics_of(tmp_path / "whole"))
    kept = sorted(path.name for path in (tmp_path / "whole" / "reference").iterdir())
    assert kept == ["step-4.safetensors", "step-6.safetensors"]


@pytest.mark.parametrize(("updates", "minibatches"), [(1, 1), (1, 3), (2, 2)])
def test_minibatches_cut_the_rollout_into_whole_groups(updates: int, minibatches: int) -> None:
    """Each round sees every sample once; groups stay together; another step or round shuffles otherwise."""
    groups = [[Sample(tokens=(g, g + 10, i), weights=(0, 0, 1), num_prompt=2) for i in range(4)] for g in range(9)]
    samples = [sample for group in groups for sample in group]
    policy = PolicyConfig(updates_per_rollout=updates, minibatches=minibatches)
    found = batches(samples, policy, seed=0, step=0)
    assert len(found) == updates * minibatches
    for start in range(0, len(found), minibatches):
        seen = [sample for batch in found[start : start + minibatches] for sample in batch]
        assert sorted(seen, key=lambda sample: sample.tokens) == samples
    assert all(batch[i : i + 4] in groups for batch in found for i in range(0, len(batch), 4))
    assert found == batches(samples, policy, seed=0, step=0)
    assert minibatches == 1 or found != batches(samples, policy, seed=0, step=1)


def test_what_teaches_nothing_is_no_update() -> None:
    """A minibatch without any signal is left out, a step without one has none."""
    assert batches([Sample(tokens=(1, 2), advantages=(0.0, 0.0), num_prompt=1)], PolicyConfig(), 0, 0) == []


def test_more_minibatches_than_groups_are_refused() -> None:
    """The remedy names both numbers."""
    with pytest.raises(InputError, match="minibatches is 3; a step has 2 groups"):
        TrainConfig(method="grpo", samples_per_step=8, policy=PolicyConfig(group_size=4, minibatches=3))
    with pytest.raises(InputError, match="group_size is 1; a group compares"):
        PolicyConfig(group_size=1)


def test_answers_are_split_at_the_end_of_their_reasoning(tmp_path: Path) -> None:
    """Text in front of `</think>` is reasoning if there was a `<think>`, which may be the answer's own."""
    make_tokenizer(tmp_path)
    renderer = Renderer(tmp_path)
    for text, reasoning, content in (
        ("2", "", "2"),
        ("<think>\n1 and 1</think>\n\n2", "1 and 1", "2"),
        ("<think>never ends", "never ends", ""),
    ):
        tokens = tuple(renderer.tokenizer.encode(text))
        output = Output(request_id="", tokens=tokens, logprobs=(), finish_reason="length", num_generated=len(tokens))
        answer = read_answer(output, renderer)
        assert (answer.text, answer.reasoning, answer.content) == (text, reasoning, content)
        assert not answer.finished and answer.num_tokens == len(tokens)


def test_what_has_no_room_in_the_context_is_refused(tmp_path: Path) -> None:
    """Answers as long as the context; a problem that fills it, by its question: the longest before the first step,
    others when they are drawn."""
    start = str(train(config(tmp_path / "start", steps=1), FIELDS))
    run: dict[str, Any] = {"method": "grpo", "model": start, "steps": 1}
    with pytest.raises(InputError, match="max_new_tokens is 64; the model has max_position_embeddings 64"):
        train(config(tmp_path / "answers", **run, max_new_tokens=64), {})
    path = tmp_path / "problems.jsonl"
    questions = [f"{i}?" for i in range(40)] + ["why " * 20]
    path.write_text("".join(json.dumps({"question": q, "answer": "1"}) + "\n" for q in questions), encoding="utf-8")
    with pytest.raises(InputError, match="the problem 'why why .* has a prompt of .* max_position_embeddings 64"):
        train(config(tmp_path / "prompts", **run, task="jsonl", path=str(path), max_new_tokens=4), {})
    with pytest.raises(InputError, match="the problem 'Warum"):
        require_room("Warum?", range(64), 64)
    require_room("Warum?", range(63), 64)


def test_answers_to_an_opened_thought_begin_in_it(tmp_path: Path) -> None:
    """R1's chat format ends the prompt with `<think>`: then the answer's own is not waited for."""
    make_tokenizer(tmp_path, "R1")
    renderer = Renderer(tmp_path)
    tokens = tuple(renderer.tokenizer.encode("so</think>2"))
    output = Output(request_id="", tokens=tokens, logprobs=(), finish_reason="stop", num_generated=len(tokens))
    answer = read_answer(output, renderer)
    assert renderer.opens_reasoning and (answer.reasoning, answer.content) == ("so", "2")


def test_failing_reward_scores_zero_and_is_counted(tmp_path: Path) -> None:
    """A reward that raises or returns no number cannot end a run, and the metrics say how often it happened."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)

    def broken(problem: Problem, answer: Answer) -> float:
        raise ValueError(answer.text)

    train(config(tmp_path / "rl", method="grpo", model=str(start), steps=1, max_new_tokens=2), {}, reward=broken)
    (line,) = metrics_of(tmp_path / "rl")
    assert (line["reward_failures"], line["reward"], line["no_signal"], line["tokens"]) == (8, 0, 1, 0)


def test_reward_rises_and_trainer_agrees_with_sampler(tmp_path: Path) -> None:
    """A bandit: answers that begin with a digit earn 1. At every step the two passes give the same
    log-probabilities."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    run = config(
        tmp_path / "rl",
        method="grpo",
        model=str(start),
        steps=25,
        samples_per_step=32,
        max_new_tokens=2,
        learning_rate=2e-2,
        min_learning_rate=2e-2,
    )
    train(run, {}, reward=lambda problem, answer: float(answer.text[:1].isdigit()))
    lines = metrics_of(tmp_path / "rl")
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[:3]) / 3 < 0.4 and sum(rewards[-5:]) / 5 > 0.8
    assert all(line.get("mismatch", 0.0) < 1e-4 for line in lines)


def test_further_updates_on_a_rollout_move_on(tmp_path: Path) -> None:
    """Two updates a rollout move further than one, two minibatches elsewhere; the mismatch is the first update's."""
    start = train(config(tmp_path / "start", steps=1), FIELDS)
    finals = set()
    for number, changes in enumerate(({}, {"updates_per_rollout": 2}, {"minibatches": 2})):
        run = config(
            tmp_path / str(number),
            method="grpo",
            model=str(start),
            steps=1,
            samples_per_step=32,
            max_new_tokens=2,
            **changes,
        )
        train(run, {}, reward=lambda problem, answer: float(answer.text[:1] < "m"))
        (line,) = metrics_of(tmp_path / str(number))
        assert line["mismatch"] < 1e-4 and (line["clip_ratio/region_mean"] > 0) == (number > 0)
        finals.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(finals) == 3
