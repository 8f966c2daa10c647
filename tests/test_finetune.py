import csv
import os
import re
import shutil
import signal
from types import SimpleNamespace

import run_helpers as rh
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import dataset_helpers as dh
import pictures
import train_stl_after_ssl as labelled
from models import classifier, make_trunk

HEADER = "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy"


def rows(tmp_path, name):
    with open(tmp_path / f"observations/{name}_observations.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def weights(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


def signal_in_step(patch, number, which):
    """The process gets a signal within its step number `which` of the full stage."""
    step, seen = labelled.FineTuning.step, []

    def disturbed(*arguments):
        seen.append(arguments)
        if len(seen) == which:
            os.kill(os.getpid(), number)
        return step(*arguments)

    patch.setattr(labelled.FineTuning, "step", disturbed)


def test_softmax_on_cached_features_equals_training_through_the_frozen_trunk():
    """The same batches through the trunk at every step, with a plain linear layer, loop and optimiser."""
    torch.manual_seed(0)
    trunk, d = make_trunk("res18")
    trunk.eval()
    images, labels = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8), torch.arange(40) % 10
    train, validation = torch.arange(30), torch.arange(30, 40)
    args = SimpleNamespace(lr=0.1, weight_decay=5e-4, patience_for_lr_decay=2, epochs=6, batch_size=8, seed=5)

    views = [images, images.flip(3)]
    with torch.no_grad():
        features = torch.stack([trunk(dh.normalised(view)) for view in views])
    mean, scale = labelled.standardisation(features[:, train])
    layer, accuracy_of_fit, _ = labelled.fit_softmax_layer((features - mean) / scale, labels, train, validation, args)

    weight, bias = torch.zeros(10, d, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    best, best_accuracy = None, -1

    def logits_of(batch):
        with torch.no_grad():
            x = trunk(dh.normalised(batch))
        return ((x - mean) / scale) @ weight.T + bias

    for epoch in range(1, 7):
        order, view = labelled.epoch_order(train, 2, 5, epoch)
        for start in range(0, 30, 8):
            chosen = order[start : start + 8]
            batch = torch.stack([views[v][i] for i, v in zip(chosen, view[start : start + 8], strict=True)])
            loss = F.cross_entropy(logits_of(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            logits = logits_of(images[validation])
            schedule.step(F.cross_entropy(logits, labels[validation]).item())
            accuracy = (logits.argmax(1) == labels[validation]).float().mean().item()
        if accuracy > best_accuracy:
            best, best_accuracy = (weight.detach().clone(), bias.detach().clone()), accuracy
    torch.testing.assert_close(layer.weight, best[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.bias, best[1], rtol=1e-3, atol=1e-4)
    assert accuracy_of_fit == pytest.approx(best_accuracy)

    model = classifier(trunk, d, 10)
    labelled.fold_standardisation(layer, mean, scale, model.softmax_layer)
    with torch.no_grad():
        expected = layer((features[0] - mean) / scale)
        torch.testing.assert_close(model.eval()(dh.normalised(images)), expected, rtol=1e-3, atol=1e-3)


def test_the_trunk_is_frozen_in_the_softmax_stage_and_trained_in_the_full_one(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "pirl").status == 0
    arguments = ("train_stl_after_ssl", *tiny, "--pirl-model-name", "pirl")
    outcome = call(*arguments, "--experiment-name", "soft")
    assert outcome.status == 0, outcome.err
    before, soft = weights(tmp_path, "pirl")["trunk"], weights(tmp_path, "soft")["trunk"]
    assert all(torch.equal(before[name], soft[name]) for name in before), "weights and running statistics"
    outcome = call(*arguments, "--experiment-name", "full", "--full-fine-tune", "True")
    assert outcome.status == 0, outcome.err
    full = weights(tmp_path, "full")
    assert not torch.equal(before["conv1.weight"], full["trunk"]["conv1.weight"])
    assert [(row["stage"], row["epoch"]) for row in rows(tmp_path, "full")] == [
        *(("softmax", "1"), ("softmax", "2"), ("full", "1"), ("full", "2"))
    ]
    results = (tmp_path / "observations/results.md").read_text()
    assert results.count(HEADER) == 2
    assert "--full-fine-tune True" in results
    for text in (outcome.out, results):
        assert HEADER in text
        assert f"PIRL trunk ({tmp_path / 'weights/pirl.pt'}), images of {tiny[1]}:" in text
        for name, row in (("softmax", "Only softmax layer is fine tuned"), ("full", "Full model is fine tuned")):
            validation, test = full["results"][name]
            assert f"\n{row} | {validation:.2%} | {test:.2%}\n" in text
    assert full["results"]["full"][0] == max(float(r["val_acc"]) for r in rows(tmp_path, "full")[2:])


def test_the_reported_accuracy_is_that_of_the_written_weights(call, tiny, tmp_path, data_dir):
    flags = ("--full-fine-tune", "--experiment-name", "base", "--epochs", 4, "--full-epochs", 3)
    outcome = call("train_stl_after_ssl", *tiny, *flags)
    assert outcome.status == 0, outcome.err
    assert [row["stage"] for row in rows(tmp_path, "base")] == ["softmax"] * 4 + ["full"] * 3
    assert "random trunk, images of" in outcome.out
    state = weights(tmp_path, "base")
    trunk, d = make_trunk("res18")
    model = classifier(trunk, d, 10)
    trunk.load_state_dict(state["trunk"])
    model.softmax_layer.load_state_dict(state["softmax_layer"])
    images, labels, *_ = dh.load_labelled(data_dir / "test", 36, torch.device("cpu"))
    with torch.no_grad():
        accuracy = (model.eval()(dh.normalised(images)).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(state["results"]["full"][1], abs=1e-6)


def test_resume_is_exact_from_any_step(call, tiny, tmp_path, monkeypatch):
    """4 steps per epoch: stopped in an epoch of the full stage, at the end of its training and in the last."""
    flags = ("--full-fine-tune", "--epochs", 3)
    assert call("train_stl_after_ssl", *tiny, *flags, "--experiment-name", "whole").status == 0
    whole = weights(tmp_path, "whole")
    for number, which in ((signal.SIGINT, 2), (signal.SIGTERM, 4), (signal.SIGINT, 11)):
        name = f"halves_{which}"
        with monkeypatch.context() as patch:
            signal_in_step(patch, number, which)
            outcome = call("train_stl_after_ssl", *tiny, *flags, "--experiment-name", name)
        assert outcome.status == 128 + number
        assert "--resume True" in outcome.out
        outcome = call("train_stl_after_ssl", *tiny, "--epochs", 3, "--experiment-name", name, "--resume")
        assert outcome.is_one_line_error("full stage", "--full-fine-tune True")
        outcome = call("train_stl_after_ssl", *tiny, *flags, "--experiment-name", name, "--resume")
        assert outcome.status == 0, outcome.err
        halves = weights(tmp_path, name)
        assert whole["results"] == halves["results"], which
        assert all(torch.equal(whole["trunk"][n], halves["trunk"][n]) for n in whole["trunk"])
        assert rows(tmp_path, "whole") == rows(tmp_path, name)


@pytest.mark.parametrize("function", ["validate", "use_best"])
def test_a_kill_after_the_steps_loses_nothing(call, tiny, tmp_path, monkeypatch, function):
    """Every epoch's checkpoint is written before validation."""
    flags = (*tiny, "--full-fine-tune", "--checkpoint-minutes", 0, "--experiment-name")
    assert call("train_stl_after_ssl", *flags, "whole").status == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(labelled.FineTuning, function, interrupted)
        assert call("train_stl_after_ssl", *flags, "killed").status == 130
    state = torch.load(tmp_path / "weights/killed.ckpt", weights_only=True)
    assert state["progress"]["step"] == 4
    assert call("train_stl_after_ssl", *flags, "killed", "--resume").status == 0
    whole, killed = weights(tmp_path, "whole"), weights(tmp_path, "killed")
    assert whole["results"] == killed["results"]
    assert all(torch.equal(whole["trunk"][n], killed["trunk"][n]) for n in whole["trunk"])
    assert rows(tmp_path, "whole") == rows(tmp_path, "killed")


def test_the_full_stage_may_have_settings_of_its_own_until_it_begins(call, tiny, tmp_path, monkeypatch):
    flags = (*tiny, "--experiment-name", "exp", "--resume")
    assert call("train_stl_after_ssl", *flags).status == 0
    softmax = weights(tmp_path, "exp")["results"]["softmax"]
    full = ("--full-fine-tune", "--full-epochs", 1, "--full-lr")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        assert call("train_stl_after_ssl", *flags, *full, 0.003).status == 143
    outcome = call("train_stl_after_ssl", *flags, *full, 0.1)
    assert outcome.is_one_line_error("--full-lr was 0.003, is 0.1")
    assert call("train_stl_after_ssl", *flags, *full, 0.003).status == 0
    state = weights(tmp_path, "exp")
    assert state["results"]["softmax"] == softmax
    assert state["settings"]["full_lr"] == 0.003
    assert [(row["stage"], row["learning_rate"]) for row in state["rows"]][2:] == [("full", 0.003)]
    assert call("train_stl_after_ssl", *flags, *full, 0.1).is_one_line_error("--full-lr was 0.003, is 0.1")


def test_messages_name_no_flag_that_was_not_given(call, tiny):
    """A changed --epochs changes those of the full stage too, but not in a message."""
    flags = (*tiny, "--experiment-name", "exp", "--full-fine-tune")
    assert call("train_stl_after_ssl", *flags).status == 0
    outcome = call("train_stl_after_ssl", *flags, "--epochs", 3, "--resume")
    assert outcome.is_one_line_error("--epochs was 2, is 3")
    assert re.findall(r"--[a-z-]+ was", outcome.err) == ["--epochs was"]


def test_precision_is_stored_resolved_and_kept(call, tiny, tmp_path, monkeypatch):
    flags = (*tiny, "--experiment-name", "exp", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(rh, "choose_precision", lambda args, device: "bf16")  # as on most GPUs
        assert call("train_stl_after_ssl", *flags).status == 0
    assert call("train_stl_after_ssl", *flags, "--full-fine-tune").status == 0
    assert weights(tmp_path, "exp")["settings"]["precision"] == "bf16"


def test_batches_without_training_are_small_whatever_the_batch_size(tiny, monkeypatch):
    """A GPU that trains on a share of a batch need not hold the whole of it in a pass for features."""
    trunk, _ = make_trunk("res18")
    seen = []
    trunk.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images = torch.randint(0, 256, (300, 3, 36, 36), dtype=torch.uint8)
    features = labelled.models.trunk_features(trunk, images, 4096)
    assert len(features) == 300
    assert max(seen) <= 128
    for size in (4096, 16):
        sizes = []
        monkeypatch.setattr(labelled.models, "update_bn", lambda batches, _, s=sizes: s.extend(map(len, batches)))
        labelled.models.plain_statistics(trunk, images, size)
        assert sum(sizes) == 300
        assert max(sizes) < 2 * min(size, 128)


def test_validation_is_the_same_for_both_stages_and_the_baseline(call, tiny, monkeypatch):
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "pirl").status == 0
    seen = []
    split = dh.stratified_split
    monkeypatch.setattr(dh, "stratified_split", lambda *a: seen.append(split(*a)) or seen[-1])
    for name, trunk in (("a", ()), ("b", ("--pirl-model-name", "pirl"))):
        assert call("train_stl_after_ssl", *tiny, *trunk, "--full-fine-tune", "--experiment-name", name).status == 0
    assert len(seen) == 2, "one split per run, for both of its stages"
    assert seen[0][1].equal(seen[1][1])


def test_folds_and_pictures(call, tiny, tmp_path, data_dir):
    own = tmp_path / "own"
    shutil.copytree(data_dir, own)
    generator = np.random.default_rng(0)
    folds = [generator.permutation(60)[:40] for _ in range(10)]
    (own / "fold_indices.txt").write_text("\n".join(" ".join(map(str, fold)) for fold in folds))
    (own / "class_names.txt").write_bytes(b"\r\n".join(f"animal {i}".encode() for i in range(10)))
    flags = ("--data-dir", own, "--folds", "--neighbours", tmp_path / "neighbours.png", "--experiment-name", "f")
    outcome = call("train_stl_after_ssl", *tiny, *flags)
    assert outcome.status == 0, outcome.err
    state = weights(tmp_path, "f")
    tests = torch.tensor(state["results"]["folds"])[:, 1]
    assert len(tests) == 10
    line = next(
        line
        for line in outcome.out.splitlines()
        if line.startswith("Only softmax layer is fine tuned, predefined folds")
    )
    assert f"none | {100 * tests.mean():.2f} ± {100 * tests.std():.2f}%" in line
    picture = (tmp_path / "neighbours.png").read_bytes()
    (tmp_path / "neighbours.png").unlink()
    assert call("train_stl_after_ssl", *tiny, *flags, "--resume").status == 0
    assert (tmp_path / "neighbours.png").read_bytes() == picture, "of a finished run, too"
    assert call("train_stl_after_ssl", *tiny, *flags, "--full-fine-tune", "--resume").status == 0
    fine_tuned = (tmp_path / "neighbours.png").read_bytes()
    assert fine_tuned != picture, "of the finished trunk"
    assert call("train_stl_after_ssl", *tiny, *flags, "--full-fine-tune", "--resume").status == 0
    assert (tmp_path / "neighbours.png").read_bytes() == fine_tuned
    # the exported layer is that of the whole training split, not of the last fold
    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "plain").status == 0
    assert torch.equal(state["softmax_layer"]["weight"], weights(tmp_path, "plain")["softmax_layer"]["weight"])
    for picture in (tmp_path / "neighbours.png", tmp_path / "observations/f_confusion.png"):
        assert picture.stat().st_size < 300_000
        with Image.open(picture) as image:
            assert min(image.size) > 300


def test_a_single_fold(call, tiny, tmp_path, data_dir, recwarn):
    own = shutil.copytree(data_dir, tmp_path / "own")
    (own / "fold_indices.txt").write_text(" ".join(map(str, range(40))) + "\n\n")
    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own, "--folds")
    assert outcome.status == 0
    assert "predefined folds | none | " in outcome.out
    assert "nan" not in outcome.out
    assert not [warning for warning in recwarn.list if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("content", [None, "1 2 x", "1 2 60", "", "-1", "9" * 30])
def test_folds_that_cannot_be_used(call, tiny, tmp_path, data_dir, content):
    own = tmp_path / "own"
    shutil.copytree(data_dir, own)
    if content is not None:
        (own / "fold_indices.txt").write_text(content)
    assert call("train_stl_after_ssl", *tiny, "--data-dir", own, "--folds").is_one_line_error("fold_indices.txt")


def test_pictures_show_what_they_say():
    images = torch.stack([torch.full((3, 96, 96), value, dtype=torch.uint8) for value in (10, 200)])
    found = images[[0, 1, 1, 0]].view(2, 2, 3, 96, 96)
    grid = pictures.neighbour_picture(
        images, torch.tensor([0, 1]), found, torch.tensor([[0, 1], [1, 0]]), ["ant", "bee"]
    )
    side = pictures.TILE + 8 + 4

    def tile(row, column):
        return lambda y, x: list(grid.getpixel((column * side + x, row * side + y)))

    for row, column, value, frame in (
        *((0, 0, 10, (255, 255, 255)), (0, 1, 10, pictures.RIGHT), (0, 2, 200, pictures.WRONG)),
        *((1, 0, 200, (255, 255, 255)), (1, 1, 200, pictures.RIGHT), (1, 2, 10, pictures.WRONG)),
    ):
        assert max(abs(shade - value) for shade in tile(row, column)(30, 30)) <= 1
        assert tile(row, column)(0, 0) == list(frame)
        shades = [tile(row, column)(y, x) for y in range(50, 68) for x in range(6, 30)]
        assert max(min(shade) for shade in shades) > value + 40, "a name"
    labels, predictions = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    picture = pictures.confusion_picture(labels, predictions, ["a", "b"])
    shades = [picture.getpixel((130 + 46 * j + 2, 60 + 46 * i + 2)) for i in range(2) for j in range(2)]
    assert shades[3] == (31, 119, 180), "all of class b"
    assert shades[2] == (255, 255, 255), "none of class b as a"
    assert len(set(shades)) == 4


def test_what_stands_in_the_table_already_is_kept(call, tiny, tmp_path):
    path = tmp_path / "observations/results.md"
    path.parent.mkdir()
    path.write_bytes(b"mine: \xff\n")
    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "exp").status == 0
    assert path.read_bytes().startswith(b"mine: \xff\n## exp\n")


def test_a_validation_loss_that_is_not_finite_is_but_a_bad_epoch(call, tiny, tmp_path, monkeypatch):
    validate, seen = labelled.FineTuning.validate, []

    def overflown(run):
        seen.append(validate(run))
        return (float("nan"), seen[-1][1]) if len(seen) == 1 else seen[-1]

    monkeypatch.setattr(labelled.FineTuning, "validate", overflown)
    flags = (*tiny, "--full-fine-tune", "--experiment-name", "exp")
    assert call("train_stl_after_ssl", *flags).status == 0
    assert "nan" in [row["val_loss"] for row in rows(tmp_path, "exp")]
    assert call("train_stl_after_ssl", *flags, "--resume").status == 0


def test_a_finished_run_resumed_adds_no_second_table(call, tiny, tmp_path):
    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "once").status == 0
    before = (tmp_path / "observations/results.md").read_text()
    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "once", "--resume").status == 0
    assert (tmp_path / "observations/results.md").read_text() == before


def test_small_stem(call, tiny, tmp_path):
    """It goes from pretraining through the file into fine-tuning."""
    assert call("pirl_stl_train_test", *tiny, "--stem", "small", "--epochs", 1, "--experiment-name", "pirl").status == 0
    state = weights(tmp_path, "pirl")
    assert state["settings"]["stem"] == "small"
    assert state["trunk"]["conv1.weight"].shape == (64, 3, 3, 3)
    flags = ("--pirl-model-name", "pirl")
    assert call("train_stl_after_ssl", *tiny, *flags, "--experiment-name", "soft").status == 0
    assert weights(tmp_path, "soft")["settings"]["stem"] == "small"
    outcome = call("train_stl_after_ssl", *tiny, *flags, "--stem", "imagenet")
    assert outcome.is_one_line_error("conv1.weight", "--stem")


@pytest.mark.full_trunk
def test_the_small_stem_has_torchvision_s_names():
    trunk, _ = make_trunk("res18", "small")
    assert trunk.state_dict().keys() == torchvision.models.resnet18().state_dict().keys() - {"fc.weight", "fc.bias"}
