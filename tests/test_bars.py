"""Progress: a bar on a terminal, a plain line a minute elsewhere; work in threads."""

import io
import sys
import time

import pytest
import tqdm.std

from runtime import bars


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch, capsys):
    """An image takes a second, for three minutes and a half."""
    now = 0
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    with bars.progress_bar(500, "reading", " images", done=100) as bar:
        for _ in range(210):
            now += 1
            bar.update()

    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    lines = out.splitlines()
    assert len(lines) == 3
    for line, seen in zip(lines, ("160/500", "220/500", "280/500"), strict=True):
        assert line.startswith("reading:")
        assert seen in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bar_on_a_terminal(monkeypatch, capsys, rank):
    """Of rank 0 alone."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(bars, "RANK", rank)
    with bars.progress_bar(30, "reading", " images", mininterval=0) as bar:
        bar.update(20)

    text = terminal.getvalue()
    if rank == 0:
        assert "20/30" in text
        assert "\r" in text
    else:
        assert text == ""
    assert capsys.readouterr().out == ""


def test_results_of_threads_are_in_the_items_order(monkeypatch):
    """Whichever is ready first; and the bar counts each."""
    bar = bars.progress_bar(12, "reading", " images")

    def square(item):
        time.sleep(0.01 * (item == 0))
        return item**2

    assert bars.in_threads(square, range(12), bar) == [n**2 for n in range(12)]
    assert bar.n == 12


def test_an_error_in_a_thread_is_not_lost():
    """Whoever writes files in threads looks at no results."""

    def failing(item):
        if item == 2:
            raise OSError(28, "No space left on device", "2.png")

    bar = bars.progress_bar(4, "writing", " images")
    with pytest.raises(OSError, match="No space"):
        bars.in_threads(failing, range(4), bar)
