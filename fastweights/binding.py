"""What runs on one model: in each thread its own pass, so that lives on one model never meet."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any


class Call:
    """A `with` block, which runs for as long as its generator does: an interrupt cannot leave it standing."""

    def __init__(self, manager: Any, what: Any = None):
        self.generator, self.thread, self.what = weakref.ref(manager.gen), threading.get_ident(), what

    @property
    def runs(self) -> bool:
        generator = self.generator()
        return generator is not None and generator.gi_frame is not None


class Calls:
    """The `with` blocks of one kind that run now, in the order in which they began. It needs no lock.

    A block enters itself first and looks for others then. So of two that begin at once, at least one sees the other.
    """

    def __init__(self) -> None:
        self.entered: list[Call] = []

    def enter(self, manager: AbstractContextManager, what: Any = None) -> AbstractContextManager:
        """Enters a block, made by a function under `contextlib.contextmanager`, that is about to begin.

        what: anything that is to be found as long as it runs.
        """
        self.entered.append(Call(manager, what))
        return manager

    def running(self) -> list[Call]:
        """Those that run."""
        for call in list(self.entered):
            if not call.runs:
                with contextlib.suppress(ValueError):  # another thread has removed it
                    self.entered.remove(call)
        return list(self.entered)

    def here(self) -> int:
        """How many run in this thread."""
        thread = threading.get_ident()
        return sum(call.thread == thread for call in self.running())

    def elsewhere(self) -> bool:
        """Whether one runs in another thread that began before those of this thread."""
        running, thread = self.running(), threading.get_ident()
        return bool(running) and running[0].thread != thread


class _Mine(threading.local):
    """What belongs to one thread alone."""

    now: Any = None
    last: weakref.ref | None = None

    def __init__(self) -> None:
        self.taps, self.tapping = Calls(), Calls()


class Binding:
    """Which pass runs on a model in this thread, and which life ran last.

    The model has one, and the linears that stand in for its own hold it. A copy of a model gets a new one.
    """

    def __init__(self) -> None:
        self.mine = _Mine()
        self.passes, self.changes = Calls(), Calls()
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

    # ---- edits and captures, see `probes.taps`

    @property
    def taps(self) -> list[Call]:
        """The blocks of this thread whose edits and captures stand, in the order in which they began."""
        entered = self.mine.taps
        running = entered.running() if entered.entered else []
        rests = [number for number, call in enumerate(running) if call.what is None]
        return running[rests[-1] + 1 :] if rests else running

    def tapped(self, taps: Any) -> AbstractContextManager:
        """Lets edits and captures stand in this thread for as long as the block runs."""
        return self.mine.taps.enter(_nothing(), taps)

    @property
    def tap(self) -> Any:
        """What is to see the pass that runs in this thread; None as a rule."""
        entered = self.mine.tapping
        running = entered.running() if entered.entered else []
        return running[-1].what if running else None

    def tapping(self, tap: Any) -> AbstractContextManager:
        """Shows a tap to the modules that run inside."""
        return self.mine.tapping.enter(_nothing(), tap)

    @contextlib.contextmanager
    def untapped(self) -> Iterator[None]:
        """Runs what is inside as if no edit and no capture stood around it: what a change itself runs on the model."""
        before = self.mine.now
        try:
            self.mine.now = None
            with self.tapped(None), self.tapping(None):
                yield
        finally:
            self.mine.now = before

    # ---- passes

    def bound(self, now: Any, life: Any) -> AbstractContextManager:
        """Runs a pass of one life: the linears see `now` in this thread, and nothing afterwards, whatever happens."""
        return self.passes.enter(self._bound(now, life))

    @contextlib.contextmanager
    def _bound(self, now: Any, life: Any) -> Iterator[None]:
        before = self.mine.now if self.passes.here() > 1 else None
        while self.changes.running() and not self.changes.here():
            time.sleep(0)  # modules are being swapped: that is over at once
        try:
            self.mine.now = now
            if self.mine.last is None or self.mine.last() is not life:
                self.mine.last = weakref.ref(life)
            self.last_of_all = self.mine.last
            yield
        finally:
            self.mine.now = before

    def changed(self, what: str) -> AbstractContextManager:
        """Changes the model's modules while no pass runs on it.

        Raises:
            ValueError: a pass runs, in this thread or another; nothing has changed then.
        """
        return self.changes.enter(self._changed(what))

    @contextlib.contextmanager
    def _changed(self, what: str) -> Iterator[None]:
        if self.passes.running():
            here = "this thread" if self.passes.here() else "another thread"
            raise ValueError(f"{what} while a pass of this model runs in {here}: expected none")
        yield

    def __deepcopy__(self, memo: dict) -> Binding:
        return Binding()

    def __reduce__(self) -> tuple:
        return Binding, ()


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield
