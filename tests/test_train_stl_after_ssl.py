"""Fine-tuning: both stages, exact resumption, the table, folds and pictures."""

import csv
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import dataset_helpers
import linear_probe
import report
import train_stl_after_ssl
from augmentations import normalize
from models import make_classifier, make_trunk
from runtime import loop
from train_stl_after_ssl import FineTuningTrainer

TABLE_HEADER = (
    "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy"
)


def read_history(tmp_path, name):
    """The CSV's rows as dicts, without what no two runs have in common."""
    path = tmp_path / f"observations/{name}_observations.csv"
    with open(path, newline="") as file:
        history = list(csv.DictReader(file))
    for metrics in history:
        del metrics["images_per_second"]
    return history


def read_results(tmp_path, name):
    return (tmp_path / f"observations/{name}_results.md").read_text()


def read_model(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


def read_checkpoint(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.ckpt", weights_only=True)


def assert_same_run(tmp_path, one, other):
    """Two runs have come to the same end, to the last bit."""
    first = read_model(tmp_path, one)
    second = read_model(tmp_path, other)
    assert first["results"] == second["results"], other
    for name in first["trunk"]:
        assert torch.equal(first["trunk"][name], second["trunk"][name]), name
    assert read_history(tmp_path, one) == read_history(tmp_path, other)


def signal_in_step(patch, number, which):
    """The process gets a signal within its step number `which` of the full stage."""
    train_step = FineTuningTrainer.train_step
    steps = []

    def disturbed(*arguments):
        steps.append(arguments)
        if len(steps) == which:
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    patch.setattr(FineTuningTrainer, "train_step", disturbed)


# ---- The two stages ------------------------------------------------------------------
def test_softmax_on_cached_features_equals_training_through_the_frozen_trunk():
    """The same batches through the trunk at every step, with a loop of our own."""
    torch.manual_seed(0)
    trunk, dimension = make_trunk("res18")
    trunk.eval()
    images = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8)
    labels = torch.arange(40) % 10
    train = torch.arange(30)
    validation = torch.arange(30, 40)
    args = SimpleNamespace(
        lr=0.1,
        weight_decay=5e-4,
        patience_for_lr_decay=2,
        epochs=6,
        batch_size=8,
        seed=5,
    )

    views = [images, images.flip(3)]
    with torch.no_grad():
        features = torch.stack([trunk(normalize(view)) for view in views])
    layer, accuracy_of_fit, _ = linear_probe.fit_softmax_layer(
        features, labels, train, validation, args
    )

    # The standardisation, from its definition; a dead feature has no spread.
    known = features[:, train].flatten(0, 1)
    mean = known.mean(0)
    scale = known.std(0).clamp(min=1e-5) / train_stl_after_ssl.FEATURE_STD

    weight = torch.zeros(10, dimension, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    best_weight = None
    best_bias = None
    best_accuracy = -1

    def logits_of(batch):
        with torch.no_grad():
            batch_features = trunk(normalize(batch))
        return ((batch_features - mean) / scale) @ weight.T + bias

    for epoch in range(1, 7):
        order, chosen_views = linear_probe.epoch_order(train, 2, 5, epoch)
        for start in range(0, 30, 8):
            chosen = order[start : start + 8]
            chosen_view = chosen_views[start : start + 8]
            batch = torch.stack(
                [views[v][i] for i, v in zip(chosen, chosen_view, strict=True)]
            )
            loss = F.cross_entropy(logits_of(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        with torch.no_grad():
            logits = logits_of(images[validation])
            schedule.step(F.cross_entropy(logits, labels[validation]).item())
            accuracy = (logits.argmax(1) == labels[validation]).float().mean().item()
        if accuracy > best_accuracy:
            best_weight = weight.detach().clone()
            best_bias = bias.detach().clone()
            best_accuracy = accuracy

    # The layer that comes back is for plain features: undo what was folded into it.
    standard_weight = layer.weight * scale
    standard_bias = layer.bias + layer.weight @ mean
    torch.testing.assert_close(standard_weight, best_weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(standard_bias, best_bias, rtol=1e-3, atol=1e-4)
    assert accuracy_of_fit == pytest.approx(best_accuracy)

    model = make_classifier(trunk, dimension, 10).eval()
    model.softmax_layer.load_state_dict(layer.state_dict())
    with torch.no_grad():
        logits = model(normalize(images))
        expected = ((features[0] - mean) / scale) @ best_weight.T + best_bias
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_the_trunk_is_frozen_in_the_softmax_stage_and_trained_in_the_full_one(
    call, tiny, tmp_path
):
    assert call("pirl_stl_train_test", *tiny, "--experiment-name", "pirl").status == 0
    arguments = ("train_stl_after_ssl", *tiny, "--pirl-model-name", "pirl")

    outcome = call(*arguments, "--experiment-name", "soft")
    assert outcome.status == 0, outcome.err
    before = read_model(tmp_path, "pirl")["trunk"]
    softmax = read_model(tmp_path, "soft")["trunk"]
    for name in before:
        # Weights and running statistics.
        assert torch.equal(before[name], softmax[name]), name

    outcome = call(*arguments, "--experiment-name", "full", "--full-fine-tune", "True")
    assert outcome.status == 0, outcome.err
    full = read_model(tmp_path, "full")
    assert not torch.equal(before["conv1.weight"], full["trunk"]["conv1.weight"])

    history = read_history(tmp_path, "full")
    assert [(metrics["stage"], metrics["epoch"]) for metrics in history] == [
        ("softmax", "1"),
        ("softmax", "2"),
        ("full", "1"),
        ("full", "2"),
    ]
    best_accuracy = max(float(metrics["val_acc"]) for metrics in history[2:])
    assert full["results"]["full"][0] == best_accuracy

    # The table: a file per experiment.
    assert read_results(tmp_path, "soft").count(TABLE_HEADER) == 1
    results = read_results(tmp_path, "full")
    assert results.count(TABLE_HEADER) == 1
    assert "--full-fine-tune True" in results
    for text in (outcome.out, results):
        assert TABLE_HEADER in text
        trunk_name = f"PIRL trunk ({tmp_path / 'weights/pirl.pt'})"
        assert f"{trunk_name}, images of {tiny[1]}:" in text
        titles = {
            "softmax": "Only softmax layer is fine tuned",
            "full": "Full model is fine tuned",
        }
        for name, title in titles.items():
            validation, test = full["results"][name]
            assert f"\n{title} | {validation:.2%} | {test:.2%}\n" in text


def test_the_reported_accuracy_is_that_of_the_written_weights(
    call, tiny, tmp_path, data_dir
):
    epochs = ("--epochs", 4, "--full-epochs", 3)
    flags = (*tiny, "--full-fine-tune", "--experiment-name", "base", *epochs)
    outcome = call("train_stl_after_ssl", *flags)
    assert outcome.status == 0, outcome.err
    stages = [metrics["stage"] for metrics in read_history(tmp_path, "base")]
    assert stages == ["softmax"] * 4 + ["full"] * 3
    assert "random trunk, images of" in outcome.out

    saved = read_model(tmp_path, "base")
    trunk, dimension = make_trunk("res18")
    model = make_classifier(trunk, dimension, 10).eval()
    trunk.load_state_dict(saved["trunk"])
    model.softmax_layer.load_state_dict(saved["softmax_layer"])

    cpu = torch.device("cpu")
    images, labels, *_ = dataset_helpers.load_labelled(data_dir / "test", 36, cpu)
    with torch.no_grad():
        predictions = model(normalize(images)).argmax(1)
    accuracy = (predictions == labels).float().mean().item()
    assert accuracy == pytest.approx(saved["results"]["full"][1], abs=1e-6)


def test_validation_is_the_same_for_both_stages_and_the_baseline(
    call, tiny, monkeypatch
):
    flags = (*tiny, "--epochs", 1, "--experiment-name", "pirl")
    assert call("pirl_stl_train_test", *flags).status == 0
    stratified_split = dataset_helpers.stratified_split
    splits = []

    def recorded(*arguments):
        splits.append(stratified_split(*arguments))
        return splits[-1]

    monkeypatch.setattr(dataset_helpers, "stratified_split", recorded)
    full = ("train_stl_after_ssl", *tiny, "--full-fine-tune", "--experiment-name")
    assert call(*full, "a").status == 0
    assert call(*full, "b", "--pirl-model-name", "pirl").status == 0
    assert len(splits) == 2, "one split per run, for both of its stages"
    validation_of_baseline = splits[0][1]
    validation_of_pretrained = splits[1][1]
    assert validation_of_baseline.equal(validation_of_pretrained)


def test_a_validation_loss_that_is_not_finite_is_but_a_bad_epoch(
    call, tiny, tmp_path, monkeypatch
):
    validate = FineTuningTrainer.validate
    results = []

    def overflown(trainer):
        loss, accuracy = validate(trainer)
        if not results:
            loss = float("nan")
        results.append((loss, accuracy))
        return loss, accuracy

    monkeypatch.setattr(FineTuningTrainer, "validate", overflown)
    flags = (*tiny, "--full-fine-tune", "--experiment-name", "exp")
    assert call("train_stl_after_ssl", *flags).status == 0
    assert "nan" in [metrics["val_loss"] for metrics in read_history(tmp_path, "exp")]
    assert call("train_stl_after_ssl", *flags, "--resume").status == 0


# ---- Resumption ----------------------------------------------------------------------
def test_resume_is_exact_from_any_step(call, tiny, tmp_path, monkeypatch):
    """4 steps per epoch: stopped within one, at the end of one, and in the last one."""
    epochs = ("--epochs", 3)
    script = ("train_stl_after_ssl", *tiny, *epochs)
    full = (*script, "--full-fine-tune")
    assert call(*full, "--experiment-name", "whole").status == 0

    stops = [(signal.SIGINT, 2), (signal.SIGTERM, 4), (signal.SIGINT, 11)]
    for number, which in stops:
        name = ("--experiment-name", f"halves_{which}")
        with monkeypatch.context() as patch:
            signal_in_step(patch, number, which)
            outcome = call(*full, *name)
        assert outcome.status == 128 + number
        assert "--resume True" in outcome.out

        # The full stage cannot be left out once it has begun.
        outcome = call(*script, *name, "--full-fine-tune", "False", "--resume")
        assert outcome.is_one_line_error("full stage", "--full-fine-tune True")

        outcome = call(*full, *name, "--resume")
        assert outcome.status == 0, outcome.err
        assert_same_run(tmp_path, "whole", f"halves_{which}")


def test_a_resumed_run_knows_how_long_the_loss_has_not_improved(
    call, tiny, tmp_path, monkeypatch
):
    """Two bad epochs, one on each side of the break, lower the learning rate."""
    calls = []

    def worse(trainer):
        calls.append(1)
        return float(len(calls)), 0.5

    monkeypatch.setattr(FineTuningTrainer, "validate", worse)
    flags = ("--full-fine-tune", "--full-epochs", 4, "--patience-for-lr-decay", 1)
    script = ("train_stl_after_ssl", *tiny, *flags, "--experiment-name")
    assert call(*script, "whole").status == 0
    full_stage = read_history(tmp_path, "whole")[2:]
    rates = [float(metrics["learning_rate"]) for metrics in full_stage]
    assert rates == pytest.approx([0.03, 0.03, 0.03, 0.003])

    calls.clear()
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 10)  # in the third epoch
        assert call(*script, "halves").status == 143
    assert call(*script, "halves", "--resume").status == 0
    assert_same_run(tmp_path, "whole", "halves")


def test_the_time_of_each_stage_outlives_a_break(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.LoopControl, "epoch_seconds", lambda loop: 30.0)
    flags = (*tiny, "--full-fine-tune", "--full-epochs", 3, "--experiment-name", "exp")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 10)
        assert call("train_stl_after_ssl", *flags).status == 143
    before = read_checkpoint(tmp_path, "exp")["seconds"]
    assert before["softmax"] > 0

    assert call("train_stl_after_ssl", *flags, "--resume").status == 0
    seconds = read_model(tmp_path, "exp")["seconds"]
    assert seconds == {"softmax": before["softmax"], "full": 90.0}


def test_several_ranks_are_refused(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stl_after_ssl, "WORLD_SIZE", 2)
    outcome = call("train_stl_after_ssl", *tiny)
    assert outcome.is_one_line_error("one process", "without torchrun")
    assert not (tmp_path / "weights").exists()


def test_flags_that_are_left_out_keep_the_values_of_the_checkpoint(
    call, tiny, tmp_path, monkeypatch
):
    settings = ("--full-fine-tune", "--lr", 0.1, "--full-epochs", 3, "--seed", 7)
    script = ("train_stl_after_ssl", *tiny)
    assert call(*script, *settings, "--experiment-name", "whole").status == 0

    name = ("--experiment-name", "halves")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 6)
        assert call(*script, *settings, *name).status == 143
    checkpoint = read_checkpoint(tmp_path, "halves")
    assert checkpoint["full_steps"] == 6
    assert checkpoint["training"]["epoch"] == 2
    assert checkpoint["training"]["step"] == 2
    assert checkpoint["results"].keys() == {"softmax", "neighbours"}
    assert checkpoint["best"]["epoch"] == 1

    # What a checkpoint does not keep: --data-dir, the folders of files, --device.
    places = (*tiny[:2], *tiny[-4:], "--device", "cpu")
    outcome = call("train_stl_after_ssl", *places, *name, "--resume")
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path, "whole", "halves")


@pytest.mark.parametrize("function", ["validate", "use_best_epoch"])
def test_a_kill_after_the_steps_loses_nothing(
    call, tiny, tmp_path, monkeypatch, function
):
    """Every epoch's checkpoint is written before validation."""
    often = ("--checkpoint-minutes", 0)
    flags = (*tiny, "--full-fine-tune", *often, "--experiment-name")
    assert call("train_stl_after_ssl", *flags, "whole").status == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FineTuningTrainer, function, interrupted)
        assert call("train_stl_after_ssl", *flags, "killed").status == 130
    assert read_checkpoint(tmp_path, "killed")["training"]["step"] == 4
    assert call("train_stl_after_ssl", *flags, "killed", "--resume").status == 0
    assert_same_run(tmp_path, "whole", "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_validation_waits_for_its_end(
    call, tiny, tmp_path, monkeypatch, number
):
    flags = (*tiny, "--full-fine-tune", "--experiment-name")
    assert call("train_stl_after_ssl", *flags, "whole").status == 0
    validate = FineTuningTrainer.validate

    def disturbed(trainer):
        os.kill(os.getpid(), number)
        return validate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuningTrainer, "validate", disturbed)
        outcome = call("train_stl_after_ssl", *flags, "halves")
    assert outcome.status == 128 + number
    assert "--resume True" in outcome.out
    training = read_checkpoint(tmp_path, "halves")["training"]
    assert training["epoch"] == 2
    assert training["step"] == 0
    assert len(training["history"]) == 3, "two epochs of the softmax layer, a full one"
    assert read_history(tmp_path, "halves") == read_history(tmp_path, "whole")[:3]

    assert call("train_stl_after_ssl", *flags, "halves", "--resume").status == 0
    assert_same_run(tmp_path, "whole", "halves")


def test_a_signal_during_the_export_ends_a_run_that_is_complete(
    call, tiny, tmp_path, monkeypatch
):
    flags = (*tiny, "--full-fine-tune", "--experiment-name")
    assert call("train_stl_after_ssl", *flags, "whole").status == 0
    results_table = report.results_table

    def disturbed(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return results_table(trainer)

    monkeypatch.setattr(train_stl_after_ssl, "results_table", disturbed)
    assert call("train_stl_after_ssl", *flags, "disturbed").status == 143
    assert TABLE_HEADER in read_results(tmp_path, "disturbed")
    assert_same_run(tmp_path, "whole", "disturbed")


def test_the_full_stage_may_have_settings_of_its_own_until_it_begins(
    call, tiny, tmp_path, monkeypatch
):
    script = ("train_stl_after_ssl", *tiny, "--experiment-name", "exp", "--resume")
    assert call(*script).status == 0
    softmax_result = read_model(tmp_path, "exp")["results"]["softmax"]

    full = (*script, "--full-fine-tune", "--full-epochs", 1, "--full-lr")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 1)
        assert call(*full, 0.003).status == 143
    assert call(*full, 0.1).is_one_line_error("--full-lr was 0.003, is 0.1")
    assert call(*full, 0.003).status == 0

    state = read_model(tmp_path, "exp")
    assert state["results"]["softmax"] == softmax_result
    assert state["settings"]["full_lr"] == 0.003
    full_epochs = state["history"][2:]
    assert len(full_epochs) == 1
    assert full_epochs[0]["stage"] == "full"
    assert full_epochs[0]["learning_rate"] == 0.003
    assert call(*full, 0.1).is_one_line_error("--full-lr was 0.003, is 0.1")


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
        # As on most GPUs.
        patch.setattr(
            train_stl_after_ssl, "choose_precision", lambda args, device: "bf16"
        )
        assert call("train_stl_after_ssl", *flags).status == 0
    assert call("train_stl_after_ssl", *flags, "--full-fine-tune").status == 0
    assert read_model(tmp_path, "exp")["settings"]["precision"] == "bf16"


# ---- The table -----------------------------------------------------------------------
def test_tables_of_others_are_kept(call, tiny, tmp_path):
    folder = tmp_path / "observations"
    folder.mkdir()
    names = ("results.md", "other_results.md", "exp2_results.md")
    for name in names:
        (folder / name).write_bytes(b"mine: \xff\n")

    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "exp").status == 0
    for name in names:
        assert (folder / name).read_bytes() == b"mine: \xff\n"
    assert (folder / "exp_results.md").read_bytes().startswith(b"## exp\n")


def test_a_run_rewrites_the_table_of_its_own_name(call, tiny, tmp_path):
    """What stands there already may be of an experiment whose weights are gone."""
    folder = tmp_path / "observations"
    folder.mkdir()
    (folder / "exp_results.md").write_bytes(b"old: \xff\n" * 100)

    assert call("train_stl_after_ssl", *tiny, "--experiment-name", "exp").status == 0
    results = read_results(tmp_path, "exp")
    assert results.startswith("## exp\n")
    assert "old" not in results


def test_a_finished_run_resumed_adds_no_second_table(call, tiny, tmp_path):
    flags = (*tiny, "--experiment-name", "once")
    assert call("train_stl_after_ssl", *flags).status == 0
    before = read_results(tmp_path, "once")
    assert call("train_stl_after_ssl", *flags, "--resume").status == 0
    after = read_results(tmp_path, "once")

    # The line with the date and the command is that of the last call.
    assert after.count("## once\n") == 1
    assert after.count(TABLE_HEADER) == 1
    assert after.splitlines()[4:] == before.splitlines()[4:]
    assert "--resume" in after.splitlines()[2]


def test_the_confusion_table_counts_all_test_images(call, tiny, tmp_path):
    flags = (*tiny, "--full-fine-tune", "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *flags)
    path = tmp_path / "observations/exp_confusion.csv"
    assert str(path) in outcome.out

    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    classes = [str(number) for number in range(1, 11)]
    assert header == ["true class", *classes]
    assert [row[0] for row in rows] == classes
    counts = torch.tensor([[int(count) for count in row[1:]] for row in rows])
    assert counts.sum(1).tolist() == [4] * 10, "40 test images"

    # Its diagonal is the reported accuracy.
    test_accuracy = read_model(tmp_path, "exp")["results"]["full"][1]
    correct = counts.diagonal().sum().item()
    assert correct / 40 == pytest.approx(test_accuracy, abs=1e-6)


# ---- Folds and pictures --------------------------------------------------------------
def test_folds_and_pictures(call, tiny, tmp_path, data_dir):
    own = tmp_path / "own"
    shutil.copytree(data_dir, own)
    generator = np.random.default_rng(0)
    folds = [generator.permutation(60)[:40] for _ in range(10)]
    lines = [" ".join(str(index) for index in fold) for fold in folds]
    (own / "fold_indices.txt").write_text("\n".join(lines))
    names = [f"animal {number}".encode() for number in range(10)]
    (own / "class_names.txt").write_bytes(b"\r\n".join(names))

    neighbours = tmp_path / "neighbours.png"
    images = ("--data-dir", own, "--folds", "--neighbours", neighbours)
    flags = (*tiny, *images, "--experiment-name", "f")
    outcome = call("train_stl_after_ssl", *flags)
    assert outcome.status == 0, outcome.err

    state = read_model(tmp_path, "f")
    tests = torch.tensor(state["results"]["folds"])[:, 1]
    assert len(tests) == 10
    title = "Only softmax layer is fine tuned, predefined folds"
    line = next(line for line in outcome.out.splitlines() if line.startswith(title))
    assert f"none | {100 * tests.mean():.2f} ± {100 * tests.std():.2f}%" in line

    # A finished run, resumed, draws its picture again.
    picture = neighbours.read_bytes()
    neighbours.unlink()
    assert call("train_stl_after_ssl", *flags, "--resume").status == 0
    assert neighbours.read_bytes() == picture

    full = (*flags, "--full-fine-tune", "--resume")
    assert call("train_stl_after_ssl", *full).status == 0
    picture_of_finished_trunk = neighbours.read_bytes()
    assert picture_of_finished_trunk != picture
    assert call("train_stl_after_ssl", *full).status == 0
    assert neighbours.read_bytes() == picture_of_finished_trunk

    # The exported layer is that of the whole training split, not of the last fold.
    plain_flags = (*tiny, "--experiment-name", "plain")
    assert call("train_stl_after_ssl", *plain_flags).status == 0
    plain = read_model(tmp_path, "plain")
    weight = state["softmax_layer"]["weight"]
    assert torch.equal(weight, plain["softmax_layer"]["weight"])

    for path in (neighbours, tmp_path / "observations/f_confusion.png"):
        assert path.stat().st_size < 300_000
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_a_single_fold(call, tiny, tmp_path, data_dir, recwarn):
    own = shutil.copytree(data_dir, tmp_path / "own")
    fold = " ".join(str(index) for index in range(40))
    (own / "fold_indices.txt").write_text(fold + "\n\n")

    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own, "--folds")
    assert outcome.status == 0
    assert "predefined folds | none | " in outcome.out
    assert "nan" not in outcome.out
    warnings = [w for w in recwarn.list if issubclass(w.category, UserWarning)]
    assert not warnings


@pytest.mark.parametrize("content", [None, "1 2 x", "1 2 60", "", "-1", "9" * 30])
def test_folds_that_cannot_be_used(call, tiny, tmp_path, data_dir, content):
    own = tmp_path / "own"
    shutil.copytree(data_dir, own)
    if content is not None:
        (own / "fold_indices.txt").write_text(content)

    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own, "--folds")
    assert outcome.is_one_line_error("fold_indices.txt")


# ---- Where the trunk comes from ------------------------------------------------------
def test_what_a_trunk_is_called():
    """The tables and the summary say where their trunk comes from."""
    args = train_stl_after_ssl.make_parser().parse_args(["--stem", "imagenet"])
    trunk, _ = make_trunk("res18")
    ours = {"trunk": trunk.state_dict(), "settings": {"lr": 0.1}}
    fine_tuned = ours | {"softmax_layer": {}}
    others = ours | {"settings": {}}

    names = []
    for weights in (None, ours, fine_tuned, others):
        *_, name = train_stl_after_ssl.make_start_trunk(args, "a.pt", weights)
        names.append(name)
    assert names == [
        "random trunk",
        "PIRL trunk (a.pt)",
        "fine-tuned trunk (a.pt)",
        "trunk of another project (a.pt)",
    ]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"image_size": 64}, "note: exp.pt was pretrained with --image-size 64\n"),
        ({"image_size": 96}, ""),
        ({"lr": 0.1}, ""),  # of an older file, which does not say
    ],
)
def test_another_image_size_in_pretraining_is_worth_a_note(capsys, settings, note):
    args = train_stl_after_ssl.make_parser().parse_args(["--stem", "imagenet"])
    trunk, _ = make_trunk("res18")
    weights = {"trunk": trunk.state_dict(), "settings": settings}
    *_, name = train_stl_after_ssl.make_start_trunk(args, "exp.pt", weights)
    assert name == "PIRL trunk (exp.pt)"
    assert capsys.readouterr().out == f"using trunk of exp.pt\n{note}"


# ---- The small stem ------------------------------------------------------------------
def test_small_stem(call, tiny, tmp_path):
    """It goes from pretraining through the file into fine-tuning."""
    flags = (*tiny, "--stem", "small", "--epochs", 1, "--experiment-name", "pirl")
    assert call("pirl_stl_train_test", *flags).status == 0
    pretrained = read_model(tmp_path, "pirl")
    assert pretrained["settings"]["stem"] == "small"
    assert pretrained["trunk"]["conv1.weight"].shape == (64, 3, 3, 3)

    script = ("train_stl_after_ssl", *tiny, "--pirl-model-name", "pirl")
    assert call(*script, "--experiment-name", "soft").status == 0
    assert read_model(tmp_path, "soft")["settings"]["stem"] == "small"

    outcome = call(*script, "--stem", "imagenet")
    assert outcome.is_one_line_error("conv1.weight", "--stem")


@pytest.mark.full_trunk
def test_the_small_stem_has_torchvision_s_names():
    trunk, _ = make_trunk("res18", "small")
    names = torchvision.models.resnet18().state_dict().keys()
    assert trunk.state_dict().keys() == names - {"fc.weight", "fc.bias"}


# ---- Flags ---------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--pirl-model-name", "--neighbours"])
def test_an_empty_name_is_refused(call, tiny, flag):
    """Most often it is a shell variable that is not set."""
    outcome = call("train_stl_after_ssl", *tiny, flag, "")
    assert outcome.is_one_line_error(flag, "empty", status=2)


# ---- Each class ----------------------------------------------------------------------
BALANCED = r"Balanced accuracy[\w ]*"  # the beginning of its row


def read_confusion(tmp_path, name):
    """(class names, counts int64 [C, C] with the true class in rows) of a run."""
    path = tmp_path / f"observations/{name}_confusion.csv"
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    counts = [[int(count) for count in row[1:]] for row in rows]
    return header[1:], torch.tensor(counts)


def recall_of(counts):
    """The accuracy of each class; NaN where it has no images."""
    return counts.diagonal() / counts.sum(1)


def class_rows(tmp_path, name):
    """The rows of the table by class: lists of texts; the header is the first."""
    lines = read_results(tmp_path, name).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Class | "))
    return [line.split(" | ") for line in (lines[first], *lines[first + 2 :])]


@pytest.fixture
def unbalanced(data_dir, tmp_path):
    """6 labelled images of each class, but 2 of class 3; 4 test images, but 1 of 7."""
    own = shutil.copytree(data_dir, tmp_path / "own")
    for folder, kept in (("train/3", 2), ("test/7", 1)):
        for path in sorted((own / folder).iterdir())[kept:]:
            path.unlink()
    return own


def test_the_results_have_the_accuracy_of_each_class(call, tiny, tmp_path, unbalanced):
    run = ("--data-dir", unbalanced, "--full-fine-tune", "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.status == 0, outcome.err

    header, *rows = class_rows(tmp_path, "exp")
    assert header[:3] == ["Class", "Labelled images", "Of test"]
    names, counts = read_confusion(tmp_path, "exp")
    assert [row[0] for row in rows] == names
    labelled = [2 if name == "3" else 6 for name in names]
    assert [int(row[1]) for row in rows] == labelled
    of_test = [1 if name == "7" else 4 for name in names]
    assert [int(row[2]) for row in rows] == of_test
    expected = [f"{recall:.2%}" for recall in recall_of(counts).tolist()]
    assert [row[3] for row in rows] == expected


def test_a_class_without_test_images_has_no_accuracy(call, tiny, tmp_path, unbalanced):
    shutil.rmtree(unbalanced / "test/7")
    run = ("--data-dir", unbalanced, "--experiment-name", "exp")
    assert call("train_stl_after_ssl", *tiny, *run).status == 0
    rows = {row[0]: row[1:] for row in class_rows(tmp_path, "exp")}
    assert rows["7"] == ["6", "0", "none"]
    assert "nan" not in read_results(tmp_path, "exp")


def test_without_test_images_each_class_s_accuracy_is_of_validation(
    call, tiny, tmp_path, unbalanced
):
    shutil.rmtree(unbalanced / "test")
    run = ("--data-dir", unbalanced, "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.status == 0, outcome.err

    header, *rows = class_rows(tmp_path, "exp")
    assert header[2] == "Of validation"
    _, counts = read_confusion(tmp_path, "exp")
    assert [int(row[2]) for row in rows] == counts.sum(1).tolist()
    recall = recall_of(counts)
    balanced = recall[~recall.isnan()].mean()
    row = re.search(rf"^{BALANCED} \| (.+)$", outcome.out, re.MULTILINE)
    assert row[1] == f"{balanced:.2%} | none"


def test_balanced_accuracy_is_a_row_where_classes_differ_in_size(
    call, tiny, tmp_path, unbalanced
):
    flags = (*tiny, "--full-fine-tune", "--experiment-name")
    outcome = call("train_stl_after_ssl", *flags, "balanced")
    assert outcome.status == 0, outcome.err
    assert "Balanced" not in outcome.out
    assert "Balanced" not in read_results(tmp_path, "balanced")

    run = (*flags, "exp", "--data-dir", unbalanced)
    outcome = call("train_stl_after_ssl", *run)
    assert outcome.status == 0, outcome.err
    _, counts = read_confusion(tmp_path, "exp")
    row = re.search(rf"^{BALANCED} \| [\d.]+% \| (.+)$", outcome.out, re.MULTILINE)
    assert row[1] == f"{recall_of(counts).mean():.2%}"
    assert row[0] in read_results(tmp_path, "exp")


def test_balanced_accuracy_counts_classes_and_not_images():
    """94 % of the images may be right with one class at 50 %."""
    labels = torch.tensor([0] * 88 + [1] * 12)
    predictions = labels.clone()
    predictions[-6:] = 0
    # Of the test images, all classes but number 1 have some.
    test_labels = torch.tensor([0, 0, 2, 2])
    test_predictions = torch.tensor([0, 0, 1, 1])

    trainer = SimpleNamespace(
        labels=labels,
        images=predictions,
        val_index=torch.arange(100),
        test_labels=test_labels,
        test_images=test_predictions,
        features=lambda images: images,
        predictions=lambda features: features,
    )
    assert (labels == predictions).float().mean() == pytest.approx(0.94)
    row = train_stl_after_ssl.balanced_row(trainer)
    assert row.endswith(" | 75.00% | 50.00%\n")


# ---- Folders without images ----------------------------------------------------------
def test_empty_folders_of_classes_are_left_out(call, tiny, tmp_path, data_dir):
    """Of the training images, and of the test images."""
    own = shutil.copytree(data_dir, tmp_path / "own")
    for folder in ("train/empty", "test/empty", "test/nothing"):
        (own / folder).mkdir()
    flags = (*tiny, "--experiment-name")
    assert call("train_stl_after_ssl", *flags, "plain").status == 0
    outcome = call("train_stl_after_ssl", *flags, "exp", "--data-dir", own)
    assert outcome.status == 0, outcome.err
    for folder in ("train/empty", "test/empty", "test/nothing"):
        assert f"note: {own / folder} holds no images and is left out" in outcome.out
    assert_same_run(tmp_path, "plain", "exp")


def test_a_class_whose_test_folder_is_empty(call, tiny, tmp_path, data_dir):
    own = shutil.copytree(data_dir, tmp_path / "own")
    shutil.rmtree(own / "test/2")
    (own / "test/2").mkdir()
    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own)
    assert outcome.status == 0, outcome.err
    assert f"note: {own / 'test/2'} holds no images and is left out" in outcome.out
