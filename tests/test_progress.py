"""Between two steps: plain lines, checkpoints, signals, a loss that is not finite."""

import io
import os
import signal
import sys
import time
import types

import pytest
import torch
from conftest import start
from records import (
    TRAINED,
    Clock,
    checkpoint,
    epochs_of,
    interrupted,
    parts_of,
    same,
    same_results,
    signal_in,
    signal_in_step,
    table,
    weights,
)

import pirl_stl_train_test
import train_stl_after_ssl
from runtime import bars, ranks
from runtime.experiment import Experiment, TrainingState
from runtime.loop import LoopControl


@pytest.fixture
def saved(monkeypatch):
    """A list that gets the run's name for each checkpoint that is written."""
    saved = []
    save_checkpoint = Experiment.save_checkpoint

    def noting_save(experiment, *arguments):
        saved.append(experiment.name)
        save_checkpoint(experiment, *arguments)

    monkeypatch.setattr(Experiment, "save_checkpoint", noting_save)
    return saved


def make_loop(tmp_path, minutes=10):
    """A loop over 2 steps per epoch of a tiny model; its save() does nothing."""
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(batch_size=4, checkpoint_minutes=minutes),
        device=torch.device("cpu"),
        model=torch.nn.Linear(1, 1),
        train_count=7,
    )
    experiment = types.SimpleNamespace(checkpoint_file=tmp_path / "exp.ckpt")
    state = TrainingState(torch.device("cpu"))

    def save():
        pass

    return LoopControl(trainer, state, experiment, save, "epoch", "lower --lr")


def parts_left(tmp_path):
    """Files that were begun and not finished."""
    return [file for file in tmp_path.rglob("*.part") if file.is_file()]


# ---- What is shown -------------------------------------------------------------------
def test_a_line_a_minute_where_there_is_no_terminal(pretrain, monkeypatch):
    tqdm = progress.tqdm

    def hurried(*arguments, **options):
        assert options["mininterval"] == 60
        assert options["delay"] == 60
        options.update(mininterval=0, delay=0, miniters=1)
        return tqdm(*arguments, **options)

    monkeypatch.setattr(progress, "tqdm", hurried)
    monkeypatch.setattr(progress, "time", Clock(1))
    outcome = pretrain("exp")

    assert outcome.err == ""
    lines = outcome.out.splitlines()
    bar_lines = [line for line in lines if line.startswith("epoch 1:")]
    assert len(bar_lines) >= 5
    assert "images" in bar_lines[-1]
    assert "loss" in bar_lines[-1]
    assert len([line for line in lines if line.startswith("epoch 1/2: loss")]) == 1
    assert "\r" not in outcome.out


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bars.progress_bar(3, "reading", " images", mininterval=0) as bar:
        bar.update(2)

    assert "2/3" in terminal.getvalue()
    assert "\r" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_an_error_in_a_thread_is_not_lost():
    """Whoever writes files in threads looks at no results."""

    def failing(item):
        if item == 2:
            raise OSError(28, "No space left on device", "2.png")

    with pytest.raises(OSError, match="No space"):
        bars.in_threads(failing, range(4), "writing")


def test_totals_and_averages(tmp_path):
    """Of 7 images in batches of 4: the last batch has 3."""
    loop = make_loop(tmp_path)
    with loop:
        loop.begin_epoch()
        loop.after_step(torch.tensor([8.0, 1.0]))
        assert loop.images_seen() == 4
        loop.after_step(torch.tensor([6.0, 3.0]))
        assert loop.images_seen() == 7
        loss, accuracy = loop.end_epoch()

    assert loss == pytest.approx(2)
    assert accuracy == pytest.approx(4 / 7)


# ---- When checkpoints are written ----------------------------------------------------
@pytest.mark.parametrize(
    ("minutes", "tick", "count"), [(10, 1, 2), (10, 20, 3), (0, 1, 11), (1.5, 100, 11)]
)
def test_when_checkpoints_are_written(
    pretrain, saved, monkeypatch, minutes, tick, count
):
    """Every so many minutes; at an epoch's end unless the last is younger than one.

    And at the end of the run.
    """
    monkeypatch.setattr(progress, "time", Clock(tick))
    assert pretrain("exp", "--checkpoint-minutes", minutes).status == 0
    assert len(saved) == count


@pytest.mark.parametrize(
    ("has_checkpoint", "last_step", "seconds", "due"),
    [
        (False, False, 599, False),
        (False, False, 600, True),
        (False, True, 0, True),  # the CSV is about to get a row
        (True, False, 599, False),
        (True, False, 600, True),
        (True, True, 59, False),
        (True, True, 60, True),
    ],
)
def test_checkpoint_due(tmp_path, monkeypatch, has_checkpoint, last_step, seconds, due):
    clock = Clock(0)
    monkeypatch.setattr(progress, "time", clock)
    loop = make_loop(tmp_path, minutes=10)
    if has_checkpoint:
        loop.experiment.checkpoint_file.touch()
    clock.now = seconds
    assert loop.checkpoint_due(last_step) == due


def test_minutes_below_one_count_at_an_epochs_end_too(tmp_path, monkeypatch):
    clock = Clock(0)
    monkeypatch.setattr(progress, "time", clock)
    loop = make_loop(tmp_path, minutes=0.5)
    loop.experiment.checkpoint_file.touch()
    clock.now = 29
    assert not loop.checkpoint_due(last_step=True)
    clock.now = 30
    assert loop.checkpoint_due(last_step=True)


def test_an_epoch_s_clock_goes_on_after_a_break_and_starts_over(tmp_path, monkeypatch):
    clock = Clock(0)
    monkeypatch.setattr(progress, "time", clock)
    loop = make_loop(tmp_path)
    with loop:
        loop.begin_epoch()
        clock.now = 30
        loop.after_step(torch.zeros(2))
    saved = loop.state.state_dict()

    clock.now = 1000  # the break does not count
    loop = make_loop(tmp_path)
    loop.state.load_state_dict(saved)
    with loop:
        loop.begin_epoch()
        clock.now = 1012
        loop.after_step(torch.zeros(2))
        loop.end_epoch()
        assert loop.state.seconds == 42
        clock.now = 1020  # validation does
        assert loop.epoch_seconds() == 50

        loop.state.finish_epoch({})
        loop.begin_epoch()
        clock.now = 1025
        assert loop.epoch_seconds() == 5


def test_the_columns_of_time(pretrain, tmp_path, monkeypatch):
    """A step takes 2 s, validation 5 s; a break for a resume counts for nothing."""
    clock = Clock(0)
    monkeypatch.setattr(progress, "time", clock)

    def make_it_last(owner, name, seconds):
        function = getattr(owner, name)

        def lasting(*arguments):
            clock.now += seconds
            return function(*arguments)

        monkeypatch.setattr(owner, name, lasting)

    make_it_last(pirl_stl_train_test.PretrainingTrainer, "train_step", 2)
    make_it_last(pirl_stl_train_test, "validate", 5)
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 8)
        assert pretrain("exp").status == 143
    clock.now += 1000
    assert pretrain("exp", "--resume").status == 0
    for metrics in weights(tmp_path, "exp")["history"]:
        assert metrics["images_per_second"] == 7.0, "70 images in 5 steps"
        assert metrics["seconds"] == 15.0


@pytest.mark.parametrize("function", ["validate", "monitor_accuracy"])
def test_a_kill_after_an_epoch_s_training_loses_nothing(
    pretrain, finished, tmp_path, monkeypatch, saved, function
):
    """The checkpoint is written before validation and kNN. A look takes 20 s."""
    finished("whole", "--knn-every", 1)
    saved.clear()

    with monkeypatch.context() as patch:
        patch.setattr(progress, "time", Clock(20))
        patch.setattr(pirl_stl_train_test, function, interrupted)
        assert pretrain("killed", "--knn-every", 1).status == 130
    assert len(saved) == 1, "ten minutes have not passed within the epoch"
    assert checkpoint(tmp_path, "killed")["training"]["step"] == 5

    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        assert pretrain("killed", "--knn-every", 1, "--resume").status == 143
    training = checkpoint(tmp_path, "killed")["training"]
    assert training["epoch"] == 2, "no step of the first epoch was made again"

    assert pretrain("killed", "--knn-every", 1, "--resume").status == 0
    assert same_results(tmp_path, "whole", "killed")


def test_a_kill_within_the_first_minute(pretrain, finished, tmp_path, monkeypatch):
    """Once there is a row in the CSV there is a checkpoint.

    Or the name would be taken by a run that cannot go on.
    """
    finished("whole")
    with monkeypatch.context() as patch:
        patch.setattr(pirl_stl_train_test, "log_epoch", interrupted)
        assert pretrain("killed").status == 130

    outcome = pretrain("killed", "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "killed")


# ---- Signals -------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_the_block_does_nothing_by_itself(tmp_path, number):
    before = signal.getsignal(number)
    loop = make_loop(tmp_path)
    with loop:
        os.kill(os.getpid(), number)
        assert loop.signal == number
        assert loop.agree(save_due=False, now=False) == (number, False)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("device", "step", "now", "meets"),
    [
        ("cpu", 3, False, True),
        ("cuda", 3, False, False),
        ("cuda", 3, True, True),
        ("cuda", 32, False, True),
    ],
)
def test_ranks_decide_together(tmp_path, monkeypatch, rank, device, step, now, meets):
    """A third one has got SIGTERM; of checkpoints, rank 0 alone decides."""

    def all_reduce(wishes, operation):
        assert operation == progress.distributed.ReduceOp.MAX
        wishes[0] = max(wishes[0].item(), int(signal.SIGTERM))

    monkeypatch.setattr(ranks, "WORLD_SIZE", 3)
    monkeypatch.setattr(ranks, "RANK", rank)
    monkeypatch.setattr(progress.distributed, "all_reduce", all_reduce)
    loop = make_loop(tmp_path)
    loop.trainer.device = torch.device(device)
    loop.state.step = step
    expected = (signal.SIGTERM, rank == 0) if meets else (0, False)
    assert loop.agree(save_due=True, now=now) == expected


def test_ranks_wait_for_the_checkpoint_before_they_end(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(progress, "leave_ranks", lambda: events.append("left"))
    loop = make_loop(tmp_path)
    loop.save = lambda: events.append("saved")
    with loop:
        loop.begin_epoch()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            loop.after_step(torch.zeros(2))
        assert events == ["saved", "left"]
        with pytest.raises(SystemExit):
            loop.after_export()
    assert events == ["saved", "left", "left"]


@pytest.mark.parametrize("function", ["validate", "monitor_accuracy", "log_epoch"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_after_an_epoch_s_training(
    pretrain, finished, tmp_path, monkeypatch, function, epoch
):
    """It waits until the epoch is in the CSV and the checkpoint. 2 is the last."""
    number = signal.SIGTERM if epoch == 1 else signal.SIGINT
    finished("whole", "--knn-every", 1)

    with monkeypatch.context() as patch:
        signal_in(patch, pirl_stl_train_test, function, number, which=epoch)
        outcome = pretrain("exp", "--knn-every", 1)
    assert outcome.status == 128 + number
    assert outcome.err == ""
    assert "--resume True goes on from here" in outcome.out
    assert parts_left(tmp_path) == []
    assert table(tmp_path, "exp") == table(tmp_path, "whole")[:epoch]
    training = checkpoint(tmp_path, "exp")["training"]
    assert training["epoch"] == epoch + 1
    assert training["step"] == 0
    assert epochs_of(training["history"]) == list(range(1, epoch + 1))

    outcome = pretrain("exp", "--knn-every", 1, "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "exp")
    whole = parts_of(checkpoint(tmp_path, "whole"), TRAINED)
    resumed = parts_of(checkpoint(tmp_path, "exp"), TRAINED)
    assert same(whole, resumed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_export(pretrain, finished, tmp_path, monkeypatch, number):
    """All work is done then: the files are whole, and the status is the signal's."""
    finished("whole")

    with monkeypatch.context() as patch:
        signal_in(patch, pirl_stl_train_test, "export", number)
        outcome = pretrain("exp")
    assert outcome.status == 128 + number
    assert "exp.pt" in outcome.out
    assert parts_left(tmp_path) == []
    assert same_results(tmp_path, "whole", "exp")

    outcome = pretrain("exp", "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "exp")


def test_a_signal_in_the_middle_of_a_file(pretrain, finished, tmp_path, monkeypatch):
    """A short run writes five: .ckpt, CSV, CSV, .ckpt and .pt."""
    finished("whole")

    for which in range(1, 6):
        name = f"exp_{which}"
        with monkeypatch.context() as patch:
            signal_in(patch, checkpoints.os, "fsync", signal.SIGTERM, which)
            outcome = pretrain(name)
        assert outcome.status == 143, which
        assert parts_left(tmp_path) == []
        training = checkpoint(tmp_path, name)["training"]
        assert epochs_of(training["history"]) == list(range(1, training["epoch"]))

        outcome = pretrain(name, "--resume")
        assert outcome.status == 0, outcome.err
        assert same_results(tmp_path, "whole", name), which


def test_a_second_signal_does_not_break_what_the_first_one_waits_for(
    pretrain, finished, tmp_path, monkeypatch
):
    """Ctrl-C, and again a moment later, while validation and the CSV are under way."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in(patch, pirl_stl_train_test, "validate", signal.SIGINT)
        signal_in(patch, checkpoints.os, "fsync", signal.SIGINT, which=2)
        assert pretrain("exp").status == 130

    assert parts_left(tmp_path) == []
    assert epochs_of(table(tmp_path, "exp")) == ["1"]
    assert pretrain("exp", "--resume").status == 0
    assert same_results(tmp_path, "whole", "exp")


def signal_in_validation(patch):
    signal_in(patch, train_stl_after_ssl.FineTuningTrainer, "validate", signal.SIGTERM)


def signal_in_results(patch):
    signal_in(patch, train_stl_after_ssl, "write_results", signal.SIGTERM)


@pytest.mark.parametrize("disturb", [signal_in_validation, signal_in_results])
def test_fine_tuning_keeps_a_signal_until_it_can_be_left(
    call, tiny, tmp_path, monkeypatch, disturb
):
    script = "train_stl_after_ssl"
    flags = (*tiny, "--full-fine-tune", "--experiment-name")
    assert call(script, *flags, "whole").status == 0

    with monkeypatch.context() as patch:
        disturb(patch)
        outcome = call(script, *flags, "exp")
    assert outcome.status == 143
    assert outcome.err == ""
    assert parts_left(tmp_path) == []

    outcome = call(script, *flags, "exp", "--resume")
    assert outcome.status == 0, outcome.err
    names = ("trunk", "softmax_layer", "results")
    whole = parts_of(weights(tmp_path, "whole"), names)
    resumed = parts_of(weights(tmp_path, "exp"), names)
    assert same(whole, resumed)
    assert table(tmp_path, "whole") == table(tmp_path, "exp")


# ---- A loss that is not finite -------------------------------------------------------
def test_a_diverged_run_keeps_its_last_checkpoint(pretrain, tmp_path, monkeypatch):
    """SIGTERM asks for a checkpoint in epoch 2, right after a step that went wrong."""
    PretrainingTrainer = pirl_stl_train_test.PretrainingTrainer  # noqa: N806
    train_step = PretrainingTrainer.train_step
    checkpoints_before = []

    def diverging(trainer, index, uniforms, epoch, step):
        totals = train_step(trainer, index, uniforms, epoch, step)
        if epoch == 2 and step == 2:
            file = tmp_path / "weights/exp.ckpt"
            checkpoints_before.append(file.read_bytes())
            totals = totals * float("nan")
            os.kill(os.getpid(), signal.SIGTERM)
        return totals

    monkeypatch.setattr(PretrainingTrainer, "train_step", diverging)
    outcome = pretrain("exp")

    place = "the loss is not finite in epoch 2, step 3 or before"
    assert outcome.is_one_line_error(place, "lower --lr", "exp.ckpt, is good")
    assert [(tmp_path / "weights/exp.ckpt").read_bytes()] == checkpoints_before
    assert not (tmp_path / "weights/exp.pt").exists()


def test_divergence_is_noticed_at_the_end_of_an_epoch_at_the_latest(
    pretrain, tmp_path, monkeypatch
):
    train_step = pirl_stl_train_test.PretrainingTrainer.train_step

    def diverging(trainer, *arguments):
        totals = train_step(trainer, *arguments)
        with torch.no_grad():
            trainer.model.trunk.conv1.weight[0, 0, 0, 0] = float("inf")
        return totals

    monkeypatch.setattr(pirl_stl_train_test.PretrainingTrainer, "train_step", diverging)
    outcome = pretrain("exp")

    assert outcome.is_one_line_error("in epoch 1, step", "there is no checkpoint yet")
    assert list((tmp_path / "weights").glob("exp*")) == []
    assert list((tmp_path / "observations").glob("exp*")) == []


# ---- Signals of schedulers and lost connections --------------------------------------
FROM_OUTSIDE = [signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture
def guard():
    """Without a run's handlers, these signals would end the tests themselves."""

    def ignore(number, frame):
        pass

    before = {number: signal.signal(number, ignore) for number in FROM_OUTSIDE}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", FROM_OUTSIDE)
def test_slurm_s_and_a_lost_connection_s_signal_save_a_checkpoint(
    pretrain, finished, tmp_path, monkeypatch, guard, number
):
    """Between steps, as SIGTERM does; the run goes on as if there had been none."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, number, which=7)
        outcome = pretrain("exp")
    assert outcome.status == 128 + number
    assert outcome.err == ""
    assert "stopped in epoch 2 after step 2: --resume True" in outcome.out
    assert checkpoint(tmp_path, "exp")["training"]["step"] == 2

    assert pretrain("exp", "--resume").status == 0
    assert same_results(tmp_path, "whole", "exp")


@pytest.mark.parametrize("number", FROM_OUTSIDE)
def test_fine_tuning_saves_a_checkpoint_too(
    call, tiny, tmp_path, monkeypatch, guard, number
):
    step = ("train_step", number, 2)
    with monkeypatch.context() as patch:
        signal_in(patch, train_stl_after_ssl.FineTuningTrainer, *step)
        flags = (*tiny, "--full-fine-tune", "--experiment-name", "exp")
        outcome = call("train_stl_after_ssl", *flags)
    assert outcome.status == 128 + number
    assert outcome.err == ""
    assert checkpoint(tmp_path, "exp")["training"]["step"] == 2


def test_nohup_s_choice_is_left_alone(tmp_path):
    """It has SIGHUP ignored, and so shall the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        loop = make_loop(tmp_path)
        with loop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert loop.signal == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert loop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- Processes -----------------------------------------------------------------------
@pytest.fixture
def endless(tiny, tmp_path):
    """endless(**options) is a process in a training of many epochs, past a step."""
    processes = []

    def endless(**options):
        run = ("--epochs", 500, "--knn-every", 0, "--experiment-name", "exp")
        flags = (*tiny, *run, "--checkpoint-minutes", 0)
        process = start("tests/thin_script", "pirl_stl_train_test", *flags, **options)
        processes.append(process)
        deadline = time.monotonic() + 60
        while not (tmp_path / "weights/exp.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    yield endless
    for process in processes:
        process.kill()
        process.wait()


def test_ctrl_c_where_the_reader_has_ended_too(endless, pretrain, tmp_path):
    """As with `| tee`: the last line is true, and the checkpoint is there."""
    process = endless()
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(60) != 0
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: the program that read the output has ended")
    assert "goes on from its last checkpoint with --resume True" in err
    assert "Broken pipe" not in err

    # It does go on: an epoch that is over already ends the run.
    training = checkpoint(tmp_path, "exp")["training"]
    flags = ("--epochs", training["epoch"], "--knn-every", 0, "--resume")
    outcome = pretrain("exp", *flags, "--checkpoint-minutes", 0)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_nohup(endless):
    """The connection is lost, and the run goes on until SIGTERM."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = endless(preexec_fn=ignore)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "stopped in epoch" in out
