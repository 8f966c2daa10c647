"""Several ranks: what each does alone, and the training of all of them on gloo.

torchrun starts rank_worker.py: the same training as on one process, and no rank is
left behind.
"""

import importlib.util
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_raw
from rank_worker import frozen
from records import PARTS, interrupted, weights
from torch import distributed

import pirl_stl_train_test
import stl10_data_load
from runtime import ranks
from runtime.errors import UserError
from runtime.ranks import compare_ranks

# ---- One rank of several -------------------------------------------------------------
LAUNCHER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
ON_A_NODE = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


def places(monkeypatch, environment):
    """What ranks.py says of a process that is started with these of the variables."""
    for name in LAUNCHER | ON_A_NODE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    specification = importlib.util.spec_from_file_location("again", ranks.__file__)
    again = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(again)
    return again.RANK, again.WORLD_SIZE, again.LOCAL_RANK, again.LOCAL_WORLD_SIZE


def test_a_launcher_sets_all_of_its_variables(monkeypatch):
    """Clusters leave some of them behind, which start nothing."""
    assert places(monkeypatch, LAUNCHER | ON_A_NODE) == (1, 2, 3, 4)
    assert places(monkeypatch, LAUNCHER) == (1, 2, 0, 1)
    for missing in LAUNCHER:
        some = LAUNCHER | ON_A_NODE
        del some[missing]
        assert places(monkeypatch, some) == (0, 1, 0, 1), missing


def test_how_ranks_meet_and_take_leave(monkeypatch):
    """Without a barrier, the interpreter's end may hang in a closed connection."""
    met = []

    def init_process_group(backend, device_id=None):
        met.append((backend, device_id))

    monkeypatch.setattr(distributed, "init_process_group", init_process_group)
    card = torch.device("cuda", 1)
    ranks.init_distributed(card)
    assert met == [], "one process has nobody to meet"
    monkeypatch.setattr(ranks, "WORLD_SIZE", 2)
    ranks.init_distributed(card)
    ranks.init_distributed(torch.device("cpu"))
    assert met == [("cpu:gloo,cuda:nccl", card), ("gloo", None)]

    ranks.cleanup_distributed()  # there is nothing to close
    left = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(distributed, name, lambda name=name: left.append(name))
    ranks.cleanup_distributed()
    assert left == ["barrier", "destroy_process_group"]


def test_rows_are_gathered_in_the_batch_s_order(monkeypatch):
    """Ranks with two rows, one and none; the last one's row is a stand-in.

    all_reduce() would sum what the ranks give it: here the test does. Gradients flow
    back to the rows.
    """
    rows = [
        torch.tensor([[1.0, 2], [3, 4]], requires_grad=True),
        torch.tensor([[5.0, 6]], requires_grad=True),
        torch.ones(1, 2, requires_grad=True),
    ]
    monkeypatch.setattr(ranks, "all_reduce", lambda tensor: tensor)
    given = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        given.append(ranks.gather_rows(rows[rank], [2, 1, 0]))
    assert sum(given).tolist() == [[1, 2], [3, 4], [5, 6]]
    sum(given).sum().backward()
    gradients = [part.grad.tolist() for part in rows]
    assert gradients == [[[1, 1], [1, 1]], [[1, 1]], [[0, 0]]]


def test_ranks_must_have_the_same_flags_and_files(monkeypatch):
    ours = {"lr": 0.1, "batch_size": 16, "model_type": "res18"}
    others = {"lr": 0.2, "batch_size": 32, "model_type": "res18"}
    everyone = []

    def all_gather_object(gathered, own):
        # As the last of three ranks.
        gathered[:] = [*everyone, own]

    compare_ranks(ours, 1)  # one rank, nothing to compare
    monkeypatch.setattr(distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr(ranks, "WORLD_SIZE", 3)

    same = (ours, (1, 2))
    everyone[:] = [same, same]
    compare_ranks(ours, 1, 2)
    # Other flags may be why other files were read: they come first.
    flags = r"^the ranks have different flags \(--lr, --batch-size\): start all"
    files = "different files: give a --data-dir"
    for other, problem in (
        ((others, (1, 2)), flags),
        ((others, (1, 3)), flags),
        ((ours, (1, 3)), files),
        ((ours, (2, 1)), files),
    ):
        for everyone[:] in ([same, other], [other, other]):
            with pytest.raises(UserError, match=problem):
                compare_ranks(ours, 1, 2)


def test_flags_are_compared_before_the_network_is_made(call, tiny, monkeypatch):
    """Else torch would be first, by a traceback. Places may differ between nodes."""

    def compare(settings):
        # Ranks that differ in these would wait for one another for ever.
        same_on_all = {"images_on", "experiment_name", "resume", "model_type"}
        assert same_on_all <= settings.keys()
        places = {"data_dir", "weights_dir", "observations_dir", "device"}
        assert not places & settings.keys()
        raise UserError("the ranks differ", "see")

    monkeypatch.setattr(pirl_stl_train_test, "compare_ranks", compare)
    monkeypatch.setattr(pirl_stl_train_test, "PretrainingTrainer", interrupted)
    outcome = call("pirl_stl_train_test", *tiny)
    assert outcome.is_one_line_error("the ranks differ")


def test_each_rank_needs_the_same_number_of_images_two_or_more(monkeypatch):
    """Batch norm has no statistics of one. A last, smaller batch may give fewer."""
    for count, accepted, refused in ((2, (4, 6), (2, 15)), (4, (8, 12), (4, 10))):
        monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", count)
        args = pirl_stl_train_test.make_parser().parse_args([])
        for args.batch_size in accepted:
            pirl_stl_train_test.check_after_loading(args, 70)
        for args.batch_size in refused:
            with pytest.raises(
                UserError, match=f"--batch-size {args.batch_size} .*mul"
            ):
                pirl_stl_train_test.check_after_loading(args, 70)


# ---- Jobs ----------------------------------------------------------------------------
def launch(count, what, *arguments):
    """A job of so many ranks; what: names of rank_worker.py, with commas."""
    # fmt: off
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--standalone", "--nproc-per-node", count,
        ROOT / "tests/rank_worker.py", what, *arguments,
        "--experiment-name", "exp",
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


def finish(process, seconds=400):
    """(status, standard output, standard error) of a job."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def error_lines(err):
    """Every rank prints its own, with its number; the launcher prints much more."""
    return [line for line in err.splitlines() if line.startswith("error")]


def test_three_ranks_and_one_process_end_where_one_process_ends(
    call, tiny, tmp_path, monkeypatch
):
    """A signal that one rank alone gets ends all of them, with a checkpoint.

    In the last step of an epoch, the ranks have one image, one and none; of the last
    validation batch 5, 5 and 4. Batch norm is in eval mode, and gradients are too short
    to be clipped: that would hide a factor.
    """
    write_raw(tmp_path, {"train": 11, "test": 10, "unlabelled": 106})
    data = tmp_path / "data"
    stl10_data_load.write_split(tmp_path / "stl10_binary", data, "unlabelled")
    # fmt: off
    uneven = [
        *tiny, "--data-dir", data, "--batch-size", 18, "--knn-every", 0,
        "--temp-parameter", 20, "--lr", 2, "--warmup-steps", 0, "--positive", "pair",
    ]
    # fmt: on
    status, out, err = finish(launch(3, "frozen,signal_in_epoch_2", *uneven))
    assert status != 0
    assert not error_lines(err)
    stopped = "stopped in epoch 2 after step 2: continue with --resume"
    assert out.count(stopped) == 1, err
    assert "3 ranks" in out
    assert out.count("epoch 1/2: loss") == 1

    frozen(monkeypatch.setattr)
    torch.set_num_threads(1)
    for name, resume in (("exp", "True"), ("alone", "False")):
        flags = (*uneven, "--experiment-name", name, "--resume", resume)
        outcome = call("pirl_stl_train_test", *flags)
        assert outcome.status == 0, outcome.err
    one = weights(tmp_path, "alone")
    three = weights(tmp_path, "exp")
    for part in PARTS:
        for name, value in one[part].items():
            if "num_batches" not in name:
                torch.testing.assert_close(
                    three[part][name], value, rtol=0, atol=1e-5, msg=name
                )
    for a, b in zip(one["history"], three["history"], strict=True):
        assert a["train_acc"] == b["train_acc"]
        assert a["val_acc"] == b["val_acc"]
        for column in ("train_loss", "val_loss"):
            assert a[column] == pytest.approx(b[column], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "flags", "lines"),
    [
        ("one_fails", (), {1: "rank 1 has a problem of its own: solve it"}),
        ("one_is_killed", (), {}),
        ("other_images", (), {0: "different files: ", 1: "different files: "}),
        ("", ("--data-dir", "nowhere"), {0: "nowhere", 1: "nowhere"}),
    ],
)
def test_an_error_ends_all_ranks_with_a_line_of_each(
    tiny, tmp_path, what, flags, lines
):
    """The launcher may end a rank before it has spoken."""
    status, _, err = finish(launch(2, what, *tiny, *flags))
    assert status != 0
    spoken = error_lines(err)
    speakers = [line.split(": ")[0] for line in spoken]
    assert len(set(speakers)) == len(speakers) > 0, err
    for rank in (0, 1):
        expected = lines.get(rank, "another rank of this job has ended")
        for line in spoken:
            if line.startswith(f"error (rank {rank}): "):
                assert expected in line, err
    if what == "one_fails":
        assert "error (rank 1)" in speakers
