"""The progress bar: on a terminal, gone afterwards, one at a time, and nothing anywhere else."""

import contextlib
import io
import sys

import pytest

from fastweights.progress import bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_bar_shows_its_description_and_how_much_is_done(terminal):
    with contextlib.redirect_stderr(terminal), bar("asking") as show:
        show(3, 7)
    assert "asking" in terminal.getvalue()
    assert "3/7" in terminal.getvalue()


def test_a_bar_inside_of_a_bar_draws_nothing_and_the_next_one_draws_again(terminal):
    with contextlib.redirect_stderr(terminal):
        with bar("outer") as show, bar("inner") as silent:
            silent(1, 2)
            show(1, 5)
        with pytest.raises(KeyError), bar("failing"):
            raise KeyError
        with bar("next") as show:
            show(2, 2)
    said = terminal.getvalue()
    assert "inner" not in said
    assert all(name in said for name in ("outer", "failing", "next", "2/2"))


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_nothing_is_drawn_where_stderr_is_no_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with bar("asking") as show:
        show(3, 7)
    assert stream is None or stream.getvalue() == ""
