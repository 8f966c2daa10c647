"""A run's files and locks, its settings, and how --resume continues it."""

import csv
import errno
import fcntl
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from records import (
    checkpoint,
    same,
    same_results,
    signal_in_step,
    weights,
)

import pirl_stl_train_test
from runtime import experiment as experiment_module
from runtime.errors import UserError
from runtime.experiment import CHANGEABLE, Experiment, TrainingState, settings_of

TRAINING_SCRIPTS = ["pirl_stl_train_test", "train_stl_after_ssl"]
PRETRAINING_KIND = "PIRL checkpoint"


def make_experiment(tmp_path, kind=PRETRAINING_KIND):
    args = pirl_stl_train_test.make_parser().parse_args(
        [
            *("--weights-dir", str(tmp_path / "weights")),
            *("--observations-dir", str(tmp_path / "observations")),
            *("--experiment-name", "exp"),
        ]
    )
    return args, Experiment(args, kind)


def file_contents(folder):
    return {
        file: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "lock" not in file.name
    }


# ---- How far a run has come ----------------------------------------------------------
def test_an_epoch_begins_with_nothing_of_the_last_one():
    state = TrainingState(torch.device("cpu"))
    state.step = 5
    state.seconds = 9.0
    state.totals += torch.tensor([30.0, 6.0])
    assert state.averages(12) == (2.5, 0.5)

    saved = state.state_dict()
    resumed = TrainingState(torch.device("cpu"))
    resumed.load_state_dict(saved)
    assert same(resumed.state_dict(), saved)

    state.finish_epoch({"epoch": 1})
    assert (state.epoch, state.step, state.seconds) == (2, 0, 0.0)
    assert state.totals.tolist() == [0, 0]
    assert state.history == [{"epoch": 1}]


# ---- What is written -----------------------------------------------------------------
def test_the_finished_model(tmp_path):
    """Plain values and tensors, which torch.load reads with weights_only."""
    args, experiment = make_experiment(tmp_path)
    trunk = torch.nn.Linear(2, 2)
    state = TrainingState(torch.device("cpu"))
    state.finish_epoch({"epoch": 1, "knn_acc": None})
    experiment.export(args, {"trunk": trunk}, state, classes=["ä", "b"])

    model = weights(tmp_path, "exp")
    assert model["kind"] == "PIRL weights"
    assert same(model["trunk"], dict(trunk.state_dict()))
    assert model["settings"]["weights_dir"] == str(tmp_path / "weights")
    assert model["settings"]["lr"] == 0.2
    assert model["settings"].keys() == vars(args).keys()
    assert model["history"] == [{"epoch": 1, "knn_acc": None}]
    assert model["classes"] == ["ä", "b"]
    assert torch.__version__ in model["machine"]


def test_the_table_of_epochs(tmp_path, monkeypatch):
    """A row each, in their order, all digits, and nothing for what is not known."""
    _, experiment = make_experiment(tmp_path)
    history = [
        {"epoch": n, "val_loss": 1 / 3 + n, "knn_acc": None if n % 5 else 0.1}
        for n in range(1, 13)
    ]
    experiment.write_history(history[:2])
    experiment.write_history(history)
    with open(experiment.history_file, newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "val_loss", "knn_acc"]
    assert len(rows) == 12
    for n, row in enumerate(rows, 1):
        assert row == [str(n), repr(1 / 3 + n), "" if n % 5 else "0.1"]
    assert b"\r" not in experiment.history_file.read_bytes()


def test_rank_0_alone_writes_and_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_module, "RANK", 1)
    args, experiment = make_experiment(tmp_path)
    trainer = SimpleNamespace(state_dict=dict)
    state = TrainingState(torch.device("cpu"))
    experiment.write_history([{"epoch": 1}])
    experiment.save_checkpoint(args, {}, trainer, state)
    experiment.export(args, {}, state)
    assert list(tmp_path.iterdir()) == []


# ---- Names and locks -----------------------------------------------------------------
@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_taken_name(call, tiny, tmp_path, script):
    run = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call(script, *run).status == 0
    before = file_contents(tmp_path)
    outcome = call(script, *run)
    assert outcome.is_one_line_error("exp", "--resume", "--experiment-name")

    # A run of the other script would replace its tables.
    other = next(name for name in TRAINING_SCRIPTS if name != script)
    assert call(other, *run).is_one_line_error("exp", "is taken")
    outcome = call(other, *run, "--resume")
    assert outcome.is_one_line_error("exp.ckpt is a", "not a", "--experiment-name")
    assert file_contents(tmp_path) == before


def test_a_name_whose_checkpoint_is_gone_cannot_be_continued(
    pretrain, finished, tmp_path
):
    finished("exp")
    for lost, taken in (("exp.ckpt", "exp.pt"), ("exp.pt", "exp_observations.csv")):
        (tmp_path / "weights" / lost).unlink()
        for flags in ((), ("--resume",)):
            outcome = pretrain("exp", *flags)
            parts = (f"{taken})", "exp.ckpt is gone, so choose another")
            assert outcome.is_one_line_error(*parts)


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_the_longest_name(call, tiny, tmp_path, script):
    """200 bytes, not letters, so that every file of the run has a name."""
    run = (*tiny, "--epochs", 1, "--experiment-name")
    outcome = call(script, *run, "ö" * 100)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / f"weights/{'ö' * 100}.pt").exists()
    outcome = call(script, *run, "ö" * 100 + "x")
    assert outcome.is_one_line_error("is longer than 200 bytes", status=2)


def test_one_name_is_run_by_one_process(pretrain, finished, tmp_path):
    """In each of its two folders; runs of other names are welcome."""
    finished("exp")
    assert pretrain("exp", "--resume").status == 0  # makes the files of the locks
    locks = list(tmp_path.glob("*/.exp*lock"))
    assert {path.parent.name for path in locks} == {"weights", "observations"}
    for path in locks:
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # as the other process does
            for flags in ((), ("--resume",)):
                outcome = pretrain("exp", *flags)
                folder = path.parent
                assert outcome.is_one_line_error(
                    f"another process is running exp in {folder}", "--experiment-name"
                )
            args, _ = make_experiment(tmp_path / "elsewhere")
            args.weights_dir = tmp_path / "weights"
            args.experiment_name = "exp_2"
            assert len(Experiment(args, PRETRAINING_KIND).locks) == 2
    assert pretrain("exp", "--resume").status == 0


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_worth_a_note(
    tmp_path, monkeypatch, capsys, number
):
    """As some network file systems of clusters are. In one folder, one note."""

    def flock(file, operation):
        raise OSError(number, "not here")

    monkeypatch.setattr(experiment_module.fcntl, "flock", flock)
    args, experiment = make_experiment(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for folder in (args.weights_dir, args.observations_dir):
        texts = [line for line in lines if f"file system of {folder} has no" in line]
        assert len(texts) == 1
        assert texts[0].startswith("note: ")
    assert experiment.locks == []
    assert list(tmp_path.rglob("*.*")) == []

    args.observations_dir = tmp_path / "observations/../weights"
    Experiment(args, PRETRAINING_KIND)
    assert len(capsys.readouterr().out.splitlines()) == 1


# ---- Checkpoints that do not fit -----------------------------------------------------
@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_checkpoint_whose_content_does_not_fit(call, tiny, tmp_path, script):
    flags = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call(script, *flags).status == 0
    path = tmp_path / "weights/exp.ckpt"
    good = torch.load(path, weights_only=True)

    other_trunk = dict(good["trunk"])
    other_trunk["conv1.weight"] = torch.zeros(2)
    other_training = dict(good["training"])
    other_training["totals"] = torch.zeros(3, 2)
    changes = {
        "settings": [None],
        "kind": ["something else"],
        "training": [{}, other_training],
        "trunk": [{}, other_trunk],
    }
    for key, values in changes.items():
        for value in values:
            torch.save({**good, key: value}, path)
            outcome = call(script, *flags, "--resume")
            assert outcome.is_one_line_error("exp.ckpt"), key
    for content in ([1, 2], {"epoch": 3}):
        torch.save(content, path)
        outcome = call(script, *flags, "--resume")
        assert outcome.is_one_line_error("exp.ckpt is a file of unknown kind")


# ---- The same images -----------------------------------------------------------------
FINGERPRINT = {"checksum": 1, "files": 2, "decoder": "Pillow 12 with libjpeg 3.1"}


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ({"checksum": 9}, "was made from other images: give the --data-dir"),
        ({"checksum": 9, "files": 9}, "was made from other images"),
        (
            {"checksum": 9, "files": 9, "decoder": "Pillow 11 with libjpeg 2.0"},
            "was made from other images",
        ),
        (
            {"checksum": 9, "decoder": "Pillow 11 with libjpeg 2.0"},
            "was made from these files, but Pillow 11 with libjpeg 2.0 decoded them, "
            "and Pillow 12 with libjpeg 3.1 gives other pixels: install the version",
        ),
        # The same pixels, however they came about.
        ({}, None),
        ({"files": 9, "decoder": "Pillow 11 with libjpeg 2.0"}, None),
    ],
)
def test_a_checkpoint_of_other_images_or_another_decoder(tmp_path, before, message):
    args, experiment = make_experiment(tmp_path)
    state = TrainingState(torch.device("cpu"), epoch=7)
    restored = []
    trainer = SimpleNamespace(state_dict=dict, load_state_dict=restored.append)
    experiment.save_checkpoint(args, {**FINGERPRINT, **before}, trainer, state)
    content = checkpoint(tmp_path, "exp")

    later = TrainingState(torch.device("cpu"))
    if message is None:
        experiment.restore(content, FINGERPRINT, trainer, later)
        assert later.epoch == 7
        assert restored == [content]
    else:
        with pytest.raises(UserError) as error:
            experiment.restore(content, FINGERPRINT, trainer, later)
        assert f"{experiment.checkpoint_file} {message}" in str(error.value)
        assert restored == []


def test_a_run_of_other_images_or_labels_is_not_continued(
    call, tiny, data_dir, tmp_path
):
    """The number of images is unchanged, so only the checksum differs."""
    own = shutil.copytree(data_dir, tmp_path / "own")
    run = (*tiny, "--data-dir", own, "--epochs", 1, "--experiment-name")
    assert call("train_stl_after_ssl", *run, "l").status == 0
    # The same pixels in the same order, with another label of one.
    (own / "train/1/0.png").rename(own / "train/2/0.png")
    outcome = call("train_stl_after_ssl", *run, "l", "--resume")
    assert outcome.is_one_line_error("l.ckpt was made from other images", "--data-dir")

    assert call("pirl_stl_train_test", *run, "p").status == 0
    shutil.copy(own / "unlabelled/3.png", own / "unlabelled/4.png")
    outcome = call("pirl_stl_train_test", *run, "p", "--resume")
    assert outcome.is_one_line_error("p.ckpt was made from other images")


# ---- Settings ------------------------------------------------------------------------
def restored(parser, tmp_path, before, now, changeable=CHANGEABLE, unknown=()):
    """The arguments of a run with the flags `before`, when it is resumed with `now`.

    unknown: settings that the checkpoint does not have.
    """
    folders = ["--weights-dir", str(tmp_path), "--observations-dir", str(tmp_path)]
    saved = settings_of(parser.parse_args([*folders, *before]))
    for name in unknown:
        del saved[name]
    argv = [*folders, "--resume", *now]
    args = parser.parse_args(argv)
    experiment = Experiment(args, PRETRAINING_KIND)
    content = {"settings": {**saved, "no_such_flag": 1}}
    return experiment.restore_settings(parser, argv, args, content, changeable)


@pytest.fixture
def parser():
    return pirl_stl_train_test.make_parser()


def test_a_flag_that_is_left_out_keeps_its_value(parser, tmp_path, capsys):
    before = ["--lr", "0.3", "--only-train", "--loss", "nce", "--count-negatives", "9"]
    args = restored(parser, tmp_path, before, ["--lr", "0.30"])
    assert args.lr == 0.3
    assert args.only_train is True
    assert args.loss == "nce"
    assert args.count_negatives == 9
    assert args.epochs == 100, "the default, then as now"
    assert args.resume is True
    assert not hasattr(args, "no_such_flag")
    assert capsys.readouterr().out.splitlines() == [
        f"continuing from {tmp_path / 'e1_pirl_.ckpt'}"
    ]


def test_flags_that_differ_are_refused_by_name(parser, tmp_path):
    """Also where the default is given: that is no reason to take it for left out."""
    before = ["--beta", "0.3"]
    now = ["--lr", "0.1", "--only-train", "--loss", "modified-nce", "--beta", "0.5"]
    with pytest.raises(UserError, match="was made with other settings") as error:
        restored(parser, tmp_path, before, now)
    line = str(error.value)
    assert "--lr was 0.2, is 0.1" in line
    assert "--only-train was False, is True" in line
    assert "--beta was 0.3, is 0.5" in line
    assert "--loss" not in line
    assert line.endswith(": leave the flags out, or choose another --experiment-name")


def test_a_flag_that_the_checkpoint_does_not_know_has_its_default(parser, tmp_path):
    """Older versions did what the default does, so it cannot be changed."""
    for now in ([], ["--beta", "0.5"]):
        assert restored(parser, tmp_path, [], now, unknown=["beta"]).beta == 0.5
    with pytest.raises(UserError, match=r"\(--beta was 0.5, is 0.4\)"):
        restored(parser, tmp_path, [], ["--beta", "0.4"], unknown=["beta"])


# What the two tests below say of each flag of pretraining; all others are refused.
PLACES = {"data_dir", "weights_dir", "observations_dir", "experiment_name", "device"}
PLACES |= {"images_on", "resume"}
MAY_CHANGE = {"epochs", "knn_every", "tensorboard", "compile", "cuda_graph"}
MAY_CHANGE |= {"tmax_for_cos_decay", "checkpoint_minutes", "precision"}


def another_value(action):
    """Another one than the flag's default, as a text."""
    if action.choices:
        return next(value for value in action.choices if value != action.default)
    if action.nargs == "?":
        return str(not action.default)
    return "0.7" if isinstance(action.default, float) else "70"


def test_a_changed_flag_is_a_note_or_refused(parser, tmp_path, capsys):
    changeable = CHANGEABLE | pirl_stl_train_test.CHANGEABLE_HERE
    for action in parser._actions[1:]:
        flag = action.option_strings[-1]
        now = [flag, another_value(action)]
        if action.dest in MAY_CHANGE:
            args = restored(parser, tmp_path, [], now, changeable)
            assert str(getattr(args, action.dest)) in now[1]
            assert f"note: {flag} was " in capsys.readouterr().out
        elif action.dest == "pirl_model_name":
            args = restored(parser, tmp_path, [], now, changeable)
            assert args.pirl_model_name is None
            assert f"note: {flag} is not read" in capsys.readouterr().out
        elif action.dest not in PLACES:
            with pytest.raises(UserError, match=f"{flag} was "):
                restored(parser, tmp_path, [], now, changeable)


def test_folders_and_devices_are_those_of_the_place(parser, tmp_path, capsys):
    """They are never restored, and never refused."""
    before = ["--data-dir", "/old", "--device", "cpu", "--images-on", "device"]
    args = restored(parser, tmp_path, before, [])
    assert str(args.data_dir) == "stl10_data"
    assert args.device == "auto"
    assert args.images_on == "auto"
    now = ["--data-dir", "/new", "--device", "cpu", "--images-on", "host"]
    args = restored(parser, tmp_path, before, now)
    assert str(args.data_dir) == "/new"
    assert args.images_on == "host"
    assert "note" not in capsys.readouterr().out


# ---- Whole runs that are continued ---------------------------------------------------
def test_a_copied_checkpoint_continues_under_its_new_name(
    pretrain, finished, tmp_path, monkeypatch
):
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert pretrain("old").status == 143
    before = file_contents(tmp_path)
    shutil.copy(tmp_path / "weights/old.ckpt", tmp_path / "weights/new.ckpt")

    outcome = pretrain("new", "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "new")
    assert weights(tmp_path, "new")["settings"]["experiment_name"] == "new"
    after = file_contents(tmp_path)
    assert {file: after[file] for file in before} == before


def test_the_file_of_weights_is_not_read_again(
    pretrain, finished, tmp_path, monkeypatch
):
    """It may be gone, or be another one by now. The name is that of the checkpoint."""
    finished("start")
    file = shutil.move(tmp_path / "weights/start.pt", tmp_path / "moved.pt")
    assert pretrain("whole", "--pirl-model-name", file).status == 0

    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 6)
        assert pretrain("exp", "--pirl-model-name", file).status == 143
    file.unlink()
    outcome = pretrain("exp", "--pirl-model-name", "gone", "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "exp")
    assert weights(tmp_path, "exp")["settings"]["pirl_model_name"] == str(file)


def test_the_optimizer_s_settings_are_the_flags_and_not_the_checkpoint_s(
    pretrain, finished, tmp_path, monkeypatch
):
    """load_state_dict() would bring them back; its momentum must come back."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert pretrain("exp").status == 143
    content = checkpoint(tmp_path, "exp")
    content["optimizer"]["param_groups"][0]["momentum"] = 0.1
    content["optimizer"]["param_groups"][0]["weight_decay"] = 0.1
    torch.save(content, tmp_path / "weights/exp.ckpt")
    assert pretrain("exp", "--resume").status == 0
    assert same_results(tmp_path, "whole", "exp")
