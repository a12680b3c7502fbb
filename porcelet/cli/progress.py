"""Bars on standard error, if that is a terminal: the bytes of a model, the requests of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porcelet.types import Progress


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A function to call with (bytes done, bytes in all). The bar is on standard error, if that is a terminal, from the
    first call on; it goes when all is done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (label, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None)

    def report(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done < total:
            bar.start()
        else:
            bar.stop()

    try:
        yield report
    finally:
        bar.stop()


@contextmanager
def batch_bar(num_before: int, num_requests: int) -> Iterator[Progress]:
    """A function to call with (requests that have their result, tokens so far); `num_before` had it at the start."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=num_requests, completed=num_before, rate=0.0)

        def report(num_done: int, num_tokens: int) -> None:
            bar.update(task, completed=num_done, rate=num_tokens / (time.perf_counter() - start))

        yield report
