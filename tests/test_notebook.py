"""The scripts as functions: in a notebook, in a thread, twice in one process."""

import os
import signal
import sys
import threading

import pytest
from records import same_results

import extract_features
import pictures
import pirl_stl_train_test
import stl10_data_load
import train_stl_after_ssl
from runtime import loop
from runtime.errors import UserError


@pytest.fixture
def arguments(tiny, monkeypatch):
    """arguments(*more) is what a notebook gives to main(): flags of a tiny run."""
    # What Jupyter's kernel was started with is not for us.
    kernel = ["ipykernel_launcher.py", "-f", "/run/user/kernel-1234.json"]
    monkeypatch.setattr(sys, "argv", kernel)

    def arguments(*more):
        return [str(part) for part in (*tiny, *more)]

    return arguments


def in_a_thread(function, *arguments):
    """What the function raises in a thread other than the main one, or None."""
    errors = []

    def work():
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def handlers():
    return [signal.getsignal(number) for number in loop.SIGNALS]


# ---- Arguments -----------------------------------------------------------------------
def test_every_script_takes_its_arguments_from_the_caller(
    arguments, raw_dir, tmp_path, capsys
):
    """And prints what it would print on a terminal."""
    data = str(tmp_path / "data")
    stl10_data_load.main(["--raw-dir", str(raw_dir), "--data-dir", data])
    run = ("--data-dir", data, "--experiment-name")
    pirl_stl_train_test.main(arguments(*run, "p"))
    train_stl_after_ssl.main(arguments(*run, "l", "--pirl-model-name", "p"))

    model = str(tmp_path / "weights/l.pt")
    out = str(tmp_path / "f.npz")
    images = f"{data}/test"
    extract_features.main(["--model", model, "--images", images, "--out", out])
    picture = str(tmp_path / "jigsaw.png")
    pictures.main(["--data-dir", data, "--out", picture, "--images", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("wrote ")]) == 5

    # The command beside the table is what it was called with.
    results = (tmp_path / "observations/l_results.md").read_text()
    assert "python train_stl_after_ssl.py --data-dir" in results
    assert "ipykernel" not in results


# ---- Threads -------------------------------------------------------------------------
@pytest.mark.parametrize("script", [pirl_stl_train_test, train_stl_after_ssl])
def test_in_a_thread_no_handler_is_installed(arguments, tmp_path, monkeypatch, script):
    """Python allows that in the main thread alone."""
    before = handlers()
    seen = []
    begin_epoch = loop.LoopControl.begin_epoch

    def noting_begin(control):
        seen.append(control.signals.handlers_before == {} and handlers() == before)
        begin_epoch(control)

    monkeypatch.setattr(loop.LoopControl, "begin_epoch", noting_begin)
    flags = ["--experiment-name", "exp"]
    if script is train_stl_after_ssl:
        flags.append("--full-fine-tune")
    assert in_a_thread(script.main, arguments(*flags)) is None
    assert seen == [True, True], "in both epochs"
    assert handlers() == before
    assert (tmp_path / "weights/exp.pt").exists()


def test_in_the_main_thread_the_handlers_are_put_back(arguments, monkeypatch):
    """A notebook's own handler of Ctrl-C is there again after a run, or an error."""
    before = handlers()
    pirl_stl_train_test.main(arguments("--experiment-name", "exp"))
    assert handlers() == before

    def fail(*arguments):
        assert handlers() != before
        raise ValueError("in the middle")

    monkeypatch.setattr(pirl_stl_train_test.PretrainingTrainer, "train_step", fail)
    with pytest.raises(ValueError, match="in the middle"):
        pirl_stl_train_test.main(arguments("--experiment-name", "other"))
    assert handlers() == before


# ---- Twice in one process ------------------------------------------------------------
def break_off(monkeypatch, which):
    """The step number `which` fails, once."""
    train_step = pirl_stl_train_test.PretrainingTrainer.train_step
    steps = []

    def failing(*arguments):
        steps.append(1)
        if len(steps) == which:
            raise ValueError("a cell's error")
        return train_step(*arguments)

    monkeypatch.setattr(pirl_stl_train_test.PretrainingTrainer, "train_step", failing)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_run_again_after_an_error(
    arguments, finished, tmp_path, monkeypatch, threaded
):
    """A notebook keeps the traceback, and with it all that the failed run held."""
    finished("whole")
    break_off(monkeypatch, which=3)
    flags = arguments("--experiment-name", "exp", "--checkpoint-minutes", 0)
    if threaded:
        kept = in_a_thread(pirl_stl_train_test.main, flags)
    else:
        with pytest.raises(ValueError, match="a cell's error") as caught:
            pirl_stl_train_test.main(flags)
        kept = caught.value
    assert str(kept) == "a cell's error"

    pirl_stl_train_test.main([*flags, "--resume"])
    assert kept.__traceback__
    assert same_results(tmp_path, "whole", "exp")


@pytest.mark.parametrize("script", [pirl_stl_train_test, train_stl_after_ssl])
def test_a_corrected_flag_needs_no_other_name(arguments, tmp_path, script):
    """What is refused before training leaves no trace under the name."""
    name = ("--experiment-name", "exp")
    with pytest.raises(UserError) as kept:
        script.main(arguments(*name, "--batch-size", 1000))
    script.main(arguments(*name))
    assert "--batch-size 1000" in str(kept.value)
    assert (tmp_path / "weights/exp.pt").exists()


def test_a_signal_ends_the_run_and_not_the_notebook(
    arguments, finished, tmp_path, monkeypatch
):
    """Jupyter's button to interrupt is a SIGINT; the next cell may resume."""
    finished("whole")
    flags = arguments("--experiment-name", "exp")

    with monkeypatch.context() as patch:
        begin_epoch = loop.LoopControl.begin_epoch

        def interrupt(control):
            os.kill(os.getpid(), signal.SIGINT)
            begin_epoch(control)

        patch.setattr(loop.LoopControl, "begin_epoch", interrupt)
        with pytest.raises(SystemExit) as end:
            pirl_stl_train_test.main(flags)
    assert end.value.code == 130

    pirl_stl_train_test.main([*flags, "--resume"])
    assert same_results(tmp_path, "whole", "exp")
