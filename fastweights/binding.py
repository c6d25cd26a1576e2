"""What runs on one model: in each thread its own pass, so that lives on one model never meet."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any


class _Mine(threading.local):
    """What belongs to one thread alone."""

    now: Any = None
    last: weakref.ref | None = None


class Binding:
    """Which pass runs on a model in this thread, and which life ran last.

    The model has one, and the linears that stand in for its own hold it. A copy of a model gets a new one.
    """

    def __init__(self) -> None:
        self.mine = _Mine()
        self.lock = threading.Lock()
        self.running: list[int] = []  # a thread for each pass that runs now
        self.last_of_all: weakref.ref | None = None
        self.made: weakref.ref | None = None  # the life that was made last, which may not have run
        self.watch: Any = None  # see `watch.standing`

    @property
    def now(self) -> Any:
        """The pass that runs in this thread; None outside of one."""
        return self.mine.now

    @property
    def last(self) -> Any:
        """The life that ran last in this thread, or else in any, or else was made last; None if it is gone."""
        lives = (ref() for ref in (self.mine.last, self.last_of_all, self.made) if ref is not None)
        return next((life for life in lives if life is not None), None)

    @contextlib.contextmanager
    def bound(self, now: Any, life: Any) -> Iterator[None]:
        """Runs a pass of one life: the linears see `now` in this thread, and nothing afterwards, whatever happens."""
        before, thread = self.mine.now, threading.get_ident()
        with self.lock:
            self.running.append(thread)
        try:
            self.mine.now = now
            if self.mine.last is None or self.mine.last() is not life:
                self.mine.last = weakref.ref(life)
            self.last_of_all = self.mine.last
            yield
        finally:
            self.mine.now = before
            with self.lock:
                self.running.remove(thread)

    @contextlib.contextmanager
    def changed(self, what: str) -> Iterator[None]:
        """Changes the model's modules while no pass runs on it.

        Raises:
            ValueError: a pass runs, in this thread or another; nothing has changed then.
        """
        with self.lock:
            if self.running:
                here = "this thread" if threading.get_ident() in self.running else "another thread"
                raise ValueError(f"{what} while a pass of this model runs in {here}: expected none")
            yield

    def __deepcopy__(self, memo: dict) -> Binding:
        return Binding()

    def __reduce__(self) -> tuple:
        return Binding, ()
