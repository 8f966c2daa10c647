"""A few faults of every script, with the thin trunk; and how the suite judges them.

`make faults` runs the whole suite, which takes long.
"""

import random
import signal
from functools import partial
from types import SimpleNamespace

import endurance
import faults
import pytest
from faults import (
    Fault,
    Job,
    check_end,
    full_disk,
    has_finished,
    sigint,
    sigkill,
    throw,
)

KILLED_TWICE = partial(sigkill, times=2)
PLAN = [
    Fault("SIGKILL", "pretrain", KILLED_TWICE, times=2),
    Fault("SIGKILL", "fine-tune", KILLED_TWICE, times=2),
    Fault("SIGKILL", "prepare", KILLED_TWICE, times=2),
    Fault("full disk", "pretrain", full_disk),
]


@pytest.mark.slow
def test_faults_are_survived(tmp_path):
    counts, problems = throw(PLAN, seed=0, folder=tmp_path, thin=True)
    assert not problems, "\n".join(problems)
    tried = {key: count.tried for key, count in counts.items()}
    assert tried == {(fault.name, fault.job): fault.times for fault in PLAN}


TRACEBACK = "Traceback (most recent call last):\n  …\nKeyboardInterrupt: \n"
FINISHED = "epoch 4/4: loss 1.0\nwrote weights/run.pt\n"


@pytest.mark.parametrize(
    ("number", "status", "out", "err", "is_good"),
    [
        (signal.SIGINT, 130, "epoch 1/4: …\n", "", True),
        (signal.SIGINT, 130, "epoch 1/4: …\n", "error: interrupted: …\n", True),
        (signal.SIGINT, 0, FINISHED, "", True),
        # While Python imports, or takes itself down after a finished run.
        (signal.SIGINT, 1, "", TRACEBACK, True),
        (signal.SIGINT, -signal.SIGINT, "", "", True),
        (signal.SIGINT, 1, FINISHED, TRACEBACK, True),
        (signal.SIGINT, 1, "epoch 1/4: …\n", TRACEBACK, False),
        (signal.SIGINT, -signal.SIGINT, "epoch 1/4: …\n", "", False),
        (signal.SIGTERM, 143, "epoch 1/4: …\n", "", True),
        (signal.SIGTERM, -signal.SIGTERM, "exp: PIRL\n", "", True),
        (signal.SIGTERM, -signal.SIGTERM, "epoch 1/4: loss 1.0\n", "", False),
        (signal.SIGTERM, 130, "epoch 1/4: …\n", "", False),
        (signal.SIGTERM, 1, "epoch 1/4: …\n", "error: …: …\n", False),
        (signal.SIGKILL, -signal.SIGKILL, "epoch 1/4: …\n", "", True),
        (signal.SIGKILL, 1, "epoch 1/4: …\n", "error: …: …\n", False),
    ],
)
def test_how_a_process_may_end(number, status, out, err, is_good):
    statuses = {signal.SIGINT: (130,), signal.SIGTERM: (143,), signal.SIGKILL: ()}
    process = SimpleNamespace(returncode=status)
    problems = []
    check_end(process, out, err, number, statuses[number], problems)
    assert (not problems) == is_good, problems


def test_when_a_run_has_finished():
    assert has_finished("using the raw files\nwrote data: 60 train\n")
    assert has_finished("data holds these images already: nothing to do\n")
    assert not has_finished("")
    assert not has_finished("note: nobody wrote a file\n")


class JobInterruptedAtItsEnd(Job):
    """Ctrl-C comes in the interpreter's own end, after the result was written."""

    def start(self, folder):
        return SimpleNamespace(
            returncode=1,
            poll=lambda: None,
            send_signal=lambda number: None,
            communicate=lambda timeout: (FINISHED, TRACEBACK),
        )

    def finish(self, folder, problems):
        pass


@pytest.mark.parametrize("is_same", [True, False])
def test_of_a_finished_run_the_result_counts(is_same, tmp_path):
    expected = "the result" if is_same else "another one"
    job = JobInterruptedAtItsEnd(
        "script", [], result=lambda folder: "the result", expected=expected
    )
    faults, problems = sigint(job, tmp_path, random.Random(0))
    if is_same:
        assert faults == 3
        assert problems == []
    else:
        assert faults == 1
        assert len(problems) == 1
        assert "the result is another" in problems[0]


@pytest.mark.parametrize("script", [faults, endurance])
def test_help_starts_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "start", None)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
