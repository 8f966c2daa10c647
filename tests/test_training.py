"""Pretraining as a user sees it: files, seeds, resume, statistics, learning."""

import colorsys
import csv
import shutil
import time

import numpy as np
import pytest
import torch
import torchvision
from run_helpers import StopSignal
from conftest import COUNTS, start_of
from PIL import Image

import pirl_stl_train_test as pirl
from dataset_helpers import normalised
from models import PIRL

CHANGING = {"images_per_second", "seconds"}  # columns that depend on the machine's speed


def weights(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


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
    assert left == {"exp.pt", "exp.ckpt", "exp.previous.ckpt", ".exp.run.lock"}


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
    """5 steps per epoch: stopped before, in and between epochs."""
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "whole").status == 0
    step = pirl.training_step
    for stop_after in (0, 1, 4, 5, 7):
        steps, name = [], f"halves_{stop_after}"

        class StopLater(StopSignal):
            @property
            def number(self, steps=steps, stop_after=stop_after):
                return 15 if len(steps) >= stop_after else None

            number = number.setter(lambda self, value: None)

        with monkeypatch.context() as patch:
            patch.setattr(pirl, "training_step", lambda *a, steps=steps: steps.append(1) or step(*a))
            patch.setattr(pirl, "StopSignal", StopLater)
            outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", name)
        assert outcome.status == 143
        assert "--resume True" in outcome.out
        outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", name, "--resume")
        assert outcome.status == 0, outcome.err
        assert same(parts_of(weights(tmp_path, "whole")), parts_of(weights(tmp_path, name))), stop_after
        assert rows(tmp_path, "whole") == rows(tmp_path, name)
        whole, halves = (torch.load(tmp_path / f"weights/{n}.ckpt", weights_only=True) for n in ("whole", name))
        assert same(whole["bank"], halves["bank"])
        assert same(whole["optimizer"], halves["optimizer"])


def test_resume_falls_back_on_the_checkpoint_before(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "whole").status == 0
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "hurt").status == 0
    checkpoint = tmp_path / "weights/hurt.ckpt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    (tmp_path / "weights/hurt.pt").unlink()
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "hurt", "--resume")
    assert outcome.status == 0
    assert outcome.err.startswith("warning: ")
    assert "hurt.previous.ckpt" in outcome.err
    assert torch.load(tmp_path / "weights/hurt.previous.ckpt", weights_only=True)["epoch"] == 2, "the good one is kept"
    assert same(parts_of(weights(tmp_path, "whole")), parts_of(weights(tmp_path, "hurt")))


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
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "first", "--warm-start", "--cont-epoch", 2)
    assert outcome.status == 0, outcome.err
    assert [row["epoch"] for row in rows(tmp_path, "first")] == ["1", "2"]
    assert not same(first["trunk"], weights(tmp_path, "first")["trunk"])


@pytest.mark.parametrize("bank", ["features", "random", "visited"])
def test_a_warm_start_under_its_own_name_resumes_itself(call, tiny, tmp_path, monkeypatch, bank):
    """Killed before its first step, it goes on from its own beginning and not from what the earlier run left."""
    flags = (*tiny, "--bank-start", bank, "--experiment-name")
    again = ("--warm-start", "--cont-epoch", 2, "--lr", 0.1)
    assert call("pirl_stl_train_test", *flags, "exp").status == 0
    shutil.copytree(tmp_path / "weights", tmp_path / "saved")
    outcome = call("pirl_stl_train_test", *flags, "exp", *again)
    assert outcome.status == 0, outcome.err
    whole = weights(tmp_path, "exp")

    def killed(*_):
        raise KeyboardInterrupt

    for function in ("start_bank", "training_step"):
        for file in (tmp_path / "saved").iterdir():
            shutil.copy(file, tmp_path / "weights")
        with monkeypatch.context() as patch:
            patch.setattr(pirl, function, killed)
            assert call("pirl_stl_train_test", *flags, "exp", *again).status == 130
        assert not (tmp_path / "weights/exp.previous.ckpt").exists(), "it is the earlier run's"
        outcome = call("pirl_stl_train_test", *flags, "exp", *again, "--resume")
        assert outcome.status == 0, outcome.err
        assert same(whole["trunk"], weights(tmp_path, "exp")["trunk"])
        assert [row["epoch"] for row in rows(tmp_path, "exp")] == ["1", "2"]


@pytest.mark.parametrize(
    "rows",
    ["", "a,b\n1,2\n", "epoch\nx\n", "epoch\n1\n", "epoch\n\xff\n", "epoch\n" + "1" * 200_000, "{head}\n1,x,,,,,,,\n"],
)
def test_a_warm_start_under_a_csv_that_is_none(call, tiny, tmp_path, rows):
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    path = tmp_path / "observations/exp_observations.csv"
    path.write_bytes(rows.format(head=",".join(pirl.COLUMNS)).encode("latin1"))
    outcome = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp", "--warm-start", "--cont-epoch", 2)
    assert outcome.status == 0 if not rows else outcome.is_one_line_error("exp_observations.csv")


@pytest.mark.parametrize(
    "flags",
    [
        ("--only-train",),
        ("--loss", "nce", "--non-linear-head", "yes"),
        ("--positive", "pair", "--bank-start", "random", "--count-negatives", 20),
        ("--precision", "bf16", "--image-size", 55, "--beta", 0, "--loss-weight", 0.3, "--tmax-for-cos-decay", 5),
        ("--batch-negatives", "--bank-start", "visited", "--decay-norms", "no", "--crop-area", 0.5, "--hue", 0),
        ("--colour-strength", 0, "--patch-colour-strength", 0.5, "--deterministic"),
        ("--batch-size", 23, "--val-images", 5, "--warmup-steps", 0, "--temp-parameter", 0.01),
    ],
)
def test_flags(call, tiny, tmp_path, flags):
    outcome = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp", *flags)
    assert outcome.status == 0, outcome.err
    state = torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)
    assert state["bank"].dtype == torch.float32
    torch.testing.assert_close(state["bank"].norm(dim=1), torch.ones(len(state["bank"])))
    if flags[0] == "--only-train":
        assert f"{COUNTS['unlabelled']} training images" in outcome.out
        assert rows(tmp_path, "exp")[0]["val_loss"] == ""
    if "--val-images" in flags:
        assert len(state["bank"]) == 75


def test_bf16_on_cpus(tiny):
    """The gradients are those of float32, where patches are 1 × 1 in layer3 and layer4, too."""
    for side in (36, 64):
        gradients = []
        for precision in ("fp32", "bf16"):
            run = start_of([*tiny, "--precision", precision, "--image-size", side])
            run.model.train()
            pirl.training_step(run, torch.arange(16), pirl.view_draws(run, 1))
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()]))
        assert torch.cosine_similarity(*gradients, dim=0) > 0.95  # bf16 has 8 bits


def test_default_batch_size(call, tiny, tmp_path):
    """128, unless the run would have less than 1,000 steps; the same when it is resumed and lengthened."""
    sizes = {(70_000, 100): 128, (4_000, 32): 128, (4_000, 31): 64, (4_000, 8): 32, (2_000, 1): 32, (20, 1): 20}
    assert {run: pirl.default_batch_size(*run) for run in sizes} == sizes
    place = tiny.index("--batch-size")
    flags = [*tiny[:place], *tiny[place + 2 :], "--experiment-name", "exp", "--tmax-for-cos-decay", 2]
    assert "3 steps of 32 per epoch" in call("pirl_stl_train_test", *flags).out
    assert weights(tmp_path, "exp")["settings"]["batch_size"] == 32
    longer = call("pirl_stl_train_test", *flags, "--epochs", 3, "--resume")
    assert longer.status == 0, longer.err


def test_learning_rate_schedule():
    args = pirl.parse_args(["--epochs", "10", "--lr", "0.4", "--warmup-steps", "10"])
    assert args.tmax_for_cos_decay == 10
    rates = [pirl.learning_rate(args, epoch, step, 5) for epoch in range(1, 11) for step in range(5)]
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


def test_bank_starts_from_features_of_whole_images(call, tiny):
    run = start_of(tiny)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    pirl.start_bank(run)
    assert same(before, dict(run.model.state_dict()))
    model = PIRL("res18")
    model.load_state_dict(run.model.state_dict())
    with torch.no_grad():
        f = model.train().head_f(model.trunk(normalised(run.images[16:32])))  # a batch of its own statistics
    torch.testing.assert_close(run.bank.vectors[16:32], torch.nn.functional.normalize(f), rtol=1e-3, atol=1e-4)


def test_compiled_code_serves_full_batches_alone(tiny):
    """Of a 16, a smaller last batch, validation and the monitor only the first: once for images, once for patches."""
    run, compiled = start_of([*tiny, "--val-images", 16]), []

    def backend(graph, inputs):
        compiled.append([tuple(value.shape) for value in inputs if value.ndim == 4 and value.shape[1] == 3])
        return graph.forward

    run.model.trunk.compile(backend=backend, dynamic=False)
    draws, stop = pirl.view_draws(run, 1), StopSignal()
    try:
        for _ in range(2):
            run.model.train()
            for index in (torch.arange(16), torch.arange(16, 22), torch.arange(16, 32)):
                pirl.training_step(run, index, draws)
            run.epoch = run.args.epochs  # the monitor is due
            pirl.monitor(run, None, stop)
            pirl.validate(run, None, stop)
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
    run.model.train()
    for run.step, index in enumerate(torch.arange(32).split(16)):
        pirl.training_step(run, index, pirl.view_draws(run, 1))
        assert not run.bank.vectors.requires_grad
        assert all(parameter.grad.abs().sum() > 0 for parameter in run.model.head_f.parameters())


def test_each_image_is_visited_once_per_epoch_in_another_order(call, tiny, monkeypatch, tmp_path):
    visited = []
    step = pirl.training_step
    monkeypatch.setattr(
        pirl, "training_step", lambda run, index, draws: visited.append(index) or step(run, index, draws)
    )
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


@pytest.mark.full_trunk
def test_overfits_64_images(call, tmp_path):
    """The pretext accuracy on 64 training images passes 90 % in under two minutes of two cores' time."""
    write_patterns(tmp_path / "data/unlabelled")
    started = time.process_time()
    outcome = call(
        *("pirl_stl_train_test", "--data-dir", tmp_path / "data", "--only-train", "--image-size", 48),
        *(
            "--device",
            "cpu",
            "--batch-size",
            64,
            "--epochs",
            45,
            "--tmax-for-cos-decay",
            70,
            "--lr",
            0.7,
            "--warmup-steps",
            20,
            "--experiment-name",
            "overfit",
        ),
        *("--bank-start", "random", "--beta", 0.99, "--loss-weight", 0.9),  # the same 64 targets throughout
        *("--weights-dir", tmp_path / "weights", "--observations-dir", tmp_path / "observations"),
    )
    assert outcome.status == 0, outcome.err
    assert max(float(row["train_acc"]) for row in rows(tmp_path, "overfit")) > 0.9
    assert time.process_time() - started < 240
