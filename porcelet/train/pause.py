"""When a run pauses before its end: a signal asks for it, or its time is nearly over. The step is always finished."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from porcelet.errors import PorceletError

SLACK = 1.25  # the next step may take this much longer than the longest so far


class Paused(PorceletError):
    """A run ended before its last step, with a checkpoint: `--resume` continues it. `asked` if its time was given."""

    exit_code = 130

    def __init__(self, message: str, *, asked: bool) -> None:
        super().__init__(message)
        self.asked = asked


@dataclass
class Watch:
    """What may ask a run to pause. `seconds` are those it may take, from `began` on (time.monotonic)."""

    seconds: float
    began: float
    signal: str = ""  # the one that came
    longest_step: float = 0.0
    longest_save: float = 1.0  # a guess until one was measured

    def reason(self) -> str:
        """Why to pause now; empty if there is no reason."""
        if self.signal:
            return self.signal
        needed = SLACK * self.longest_step + 2 * self.longest_save  # the run's end writes the model too
        if time.monotonic() - self.began + needed > self.seconds:
            return "time is over"
        return ""

    def stepped(self, seconds: float) -> None:
        self.longest_step = max(self.longest_step, seconds)

    def saved(self, seconds: float) -> None:
        self.longest_save = max(self.longest_save, seconds)


@contextmanager
def watching(seconds: float, began: float) -> Iterator[Watch]:
    """A watch that SIGINT and SIGTERM set; a second one of them acts as ever, so an impatient person is heard.

    Python hands signals to the main thread alone; in another one only the time counts.
    """
    watch = Watch(seconds, began)
    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def heard(number: int, frame: FrameType | None) -> None:
        watch.signal = signal.Signals(number).name
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, heard)
    try:
        yield watch
    finally:
        for number in numbers:
            signal.signal(number, before[number])
