"""Between two steps: the bar, the clock, checkpoints, signals, divergence."""

import os
import signal

import pytest
import torch
import tqdm.std
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
from evaluation import KNNMonitor
from runtime import bars, loop
from runtime.errors import UserError
from runtime.experiment import Experiment, TrainingState
from runtime.loop import LoopControl

PretrainingTrainer = pirl_stl_train_test.PretrainingTrainer
FineTuningTrainer = train_stl_after_ssl.FineTuningTrainer
FROM_OUTSIDE = [signal.SIGUSR1, signal.SIGHUP]
ALL_SIGNALS = [signal.SIGTERM, signal.SIGINT, *FROM_OUTSIDE]


@pytest.fixture
def clock(monkeypatch):
    """The loop's clock, which stands still unless the test moves it."""
    clock = Clock(0)
    clock.now = 5000
    monkeypatch.setattr(loop, "time", clock)
    return clock


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


@pytest.fixture
def guard():
    """Without a run's handlers, these signals would end the tests themselves."""

    def ignore(number, frame):
        pass

    before = {number: signal.signal(number, ignore) for number in FROM_OUTSIDE}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_loop(tmp_path, minutes=10.0):
    """A loop over 7 images in batches of 4 and 3. What it saves is an empty file."""
    checkpoint_file = tmp_path / "exp.ckpt"
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    return LoopControl(
        TrainingState(torch.device("cpu")),
        model,
        images_per_epoch=7,
        batch_size=4,
        save=checkpoint_file.touch,
        checkpoint_file=checkpoint_file,
        checkpoint_minutes=minutes,
        title="whole network, epoch",
        advice="lower --lr",
    )


def parts_left(tmp_path):
    """Files that were begun and not finished."""
    return [file for file in tmp_path.rglob(".*.part") if file.is_file()]


# ---- What is shown -------------------------------------------------------------------
def test_loss_and_accuracy_of_the_epoch_so_far(tmp_path, monkeypatch, capsys, clock):
    """Of 7 images in batches of 4: the last batch has 3. A new epoch starts at 0."""
    now = 0
    monkeypatch.setattr(tqdm.std, "time", lambda: now)
    control = make_loop(tmp_path)
    with control:
        control.begin_epoch()
        clock.now += 2
        control.after_step(torch.tensor([8.0, 1.0]))
        now += 100
        clock.now += 2
        control.after_step(torch.tensor([6.0, 3.0]))
        assert control.end_epoch() == pytest.approx((2, 4 / 7))
        line = capsys.readouterr().out.strip()
        assert line.startswith("whole network, epoch 1: 100%")
        assert "7/7" in line
        assert line.endswith("loss 2.000, accuracy 25.0%]"), "of the first step"

        control.state.finish_epoch({})
        control.begin_epoch()
        control.after_step(torch.tensor([2.0, 4.0]))
        control.after_step(torch.tensor([5.0, 3.0]))
        assert control.end_epoch() == pytest.approx((1, 1))


def test_a_bar_continues_where_the_run_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bars.PlainLines, "write", lambda self, text: None)
    control = make_loop(tmp_path)
    control.state.step = 1
    with control:
        control.begin_epoch()
        assert control.bar.bar.n == 4
        control.after_step(torch.zeros(2))
        assert control.bar.bar.n == 7


def test_the_columns_of_time(pretrain, tmp_path, monkeypatch, clock):
    """A step takes 2 s, validation 5 s; a break for a resume counts for nothing."""

    def make_it_last(owner, name, seconds):
        function = getattr(owner, name)

        def lasting(*arguments):
            clock.now += seconds
            return function(*arguments)

        monkeypatch.setattr(owner, name, lasting)

    make_it_last(PretrainingTrainer, "train_step", 2)
    make_it_last(pirl_stl_train_test, "validate", 5)
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 8)
        assert pretrain("exp").status == 143
    clock.now += 1000
    assert pretrain("exp", "--resume").status == 0
    for metrics in weights(tmp_path, "exp")["history"]:
        assert metrics["images_per_second"] == 7.0, "70 images in 5 steps"
        assert metrics["seconds"] == 15.0


# ---- When checkpoints are written ----------------------------------------------------
@pytest.mark.parametrize(
    ("minutes", "has_checkpoint", "last_step", "seconds", "due"),
    [
        (10, False, False, 599, False),
        (10, False, False, 600, True),
        (10, False, True, 0, True),  # the CSV is about to get a row
        (10, True, False, 599, False),
        (10, True, False, 600, True),
        (10, True, True, 59, False),
        (10, True, True, 60, True),
        (0.5, True, True, 29, False),
        (0.5, True, True, 30, True),
        (0.5, True, False, 30, True),
        (0, True, False, 0, True),
    ],
)
def test_a_checkpoint_is_due(
    tmp_path, clock, minutes, has_checkpoint, last_step, seconds, due
):
    """Every so many minutes; at an epoch's end unless the last is younger than one."""
    control = make_loop(tmp_path, minutes)
    if has_checkpoint:
        clock.now += 1000
        control.checkpoint()
    clock.now += seconds
    assert control.checkpoint_due(last_step) == due


@pytest.mark.parametrize(("minutes", "count"), [(10, 2), (0, 11)])
def test_how_many_checkpoints_a_run_writes(pretrain, saved, clock, minutes, count):
    """Of 2 epochs of 5 steps, in seconds: the first epoch's and the last, or all."""
    clock.tick = 0.1
    assert pretrain("exp", "--checkpoint-minutes", minutes).status == 0
    assert len(saved) == count


def test_a_kill_after_an_epoch_s_training_loses_nothing(
    pretrain, finished, tmp_path, monkeypatch
):
    """Once there is a row in the CSV there is a checkpoint; and before validation.

    Or the name would be taken by a run that cannot be continued.
    """
    finished("whole")
    with monkeypatch.context() as patch:
        patch.setattr(pirl_stl_train_test, "validate", interrupted)
        assert pretrain("killed").status == 130
    assert checkpoint(tmp_path, "killed")["training"]["step"] == 5

    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        assert pretrain("killed", "--resume").status == 143
    training = checkpoint(tmp_path, "killed")["training"]
    assert training["epoch"] == 2, "no step of the first epoch was made again"

    assert pretrain("killed", "--resume").status == 0
    assert same_results(tmp_path, "whole", "killed")


# ---- Signals -------------------------------------------------------------------------
@pytest.mark.parametrize("number", ALL_SIGNALS)
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, capsys, guard, number):
    """It is answered at once, saves a checkpoint, and its number is in the status."""
    before = signal.getsignal(number)
    control = make_loop(tmp_path)
    with control:
        control.begin_epoch()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # impatience
        lines = capsys.readouterr().out.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"{number.name} received: the run will stop")
        assert not control.checkpoint_file.exists()
        with pytest.raises(SystemExit) as end:
            control.after_step(torch.zeros(2))

    assert end.value.code == 128 + number
    assert control.checkpoint_file.exists()
    assert capsys.readouterr().out == (
        "stopped in epoch 1 after step 1: continue with --resume True\n"
    )
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    "error",
    [RuntimeError("reentrant call inside <_io.BufferedWriter>"), BrokenPipeError()],
    ids=["in the middle of a print", "of a reader that has ended"],
)
def test_a_signal_that_cannot_be_answered_is_noted_nevertheless(
    tmp_path, monkeypatch, error
):
    def busy(*arguments, **options):
        raise error

    control = make_loop(tmp_path)
    with control, monkeypatch.context() as patch:
        patch.setattr("builtins.print", busy)
        os.kill(os.getpid(), signal.SIGTERM)
        assert control.signals.received == signal.SIGTERM


def test_nohup_s_choice_is_left_alone(tmp_path):
    """It has SIGHUP ignored, and so shall the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        control = make_loop(tmp_path)
        with control:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            assert control.signals.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stopped_in_a_step_continues_exactly(
    pretrain, finished, tmp_path, monkeypatch, guard
):
    """Here by Slurm, which sends SIGUSR1 before a job's time is over."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGUSR1, which=7)
        outcome = pretrain("exp")
    assert outcome.status == 128 + signal.SIGUSR1
    assert outcome.err == ""
    assert "stopped in epoch 2 after step 2: continue with --resume True" in outcome.out
    assert checkpoint(tmp_path, "exp")["training"]["step"] == 2

    assert pretrain("exp", "--resume").status == 0
    assert same_results(tmp_path, "whole", "exp")


@pytest.mark.parametrize(
    ("owner", "function", "epoch"),
    [
        (pirl_stl_train_test, "validate", 1),
        (KNNMonitor, "accuracy", 2),  # the last
    ],
)
def test_a_signal_after_an_epoch_s_training(
    pretrain, finished, tmp_path, monkeypatch, owner, function, epoch
):
    """It is answered at once, and waits for the epoch's row and its checkpoint."""
    finished("whole", "--knn-every", 1)
    with monkeypatch.context() as patch:
        signal_in(patch, owner, function, signal.SIGINT, which=epoch)
        outcome = pretrain("exp", "--knn-every", 1)
    assert outcome.status == 130
    assert outcome.err == ""
    answer = outcome.out.index("SIGINT received")
    assert answer < outcome.out.index(f"epoch {epoch}/2: loss")
    assert f"stopped after epoch {epoch}: continue with --resume True" in outcome.out
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


def test_a_signal_in_the_last_step_ends_the_run_before_validation(
    pretrain, tmp_path, monkeypatch
):
    """Validation may take longer than a scheduler waits."""
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, which=5)
        patch.setattr(pirl_stl_train_test, "validate", interrupted)
        outcome = pretrain("exp")
    assert outcome.status == 143
    assert "stopped in epoch 1 after step 5" in outcome.out
    assert checkpoint(tmp_path, "exp")["training"]["step"] == 5


def test_a_signal_during_the_export(pretrain, finished, tmp_path, monkeypatch):
    """All work is done then: the files are whole, and the status is the signal's."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in(patch, pirl_stl_train_test, "export", signal.SIGINT)
        outcome = pretrain("exp")
    assert outcome.status == 130
    assert "exp.pt" in outcome.out
    assert parts_left(tmp_path) == []
    assert same_results(tmp_path, "whole", "exp")


@pytest.mark.parametrize("which", [1, 2, 5])
def test_signals_in_the_middle_of_a_file(
    pretrain, finished, tmp_path, monkeypatch, which
):
    """A short run writes five: .ckpt, CSV, CSV, .ckpt and .pt. A second comes later."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in(patch, os, "fsync", signal.SIGTERM, which)
        signal_in(patch, os, "fsync", signal.SIGTERM, which + 1)
        assert pretrain("exp").status == 143
    assert parts_left(tmp_path) == []
    training = checkpoint(tmp_path, "exp")["training"]
    assert epochs_of(training["history"]) == list(range(1, training["epoch"]))

    outcome = pretrain("exp", "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "exp")


# ---- Several ranks -------------------------------------------------------------------
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
        assert operation == loop.distributed.ReduceOp.MAX
        wishes[0] = max(wishes[0].item(), int(signal.SIGTERM))

    monkeypatch.setattr(loop, "WORLD_SIZE", 3)
    monkeypatch.setattr(loop, "RANK", rank)
    monkeypatch.setattr(loop.distributed, "all_reduce", all_reduce)
    control = make_loop(tmp_path)
    control.state.device = torch.device(device)
    control.state.step = step
    expected = (signal.SIGTERM, rank == 0) if meets else (0, False)
    assert control.agree(save_due=True, now=now) == expected


def test_gpus_meet_wherever_a_run_may_end(tmp_path, monkeypatch):
    """After an epoch's last step, the epoch and the export; not after every step."""
    met = []
    monkeypatch.setattr(loop, "WORLD_SIZE", 2)
    monkeypatch.setattr(loop.distributed, "all_reduce", lambda *wishes: met.append(1))
    control = make_loop(tmp_path)
    control.state.device = torch.device("cuda")
    with control:
        control.begin_epoch()
        control.after_step(torch.zeros(2))
        assert len(met) == 0
        control.after_step(torch.zeros(2))
        assert len(met) == 1
        control.end_epoch()
        control.state.finish_epoch({})
        control.after_epoch()
        assert len(met) == 2
        control.after_export()
        assert len(met) == 3


def test_ranks_wait_for_the_checkpoint_before_they_end(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(loop, "cleanup_distributed", lambda: events.append("left"))
    control = make_loop(tmp_path)
    control.save = lambda: events.append("saved")
    with control:
        control.begin_epoch()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            control.after_step(torch.zeros(2))
        assert events == ["saved", "left"]
        with pytest.raises(SystemExit):
            control.after_export()
    assert events == ["saved", "left", "left"]


# ---- Divergence ----------------------------------------------------------------------
def lose_a_weight(control):
    control.model[0].weight.data[0, 0] = float("nan")


def lose_a_statistic(control):
    """Training does not use it; validation and the export do."""
    control.model[1].running_var[0] = float("inf")


def lose_the_loss(control):
    control.state.totals[0] = float("inf")


@pytest.mark.parametrize("lose", [lose_a_weight, lose_a_statistic, lose_the_loss])
def test_what_is_not_finite_ends_the_run(tmp_path, lose):
    control = make_loop(tmp_path)
    control.state.epoch = 3
    control.state.step = 1
    control.check_finite()
    lose(control)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        control.checkpoint()
    assert not control.checkpoint_file.exists()

    control.checkpoint_file.touch()
    with control:
        control.begin_epoch()
        with pytest.raises(UserError) as error:
            control.end_epoch()
    assert str(error.value) == (
        "the loss is not finite in whole network, epoch 3, step 1 or before: lower "
        f"--lr (the last checkpoint, {control.checkpoint_file}, is good)"
    )


def test_divergence_is_noticed_within_an_epoch(tmp_path, clock):
    """Once a second, with the loss that is shown."""
    control = make_loop(tmp_path)
    with control:
        control.begin_epoch()
        lose_a_weight(control)
        clock.now += 2
        with pytest.raises(UserError, match="not finite"):
            control.after_step(torch.zeros(2))


@pytest.mark.parametrize(
    ("script", "trainer_class", "flags", "steps_per_epoch"),
    [
        ("pirl_stl_train_test", PretrainingTrainer, ("--loss", "nce"), 5),
        ("train_stl_after_ssl", FineTuningTrainer, ("--full-fine-tune",), 4),
    ],
)
@pytest.mark.parametrize("broken", ["loss", "statistics"])
def test_a_run_that_diverges_keeps_its_last_checkpoint(
    call,
    tiny,
    tmp_path,
    monkeypatch,
    script,
    trainer_class,
    flags,
    steps_per_epoch,
    broken,
):
    """SIGTERM asks for a checkpoint in epoch 2, in the step that went wrong."""
    train_step = trainer_class.train_step
    calls = []
    run = (*tiny, "--experiment-name", "exp", "--checkpoint-minutes", 0, *flags)
    file = tmp_path / "weights/exp.ckpt"

    def diverging(trainer, *arguments):
        calls.append(1)
        totals = train_step(trainer, *arguments)
        if len(calls) == steps_per_epoch + 3:
            calls.append(file.read_bytes())
            os.kill(os.getpid(), signal.SIGTERM)
            if broken == "loss":
                return totals * float("nan")
            trainer.model.trunk.bn1.running_mean[5] = float("nan")
        return totals

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "train_step", diverging)
        outcome = call(script, *run)
    parts = ("epoch 2, step 3 or before", "-lr, ", "--precision fp32", "exp.ckpt, is")
    assert outcome.is_one_line_error(*parts)
    assert file.read_bytes() == calls[-1]
    assert checkpoint(tmp_path, "exp")["training"]["step"] == 2
    assert not (tmp_path / "weights/exp.pt").exists()

    assert call(script, *run, "--resume").status == 0
