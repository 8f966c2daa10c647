"""Pretraining as a user sees it: files, seeds, resume, statistics, learning."""

import colorsys
import csv
import os
import re
import shutil
import signal
import time

import run_helpers as rh
import numpy as np
import pytest
import torch
import torchvision
from conftest import COUNTS, start_of
from PIL import Image

import models
import pirl_stl_train_test as pirl
from models import PIRL

CHANGING = {"images_per_second", "seconds"}  # columns that depend on the machine's speed


def weights(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


def checkpoint(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.ckpt", weights_only=True)


def rows(tmp_path, name):
    with open(tmp_path / f"observations/{name}_observations.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CHANGING} for row in csv.DictReader(file)]


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def parts_of(state):
    return {name: state[name] for name in ("trunk", "head_f", "head_g")}


def signal_in_step(patch, number, which):
    """The process gets a signal within its step number `which`."""
    step, seen = pirl.Pretraining.step, []

    def disturbed(*arguments):
        seen.append(arguments)
        if len(seen) == which:
            os.kill(os.getpid(), number)
        return step(*arguments)

    patch.setattr(pirl.Pretraining, "step", disturbed)


def interrupted(*arguments):
    raise KeyboardInterrupt


class Clock:
    """In the place of `time` in run_helpers.py: each look at it comes `tick` seconds later."""

    def __init__(self, tick):
        self.now, self.tick = 0, tick

    def monotonic(self):
        self.now += self.tick
        return self.now


@pytest.mark.full_trunk
def test_run_writes_what_the_readme_says(call, tiny, tmp_path):
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp")
    assert outcome.status == 0, outcome.err
    assert "70 training images" in outcome.out
    assert "69 negatives (all other training images" in outcome.out
    assert outcome.err == ""
    state = weights(tmp_path, "exp")
    missing, unexpected = torchvision.models.resnet18().load_state_dict(state["trunk"], strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    assert state["settings"]["batch_size"] == 16
    table = rows(tmp_path, "exp")
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert {"train_loss", "val_loss", "train_acc", "val_acc", "learning_rate"} <= set(table[0])
    assert all(float(row["val_loss"]) > 0 for row in table)
    left = {file.name for file in (tmp_path / "weights").iterdir()}
    assert left == {"exp.pt", "exp.ckpt", ".exp.run.lock"}


@pytest.mark.parametrize(("model", "d"), [("res18", 512), ("res34", 512), ("res50", 2048)])
@pytest.mark.parametrize("non_linear", [False, True])
@pytest.mark.full_trunk
def test_networks(model, d, non_linear):
    network = PIRL(model, non_linear).eval()
    features = network.trunk(torch.randn(2, 3, 48, 48))
    assert features.shape == (2, d)
    f, g = network(torch.randn(2, 3, 48, 48), torch.randn(18, 3, 15, 15))
    assert f.shape == g.shape == (2, 128)
    reference = getattr(torchvision.models, {"res18": "resnet18", "res34": "resnet34", "res50": "resnet50"}[model])()
    missing, unexpected = reference.load_state_dict(network.trunk.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    linear = [m for m in network.head_f.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == (2 if non_linear else 1)


def test_patches_are_concatenated_in_presentation_order():
    network = PIRL("res18").eval()
    patches = torch.randn(18, 3, 15, 15)
    with torch.no_grad():
        _, g = network(torch.randn(2, 3, 48, 48), patches)
        with_batch_statistics = PIRL("res18").trunk
        with_batch_statistics.load_state_dict(network.trunk.state_dict())
        features = with_batch_statistics.train()(patches)
        for image in range(2):
            each = [network.head_g.patch(features[image * 9 + p]) for p in range(9)]
            expected = network.head_g.together(torch.cat(each))
            torch.testing.assert_close(g[image], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_those_of_whole_images(training):
    """A pass over images and patches leaves the statistics that a pass over the images alone leaves."""
    both, alone = PIRL("res18").train(training), PIRL("res18")
    alone.load_state_dict(both.state_dict())
    alone.train(training)
    images, patches = torch.randn(4, 3, 48, 48), 3 + 2 * torch.randn(36, 3, 15, 15)
    with torch.no_grad():
        both(images, patches)
        alone.trunk(images)
    for (name, a), (_, b) in zip(both.trunk.state_dict().items(), alone.trunk.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert both.trunk.training == training
    assert both.trunk.bn1.track_running_stats


def test_same_seed_same_weights(call, tiny, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert call("pirl_stl_train_test", *tiny, "--experiment-name", name, "--seed", seed).status == 0
    a, b, c = (parts_of(weights(tmp_path, name)) for name in "abc")
    assert same(a, b)
    assert not same(a, c)
    assert rows(tmp_path, "a") == rows(tmp_path, "b")


def test_resume_is_exact_from_any_step(call, tiny, tmp_path, monkeypatch):
    """5 steps per epoch: stopped in an epoch, at the end of its training and in the next."""
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "whole").status == 0
    for number, which in ((signal.SIGTERM, 1), (signal.SIGINT, 4), (signal.SIGTERM, 5), (signal.SIGTERM, 7)):
        name = f"halves_{which}"
        with monkeypatch.context() as patch:
            signal_in_step(patch, number, which)
            outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", name)
        assert outcome.status == 128 + number
        assert "--resume True" in outcome.out
        where = checkpoint(tmp_path, name)["progress"]
        assert (where["epoch"] - 1) * 5 + where["step"] == which
        outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", name, "--resume")
        assert outcome.status == 0, outcome.err
        assert same(parts_of(weights(tmp_path, "whole")), parts_of(weights(tmp_path, name))), which
        assert rows(tmp_path, "whole") == rows(tmp_path, name)
        assert same(*(checkpoint(tmp_path, n)["run"] for n in ("whole", name)))


@pytest.mark.parametrize("function", ["validate", "neighbours"])
def test_a_kill_after_an_epoch_s_training_loses_nothing(call, tiny, tmp_path, monkeypatch, function):
    """The checkpoint is written before validation and the nearest neighbours; clocks pass 20 s at every look."""
    flags = (*tiny, "--knn-every", 1, "--experiment-name")
    assert call("pirl_stl_train_test", *flags, "whole").status == 0
    saved, save = [], rh.Experiment.save
    with monkeypatch.context() as patch:
        patch.setattr(rh, "time", Clock(20))
        patch.setattr(pirl, function, interrupted)
        patch.setattr(rh.Experiment, "save", lambda *a, **k: saved.append(1) or save(*a, **k))
        assert call("pirl_stl_train_test", *flags, "killed").status == 130
    assert len(saved) == 1, "ten minutes have not passed within the epoch"
    assert checkpoint(tmp_path, "killed")["progress"]["step"] == 5
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        assert call("pirl_stl_train_test", *flags, "killed", "--resume").status == 143
    assert checkpoint(tmp_path, "killed")["progress"]["epoch"] == 2, "no step of the first epoch was made again"
    assert call("pirl_stl_train_test", *flags, "killed", "--resume").status == 0
    assert same(*(parts_of(weights(tmp_path, name)) for name in ("whole", "killed")))
    assert rows(tmp_path, "whole") == rows(tmp_path, "killed")


@pytest.mark.parametrize(("minutes", "tick", "count"), [(10, 1, 2), (10, 20, 3), (0, 1, 11), (1.5, 100, 11)])
def test_when_checkpoints_are_written(call, tiny, monkeypatch, minutes, tick, count):
    """Every so many minutes, at an epoch's end unless the last is younger than one, and at the end of the run."""
    saved, save = [], rh.Experiment.save
    monkeypatch.setattr(rh, "time", Clock(tick))
    monkeypatch.setattr(rh.Experiment, "save", lambda *a, **k: saved.append(1) or save(*a, **k))
    assert call("pirl_stl_train_test", *tiny, "--checkpoint-minutes", minutes).status == 0
    assert len(saved) == count


def test_a_kill_within_the_first_minute(call, tiny, tmp_path, monkeypatch):
    """Once there is a row in the CSV there is a checkpoint, or the name would be taken by a run that cannot go on."""
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "whole").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(pirl, "report", interrupted)
        assert call("pirl_stl_train_test", *tiny, "--experiment-name", "killed").status == 130
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "killed", "--resume")
    assert outcome.status == 0, outcome.err
    assert same(*(parts_of(weights(tmp_path, name)) for name in ("whole", "killed")))


def test_a_damaged_checkpoint_is_refused_and_kept(call, tiny, tmp_path):
    flags = (*tiny, "--experiment-name", "hurt")
    assert call("pirl_stl_train_test", *flags).status == 0
    file = tmp_path / "weights/hurt.ckpt"
    whole = file.read_bytes()
    for hurt in (whole[:-1000], whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :], b""):
        file.write_bytes(hurt)
        assert call("pirl_stl_train_test", *flags, "--resume").is_one_line_error("hurt.ckpt", "another copy")
        assert file.read_bytes() == hurt
    file.write_bytes(whole)
    assert call("pirl_stl_train_test", *flags, "--resume").status == 0


def test_a_finished_run_resumed_changes_nothing(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").status == 0
    before = parts_of(weights(tmp_path, "exp")), rows(tmp_path, "exp")
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", "--resume").status == 0
    assert same(before, (parts_of(weights(tmp_path, "exp")), rows(tmp_path, "exp")))


def test_resume_without_a_checkpoint_begins_and_says_so(call, tiny):
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "new", "--resume")
    assert outcome.status == 0
    assert "from the beginning" in outcome.out


def test_without_a_checkpoint_resume_overwrites_nothing(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").status == 0
    for file in (tmp_path / "weights").glob("exp*.ckpt"):
        file.unlink()
    before = (tmp_path / "weights/exp.pt").read_bytes()
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", "--resume").is_one_line_error("exp.pt")
    assert (tmp_path / "weights/exp.pt").read_bytes() == before


def test_resume_with_other_settings_lists_them(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").status == 0
    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    changed = ("--batch-size", 8, "--seed", 5, "--loss", "nce")
    outcome = call("pirl_stl_train_test", *tiny, *changed, "--experiment-name", "exp", "--resume")
    assert outcome.is_one_line_error(
        "--batch-size was 16, is 8", "--seed was 0, is 5", "--loss was modified-nce, is nce"
    )
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before


def test_messages_name_no_flag_that_was_not_given(call, tiny):
    """A changed --epochs moves --tmax-for-cos-decay too, but not in a message."""
    flags = (*tiny, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *flags).status == 0
    outcome = call("pirl_stl_train_test", *flags, "--epochs", 3, "--only-train", "--resume")
    assert outcome.is_one_line_error("--only-train was False, is True")
    assert re.findall(r"--[a-z-]+ was", outcome.err) == ["--only-train was"]
    outcome = call("pirl_stl_train_test", *flags, "--epochs", 3, "--resume")
    assert outcome.status == 0
    assert not re.findall(r"--[a-z-]+ was", outcome.out)


def test_more_epochs_for_a_finished_run(call, tiny, tmp_path):
    """The learning rate stays at its end; with --tmax-for-cos-decay given at first, it is as if made in one go."""
    flags = (*tiny, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *flags).status == 0
    before = weights(tmp_path, "exp")
    outcome = call("pirl_stl_train_test", *flags, "--epochs", 3, "--resume")
    assert outcome.status == 0, outcome.err
    assert "from the end of epoch 2 on" in outcome.out
    assert [float(row["learning_rate"]) for row in rows(tmp_path, "exp")][2] == 0
    assert torch.equal(before["trunk"]["conv1.weight"], weights(tmp_path, "exp")["trunk"]["conv1.weight"])

    flags = (*tiny, "--tmax-for-cos-decay", 3, "--experiment-name")
    assert call("pirl_stl_train_test", *flags, "whole", "--epochs", 3).status == 0
    assert call("pirl_stl_train_test", *flags, "longer").status == 0
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "longer", "--epochs", 3, "--resume")
    assert outcome.status == 0, outcome.err
    assert same(*(parts_of(weights(tmp_path, name)) for name in ("whole", "longer")))


def test_precision_is_stored_resolved_and_kept(call, tiny, tmp_path, monkeypatch):
    """auto is what the machine has where the run begins; going on elsewhere does not change the arithmetic unsaid."""
    flags = (*tiny, "--experiment-name", "exp", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(rh, "choose_precision", lambda args, device: "bf16")  # as on most GPUs
        assert call("pirl_stl_train_test", *flags, "--epochs", 1).status == 0
    assert weights(tmp_path, "exp")["settings"]["precision"] == "bf16"
    for epochs, given, precision in ((2, (), "bf16"), (3, ("--precision", "fp32"), "fp32")):
        outcome = call("pirl_stl_train_test", *flags, "--epochs", epochs, *given)
        assert outcome.status == 0, outcome.err
        assert ("--precision was bf16, is fp32" in outcome.out) == bool(given)
        assert weights(tmp_path, "exp")["settings"]["precision"] == precision
    assert rh.choose_precision(pirl.parse_args([]), torch.device("cpu")) == "fp32"


def test_a_line_a_minute_where_there_is_no_terminal(call, tiny, monkeypatch):
    bar, clock = rh.tqdm, Clock(1)

    def hurried(*arguments, **options):
        assert options["mininterval"] == options["delay"] == 60
        return bar(*arguments, **options | {"mininterval": 0, "delay": 0, "miniters": 1})

    monkeypatch.setattr(rh, "tqdm", hurried)
    monkeypatch.setattr(rh, "time", clock)
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp")
    assert outcome.err == ""
    lines = [line for line in outcome.out.splitlines() if line.startswith("epoch 1:")]
    assert len(lines) >= 5
    assert "images" in lines[-1]
    assert "loss" in lines[-1]
    assert len([line for line in outcome.out.splitlines() if line.startswith("epoch 1/2: loss")]) == 1
    assert "\r" not in outcome.out


def test_warm_start(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "first").status == 0
    # one more epoch under a name of its own, with a learning rate of 0: the weights are the first run's
    other = (*tiny, "--experiment-name", "second", "--warm-start", "--pirl-model-name", "first", "--cont-epoch", 2)
    outcome = call("pirl_stl_train_test", *other, "--lr", 0)
    assert outcome.status == 0, outcome.err
    first, second = (weights(tmp_path, name) for name in ("first", "second"))
    assert same(first["head_g"], second["head_g"])
    assert torch.equal(first["trunk"]["conv1.weight"], second["trunk"]["conv1.weight"])
    assert [row["epoch"] for row in rows(tmp_path, "second")] == ["2"]
    # and under its own name: the CSV goes on
    before = rows(tmp_path, "first")[:1]
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "first", "--warm-start", "--cont-epoch", 2)
    assert outcome.status == 0, outcome.err
    assert [row["epoch"] for row in rows(tmp_path, "first")] == ["1", "2"]
    assert rows(tmp_path, "first")[:1] == before
    after = weights(tmp_path, "first")
    assert not same(first["trunk"], after["trunk"])
    assert all(value is None or type(value) in (int, float) for row in after["rows"] for value in row.values())
    assert [row["epoch"] for row in after["rows"]] == [1, 2]


def earlier_run_s(tmp_path):
    """A copy of the files of the run `exp`, and a function that brings them back."""
    saved = shutil.copytree(tmp_path / "weights", tmp_path / "saved")
    return lambda: [shutil.copy(file, tmp_path / "weights") for file in saved.glob("exp.*")]


WARM = ("--warm-start", "--cont-epoch", 2)


def test_a_warm_started_run_resumes_itself(call, tiny, tmp_path, monkeypatch):
    """Killed before or after its first step, it goes on from its own beginning, without the flags of a warm start."""
    flags = (*tiny, "--lr", 0.1, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *flags).status == 0
    bring_back = earlier_run_s(tmp_path)
    assert call("pirl_stl_train_test", *flags, *WARM).status == 0
    whole = weights(tmp_path, "exp")
    for killed in ("before", "after"):
        bring_back()
        with monkeypatch.context() as patch:
            if killed == "before":
                patch.setattr(pirl.Pretraining, "step", interrupted)
            else:
                signal_in_step(patch, signal.SIGINT, 1)
            assert call("pirl_stl_train_test", *flags, *WARM).status == 130
        outcome = call("pirl_stl_train_test", *flags, "--resume")
        assert outcome.status == 0, outcome.err
        assert same(parts_of(whole), parts_of(weights(tmp_path, "exp")))
        assert [row["epoch"] for row in rows(tmp_path, "exp")] == ["1", "2"]
        assert weights(tmp_path, "exp")["settings"]["warm_start"] is True


def test_a_warm_start_does_not_resume_the_run_before_it(call, tiny, tmp_path, monkeypatch):
    """Killed before it has written anything, --resume finds the earlier run's checkpoint, which is not its own."""
    flags = (*tiny, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *flags).status == 0
    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(models, "read_weights", interrupted)
        assert call("pirl_stl_train_test", *flags, *WARM).status == 130
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before
    outcome = call("pirl_stl_train_test", *flags, *WARM, "--resume")
    assert outcome.is_one_line_error("--warm-start was False, is True")


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "epoch\n\xff\n"])
def test_a_warm_start_needs_no_csv(call, tiny, tmp_path, content):
    """The rows before it are those of the model's own record, whatever has become of the CSV."""
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    before, path = rows(tmp_path, "exp"), tmp_path / "observations/exp_observations.csv"
    path.write_bytes(content.encode("latin1"))
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", *WARM)
    assert outcome.status == 0, outcome.err
    assert [row["epoch"] for row in rows(tmp_path, "exp")] == ["1", "2"]
    assert rows(tmp_path, "exp")[:1] == before


@pytest.mark.parametrize(
    "flags",
    [
        ("--only-train",),
        ("--loss", "nce", "--non-linear-head", "yes"),
        ("--positive", "pair", "--count-negatives", 20),
        ("--precision", "bf16", "--image-size", 55, "--beta", 0, "--loss-weight", 0.3, "--tmax-for-cos-decay", 5),
        ("--batch-negatives", "no", "--zero-init", "False", "--crop-area", 0.5),
        ("--colour-strength", 0, "--deterministic"),
        ("--batch-size", 23, "--warmup-steps", 0, "--temp-parameter", 0.01),
    ],
)
def test_flags(call, tiny, tmp_path, flags):
    outcome = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp", *flags)
    assert outcome.status == 0, outcome.err
    bank = checkpoint(tmp_path, "exp")["run"]["bank"]["vectors"]
    assert bank.dtype == torch.float32
    assert len(bank) == COUNTS["unlabelled"]
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(len(bank)))
    if flags[0] == "--only-train":
        assert f"{COUNTS['unlabelled']} training images" in outcome.out
        assert rows(tmp_path, "exp")[0]["val_loss"] == ""


def test_at_most_so_many_images_validate(tiny, monkeypatch):
    monkeypatch.setattr(pirl.dh, "VALIDATION_IMAGES", 7)
    run, all_of_them = start_of(tiny), start_of([*tiny, "--only-train"])
    assert (run.train_count, len(run.images)) == (70, 77)
    assert all_of_them.train_count == len(all_of_them.images) == 100
    for images in (run.images, all_of_them.images):
        assert len({image.numpy().tobytes() for image in images}) == len(images), "each of them once"


def test_bf16_on_cpus(tiny):
    """The gradients are those of float32, where patches are 1 × 1 in layer3 and layer4, too."""
    for side in (36, 64):
        gradients = []
        for precision in ("fp32", "bf16"):
            run = start_of([*tiny, "--precision", precision, "--image-size", side])
            run.step(torch.arange(16), run.view_draws(1), 1, 0)
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()]))
        assert torch.cosine_similarity(*gradients, dim=0) > 0.95  # bf16 has 8 bits


def rates_of(*flags, steps=5):
    args = pirl.parse_args(["--epochs", "10", "--lr", "0.4", "--warmup-steps", "10", *flags])
    pirl.settle(args, torch.device("cpu"), None)
    epochs = range(args.cont_epoch, args.epochs + 1)
    return [pirl.learning_rate(args, epoch, step, steps) for epoch in epochs for step in range(steps)]


def test_learning_rate_schedule():
    rates = rates_of()
    assert rates[0] == pytest.approx(0.04, rel=1e-3)
    assert rates[25] == pytest.approx(0.2)  # half-way down the cosine
    assert rates[-1] < 0.001
    assert max(rates) == max(rates[9:11])
    reference = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=10)
    for epoch in range(10):
        if epoch >= 2:
            assert rates[5 * epoch] == pytest.approx(reference.param_groups[0]["lr"])
        reference.step()
        cosine.step()


def test_the_learning_rate_stays_at_its_end():
    rates = rates_of("--tmax-for-cos-decay", "6")
    assert rates[29] > 0
    assert rates[30:] == [0] * 20
    assert rates[:30] == [pytest.approx(rate) for rate in rates_of("--tmax-for-cos-decay", "6", "--epochs", "6")]


def test_a_warm_start_has_a_warm_up():
    plain, warm = rates_of(), rates_of("--warm-start", "True", "--cont-epoch", "4")
    assert warm == [pytest.approx(rate * min(1, (i + 1) / 10)) for i, rate in enumerate(plain[15:])]


def test_compiled_code_serves_full_batches_alone(tiny, data_dir):
    """Of a 16, a smaller last batch, validation and the monitor only the first: once for images, once for patches."""
    run, compiled = start_of(tiny), []

    def backend(graph, inputs):
        compiled.append([tuple(value.shape) for value in inputs if value.ndim == 4 and value.shape[1] == 3])
        return graph.forward

    run.model.trunk.compile(backend=backend, dynamic=False)
    draws, labelled = run.view_draws(1), pirl.load_monitor(run.args, run.device)
    try:
        for _ in range(2):
            for step, index in enumerate((torch.arange(16), torch.arange(16, 22), torch.arange(16, 32))):
                run.step(index, draws, 1, step)
            pirl.neighbours(run, labelled)
            pirl.validate(run, draws, 1)
    finally:
        torch._dynamo.reset()
    assert sorted(shape for shapes in compiled for shape in shapes if shape[0] in (16, 144)) == [
        (16, 3, 36, 36),
        (144, 3, 11, 11),
    ]
    assert len(compiled) == 2


def test_nothing_flows_into_the_bank(tiny):
    """Two steps: what the first has put into the bank is a negative of the second, and carries no gradient."""
    run = start_of(tiny)
    for step, index in enumerate(torch.arange(32).split(16)):
        run.step(index, run.view_draws(1), 1, step)
        assert not run.bank.vectors.requires_grad
        assert all(parameter.grad.abs().sum() > 0 for parameter in run.model.head_f.parameters())


def test_each_image_is_visited_once_per_epoch_in_another_order(call, tiny, monkeypatch, tmp_path):
    visited = []
    step = pirl.Pretraining.step
    monkeypatch.setattr(pirl.Pretraining, "step", lambda *a: visited.append(a[1]) or step(*a))
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "exp").status == 0
    first, second = torch.cat(visited[:5]), torch.cat(visited[5:])
    assert first.sort().values.equal(torch.arange(70))
    assert second.sort().values.equal(torch.arange(70))
    assert not first.equal(second)


def write_patterns(folder):
    """64 images to tell apart: eight hues by eight patterns of stripes and checks."""
    y, x = np.mgrid[:96, :96] / 96
    up, across, fine_up, fine_across = (np.sin(2 * np.pi * v) > 0 for v in (4 * x, 4 * y, 9 * x, 9 * y))
    slanted = np.sin(8 * np.pi * (x + y)) > 0
    patterns = [x < 2, up, across, up ^ across, fine_up, fine_across, fine_up ^ fine_across, slanted]
    folder.mkdir(parents=True)
    for i in range(64):
        light, dark = colorsys.hsv_to_rgb(i // 8 / 8, 1, 0.8), colorsys.hsv_to_rgb(i // 8 / 8 + 0.3, 0.3, 0.25)
        image = np.where(patterns[i % 8][..., None], light, dark)
        Image.fromarray((255 * image).astype(np.uint8)).save(folder / f"{i}.png")


@pytest.mark.slow
@pytest.mark.full_trunk
def test_overfits_64_images(call, tmp_path):
    """The pretext accuracy on 64 training images passes 90 % in under two minutes of two cores' time."""
    write_patterns(tmp_path / "data/unlabelled")
    started = time.process_time()
    outcome = call(
        *("pirl_stl_train_test", "--data-dir", tmp_path / "data", "--only-train", "--image-size", 48),
        *("--device", "cpu", "--batch-size", 64, "--epochs", 45, "--tmax-for-cos-decay", 70, "--lr", 0.7),
        *("--warmup-steps", 20, "--experiment-name", "overfit"),
        *("--beta", 0.99, "--loss-weight", 0.9),  # the same 64 targets throughout
        *("--weights-dir", tmp_path / "weights", "--observations-dir", tmp_path / "observations"),
    )
    assert outcome.status == 0, outcome.err
    assert max(float(row["train_acc"]) for row in rows(tmp_path, "overfit")) > 0.9
    assert time.process_time() - started < 240
