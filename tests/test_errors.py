"""Bad input gets one line on standard error, status 1 (2 for usage), and nothing that was there is lost."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_helpers import StopSignal, Terminated, run_script
from conftest import ROOT, Outcome, start
from PIL import Image

SCRIPTS = ["stl10_data_load", "pirl_stl_train_test", "train_stl_after_ssl"]


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the image folders that a test may damage."""
    return shutil.copytree(data_dir, tmp_path / "own")


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_errors(call, script):
    assert call(script, "--no-such-flag").is_one_line_error("--no-such-flag", status=2)
    assert call(script, "--seed", "x").is_one_line_error("--seed", "--help", status=2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", 0),
        ("--epochs", "1.5"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--temp-parameter", 0),
        ("--beta", 1),
        ("--loss-weight", 1.1),
        ("--model-type", "res101"),
        ("--only-train", "maybe"),
        ("--experiment-name", "../x"),
        ("--experiment-name", "x.previous"),
        ("--experiment-name", "x" * 201),
        ("--experiment-name", "x\ny"),
        ("--epochs", "9" * 400),
        ("--no-such\nflag",),
        ("--image-size", 20),
        ("--cont-epoch", 3),
        ("--pirl-model-name", "x"),
        ("--warm-start", "True", "--epochs", 2, "--cont-epoch", 3),
    ],
)
def test_values_out_of_range(call, tiny, flags):
    assert call("pirl_stl_train_test", *tiny, *flags).is_one_line_error(status=2)


@pytest.mark.parametrize("picture", ["", "..", "/"])
def test_pictures_without_a_name(call, tiny, picture):
    assert call("train_stl_after_ssl", *tiny, "--neighbours", picture).is_one_line_error("names no file", status=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_default(script):
    done = subprocess.run([sys.executable, ROOT / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "default" in done.stdout
    assert "True|False" in done.stdout


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("yes", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)]
)
def test_booleans_mean_what_they_say(text, value):
    import pirl_stl_train_test as pirl

    assert pirl.parse_args(["--only-train", text]).only_train is value
    assert pirl.parse_args(["--only-train", "--resume"]).only_train is True


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_data_that_is_not_there(call, tiny, tmp_path, script):
    outcome = call(script, *tiny, "--data-dir", tmp_path / "nothing")
    assert outcome.is_one_line_error("nothing", "stl10_data_load.py")


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_empty_split(call, tiny, own_data, script):
    for folder in ("unlabelled", "train"):
        shutil.rmtree(own_data / folder)
        (own_data / folder).mkdir()
    assert call(script, *tiny, "--data-dir", own_data).is_one_line_error("holds no images")


def spoil(kind, path):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "small":
        Image.new("RGB", (95, 96)).save(path)
    elif kind == "jpeg":
        Image.new("RGB", (96, 96)).save(path, "JPEG")
    elif kind == "bomb":
        content = bytearray(path.read_bytes())
        content[16:24] = (60000).to_bytes(4, "big") * 2  # width and height
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "small", "jpeg", "bomb"])
@pytest.mark.parametrize(("script", "image"), [(SCRIPTS[1], "unlabelled/3.png"), (SCRIPTS[2], "train/4/3.png")])
def test_bad_images_are_named(call, tiny, own_data, script, image, kind):
    spoil(kind, own_data / image)
    assert call(
        script, *tiny, "--data-dir", own_data, "--only-train" if script == SCRIPTS[1] else "--full-fine-tune"
    ).is_one_line_error(own_data / image)


def test_strange_names(call, tiny, own_data):
    (own_data / "unlabelled/cat.png").write_bytes(b"")
    assert call("pirl_stl_train_test", *tiny, "--data-dir", own_data).is_one_line_error("cat.png")
    (own_data / "train/11").mkdir()
    assert call("train_stl_after_ssl", *tiny, "--data-dir", own_data).is_one_line_error("train/11")


@pytest.mark.parametrize("name", ["unlabelled/3.png", "unlabelled/new\nline.png", "unlabelled/100.png"])
def test_what_is_no_file(call, tiny, own_data, name):
    """A pipe would be waited for."""
    (own_data / name).unlink(missing_ok=True)
    os.mkfifo(own_data / name)
    outcome = call("pirl_stl_train_test", *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error("is no file named <index>.png")


def test_text_files_are_small(call, tiny, own_data):
    for name, flags in (("fold_indices.txt", ("--folds",)), ("class_names.txt", ())):
        with open(own_data / name, "wb") as file:
            file.truncate(3 * 2**30)
        outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own_data, *flags, "--experiment-name", name)
        assert outcome.is_one_line_error(name, "1048576 bytes")
        (own_data / name).write_text("x" * 10_000 + "\n" * 10)
    assert call("train_stl_after_ssl", *tiny, "--data-dir", own_data).status == 0, "names are cut"
    (own_data / "class_names.txt").unlink()
    os.mkfifo(own_data / "class_names.txt")
    assert call("train_stl_after_ssl", *tiny, "--data-dir", own_data, "--resume").status == 0


def test_names_that_meet_other_locks(call, tiny, own_data, tmp_path):
    """The table and the decoded copies have locks of their own in these folders."""
    flags = (*tiny, "--epochs", 1, "--data-dir", own_data, "--weights-dir", own_data)
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "unlabelled").status == 0
    assert call("train_stl_after_ssl", *flags, "--experiment-name", "train").status == 0
    assert call("train_stl_after_ssl", *flags, "--experiment-name", "results").status == 0


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_output_that_nobody_reads(tiny, tmp_path, script):
    """Closed from the start, closed by its reader, or of an encoding that lacks our signs."""
    flags = [str(flag) for flag in (*tiny, "--epochs", 1)]
    command = f'"{sys.executable}" "{ROOT / script}.py" "$@"'

    def shell(how, name, **environment):
        line = ["bash", "-c", command + how, "bash", *flags, "--experiment-name", name]
        return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})

    assert shell(" >&- 2>&-", "closed").returncode == 0
    assert (tmp_path / "weights/closed.pt").exists()
    for how, name, part in (
        (' | true; exit "${PIPESTATUS[0]}"', "broken", "Broken pipe: whoever read the output"),
        (" > /dev/full", "full", "No space left"),
        (" --help > /dev/full", "help", "No space left"),
    ):
        unread = shell(how, name, PYTHONUNBUFFERED="")
        assert Outcome(unread.returncode, unread.stdout, unread.stderr).is_one_line_error(part)
    ascii_only = shell("", "ascii", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0, ascii_only.stderr


def test_errors_of_the_system_that_nobody_thought_of(call, tiny, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert call("pirl_stl_train_test", *tiny, "--data-dir", tmp_path / "loop").is_one_line_error("loop")
    assert call("pirl_stl_train_test", *tiny, "--weights-dir", tmp_path / "loop").is_one_line_error("loop")


def test_more_negatives_than_images_and_too_large_a_batch(call, tiny):
    assert call("pirl_stl_train_test", *tiny, "--count-negatives", 70).is_one_line_error("70", "69")
    assert call("pirl_stl_train_test", *tiny, "--batch-size", 71).is_one_line_error("71", "70")
    assert call("train_stl_after_ssl", *tiny, "--batch-size", 61).is_one_line_error("61", "50")


def test_cuda_that_is_not_there(call, tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert call("pirl_stl_train_test", *tiny, "--device", "cuda").is_one_line_error("--device cpu")


def bad_files(folder):
    """Files that are no weights of ours, by name."""
    trunk = {"conv1.weight": torch.zeros(1)}
    torch.save({"kind": "PIRL weights", "trunk": trunk, "settings": {}}, folder / "other.pt")
    torch.save({"kind": "PIRL weights", "trunk": trunk, "settings": None}, folder / "none.pt")
    torch.save({"kind": "something else"}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"kind": "PIRL weights", "trunk": Evil()}, folder / "code.pt")
    whole = (folder / "other.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
    return ["other", "none", "foreign", "list", "code", "cut", "empty", "text"]


class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


def test_weights_that_cannot_be_used(call, tiny, tmp_path):
    (tmp_path / "weights").mkdir()
    for name in bad_files(tmp_path / "weights"):
        outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", name)
        assert outcome.is_one_line_error(f"{name}.pt")
        outcome = call("pirl_stl_train_test", *tiny, "--warm-start", "--pirl-model-name", f"{name}.pt")
        assert outcome.is_one_line_error(f"{name}.pt")
    assert call("train_stl_after_ssl", *tiny, "--pirl-model-name", "nowhere").is_one_line_error("nowhere")


@pytest.mark.full_trunk
def test_weights_of_another_architecture(call, tiny):
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    outcome = call("train_stl_after_ssl", *tiny, "--model-type", "res34", "--pirl-model-name", "exp")
    assert outcome.is_one_line_error("exp.pt", "--model-type")
    warm = ("--warm-start", "--pirl-model-name", "exp", "--experiment-name", "new")
    assert call("pirl_stl_train_test", *tiny, *warm, "--non-linear-head").is_one_line_error("exp.pt")


def test_damaged_checkpoints(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    checkpoint = tmp_path / "weights/exp.ckpt"
    content = checkpoint.read_bytes()
    for bad in (content[:1000], b"", b"PK\3\4" + b"x" * 99):
        checkpoint.write_bytes(bad)
        outcome = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp", "--resume")
        assert outcome.is_one_line_error("exp.ckpt")
        assert checkpoint.read_bytes() == bad
    outcome = call("train_stl_after_ssl", *tiny, "--experiment-name", "exp", "--resume")
    assert outcome.is_one_line_error("exp.ckpt")


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_taken_name(call, tiny, tmp_path, script):
    assert call(script, *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("exp*")}
    outcome = call(script, *tiny, "--epochs", 1, "--experiment-name", "exp")
    assert outcome.is_one_line_error("exp", "--resume", "--experiment-name")
    assert {file: file.read_bytes() for file in tmp_path.rglob("exp*")} == before


def test_weights_that_are_not_finite_are_never_kept(call, tiny, tmp_path, monkeypatch):
    """A finite loss in the epoch's last step, and an update by which the weights are lost."""
    import pirl_stl_train_test as pirl

    step = pirl.training_step

    def poisoned(run, index, draws):
        sums = step(run, index, draws)
        if (run.epoch, run.step) == (2, run.steps - 1):
            run.model.trunk.conv1.weight.data[0] = float("nan")
        return sums

    monkeypatch.setattr(pirl, "training_step", poisoned)
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp")
    assert outcome.is_one_line_error("epoch 2, step 5", "exp.ckpt")
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["epoch"] == 2
    assert not (tmp_path / "weights/exp.pt").exists()


@pytest.mark.parametrize("loss", ["modified-nce", "nce"])
def test_a_loss_that_is_not_finite(call, tiny, tmp_path, monkeypatch, loss):
    import pirl_stl_train_test as pirl

    step = pirl.training_step

    def poisoned(run, index, draws):
        if (run.epoch, run.step) == (2, 3):
            run.model.head_f[0].weight.data.fill_(float("nan"))
        return step(run, index, draws)

    monkeypatch.setattr(pirl, "training_step", poisoned)
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", "--loss", loss)
    assert outcome.is_one_line_error("epoch 2, step 4", "--lr", "exp.ckpt")
    monkeypatch.setattr(pirl, "training_step", step)
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["epoch"] == 2
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", "--loss", loss, "--resume").status == 0


def test_a_softmax_layer_that_is_not_finite(call, tiny, monkeypatch):
    import train_stl_after_ssl as labelled

    features = labelled.features_of
    monkeypatch.setattr(labelled, "features_of", lambda *a: features(*a) * float("nan"))
    assert call("train_stl_after_ssl", *tiny).is_one_line_error("epoch 1", "--lr")


def test_a_full_stage_that_is_not_finite(call, tiny, tmp_path, monkeypatch):
    """From the third of four steps of the second epoch on."""
    import train_stl_after_ssl as labelled

    views, flags = [], ("--full-fine-tune", "--experiment-name", "exp")

    def poisoned(images, draws, view=labelled.labelled_view):
        views.append(1)
        return view(images, draws) * (float("nan") if len(views) == 7 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(labelled, "labelled_view", poisoned)
        outcome = call("train_stl_after_ssl", *tiny, *flags)
    assert outcome.is_one_line_error("epoch 2 of the whole network, step 3", "--full-lr", "exp.ckpt")
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["full_stage"]["epoch"] == 2
    assert call("train_stl_after_ssl", *tiny, *flags, "--resume").status == 0


def test_a_folder_that_cannot_be_made(call, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = call("pirl_stl_train_test", *tiny, "--weights-dir", tmp_path / "file/weights")
    assert outcome.is_one_line_error("file/weights")
    for flag in ("--weights-dir", "--observations-dir"):
        outcome = call("pirl_stl_train_test", *tiny, flag, tmp_path / "file")
        assert outcome.is_one_line_error("file", "name another path")


@pytest.mark.full_trunk
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(call, tiny, tmp_path):
    """RLIMIT_FSIZE stands in for the disk: the second run's checkpoints do not fit."""
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    longer = (*tiny, "--epochs", 2, "--tmax-for-cos-decay", 1, "--experiment-name", "exp", "--resume")

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    process = start("pirl_stl_train_test", *longer, preexec_fn=small_disk)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before
    assert not list((tmp_path / "weights").glob("*.part"))
    assert call("pirl_stl_train_test", *longer).status == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(call, tiny, tmp_path, number, status):
    process = start("pirl_stl_train_test", *tiny, "--epochs", 500, "--experiment-name", "exp")
    wait_for(tmp_path / "weights/exp.ckpt", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "--resume True" in out
    assert err == ""
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["epoch"] >= 2


def test_a_signal_that_comes_twice_at_once_to_a_rank(monkeypatch):
    """As all processes of a job, and from the launcher. A later one ends it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    raised = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        stop = StopSignal()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        stop.since -= 3
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("when", ["whole_image_statistics", "trunk_features"])
def test_a_signal_while_the_features_are_measured(call, tiny, tmp_path, monkeypatch, when):
    import pirl_stl_train_test as pirl

    flags, function = (*tiny, "--knn-every", 1), getattr(pirl, when)

    def interrupted(*a, **k):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(pirl, when, interrupted)
        outcome = call("pirl_stl_train_test", *flags, "--experiment-name", "exp")
    assert outcome.status == 143
    assert "epoch 1 after step 5" in outcome.out
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "exp", "--resume").status == 0
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "whole").status == 0
    a, b = (torch.load(tmp_path / f"weights/{name}.pt", weights_only=True) for name in ("exp", "whole"))
    assert all(torch.equal(a["trunk"][name], b["trunk"][name]) for name in a["trunk"])


def test_interrupted_before_training(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_one_name_is_run_by_one_process(call, tiny, tmp_path):
    process = start("pirl_stl_train_test", *tiny, "--epochs", 500, "--experiment-name", "exp")
    wait_for(tmp_path / "weights/exp.ckpt", process)
    for flags in ((), ("--resume",)):
        outcome = call("pirl_stl_train_test", *tiny, "--epochs", 500, "--experiment-name", "exp", *flags)
        assert outcome.is_one_line_error("another process", "--experiment-name")
    elsewhere = ("--experiment-name", "exp", "--weights-dir", tmp_path / "elsewhere")
    assert call("pirl_stl_train_test", *tiny, *elsewhere).is_one_line_error("another process"), "the same CSV"
    process.kill()
    process.wait()
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").is_one_line_error("--resume")


@pytest.mark.parametrize(("interrupt", "status"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_a_signal_while_torch_writes_a_file(call, tiny, tmp_path, monkeypatch, interrupt, status):
    """Torch fails to end its archive then, and the signal is but the context of that error."""

    def save(state, file):
        try:
            raise interrupt
        finally:
            raise RuntimeError("unexpected pos 25885184 vs 25885080")

    monkeypatch.setattr(torch, "save", save)
    outcome = call("train_stl_after_ssl", *tiny, "--epochs", 1, "--experiment-name", "exp")
    assert outcome.is_one_line_error("interrupted", status=status)
    assert not list((tmp_path / "weights").glob("*exp*.p*"))


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.full_trunk
def test_too_little_free_disk_is_said_before_anything_is_done(call, tiny, tmp_path, monkeypatch):
    free = SimpleNamespace(free=50_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    for script in SCRIPTS[1:]:
        assert call(script, *tiny, "--experiment-name", "exp").is_one_line_error("50 MB", "make room")
        assert not list((tmp_path / "weights").glob("exp*"))
    free.free = 10**12
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    there = sum(file.stat().st_size for file in (tmp_path / "weights").glob("exp*"))
    free.free = 400_000_000 - there  # what lies there already will be replaced
    more = (*tiny, "--epochs", 2, "--tmax-for-cos-decay", 1, "--experiment-name", "exp", "--resume")
    assert call("pirl_stl_train_test", *more).status == 0


def test_too_little_free_disk_for_the_images(call, raw_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    outcome = call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", tmp_path / "data")
    assert outcome.is_one_line_error("data has 5 MB", "make room")
    assert not list((tmp_path / "data").rglob("*.png"))


def test_too_little_free_disk_for_unpacking(call, raw_dir, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as archive:
        archive.add(raw_dir / "stl10_binary", "stl10_binary")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))  # unlabelled: 2.8 MB
    outcome = call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "data")
    assert outcome.is_one_line_error("has 2 MB", "make room")
    assert not (tmp_path / "stl10_binary").exists()


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_read_only_folder(call, tiny, tmp_path, script, monkeypatch):
    """Root may write anywhere, so the kernel's answer is put in its place."""
    plain = Path.open

    def read_only(path, mode="r", *rest, **options):
        if "w" in mode and path.name.startswith(".exp"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return plain(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert call(script, *tiny, "--experiment-name", "exp").is_one_line_error("Read-only", "choose a folder")


def test_a_checkpoint_with_fields_that_do_not_fit(call, tiny, tmp_path):
    """Whole, and of ours by its name; but no field is trusted."""
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    path = tmp_path / "weights/exp.ckpt"
    good = torch.load(path, weights_only=True)
    for name, bad in {
        "settings": None,
        "model": {},
        "bank": torch.zeros(1).expand(2**20, 2**20),
        "statistics": torch.zeros(3),
        "optimizer": {"state": {}},
        "epoch": "2",
        "step": -1,
        "rows": [1],
    }.items():
        torch.save({**good, name: bad}, path)
        outcome = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp", "--resume")
        assert outcome.is_one_line_error("exp.ckpt"), name
    momentum = good["optimizer"]["state"][0]
    wrong = {**good["optimizer"], "state": {0: {**momentum, "momentum_buffer": torch.zeros(2)}}}
    torch.save({**good, "optimizer": wrong}, path)
    outcome = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp", "--resume")
    assert outcome.is_one_line_error("exp.ckpt")
