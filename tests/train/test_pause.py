from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from porcelet.train import checkpoint
from porcelet.train.loop import train
from porcelet.train.pause import Paused, Watch, watching
from tests.train.test_checkpoint import assert_same_run
from tests.train.tiny_run import FIELDS, config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_leaves_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of nowhere: the step is saved, the fact is said, handlers are as before, the run goes on equal."""
    before = signal.getsignal(number)

    def send(metrics: dict[str, float]) -> None:
        if metrics["step"] == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(
        Paused, match=rf"{number.name}: paused after step 4 of 12.*step-4 \(.* MB\).*--resume"
    ) as caught:
        train(config(tmp_path / "paused"), FIELDS, send)
    assert caught.value.exit_code == 130 and not caught.value.asked and signal.getsignal(number) == before
    assert checkpoint.newest(tmp_path / "paused") == tmp_path / "paused" / "checkpoint" / "step-4"
    train(config(tmp_path / "paused"), FIELDS, resume=True)
    train(config(tmp_path / "whole"), FIELDS)
    assert_same_run(tmp_path / "whole", tmp_path / "paused")


def test_numbers_are_the_same_however_often_time_runs_out(tmp_path: Path) -> None:
    """No time at all: each call takes one step and pauses, as asked; five calls make the run of five steps."""
    for step in (1, 2, 3, 4):
        with pytest.raises(Paused, match=f"time is over: paused after step {step} of 5") as caught:
            train(config(tmp_path / "split", steps=5), FIELDS, resume=True, minutes=0)
        assert caught.value.asked
    train(config(tmp_path / "split", steps=5), FIELDS, resume=True, minutes=0)
    train(config(tmp_path / "whole", steps=5), FIELDS)
    assert_same_run(tmp_path / "whole", tmp_path / "split")


def test_run_pauses_before_a_step_that_may_not_fit() -> None:
    """What is left must hold the longest step so far with some slack, and two saves."""
    watch = Watch(seconds=100.0, began=time.monotonic() - 50.0)
    assert not watch.reason()
    watch.stepped(30.0)
    watch.saved(2.0)
    watch.stepped(1.0)
    assert not watch.reason()
    watch.saved(10.0)
    assert "time is over" in watch.reason()
    assert not Watch(math.inf, 0.0).reason()


def test_second_signal_acts_as_ever() -> None:
    """A person who presses Ctrl-C twice does not wait for the step."""
    with pytest.raises(KeyboardInterrupt), watching(math.inf, 0.0) as watch:
        signal.raise_signal(signal.SIGINT)
        assert watch.reason() == "SIGINT"
        signal.raise_signal(signal.SIGINT)


def test_thread_that_gets_no_signals_may_train() -> None:
    """Outside the main thread only the time counts."""
    seen: list[str] = []

    def work() -> None:
        with watching(0.0, 0.0) as watch:
            seen.append(watch.reason())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["time is over"]
