"""Several ranks on gloo, started by torchrun: the same training as on one process.

No rank is left behind.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from rank_worker import freeze
from records import weights

import pirl_stl_train_test
from runtime import ranks
from runtime.errors import UserError

WORKER = ROOT / "tests/rank_worker.py"


def launch(ranks, script, *arguments):
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--standalone", "--nproc-per-node", ranks, script, *arguments,
    ]
    # fmt: on
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process, seconds=120):
    """(status, standard output, standard error) of a job."""
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
    """Every rank prints its own, with its number; the launcher prints much more."""
    return [line for line in err.splitlines() if line.startswith("error")]


def every_line_says(err, *parts):
    """Whether at least one rank, and no rank more than once, has said all parts.

    The launcher may end a rank before it has spoken.
    """
    lines = error_lines(err)
    beginnings = [line.split(": ")[0] for line in lines]
    assert beginnings, err
    assert len(beginnings) == len(set(beginnings)), err
    assert set(beginnings) <= {"error (rank 0)", "error (rank 1)"}, err
    for line in lines:
        for part in parts:
            assert part in line, err
    return True


def difference(a, b):
    """The largest between two exported models' parameters."""
    differences = []
    for part in ("trunk", "head_f", "head_g"):
        for name, value in a[part].items():
            if "num_batches" not in name:
                other = b[part][name]
                differences.append((value.double() - other.double()).abs().max())
    return max(differences)


def same_history(a, b):
    for one, other in zip(a["history"], b["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert one["train_acc"] == other["train_acc"]
        assert one["val_loss"] == pytest.approx(other["val_loss"], abs=1e-5)
    return True


# ---- The same training ---------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "precision"), [(2, "bf16"), (4, "fp32")])
def test_every_image_once_and_all_ranks_equal_after_every_step(
    tiny, tmp_path, ranks, precision
):
    """70 images in batches of 16: the last has 6, which four ranks share unevenly."""
    flags = (*tiny, "--precision", precision, "--experiment-name", "exp")
    out = run(ranks, WORKER, tmp_path, "watch", *flags)

    seen = []
    for rank in range(ranks):
        text = (tmp_path / f"watch_{rank}.json").read_text()
        seen.append(json.loads(text))
    for epoch in (1, 2):
        images = []
        for one in seen:
            for step in one["steps"]:
                if step["epoch"] == epoch:
                    images += step["images"]
        assert sorted(images) == list(range(70))
    for one in seen:
        assert [step["equal"] for step in one["steps"]] == [True] * 10
        assert one["buffers_equal"], "after validation"
        assert all(one["buffers_equal"])
        assert not one["synchronised"], "each rank normalises its own share"
    measured = [one["features"] > 0 for one in seen]
    assert measured == [True] + [False] * (ranks - 1), "rank 0 alone measures features"

    assert f"{ranks} ranks" in out
    assert out.count("epoch 1/2: loss") == 1
    assert out.count("wrote ") == 1
    path = tmp_path / "observations/exp_observations.csv"
    with open(path, newline="") as file:
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


FROZEN = ("--lr", 0.01, "--knn-every", 0)


def test_two_ranks_end_where_one_process_ends(run_alone, tiny, tmp_path):
    """With batch norm in eval mode, and both views' vectors of the whole batch."""
    flags = (*tiny, *FROZEN, "--batch-negatives", "True", "--positive", "pair")
    run_alone(*flags, "--experiment-name", "one")
    run(2, WORKER, tmp_path, "frozen", *flags, "--experiment-name", "two")

    one = weights(tmp_path, "one")
    two = weights(tmp_path, "two")
    assert difference(one, two) < 1e-5
    assert same_history(one, two)


@pytest.mark.slow
def test_a_run_goes_from_two_ranks_to_one_and_back(run_alone, tiny, tmp_path):
    """As if it had been on one throughout.

    With batch norm in eval mode and the whole batch's vectors as negatives.
    """
    flags = (*tiny, *FROZEN, "--batch-negatives", "True", "--tmax-for-cos-decay", 3)
    run_alone(*flags, "--epochs", 3, "--experiment-name", "one")
    flags = (*flags, "--experiment-name", "changing", "--resume")
    run(2, WORKER, tmp_path, "frozen", *flags, "--epochs", 1)
    run_alone(*flags, "--epochs", 2)
    run(2, WORKER, tmp_path, "frozen", *flags, "--epochs", 3)

    one = weights(tmp_path, "one")
    changing = weights(tmp_path, "changing")
    assert difference(one, changing) < 1e-5
    assert same_history(one, changing)


def test_shares_of_less_than_two_images_are_refused(monkeypatch):
    """Their batch norm has no statistics.

    A last, smaller batch may give such shares: see above.
    """
    parser = pirl_stl_train_test.make_parser()
    for ranks, size, accepted in (
        (2, 2, False),
        (2, 15, False),
        (2, 4, True),
        (4, 4, False),
        (4, 8, True),
    ):
        monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", ranks)
        args = parser.parse_args(["--batch-size", str(size)])
        if accepted:
            pirl_stl_train_test.check_after_loading(args, 70)
        else:
            with pytest.raises(UserError, match=f"--batch-size {size} .*multiple"):
                pirl_stl_train_test.check_after_loading(args, 70)


# ---- The end of a job ----------------------------------------------------------------
# Without --epochs and the name.
ENDLESS = (
    *("--only-train", "--batch-size", 4, "--knn-every", 0),
    *("--experiment-name", "exp", "--checkpoint-minutes", 0),
)


@pytest.fixture
def endless(tiny, tmp_path):
    """Two ranks in the first steps of a training that will not end by itself.

    An epoch takes 5 s.
    """
    process = launch(2, WORKER, tmp_path, "slow", *tiny, *ENDLESS, "--epochs", 500)
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
    variable = f"\0RANK={rank}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_the_name = (folder / "stat").read_text().rsplit(")", 1)[1]
            parent = after_the_name.split()[1]
            environment = (folder / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if parent == str(process.pid) and variable in environment:
            return int(folder.name)
    raise AssertionError("no such rank")


def stop(process):
    """SIGTERM to the ranks and their launcher, which passes it on to the ranks.

    As when a scheduler stops a job.
    """
    pids = [pid_of_rank(process, rank) for rank in (0, 1)]
    for pid in (*pids, process.pid):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job(endless, rank):
    os.kill(pid_of_rank(endless, rank), signal.SIGKILL)
    status, _, err = finish(endless, 30)
    assert status != 0
    assert len(error_lines(err)) == 1, err
    assert error_lines(err)[0].startswith(f"error (rank {1 - rank}): another rank")


@pytest.mark.slow
def test_sigterm_to_all_processes_checkpoints(endless, tiny, tmp_path):
    stop(endless)
    _, out, err = finish(endless, 60)
    assert "stopped in epoch" in out, err
    state = torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)
    assert not error_lines(err)
    epoch = state["training"]["epoch"]
    step = state["training"]["step"]
    assert f"stopped in epoch {epoch} after step {step}" in out

    flags = (*tiny, *ENDLESS, "--epochs", epoch, "--resume")
    out = run(2, WORKER, tmp_path, "plain", *flags)
    assert "going on from" in out
    assert f"epoch {epoch}/{epoch}: loss" in out


@pytest.mark.slow
def test_sigterm_during_validation_checkpoints_after_it(tiny, tmp_path):
    flags = (*tiny, "--epochs", 500, "--knn-every", 0, "--experiment-name", "exp")
    process = launch(2, WORKER, tmp_path, "slow-validation", *flags)
    line = ""
    while "validating" not in line:
        line = process.stdout.readline()
        assert line, process.communicate()
    stop(process)

    _, out, err = finish(process, 60)
    assert not error_lines(err)
    assert "stopped after epoch 1: --resume True" in out, err
    state = torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)
    assert state["training"]["epoch"] == 2
    assert state["training"]["step"] == 0
    assert len(state["training"]["history"]) == 1


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_with_its_line(tiny, tmp_path):
    """The lines themselves are looked at in test_run_helpers.py."""
    flags = (*tiny, "--experiment-name", "exp")
    status, _, err = finish(launch(2, WORKER, tmp_path, "one-fails", *flags), 60)
    assert status != 0
    lines = error_lines(err)
    expected = "error (rank 1): rank 1 has a problem of its own: solve it"
    assert lines.count(expected) == 1, err
    lines.remove(expected)
    # Rank 0 either notices, or the launcher ends it first.
    assert len(lines) <= 1, err
    for line in lines:
        assert line.startswith("error (rank 0): another rank of this job has ended")


@pytest.mark.slow
def test_ranks_that_see_different_images_are_refused(tiny, tmp_path):
    flags = (*tiny, "--experiment-name", "exp")
    status, _, err = finish(launch(2, WORKER, tmp_path, "other-images", *flags), 60)
    assert status != 0
    assert every_line_says(err, "--data-dir", "different files")


@pytest.mark.slow
def test_bad_arguments_give_one_line_of_each_rank(tiny):
    """From within the job; what the parser refuses is the next test's."""
    script = ROOT / "pirl_stl_train_test.py"
    status, _, err = finish(launch(2, script, *tiny, "--data-dir", "nowhere"), 60)
    assert status != 0
    assert every_line_says(err, "nowhere")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_parser_speaks_on_every_rank(monkeypatch, capsys, rank):
    monkeypatch.setattr(ranks, "RANK", rank)
    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)
    parser = pirl_stl_train_test.make_parser()
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--batch-size", "0"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error (rank {rank}): ")
    assert "--batch-size" in err


@pytest.mark.slow
def test_fine_tuning_refuses_several_ranks(tiny, tmp_path):
    script = ROOT / "train_stl_after_ssl.py"
    status, out, err = finish(launch(2, script, *tiny), 60)
    assert status != 0
    assert not out
    assert every_line_says(err, "one process", "without torchrun")
    assert not (tmp_path / "weights").exists()
