"""A progress bar in the terminal, for what may take a while."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

_drawing = threading.Lock()  # a terminal shows one bar: work inside of work, or in another thread, draws none


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback `(done, total)` that moves a bar on stderr; the bar is gone when the block ends.

    Nothing is drawn where stderr is not a terminal, or where another bar is being drawn.

    Example:
        with bar("asking after each event") as show:
            episode.probe(ids, at="every", progress=show)
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal or not _drawing.acquire(blocking=False):
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    finally:
        _drawing.release()
