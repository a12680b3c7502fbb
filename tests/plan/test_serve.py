"""Serving and training plans: what more users cost, what fits, and the published account of V3's training."""

from __future__ import annotations

import pytest

from porcelet.errors import InputError
from porcelet.plan.hardware import Fleet
from porcelet.plan.layout import Layout
from porcelet.plan.model import find_model
from porcelet.plan.serve import Traffic, options, point, satisfies, users
from porcelet.plan.training import Run, device_bytes, operations, plan_training, reached
from tests.plan.machines import device, given

V3, LITE = find_model("deepseek-v3"), find_model("deepseek-v2-lite")


def test_more_users_mean_more_tokens_and_less_speed() -> None:
    """Along every option's curve throughput rises, and speed falls."""
    for option in options(LITE, Fleet(device(), 8), Traffic()):
        for fewer, more in zip(option.curve, option.curve[1:], strict=False):
            assert more.concurrency > fewer.concurrency
            assert more.written >= fewer.written * 0.999 and more.speed <= fewer.speed * 1.001


def test_best_point_satisfies_and_hardly_more_would() -> None:
    """The busiest point keeps the promise; a twentieth more answers at once break it, or do not fit."""
    traffic, fleet = Traffic(speed=30, thinking=3), Fleet(device(), 8)
    best = options(LITE, fleet, traffic)[0]
    assert best.best is not None and satisfies(best.best, traffic)
    more = int(best.best.concurrency * 1.05) + 1
    assert more > best.max_concurrency or not satisfies(point(LITE, fleet, best.layout, traffic, more), traffic)


def test_options_are_ranked_by_what_satisfied_users_get() -> None:
    """The first option writes the most tokens at the promised speed."""
    found = options(LITE, Fleet(device(), 8), Traffic(speed=30))
    written = [option.best.written if option.best else 0.0 for option in found]
    assert written == sorted(written, reverse=True) and written[0] > 0


def test_what_does_not_fit_is_no_option() -> None:
    """671 GB do not fit on four cards of 100 GB, whatever the layout; on sixteen they do."""
    assert options(V3, Fleet(device(), 4), Traffic()) == []
    assert options(V3, Fleet(device(), 16), Traffic())


def test_cache_hits_leave_more_for_answers() -> None:
    """What is found in the cache is not computed: more is written, and the first token comes sooner."""
    fleet, layout = Fleet(device(), 1), Layout()
    cold, warm = (point(LITE, fleet, layout, Traffic(prompt=8000, hits=hits), 32) for hits in (0.0, 0.75))
    assert warm.written > cold.written and warm.first_token < cold.first_token


def test_speculation_pays_where_memory_binds() -> None:
    """With the MTP layer's guesses a lone answer is nearly 1.85 times as fast."""
    ideal = device(memory=given(1e12), network=given(1e12))
    plain, guessing = (point(V3, Fleet(ideal, 1), Layout(), Traffic(), 1, mtp=mtp).speed for mtp in (False, True))
    assert 1.0 < guessing / plain < 1.85


def test_users_follow_littles_law() -> None:
    """A hundred answers at once of 50 seconds, asked for every six minutes, are those of 720 people."""
    traffic = Traffic(turns=10, answer=400)
    best = options(LITE, Fleet(device(), 1), traffic)[0].best
    assert best is not None
    assert users(best, traffic) == pytest.approx(best.concurrency * 360 / best.latency(traffic))


@pytest.mark.parametrize("changes", [{"prompt": 0}, {"hits": 1.0}, {"hits": -0.1}, {"thinking": 0.5}, {"speed": 0}])
def test_impossible_traffic_is_refused(changes: dict[str, float]) -> None:
    """The refusal names the value."""
    (name,) = changes
    with pytest.raises(InputError, match=name):
        Traffic(**changes)  # type: ignore[arg-type]


# ---- training -------------------------------------------------------------------------------------------------------


def test_v3_reached_what_its_makers_published() -> None:
    """15,360 sequences of 4,096 tokens in 19.926 s on 2,048 H800: 385 TFLOP/s with causal attention, 432 with the full
    square (arXiv 2505.09343, table 4), within 1 %."""
    _, causal, square = reached(V3.config, Run(tokens=1), 15360 * 4096 / 19.926 / 2048)
    assert causal / 1e12 == pytest.approx(385, rel=0.01)
    assert square / 1e12 == pytest.approx(432, rel=0.01)


@pytest.mark.parametrize(("name", "tokens", "hours"), [("deepseek-v3", 14.8e12, 2664e3), ("v2", 8.1e12, 8.1 * 172.8e3)])
def test_published_training_times_lie_in_the_range(name: str, tokens: float, hours: float) -> None:
    """V3's 2,664K H800 hours and V2's 172.8K a trillion tokens are within what the planner thinks possible."""
    h800 = device(rates={"bf16": given(989.5e12), "fp8": given(1979e12)}, memory=given(80e9))
    plan = plan_training(find_model(name), Fleet(h800, 2048), Run(tokens=tokens))
    low, high = plan.device_hours.range
    assert low <= hours <= high
    assert plan.days.value == pytest.approx(plan.device_hours.value / 2048 / 24)
    assert plan.without_attention.value < plan.utilisation.value


def test_v3_trains_the_way_it_was_trained() -> None:
    """16 stages, experts over 64 cards, ZeRO-1, no tensor parallelism fit into 80 GB; one stage does not."""
    own = Layout(16, 128, 1, 64)
    assert device_bytes(V3, own, Run(tokens=1)) < 72e9 < device_bytes(V3, Layout(1, 2048, 1, 64), Run(tokens=1))
    h800 = device(memory=given(80e9))
    assert own in [layout for layout, _ in plan_training(V3, Fleet(h800, 2048), Run(tokens=1)).layouts]


def test_training_operations_are_three_forward_passes() -> None:
    """Products and pairs of a token, forward once and backward twice; the MTP layer adds one layer and one head."""
    config = LITE.config
    cost = operations(config, 1024)
    head = config.vocab_size * config.hidden_size
    multiplied = sum(map(config.num_multiplied, range(27))) + head
    assert cost.products == 6 * multiplied
    assert cost.causal == pytest.approx(3 * 27 * config.attention_flops(1) * 512.5)
    assert operations(V3.config, 4096, mtp=True).products > operations(V3.config, 4096).products
