"""Files that are whole or not there, names and locks, and going on with a run."""

import csv
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import start

import pirl_stl_train_test
import train_stl_after_ssl
from runtime.errors import UserError
from runtime.experiment import CHANGEABLE, Experiment, settings_of
from runtime.files import atomic_save, atomic_write, explain_mismatch, read_torch_file
from runtime.weights import load_weights, read_weights

TRAINING_SCRIPTS = ["pirl_stl_train_test", "train_stl_after_ssl"]
# A run that another test, or a signal, ends.
LONG = ("--epochs", 500, "--experiment-name", "exp", "--checkpoint-minutes", 0)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- Atomic files --------------------------------------------------------------------
def names_in(folder):
    return [file.name for file in folder.iterdir()]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/table.csv"
    with atomic_write(path, "w") as file:
        file.write("first")
        assert not path.exists()
    assert path.read_text() == "first"

    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_write(path, "w") as file:  # noqa: PT012
            file.write("second")
            file.flush()
            raise error
        assert path.read_text() == "first"
        assert names_in(path.parent) == ["table.csv"]

    with atomic_write(path) as file:
        file.write(b"third")
    assert path.read_bytes() == b"third"
    assert names_in(path.parent) == ["table.csv"]


def test_a_table_may_hold_any_file_name(tmp_path):
    """Linux allows any bytes in it."""
    path = tmp_path / "table.csv"
    with atomic_write(path, "w") as file:
        file.write(os.fsdecode(b"caf\xe9.jpg") + ", größe\r\n")
    assert path.read_bytes() == b"caf\xe9.jpg, gr\xc3\xb6\xc3\x9fe\r\n"


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "exp.ckpt"
    with pytest.raises(OSError, match="No space") as error, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path)
    assert names_in(tmp_path) == []


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "exp.ckpt"
    atomic_save({"epoch": 3, "bank": torch.arange(4.0), "name": "ö"}, path)
    content = read_torch_file(path)
    assert content["epoch"] == 3
    assert content["name"] == "ö"
    assert content["bank"].equal(torch.arange(4.0))
    assert names_in(tmp_path) == ["exp.ckpt"]


class Code:
    def __reduce__(self):
        return os.system, ("echo evil",)


def test_torch_files_that_cannot_be_read(tmp_path):
    """Any single bit of the archive may be wrong; code is not run."""
    path = tmp_path / "exp.ckpt"
    atomic_save(torch.arange(1000.0), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({"a": Code()}, path)
    code = path.read_bytes()

    for content in (b"", b"text", whole[:1000], bytes(flipped), code):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"exp.ckpt is damaged or .*: use"):
            read_torch_file(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_torch_file(path)


def test_a_checkpoint_of_a_gpu_is_read_onto_the_cpu(tmp_path, monkeypatch):
    path = tmp_path / "exp.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        atomic_save({"bank": torch.arange(4.0)}, path)
    bank = read_torch_file(path)["bank"]
    assert bank.device == torch.device("cpu")
    assert bank.tolist() == [0, 1, 2, 3]


def test_a_mismatch_is_one_line(tmp_path):
    advice = "use another copy"
    with (
        pytest.raises(UserError, match=r"exp.pt does not fit .*KeyError") as error,
        explain_mismatch(tmp_path / "exp.pt", advice),
    ):
        {}["a\nb" * 1000]
    line = str(error.value)
    assert line.endswith(": use another copy")
    assert "\n" not in line
    assert len(line) < 200 + len(str(tmp_path)) + 100


def test_a_full_disk_in_the_middle_of_a_checkpoint(
    pretrain, finished, tmp_path, monkeypatch
):
    """The last one stays whole, nothing half-written stays, and the run goes on."""
    finished("exp")
    checkpoint = tmp_path / "weights/exp.ckpt"
    before = checkpoint.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    longer = ("--epochs", 3, "--checkpoint-minutes", 0, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = pretrain("exp", *longer)
    assert outcome.is_one_line_error("exp.ckpt", "No space left on device")
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "weights").glob("*.part"))

    outcome = pretrain("exp", *longer)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(
    call, tiny, tmp_path
):
    """RLIMIT_FSIZE stands in for the disk: the second run's checkpoints do not fit."""
    run = (*tiny, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *run, "--epochs", 1).status == 0
    checkpoint = tmp_path / "weights/exp.ckpt"
    before = checkpoint.read_bytes()
    longer = (*run, "--epochs", 2, "--tmax-for-cos-decay", 1, "--resume")

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = len(before) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(
        "tests/thin_script", "pirl_stl_train_test", *longer, preexec_fn=small_disk
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "weights").glob("*.part"))

    assert call("pirl_stl_train_test", *longer).status == 0


def test_an_error_of_the_system_names_its_file(call, tiny, tmp_path, monkeypatch):
    """A read-only folder, as the kernel would say it: root may write anywhere."""
    plain_open = open

    def read_only(path, mode="r", *rest, **options):
        if "w" in mode and str(path).endswith(".part"):
            raise OSError(30, "Read-only file system", str(path))
        return plain_open(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", read_only)
    run = ("--epochs", 1, "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.is_one_line_error("exp.ckpt", "Read-only")


def test_a_full_memory_is_not_the_file_s_fault(tmp_path, monkeypatch):
    """run_script() has a line for it, with advice that helps."""

    def full(*arguments, **options):
        raise MemoryError

    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        read_torch_file(tmp_path / "a.pt")
    advice = "use another copy"
    with pytest.raises(torch.OutOfMemoryError), explain_mismatch("a.pt", advice):
        raise torch.OutOfMemoryError("the card is full")


def test_a_checkpoint_that_does_not_say_what_it_is(call, tiny, tmp_path):
    (tmp_path / "weights").mkdir()
    torch.save({"epoch": 3}, tmp_path / "weights/exp.ckpt")
    run = ("--experiment-name", "exp", "--resume")
    outcome = call("pirl_stl_train_test", *tiny, *run)
    assert outcome.is_one_line_error("exp.ckpt is a file of unknown kind, not a PIRL")


# ---- Checkpoints that do not fit -----------------------------------------------------
def test_damaged_checkpoints(call, tiny, tmp_path):
    run = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *run).status == 0
    checkpoint = tmp_path / "weights/exp.ckpt"
    content = checkpoint.read_bytes()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1

    for bad in (content[:1000], b"", b"PK\3\4" + b"x" * 99, bytes(changed)):
        checkpoint.write_bytes(bad)
        outcome = call("pirl_stl_train_test", *run, "--resume")
        assert outcome.is_one_line_error("exp.ckpt")
        assert checkpoint.read_bytes() == bad
    run = (*tiny, "--experiment-name", "exp", "--resume")
    outcome = call("train_stl_after_ssl", *run)
    assert outcome.is_one_line_error("exp.ckpt")


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_checkpoint_whose_content_does_not_fit(call, tiny, tmp_path, script):
    """Whole, and ours by its kind."""
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
            content = dict(good)
            content[key] = value
            torch.save(content, path)
            outcome = call(script, *flags, "--resume")
            assert outcome.is_one_line_error("exp.ckpt"), key


def test_a_checkpoint_of_the_other_script(call, tiny):
    run = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call("train_stl_after_ssl", *run).status == 0
    outcome = call("pirl_stl_train_test", *run, "--resume")
    assert outcome.is_one_line_error(
        "exp.ckpt", "labelled checkpoint, not a PIRL checkpoint", "--experiment-name"
    )


# ---- Names and locks -----------------------------------------------------------------
@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_a_taken_name(call, tiny, tmp_path, script):
    run = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call(script, *run).status == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("exp*")}

    outcome = call(script, *run)
    assert outcome.is_one_line_error("exp", "--resume", "--experiment-name")
    assert {file: file.read_bytes() for file in tmp_path.rglob("exp*")} == before


def test_a_name_whose_checkpoint_is_gone_cannot_go_on(pretrain, finished, tmp_path):
    finished("exp")
    (tmp_path / "weights/exp.ckpt").unlink()
    for flags in ((), ("--resume",)):
        outcome = pretrain("exp", *flags)
        assert outcome.is_one_line_error("exp.ckpt is gone, so choose another")


def test_one_name_is_run_by_one_process(call, tiny, tmp_path):
    """Until SIGTERM ends it, with a checkpoint."""
    process = start("tests/thin_script", "pirl_stl_train_test", *tiny, *LONG)
    wait_for(tmp_path / "weights/exp.ckpt", process)
    run = (*tiny, "--experiment-name", "exp")
    for flags in ((), ("--resume",)):
        outcome = call("pirl_stl_train_test", *run, "--epochs", 500, *flags)
        assert outcome.is_one_line_error("another process", "--experiment-name")
    elsewhere = ("--weights-dir", tmp_path / "elsewhere")
    outcome = call("pirl_stl_train_test", *run, *elsewhere)
    assert outcome.is_one_line_error("another process"), "the same CSV"

    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "--resume True" in out
    assert err == ""
    outcome = call("pirl_stl_train_test", *run)
    assert outcome.is_one_line_error("--resume")


def test_an_experiment_named_like_the_table(call, tiny, tmp_path):
    """The table is <experiment>_results.md, so no name is that of another's table."""
    run = ("--experiment-name", "results")
    assert call("train_stl_after_ssl", *tiny, *run).status == 0
    assert (tmp_path / "observations/results_results.md").exists()


def test_each_experiment_has_a_table_of_its_own(call, tiny, tmp_path):
    tiny = (*tiny, "--epochs", 1)
    for name in ("a", "b"):
        assert call("train_stl_after_ssl", *tiny, "--experiment-name", name).status == 0
    folder = tmp_path / "observations"
    assert not (folder / "results.md").exists()

    first = (folder / "a_results.md").read_text()
    assert first.startswith("## a\n")
    assert first.count("Only softmax layer is fine tuned") == 1
    assert (folder / "b_results.md").read_text().startswith("## b\n")

    # A resumed run of the name writes it again.
    resumed = call("train_stl_after_ssl", *tiny, "--experiment-name", "a", "--resume")
    assert resumed.status == 0, resumed.err
    again = (folder / "a_results.md").read_text()
    assert again.startswith("## a\n")
    assert again.count("Only softmax layer is fine tuned") == 1

    # 40 test images, 4 of each class.
    with open(folder / "a_confusion.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert len(header) == 11
    for row in rows:
        assert sum(int(count) for count in row[1:]) == 4
    assert len(rows) == 10


# ---- Settings of a run that goes on --------------------------------------------------
def restored(parser, tmp_path, before, now, changeable=CHANGEABLE):
    """The arguments of a run with the flags `before`, when it is resumed with `now`."""
    folders = ["--weights-dir", str(tmp_path), "--observations-dir", str(tmp_path)]
    saved = settings_of(parser.parse_args([*folders, *before]))
    argv = [*folders, "--resume", *now]
    args = parser.parse_args(argv)
    experiment = Experiment(args, "PIRL checkpoint")
    checkpoint = {"settings": saved}
    return experiment.restore_settings(parser, argv, args, checkpoint, changeable)


def test_a_flag_that_is_left_out_keeps_its_value(tmp_path, capsys):
    parser = pirl_stl_train_test.make_parser()
    before = ["--lr", "0.3", "--only-train", "--loss", "nce", "--count-negatives", "9"]
    args = restored(parser, tmp_path, before, [])
    assert args.lr == 0.3
    assert args.only_train is True
    assert args.loss == "nce"
    assert args.count_negatives == 9
    assert args.epochs == 100, "the default, then as now"
    assert args.resume is True
    assert capsys.readouterr().out.splitlines() == [
        f"going on from {tmp_path / 'e1_resnet18_.ckpt'}"
    ]


def test_the_full_stage_is_kept_too(tmp_path):
    parser = train_stl_after_ssl.make_parser()
    before = ["--full-fine-tune", "--full-lr", "0.5"]
    args = restored(parser, tmp_path, before, [])
    assert args.full_fine_tune is True
    assert args.full_lr == 0.5


def test_a_flag_that_is_given_as_before_is_accepted(tmp_path):
    parser = pirl_stl_train_test.make_parser()
    args = restored(parser, tmp_path, ["--lr", "0.3"], ["--lr", "0.30"])
    assert args.lr == 0.3


def test_a_flag_that_differs_is_refused_by_name(tmp_path):
    parser = pirl_stl_train_test.make_parser()
    now = ["--lr", "0.1", "--only-train", "--loss", "modified-nce"]
    with pytest.raises(UserError, match="was made with other settings") as error:
        restored(parser, tmp_path, [], now)
    line = str(error.value)
    assert "--lr was 0.2, is 0.1" in line
    assert "--only-train was False, is True" in line
    assert "--loss" not in line
    assert line.endswith(": leave the flags out, or choose another --experiment-name")


def test_a_flag_may_be_given_back_its_default(tmp_path):
    """That it is the default is no reason to take it for left out."""
    parser = pirl_stl_train_test.make_parser()
    with pytest.raises(UserError, match=r"--lr was 0.3, is 0.2\)"):
        restored(parser, tmp_path, ["--lr", "0.3"], ["--lr", "0.2"])


def test_changes_that_are_allowed_are_notes(tmp_path, capsys):
    parser = pirl_stl_train_test.make_parser()
    now = ["--epochs", "200", "--checkpoint-minutes", "3"]
    changeable = {"epochs", "checkpoint_minutes"}
    args = restored(parser, tmp_path, ["--lr", "0.3"], now, changeable)
    assert args.epochs == 200
    assert args.checkpoint_minutes == 3
    assert args.lr == 0.3
    out = capsys.readouterr().out
    assert "note: --epochs was 100, is 200\n" in out
    assert "note: --checkpoint-minutes was 10.0, is 3.0\n" in out


def test_paths_and_the_device_are_those_of_the_place(tmp_path, capsys):
    """They are never restored, and never refused."""
    parser = pirl_stl_train_test.make_parser()
    before = ["--data-dir", "/old/images", "--device", "cpu"]
    args = restored(parser, tmp_path, before, [])
    assert str(args.data_dir) == "stl10_data"
    assert args.device == "auto"
    args = restored(parser, tmp_path, before, ["--data-dir", "/new", "--device", "cpu"])
    assert str(args.data_dir) == "/new"
    assert "note" not in capsys.readouterr().out


def test_where_the_images_are_kept_is_the_machine_s_affair(tmp_path):
    parser = pirl_stl_train_test.make_parser()
    before = ["--images-on", "device"]
    assert restored(parser, tmp_path, before, []).images_on == "auto"
    now = ["--images-on", "host"]
    assert restored(parser, tmp_path, before, now).images_on == "host"


def test_settings_of_another_version_are_not_looked_at(tmp_path):
    parser = pirl_stl_train_test.make_parser()
    argv = ["--weights-dir", str(tmp_path), "--observations-dir", str(tmp_path)]
    args = parser.parse_args(argv)
    experiment = Experiment(args, "PIRL checkpoint")
    checkpoint = {"settings": {"lr": 0.3, "no_such_flag": 1}}
    args = experiment.restore_settings(parser, argv, args, checkpoint, CHANGEABLE)
    assert args.lr == 0.3
    assert not hasattr(args, "no_such_flag")


def test_settings_through_a_script(call, tiny, tmp_path):
    run = (*tiny, "--experiment-name", "exp")
    first = ("--epochs", 1, "--lr", 0.3, "--knn-every", 0)
    assert call("pirl_stl_train_test", *run, *first).status == 0

    outcome = call("pirl_stl_train_test", *run, "--resume", "--lr", 0.1)
    assert outcome.is_one_line_error("exp.ckpt", "--lr was 0.3, is 0.1")
    outcome = call("pirl_stl_train_test", *run, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: --epochs was 1, is 2" in outcome.out
    model = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert model["settings"]["lr"] == 0.3
    assert model["settings"]["knn_every"] == 0
    assert [metrics["epoch"] for metrics in model["history"]] == [1, 2]


# ---- Weights to start from -----------------------------------------------------------
def test_what_is_used_of_a_file_and_what_is_not_is_said(capsys):
    modules = {name: torch.nn.Linear(2, 2) for name in ("trunk", "head_f", "head_g")}
    weights = {name: module.state_dict() for name, module in modules.items()}
    load_weights(modules, weights, "exp.pt")
    assert capsys.readouterr().out == "using trunk, head_f, head_g of exp.pt\n"

    load_weights({"trunk": torch.nn.Linear(2, 2)}, weights, "exp.pt")
    assert capsys.readouterr().out == "using trunk of exp.pt, not head_f, head_g\n"


def test_a_folder_of_the_model_s_name_is_not_in_the_way(tmp_path, monkeypatch):
    """As in the README: the images are in pets, and the run is called so too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    content = {"trunk": {"conv1.weight": torch.zeros(1)}, "settings": {}}
    atomic_save(content, tmp_path / "weights/pets.pt")
    found, _ = read_weights("pets", Path("weights"))
    assert found == Path("weights/pets.pt")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    trunk = {"conv1.weight": torch.zeros(1)}
    content = {"kind": "PIRL weights", "trunk": trunk, "settings": {"lr": 1}}
    home = tmp_path / "home"
    folder = tmp_path / "weights"
    for path in (folder / "a.pt", folder / "b.ckpt", home / "c.pt"):
        atomic_save(content, path)
    monkeypatch.setenv("HOME", str(home))

    for name, path in (
        (str(folder / "a.pt"), folder / "a.pt"),
        ("a.pt", folder / "a.pt"),
        ("a", folder / "a.pt"),
        ("b", folder / "b.ckpt"),
        ("~/c.pt", home / "c.pt"),
    ):
        found, weights = read_weights(name, folder)
        assert found == path
        assert weights["settings"] == {"lr": 1}
        assert weights["trunk"].keys() == trunk.keys()
    with pytest.raises(UserError, match=r"there is no model c .*c\.pt.*: check"):
        read_weights("c", folder)
