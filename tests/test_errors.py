"""Bad input gets one line on standard error, status 1 (2 for usage), and nothing that was there is lost."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import run_helpers as rh
import pytest
import torch
from conftest import ROOT, start

import models
import pirl_stl_train_test as pirl
import train_stl_after_ssl

SCRIPTS = ["stl10_data_load", "pirl_stl_train_test", "train_stl_after_ssl"]


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the image folders that a test may damage."""
    return shutil.copytree(data_dir, tmp_path / "own")


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_errors(call, script):
    assert call(script, "--no-such-flag").is_one_line_error("--no-such-flag", status=2)
    assert call(script, "--url" if script == SCRIPTS[0] else "--seed").is_one_line_error("--help", status=2)


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
        ("--experiment-name", "x\ny"),
        ("--epochs", "9" * 400),
        ("--device", "mps"),
        ("--no-such\nflag",),
        ("--image-size", 20),
        ("--cont-epoch", 3),
        ("--pirl-model-name", "x"),
        ("--warm-start", "True", "--epochs", 2, "--cont-epoch", 3),
    ],
)
def test_values_out_of_range(call, tiny, flags):
    assert call("pirl_stl_train_test", *tiny, *flags).is_one_line_error(status=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_default_in_groups(call, script):
    outcome = call(script, "--help")
    assert outcome.status == 0
    assert "default" in outcome.out
    if script == "pirl_stl_train_test":
        groups = ("files:", "machine:", "images:", "network:", "loss:", "training:")
        assert all(f"\n{group}\n" in outcome.out for group in groups)


@pytest.mark.parametrize(
    ("text", "value"), [("True", True), ("yes", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)]
)
def test_booleans_mean_what_they_say(text, value):
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


def test_errors_of_the_system_that_nobody_thought_of(call, tiny, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert call("pirl_stl_train_test", *tiny, "--data-dir", tmp_path / "loop").is_one_line_error("loop")
    assert call("pirl_stl_train_test", *tiny, "--weights-dir", tmp_path / "loop").is_one_line_error("loop")


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
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for bad in (content[:1000], b"", b"PK\3\4" + b"x" * 99, bytes(changed)):
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


def test_a_folder_that_cannot_be_made(call, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = call("pirl_stl_train_test", *tiny, "--weights-dir", tmp_path / "file/weights")
    assert outcome.is_one_line_error("file/weights")
    for flag in ("--weights-dir", "--observations-dir"):
        outcome = call("pirl_stl_train_test", *tiny, flag, tmp_path / "file")
        assert outcome.is_one_line_error("file", "File exists")


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_goes_on(call, tiny, tmp_path):
    """RLIMIT_FSIZE stands in for the disk: the second run's checkpoints do not fit."""
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    longer = (*tiny, "--epochs", 2, "--tmax-for-cos-decay", 1, "--experiment-name", "exp", "--resume")

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    process = start("tests/thin_script", "pirl_stl_train_test", *longer, preexec_fn=small_disk)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before
    assert not list((tmp_path / "weights").glob("*.part"))
    assert call("pirl_stl_train_test", *longer).status == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(call, tiny, tmp_path, number, status):
    long = ("--epochs", 500, "--experiment-name", "exp", "--checkpoint-minutes", 0)
    process = start("tests/thin_script", "pirl_stl_train_test", *tiny, *long)
    wait_for(tmp_path / "weights/exp.ckpt", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "--resume True" in out
    assert err == ""
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["progress"]["step"] >= 1


def test_interrupted_before_training(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        rh.run_script(main)
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


def test_one_name_is_run_by_one_process(call, tiny, tmp_path):
    long = ("--epochs", 500, "--experiment-name", "exp", "--checkpoint-minutes", 0)
    process = start("tests/thin_script", "pirl_stl_train_test", *tiny, *long)
    wait_for(tmp_path / "weights/exp.ckpt", process)
    for flags in ((), ("--resume",)):
        outcome = call("pirl_stl_train_test", *tiny, "--epochs", 500, "--experiment-name", "exp", *flags)
        assert outcome.is_one_line_error("another process", "--experiment-name")
    elsewhere = ("--experiment-name", "exp", "--weights-dir", tmp_path / "elsewhere")
    assert call("pirl_stl_train_test", *tiny, *elsewhere).is_one_line_error("another process"), "the same CSV"
    process.kill()
    process.wait()
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").is_one_line_error("--resume")


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_too_little_free_disk_for_the_images(call, raw_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000))
    outcome = call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", tmp_path / "data")
    assert outcome.is_one_line_error("data has 5 MB", "make room")
    assert not list((tmp_path / "data").rglob("*.png"))


@pytest.mark.parametrize(("script", "flag"), [(SCRIPTS[1], ("--only-train",)), (SCRIPTS[2], ("--full-fine-tune",))])
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bomb"])
def test_bad_images_are_named(call, tiny, own_data, script, flag, kind):
    image = own_data / ("unlabelled/3.png" if script == SCRIPTS[1] else "train/4/3.png")
    good = image.read_bytes()
    bomb = good[:16] + (60000).to_bytes(4, "big") * 2 + good[24:]  # width and height
    image.write_bytes({"empty": b"", "text": b"no image", "cut": good[:500], "bomb": bomb}[kind])
    assert call(script, *tiny, "--data-dir", own_data, *flag).is_one_line_error(image)


def test_numbers_that_do_not_go_with_the_images(call, tiny):
    assert call("pirl_stl_train_test", *tiny, "--count-negatives", 70).is_one_line_error("70", "69")
    assert call("pirl_stl_train_test", *tiny, "--batch-size", 71).is_one_line_error("71", "70")
    assert call("train_stl_after_ssl", *tiny, "--batch-size", 61).is_one_line_error("61", "50")


@pytest.mark.parametrize("broken", ["loss", "weights"])
@pytest.mark.parametrize(
    ("script", "run_class", "more"),
    [
        (SCRIPTS[1], pirl.Pretraining, ("--knn-every", 0)),
        (SCRIPTS[1], pirl.Pretraining, ("--knn-every", 0, "--loss", "nce")),
        (SCRIPTS[2], train_stl_after_ssl.FineTuning, ("--full-fine-tune",)),
    ],
    ids=["pretraining", "nce", "fine-tuning"],
)
def test_a_run_that_diverges_keeps_its_last_checkpoint(
    call, tiny, tmp_path, monkeypatch, script, run_class, more, broken
):
    """In the third step of the second epoch the weights are lost, before the loss sees them or after."""
    step, calls = run_class.step, []
    flags = (*tiny, "--experiment-name", "exp", "--checkpoint-minutes", 0, *more)

    def poisoned(run, *arguments):
        calls.append(1)
        per_epoch = 5 if script == SCRIPTS[1] else 4
        if len(calls) == per_epoch + 3 and broken == "loss":
            run.model.trunk.conv1.weight.data[0] = float("nan")
        sums = step(run, *arguments)
        if len(calls) == per_epoch + 3:
            run.model.trunk.conv1.weight.data[0] = float("nan")
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(run_class, "step", poisoned)
        outcome = call(script, *flags)
    assert outcome.is_one_line_error("2, step 3", "lr", "exp.ckpt")
    assert torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)["progress"]["step"] == 2
    assert not (tmp_path / "weights/exp.pt").exists()
    assert call(script, *flags, "--resume").status == 0


def test_a_softmax_layer_that_is_not_finite(call, tiny, monkeypatch):
    features = models.trunk_features
    monkeypatch.setattr(models, "trunk_features", lambda *a: features(*a) * float("nan"))
    assert call("train_stl_after_ssl", *tiny).is_one_line_error("epoch 1", "--lr")


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_a_checkpoint_whose_content_does_not_fit(call, tiny, tmp_path, script):
    """Whole, and ours by its kind."""
    flags = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call(script, *flags).status == 0
    path = tmp_path / "weights/exp.ckpt"
    good = torch.load(path, weights_only=True)
    for change in (
        {"settings": None},
        {"kind": "something else"},
        {"progress": {}},
        {"run": {**good["run"], "model": {}}},
        {"run": {**good["run"], "model": good["run"]["model"] | {"trunk.conv1.weight": torch.zeros(2)}}},
        {"progress": good["progress"] | {"sums": torch.zeros(3, 2)}},
    ):
        torch.save({**good, **change}, path)
        assert call(script, *flags, "--resume").is_one_line_error("exp.ckpt"), change.keys()


def test_an_error_of_the_system_names_its_file(call, tiny, tmp_path, monkeypatch):
    """A read-only folder, as the kernel would say it: root may write anywhere."""
    plain = open

    def read_only(path, mode="r", *rest, **options):
        if "w" in mode and str(path).endswith(".part"):
            raise OSError(30, "Read-only file system", str(path))
        return plain(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", read_only)
    outcome = call("train_stl_after_ssl", *tiny, "--epochs", 1, "--experiment-name", "exp")
    assert outcome.is_one_line_error("exp.ckpt", "Read-only")


def ends_with(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        rh.run_script(main)
    return end.value.code


def test_full_memory_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    assert ends_with(torch.OutOfMemoryError("CUDA out of memory")) == 1
    assert ends_with(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("memory is full" in line and "--batch-size" in line for line in lines)
    with pytest.raises(RuntimeError, match="a bug"):
        ends_with(RuntimeError("a bug"))


@pytest.mark.parametrize("picture", ["", ".", "..", "/", "folder"])
def test_a_picture_that_cannot_be_written_is_refused_before_training(call, tiny, tmp_path, picture):
    (tmp_path / "folder").mkdir()
    picture = tmp_path / picture if picture == "folder" else picture
    outcome = call("train_stl_after_ssl", *tiny, "--experiment-name", "exp", "--neighbours", picture)
    assert outcome.is_one_line_error("--neighbours", status=2)
    assert not (tmp_path / "weights/exp.pt").exists()


def test_an_experiment_named_like_the_table(call, tiny):
    """Each has a lock, in the same folder."""
    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "results").status == 0


@pytest.mark.slow
def test_a_terminal_that_lacks_our_signs():
    command = [sys.executable, ROOT / "pirl_stl_train_test.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "\\u03c4: the temperature" in done.stdout


def test_what_only_unix_has_is_not_used():
    """fcntl, resource and os.sched_getaffinity do not exist on Windows, the last not on macOS either."""
    for file in ROOT.glob("*.py"):
        names = ("import fcntl", "import resource", "sched_getaffinity", "os.fork", "SIGALRM")
        assert not re.search("|".join(map(re.escape, names)), file.read_text()), file.name
