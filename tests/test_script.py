"""How a script begins and ends: one line for what the user can solve, other systems."""

import builtins
import datetime
import importlib
import io
import os
import re
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS
from torch import distributed

from runtime import script
from runtime.arguments import Parser
from runtime.errors import UserError, first_line
from runtime.script import run_script


def status_of(error):
    """The exit status of a script whose main() raises the error."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    return end.value.code


def only_line(capsys):
    """The one line on standard error."""
    [line] = capsys.readouterr().err.splitlines()
    return line


# ---- One line ------------------------------------------------------------------------
def test_what_the_user_can_solve_is_one_line(capsys):
    assert status_of(UserError("the file a\nb is wrong", "use another")) == 1
    assert only_line(capsys) == "error: the file a b is wrong: use another"

    assert status_of(KeyboardInterrupt()) == 130
    assert only_line(capsys).startswith("error: interrupted: run the same command")

    assert status_of(OSError(28, "No space left on device", "exp.pt")) == 1
    assert only_line(capsys).startswith("error: exp.pt: No space left on device: solve")
    assert status_of(OSError("a library's own words")) == 1
    assert only_line(capsys).startswith("error: the system: a library's own words: ")


def test_full_memory_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    allocator = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    for error, reason in (
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), "CUDA out of memory"),
        (RuntimeError(allocator), allocator),
        (MemoryError(), "MemoryError"),
    ):
        assert status_of(error) == 1
        assert only_line(capsys).startswith(
            f"error: out of memory ({reason}): choose a smaller --batch-size"
        )
    with pytest.raises(RuntimeError, match="a bug"):
        status_of(RuntimeError("a bug"))
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("error", "beginning"),
    [
        (OSError(28, "No space left on device", "out.txt"), "error: out.txt: No space"),
        (BrokenPipeError(), "error: the program that read the output has ended: a"),
    ],
)
def test_standard_output_that_cannot_be_written(monkeypatch, capsys, error, beginning):
    """On a full disk, or behind `| head`. What is not written cannot be flushed."""

    class Full:
        def flush(self):
            raise error

    monkeypatch.setattr(sys, "stdout", Full())
    assert status_of(error) == 1
    sys.stdout.flush()  # as the interpreter does at its end
    assert only_line(capsys).startswith(beginning)


def test_a_terminal_that_lacks_our_signs(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run_script(lambda: print("τ: the temperature"))
    assert raw.getvalue() == b"\\u03c4: the temperature\n", "flushed, too"


# ---- Several ranks -------------------------------------------------------------------
@pytest.fixture
def rank_3_of_4(monkeypatch):
    """This process; the exit statuses with which it would have ended at once."""
    monkeypatch.setattr(script, "RANK", 3)
    monkeypatch.setattr(script, "WORLD_SIZE", 4)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back at the end
    ended = []

    def end_at_once(status):
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end_at_once)
    return ended


def test_every_rank_says_its_own_line(capsys, rank_3_of_4):
    parser = Parser("A script.")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--no-such-flag"])
    assert end.value.code == 2
    beginning = "error (rank 3): unrecognized arguments: --no-such-flag: see "
    assert only_line(capsys).startswith(beginning)

    assert status_of(UserError("a\nb", "c")) == 1
    assert only_line(capsys) == "error (rank 3): a b: c"
    assert rank_3_of_4 == [1], "the interpreter's own end would wait for other ranks"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        distributed.DistBackendError("NCCL error: remote process exited"),
    ],
    ids=["gloo", "nccl"],
)
def test_a_lost_connection_ends_in_one_line_at_once(
    monkeypatch, capsys, rank_3_of_4, error
):
    assert status_of(error) == 1
    assert rank_3_of_4 == [1]
    beginning = "error (rank 3): another rank of this job has ended ("
    assert only_line(capsys).startswith(beginning)

    monkeypatch.setattr(script, "WORLD_SIZE", 1)
    with pytest.raises(type(error)):
        status_of(error)  # of a single process, it is a bug


def test_rank_0_alone_prints_and_each_takes_leave(rank_3_of_4, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(script, "cleanup_distributed", lambda: called.append("left"))
    run_script(lambda: called.append(print("a line")))
    assert called == [None, "left"]
    assert capsys.readouterr().out == ""


# ---- Other systems -------------------------------------------------------------------
@pytest.mark.parametrize("version", [(3, 10, 9), (3, 11, 3), (3, 14, 0)])
def test_a_python_that_is_too_old_or_too_new_is_one_line(monkeypatch, version):
    """datetime.UTC, ExceptionGroup and tomllib are among what Python 3.11 brought."""
    ends = {}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        patch.setitem(sys.modules, "tomllib", None)
        patch.delattr(datetime, "UTC")
        patch.delattr(builtins, "ExceptionGroup")
        # Nothing of the project counts as imported already.
        ours = {file.stem for file in ROOT.glob("*.py")} | {"runtime"}
        for name in list(sys.modules):
            if name.partition(".")[0] in ours:
                patch.delitem(sys.modules, name)

        for name in SCRIPTS:
            with pytest.raises(SystemExit) as end:
                importlib.import_module(name)
            ends[name] = end.value.code
    with_main = {f.stem for f in ROOT.glob("*.py") if "__main__" in f.read_text()}
    assert ends.keys() == with_main
    for line in ends.values():
        assert line.startswith("error: this is Python"), line


def test_what_only_unix_has_is_not_needed():
    """Windows has no fcntl, and neither it nor macOS has os.sched_getaffinity."""
    pattern = (
        r"^import (fcntl|resource)|sched_getaffinity|os\.fork|signal\.SIG(ALRM|HUP)"
    )
    for file in [*ROOT.glob("*.py"), *ROOT.glob("runtime/*.py")]:
        text = file.read_text().replace("signal.SIG_IGN", "")
        assert not re.search(pattern, text, re.M), file.name
