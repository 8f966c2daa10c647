"""Several ranks on gloo, started by torchrun: the same training as on one process, and no rank left behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import run_helpers as rh
import pytest
import torch
from conftest import ROOT
from rank_worker import freeze

import pirl_stl_train_test as pirl

WORKER = ROOT / "tests/rank_worker.py"


def launch(ranks, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*map(str, (*command, *arguments))],
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process, seconds=120):
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def run(ranks, script, *arguments):
    status, out, err = finish(launch(ranks, script, *arguments))
    assert status == 0, err
    return out


def error_lines(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


def weights(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


def difference(a, b):
    """The largest between two exported models' parameters."""
    parts = ("trunk", "head_f", "head_g")
    return max((a[p][k].double() - b[p][k].double()).abs().max() for p in parts for k in a[p] if "num_batches" not in k)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "precision"), [(2, "bf16"), (4, "fp32")])
def test_every_image_once_and_all_ranks_equal_after_every_step(tiny, tmp_path, ranks, precision):
    """70 images in batches of 16: the last batch has 6, which four ranks share unevenly."""
    flags = (*tiny, "--precision", precision, "--experiment-name", "exp")
    out = run(ranks, WORKER, tmp_path, "watch", *flags)
    seen = [json.loads((tmp_path / f"watch_{rank}.json").read_text()) for rank in range(ranks)]
    for epoch in (1, 2):
        images = [i for one in seen for step in one["steps"] if step["epoch"] == epoch for i in step["images"]]
        assert sorted(images) == list(range(70))
    for one in seen:
        assert [step["equal"] for step in one["steps"]] == [True] * 10
        assert one["buffers_equal"], "after validation"
        assert all(one["buffers_equal"])
        assert not one["synchronised"], "each rank normalises its own share"
    assert [one["features"] > 0 for one in seen] == [True] + [False] * (ranks - 1), "rank 0 alone measures features"
    assert f"{ranks} ranks" in out
    assert out.count("epoch 1/2: loss") == out.count("wrote ") == 1
    with open(tmp_path / "observations/exp_observations.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


@pytest.fixture
def run_alone(call, monkeypatch):
    """run_alone(*arguments) pretrains in this process, with batch norm in eval mode."""
    freeze(monkeypatch.setattr)
    torch.set_num_threads(1)

    def run_alone(*arguments):
        outcome = call("pirl_stl_train_test", *arguments)
        assert outcome.status == 0, outcome.err

    return run_alone


def same_rows(a, b):
    for one, other in zip(a["rows"], b["rows"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert one["train_acc"] == other["train_acc"]
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
    return True


FROZEN = ("--lr", 0.01, "--knn-every", 0)


def test_two_ranks_end_where_one_process_ends(run_alone, tiny, tmp_path):
    """With batch norm in eval mode."""
    flags = (*tiny, *FROZEN, "--batch-negatives", "False", "--positive", "pair")
    run_alone(*flags, "--experiment-name", "one")
    run(2, WORKER, tmp_path, "frozen", *flags, "--experiment-name", "two")
    one, two = weights(tmp_path, "one"), weights(tmp_path, "two")
    assert difference(one, two) < 1e-5
    assert same_rows(one, two)


@pytest.mark.slow
def test_a_run_goes_from_two_ranks_to_one_and_back(run_alone, tiny, tmp_path):
    """With batch norm in eval mode and the whole batch's vectors as negatives: as if it had been on one throughout."""
    flags = (*tiny, *FROZEN, "--batch-negatives", "True", "--tmax-for-cos-decay", 3)
    run_alone(*flags, "--epochs", 3, "--experiment-name", "one")
    flags = (*flags, "--experiment-name", "changing", "--resume")
    run(2, WORKER, tmp_path, "frozen", *flags, "--epochs", 1)
    run_alone(*flags, "--epochs", 2)
    run(2, WORKER, tmp_path, "frozen", *flags, "--epochs", 3)
    one, changing = weights(tmp_path, "one"), weights(tmp_path, "changing")
    assert difference(one, changing) < 1e-5
    assert same_rows(one, changing)


@pytest.fixture
def endless(tiny, tmp_path):
    """Two ranks in the first steps of a training that will not end by itself; an epoch takes 5 s."""
    arguments = (*tiny, "--epochs", 500, "--only-train", "--batch-size", 4, "--checkpoint-minutes", 0)
    arguments = (*arguments, "--experiment-name", "exp", "--knn-every", 0)
    process = launch(2, WORKER, tmp_path, "slow", *arguments)
    deadline = time.monotonic() + 90
    while not (tmp_path / "weights/exp.ckpt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def pid_of_rank(process, rank):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if parent == str(process.pid) and f"\0RANK={rank}\0".encode() in (folder / "environ").read_bytes():
                return int(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            pass
    raise AssertionError("no such rank")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(endless, rank):
    os.kill(pid_of_rank(endless, rank), signal.SIGKILL)
    status, _, err = finish(endless, 30)
    assert status != 0
    assert len(error_lines(err)) == 1, err
    assert "another rank" in error_lines(err)[0]


@pytest.mark.slow
def test_sigterm_to_all_processes_checkpoints(endless, tiny, tmp_path):
    """To ranks and launcher, which passes it on to the ranks, as when a scheduler stops a job."""
    for pid in (*(pid_of_rank(endless, rank) for rank in (0, 1)), endless.pid):
        os.kill(pid, signal.SIGTERM)
    _, out, err = finish(endless, 60)
    assert "stopped in epoch" in out, err
    state = torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)
    assert not error_lines(err)
    epochs, step = state["progress"]["epoch"], state["progress"]["step"]
    assert f"stopped in epoch {epochs} after step {step}" in out
    arguments = (*tiny, "--epochs", epochs, "--only-train", "--batch-size", 4)
    arguments = (*arguments, "--experiment-name", "exp", "--knn-every", 0)
    out = run(2, WORKER, tmp_path, "plain", *arguments, "--resume")
    assert "going on from" in out
    assert f"epoch {epochs}/{epochs}: loss" in out


def test_shares_of_less_than_two_images_are_refused(monkeypatch):
    """Their batch norm has no statistics. A last, smaller batch may give such shares: see above."""
    for ranks, size, accepted in ((2, 2, False), (2, 15, False), (2, 4, True), (4, 4, False), (4, 8, True)):
        monkeypatch.setattr(rh, "RANKS", ranks)
        args = pirl.parse_args(["--batch-size", str(size)])
        if accepted:
            pirl.check(args, 70)
        else:
            with pytest.raises(rh.UserError, match=f"--batch-size {size} .*multiple"):
                pirl.check(args, 70)


def test_an_error_on_one_rank_ends_all_with_its_line(tiny, tmp_path):
    status, _, err = finish(launch(2, WORKER, tmp_path, "one-fails", *tiny, "--experiment-name", "exp"), 60)
    assert status != 0
    assert error_lines(err) == ["error: rank 1 has a problem of its own: solve it"]


@pytest.mark.slow
def test_ranks_that_see_different_images_are_refused(tiny, tmp_path):
    status, _, err = finish(launch(2, WORKER, tmp_path, "other-images", *tiny, "--experiment-name", "exp"), 60)
    assert status != 0
    assert len(error_lines(err)) == 1, err
    assert "--data-dir" in error_lines(err)[0]


@pytest.mark.slow
def test_bad_arguments_give_one_line(tiny):
    """From within the job; what the parser refuses is the other test's."""
    status, _, err = finish(launch(2, ROOT / "pirl_stl_train_test.py", *tiny, "--data-dir", "nowhere"), 60)
    assert status != 0
    assert len(error_lines(err)) == 1, err
    assert "nowhere" in err


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_the_parser_speaks_on_rank_0_alone(monkeypatch, capsys, rank, lines):
    monkeypatch.setattr(rh, "RANK", rank)
    with pytest.raises(SystemExit) as end:
        pirl.parse_args(["--batch-size", "0"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == lines
    assert ("--batch-size" in err) == bool(lines)


@pytest.mark.slow
def test_fine_tuning_refuses_several_ranks(tiny, tmp_path):
    status, out, err = finish(launch(2, ROOT / "train_stl_after_ssl.py", *tiny), 60)
    assert status != 0
    assert not out
    assert len(error_lines(err)) == 1, err
    assert "one process" in error_lines(err)[0]
    assert "without torchrun" in error_lines(err)[0]
    assert not (tmp_path / "weights").exists()
