from __future__ import annotations

import re

import pytest

from porcelet.train.estimate import Estimate
from porcelet.train.plots import MAX_POINTS, draw_curves, draw_stages, smoothed, window_of

matplotlib = pytest.importorskip("matplotlib")

NOISY = [(i, float(i % 7)) for i in range(1, 201)]


def test_running_mean_is_that_of_the_last_points() -> None:
    """Fewer at the beginning; a short run is not smoothed, and a constant has no digits that it had not before."""
    mean = smoothed(NOISY)
    assert window_of(200) == 10 and [step for step, _ in mean] == list(range(1, 201))
    assert mean[2][1] == pytest.approx((1 + 2 + 3) / 3)
    assert mean[-1][1] == pytest.approx(sum(i % 7 for i in range(191, 201)) / 10)
    flat = [(i, 1e-4) for i in range(500)]
    assert ">1.00</text>" in draw_curves([flat], [smoothed(flat)], "", "constant")
    assert smoothed(NOISY[:19]) == NOISY[:19]


def test_plot_takes_the_colours_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is its own, so it can be read on light and dark; whatever style is set, the bytes are the same."""
    drawn = draw_curves([NOISY, NOISY], [smoothed(NOISY), NOISY], "two lines", "name")
    assert "var(--one)" in drawn and "var(--two)" in drawn and "currentColor" in drawn
    assert not re.search(r"(?:stroke|fill): #", drawn) and "font-family" not in drawn
    assert "stroke-dasharray" in drawn  # the second line, for those who see no colours
    monkeypatch.setitem(matplotlib.rcParams, "lines.linestyle", ":")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert draw_curves([NOISY, NOISY], [smoothed(NOISY), NOISY], "two lines", "name") == drawn


def test_long_run_is_thinned_to_its_last_point() -> None:
    """The line of a run of a hundred times the steps takes no more room."""
    long = [(i, float(i * 7919 % 101)) for i in range(1, 100 * MAX_POINTS + 1)]
    assert len(draw_curves([long], [long], "", "long")) < 60 * MAX_POINTS
    only_last = [*((i, 0.0) for i in range(1, 5000)), (5000, 9.0)]
    flat = [(i, 0.0) for i in range(1, 5001)]
    assert draw_curves([only_last], [only_last], "", "a") != draw_curves([flat], [flat], "", "a")


def test_stages_have_bars_where_they_were_measured() -> None:
    """One without a number leaves a gap, a single stage is a point, and a name is no formula."""
    found = Estimate(0.5, 0.4, 0.7)
    drawn = draw_stages(["a", "$b_1$", "c", "d"], [[found, None, found, found]], "said <so>", "name")
    assert 'aria-label="said &lt;so&gt;"' in drawn and ">$b_1$</text>" in drawn and "rotate(-25" in drawn
    assert "<svg" in draw_stages(["a"], [[found]], "", "name")
