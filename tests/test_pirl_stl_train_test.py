"""Pretraining as a user sees it: files, seeds, resume, warm start, flags, learning."""

import builtins
import csv
import shutil
import signal
import sys
import types

import pytest
import torch
import torchvision
from conftest import COUNTS, ThinResNet, make_trainer
from records import (
    TRAINED,
    checkpoint,
    epochs_of,
    interrupted,
    parts_of,
    same,
    same_results,
    signal_in_step,
    table,
    weights,
)
from test_linear_probe import knn_by_hand

import dataset_helpers
import evaluation
import pirl_stl_train_test
from augmentations import PIXEL_MEAN, PIXEL_STD, normalize

CPU = torch.device("cpu")
WARM_START = ("--warm-start", "--cont-epoch", 2)


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the images that a test may change. Its flag: --data-dir own_data."""
    return shutil.copytree(data_dir, tmp_path / "own")


# ---- Files and seeds -----------------------------------------------------------------
def test_the_summary_says_what_is_about_to_be_done(capsys, monkeypatch):
    parser = pirl_stl_train_test.make_parser()
    flags = "--experiment-name exp --epochs 9 --batch-size 16 --precision fp32"
    trainer = types.SimpleNamespace(
        args=parser.parse_args([*flags.split(), "--tmax-for-cos-decay", "9"]),
        device=torch.device("cpu"),
        images=torch.zeros(100),
        train_count=70,
        negative_count=69,
        steps_per_epoch=5,
    )
    pirl_stl_train_test.print_summary(trainer, types.SimpleNamespace(epoch=9))
    assert capsys.readouterr().out == (
        "exp: PIRL, jigsaw, res18, cpu, fp32, seed 0\n"
        "  70 training images of 96 × 96 pixels, 30 for validation\n"
        "  5 steps of 16 per epoch, epochs 9 to 9\n"
        "  69 negatives (all other training images), loss modified-nce, "
        "--positive bank\n"
    )

    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    trainer.negative_count = 50
    trainer.args.tmax_for_cos_decay = 7
    pirl_stl_train_test.print_summary(trainer, types.SimpleNamespace(epoch=10))
    first, _, third, fourth, note = capsys.readouterr().out.splitlines()
    assert first.endswith(", seed 0, 2 ranks")
    assert third == "  5 steps of 16 per epoch, all epochs are done"
    assert fourth.startswith("  50 negatives, loss")
    assert note == (
        "note: the learning rate is 0 from the end of epoch 7 on; with "
        "--tmax-for-cos-decay 9 it would be a cosine of 9 epochs"
    )


def test_the_numbers_of_a_run_of_70_images(capsys):
    """All others may be negatives, and its 25 steps all be warm-up."""
    flags = "--batch-size 16 --epochs 6 --cont-epoch 2 --count-negatives 69"
    args = pirl_stl_train_test.make_parser().parse_args(flags.split())
    for args.warmup_steps in (25, 26):
        pirl_stl_train_test.check_after_loading(args, 70)
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: the warm-up of 26 steps is longer than the run, 25 ")


@pytest.mark.full_trunk
def test_run_writes_what_the_readme_says(pretrain, tmp_path):
    outcome = pretrain("exp", "--batch-size", 35)
    assert outcome.status == 0, outcome.err
    assert "70 training images" in outcome.out
    assert "69 negatives (all other training images" in outcome.out
    assert outcome.err == ""

    content = weights(tmp_path, "exp")
    resnet = torchvision.models.resnet18()
    missing, unexpected = resnet.load_state_dict(content["trunk"], strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
    assert content["settings"]["batch_size"] == 35

    # Row by row, and column by column, what the finished model has.
    path = tmp_path / "observations/exp_observations.csv"
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    assert len(rows) == 2
    assert header == [
        *("epoch", "train_loss", "val_loss", "train_acc", "val_acc", "learning_rate"),
        *("images_per_second", "knn_acc", "seconds"),
    ]
    for row, metrics in zip(rows, content["history"], strict=True):
        values = [metrics[column] for column in header]
        assert row == ["" if value is None else str(value) for value in values]

    left = {file.name for file in (tmp_path / "weights").iterdir()}
    assert left == {"exp.pt", "exp.ckpt", ".exp.run.lock"}


def test_too_few_images(pretrain, own_data):
    files = list((own_data / "unlabelled").iterdir())
    flags = ("--data-dir", own_data, "--only-train")
    for file in files[3:]:
        file.unlink()
    assert pretrain("three", *flags, "--batch-size", 3).status == 0

    files[0].unlink()
    for size in (1, 2):
        outcome = pretrain("two", *flags, "--batch-size", size)
        assert outcome.is_one_line_error("2 training images")


# ---- Resume --------------------------------------------------------------------------
def test_resume_is_exact_from_any_step(pretrain, finished, tmp_path, monkeypatch):
    """5 steps per epoch: stopped in one, at the end of its training, in the next."""
    finished("whole")

    term = signal.SIGTERM
    for number, step in ((signal.SIGINT, 4), (term, 5), (term, 7)):
        name = f"halves_{step}"
        with monkeypatch.context() as patch:
            signal_in_step(patch, number, step)
            outcome = pretrain(name)
        assert outcome.status == 128 + number
        assert "--resume True" in outcome.out
        training = checkpoint(tmp_path, name)["training"]
        assert (training["epoch"] - 1) * 5 + training["step"] == step

        outcome = pretrain(name, "--resume")
        assert outcome.status == 0, outcome.err
        assert same_results(tmp_path, "whole", name), step
        whole_run = parts_of(checkpoint(tmp_path, "whole"), TRAINED)
        halves = parts_of(checkpoint(tmp_path, name), TRAINED)
        assert same(whole_run, halves)


def test_more_epochs_for_a_finished_run(pretrain, finished, tmp_path):
    """The learning rate stays at its end, and the run says so."""
    finished("exp")
    before = weights(tmp_path, "exp")

    outcome = pretrain("exp", "--epochs", 3, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: the learning rate is 0" in outcome.out
    assert "from the end of epoch 2 on" in outcome.out
    assert "with --tmax-for-cos-decay 3 it would" in outcome.out

    after = weights(tmp_path, "exp")
    assert epochs_of(after["history"]) == [1, 2, 3]
    assert after["history"][2]["learning_rate"] == 0
    convolution = "conv1.weight"
    assert torch.equal(before["trunk"][convolution], after["trunk"][convolution])


def test_what_a_resumed_run_may_change_and_what_not(pretrain, finished, tmp_path):
    """Notes for these flags; any other is refused by its name, before anything else."""
    finished("exp")
    changed = ("--knn-every", 1, "--checkpoint-minutes", 3, "--cuda-graph")
    outcome = pretrain("exp", *changed, "--tmax-for-cos-decay", 3, "--resume")
    assert outcome.status == 0, outcome.err
    notes = [line for line in outcome.out.splitlines() if " was " in line]
    assert notes == [
        "note: --tmax-for-cos-decay was 2, is 3",
        "note: --knn-every was 5, is 1",
        "note: --cuda-graph was False, is True",
        "note: --checkpoint-minutes was 10.0, is 3.0",
    ]
    assert "note: --cuda-graph True has no effect here" in outcome.out
    settings = weights(tmp_path, "exp")["settings"]
    assert settings["knn_every"] == 1
    assert settings["tmax_for_cos_decay"] == 3

    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    refused = {
        "--batch-size": 8,
        "--seed": 5,
        "--lr": 0.1,
        "--loss": "nce",
        "--positive": "pair",
        "--only-train": True,
        "--count-negatives": 20,
        "--batch-negatives": False,
        "--loss-weight": 0.4,
        "--temp-parameter": 0.1,
        "--beta": 0.4,
        "--weight-decay": 0.1,
        "--warmup-steps": 99,
        "--crop-area": 0.3,
        "--colour-strength": 0.4,
        "--image-size": 40,
        "--deterministic": True,
        "--warm-start": True,
    }
    flags = [part for pair in refused.items() for part in pair]
    outcome = pretrain("exp", *flags, "--resume")
    assert outcome.is_one_line_error(*(f"{flag} was" for flag in refused))
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before


def test_fewer_epochs_than_have_begun(pretrain, finished, tmp_path, monkeypatch):
    """None can be undone; the run and its model say how many there are."""
    finished("whole")
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert pretrain("halves").status == 143
    # Once in the middle of epoch 2, once after it.
    for name in ("halves", "whole"):
        outcome = pretrain(name, "--epochs", 1, "--resume")
        assert outcome.status == 0, outcome.err
        assert "note: epoch 2 has begun already, so --epochs is 2" in outcome.out
        assert weights(tmp_path, name)["settings"]["epochs"] == 2
    assert epochs_of(table(tmp_path, "whole")) == ["1", "2"]
    assert same_results(tmp_path, "whole", "halves")


def test_precision_is_stored_resolved_and_kept(pretrain, tmp_path, monkeypatch):
    """auto is what the machine has where the run begins, here as on most GPUs.

    Going on elsewhere does not change the arithmetic unsaid.
    """
    with monkeypatch.context() as patch:
        patch.setattr(
            pirl_stl_train_test, "choose_precision", lambda args, device: "bf16"
        )
        outcome = pretrain("exp", "--epochs", 1, "--resume")
    assert outcome.status == 0
    assert "from the beginning" in outcome.out, "there was nothing to resume"

    note = "--precision was bf16, is fp32"
    for flags, kept in (((), "bf16"), (("--precision", "fp32"), "fp32")):
        outcome = pretrain("exp", "--epochs", 2, *flags, "--resume")
        assert outcome.status == 0, outcome.err
        assert (note in outcome.out) == (kept == "fp32")
        assert weights(tmp_path, "exp")["settings"]["precision"] == kept


# ---- Warm start ----------------------------------------------------------------------
def test_warm_start_under_another_name(pretrain, finished, tmp_path):
    """One more epoch with a learning rate of 0: the weights are the first run's."""
    finished("first")
    # The name of a file is enough.
    flags = ("--cont-epoch", 2, "--pirl-model-name", "first", "--lr", 0)
    outcome = pretrain("second", *flags)
    assert outcome.status == 0, outcome.err

    first = weights(tmp_path, "first")
    second = weights(tmp_path, "second")
    assert same(first["head_f"], second["head_f"])
    assert same(first["head_g"], second["head_g"])
    assert torch.equal(first["trunk"]["conv1.weight"], second["trunk"]["conv1.weight"])
    assert epochs_of(table(tmp_path, "second")) == ["2"]


def test_a_warm_start_from_another_model_replaces_no_run(pretrain, finished, tmp_path):
    finished("exp")
    shutil.copy(tmp_path / "weights/exp.pt", tmp_path / "weights/other.pt")
    before = {file: file.read_bytes() for file in tmp_path.rglob("exp*")}
    outcome = pretrain("exp", *WARM_START, "--pirl-model-name", "other")
    assert outcome.is_one_line_error("the name exp is taken")
    assert {file: file.read_bytes() for file in tmp_path.rglob("exp*")} == before


def test_warm_start_under_its_own_name(pretrain, finished, tmp_path):
    """The CSV goes on, by the model's own record of the epochs before."""
    finished("first")
    before = weights(tmp_path, "first")
    first_line = table(tmp_path, "first")[0]
    path = tmp_path / "observations/first_observations.csv"
    path.write_bytes(b"epoch\n\xff\n")

    outcome = pretrain("first", *WARM_START)
    assert outcome.status == 0, outcome.err
    lines = table(tmp_path, "first")
    assert epochs_of(lines) == ["1", "2"]
    assert lines[0] == first_line

    after = weights(tmp_path, "first")
    assert not same(before["trunk"], after["trunk"])
    assert epochs_of(after["history"]) == [1, 2]


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_warm_started_run_resumes_itself(pretrain, tmp_path, monkeypatch, killed):
    """Killed before or after its first step, it goes on from its own beginning.

    It does so without the first run's flags.
    """
    assert pretrain("exp", "--lr", 0.1).status == 0
    earlier_files = shutil.copytree(tmp_path / "weights", tmp_path / "saved")
    assert pretrain("exp", "--lr", 0.1, *WARM_START).status == 0
    whole = weights(tmp_path, "exp")

    for file in earlier_files.glob("exp.*"):
        shutil.copy(file, tmp_path / "weights")
    with monkeypatch.context() as patch:
        if killed == "before":
            patch.setattr(
                pirl_stl_train_test.PretrainingTrainer, "train_step", interrupted
            )
        else:
            signal_in_step(patch, signal.SIGINT, 1)
        assert pretrain("exp", "--lr", 0.1, *WARM_START).status == 130

    outcome = pretrain("exp", "--resume")
    assert outcome.status == 0, outcome.err
    resumed = weights(tmp_path, "exp")
    assert same(parts_of(whole), parts_of(resumed))
    assert epochs_of(table(tmp_path, "exp")) == ["1", "2"]
    assert resumed["settings"]["warm_start"] is True
    assert resumed["settings"]["lr"] == 0.1


# ---- Flags ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        "--only-train",
        "--loss nce --non-linear-head yes",
        "--positive pair --count-negatives 20",
        "--precision bf16 --image-size 55 --beta 0 --loss-weight 0.3"
        " --tmax-for-cos-decay 5",
        "--batch-negatives no --zero-init False --crop-area 0.5",
        "--colour-strength 0 --deterministic",
        "--batch-size 23 --warmup-steps 0 --temp-parameter 0.01",
    ],
)
def test_flags(pretrain, tmp_path, flags):
    outcome = pretrain("exp", "--epochs", 1, *flags.split())
    assert outcome.status == 0, outcome.err

    bank = checkpoint(tmp_path, "exp")["bank"]["vectors"]
    assert bank.dtype == torch.float32
    assert len(bank) == COUNTS["unlabelled"]
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(len(bank)))
    if flags == "--only-train":
        assert f"{COUNTS['unlabelled']} training images" in outcome.out
        assert table(tmp_path, "exp")[0]["val_loss"] == ""


def test_compiled_code_serves_full_batches_alone(tiny):
    """Not a smaller last batch, validation or the monitor.

    It is compiled once for the batch's 16 images and once for their 144 patches.
    """
    trainer = make_trainer(tiny)
    compiled = []

    def backend(graph, inputs):
        shapes = [tuple(value.shape) for value in inputs if value.ndim == 4]
        compiled.append([shape for shape in shapes if shape[1] == 3])
        return graph.forward

    trainer.model.trunk.compile(backend=backend, dynamic=False)
    uniforms = trainer.epoch_uniforms(1)
    monitor = evaluation.make_monitor(trainer.args, trainer.device)
    batches = [torch.arange(16), torch.arange(16, 22), torch.arange(16, 32)]
    try:
        for _ in range(2):
            for step, index in enumerate(batches):
                trainer.train_step(index, uniforms, 1, step)
            monitor.accuracy(trainer.exported_trunk())
            pirl_stl_train_test.validate(trainer, uniforms, 1)
    finally:
        torch._dynamo.reset()

    batch_shapes = []
    for shapes in compiled:
        batch_shapes.extend(shape for shape in shapes if shape[0] in (16, 144))
    assert sorted(batch_shapes) == [(16, 3, 36, 36), (144, 3, 11, 11)]
    assert len(compiled) == 2


# ---- Ranks ---------------------------------------------------------------------------
def test_files_weights_and_place_are_compared_before_the_first_step(
    pretrain, finished, tmp_path, monkeypatch
):
    """A node without the checkpoint would start over while the others go on."""
    finished("exp")
    compared = []
    monkeypatch.setattr(
        pirl_stl_train_test, "compare_ranks", lambda _, *facts: compared.append(facts)
    )
    assert pretrain("exp", "--resume").status == 0
    saved = checkpoint(tmp_path, "exp")
    images = {name: saved[name] for name in ("checksum", "files", "decoder")}
    assert compared[0] == ()
    assert compared[1][:3] == (images, 3, 0)

    # A file of weights to start from, and another one that differs in one number.
    weights_of_exp = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    weights_of_exp["trunk"]["bn1.running_mean"][3] += 1e-3
    torch.save(weights_of_exp, tmp_path / "weights/other.pt")
    checksums = []
    for run, start in (("a", "exp"), ("b", "exp"), ("c", "other")):
        compared.clear()
        assert pretrain(run, "--pirl-model-name", start).status == 0
        assert compared[1][1:3] == (1, 0)
        checksums.append(compared[1][3])
    assert checksums[0] == checksums[1] != checksums[2]


def test_rank_0_alone_measures_logs_and_exports(pretrain, tmp_path, monkeypatch):
    def not_here(*arguments):
        raise AssertionError("that is for rank 0")

    trainer_class = pirl_stl_train_test.PretrainingTrainer
    monkeypatch.setattr(pirl_stl_train_test, "RANK", 1)
    monkeypatch.setattr(trainer_class, "train_step", lambda *_: torch.tensor([8.0, 4]))
    monkeypatch.setattr(pirl_stl_train_test, "validate", lambda *_: (1.0, 0.5))
    monkeypatch.setattr(trainer_class, "exported_trunk", not_here)
    monkeypatch.setattr(evaluation, "make_monitor", not_here)
    monkeypatch.setattr(pirl_stl_train_test, "tensorboard_writer", not_here)
    outcome = pretrain("exp", "--knn-every", 1, "--tensorboard")
    assert outcome.status == 0, outcome.err
    assert not (tmp_path / "weights/exp.pt").exists()


# ---- The kNN monitor and TensorBoard -------------------------------------------------
def test_the_monitor_is_in_the_csv_and_reads_no_test_image(
    pretrain, tmp_path, own_data
):
    (own_data / "test/1/0.png").write_bytes(b"no image")
    outcome = pretrain("exp", "--data-dir", own_data, "--epochs", 3, "--knn-every", 2)
    assert outcome.status == 0, outcome.err
    accuracies = [line["knn_acc"] for line in table(tmp_path, "exp")]
    measured = [bool(accuracy) for accuracy in accuracies]
    assert measured == [False, True, True], "every second epoch, and the last"
    assert outcome.out.count("kNN") == 2


def test_training_does_not_notice_the_monitor(pretrain, finished, tmp_path):
    finished("whole")
    outcome = pretrain("often", "--knn-every", 1)
    assert outcome.status == 0, outcome.err
    trunks = [weights(tmp_path, name)["trunk"] for name in ("often", "whole")]
    assert same(*trunks)


def test_the_monitor_measures_the_exported_features(pretrain, data_dir, tmp_path):
    """The last epoch's accuracy is that of the file's features, by our own search.

    Among the images that fine-tuning with this seed would train on.
    """
    assert pretrain("exp", "--epochs", 1, "--seed", 3).status == 0
    content = weights(tmp_path, "exp")
    resnet = ThinResNet()
    resnet.load_state_dict(content["trunk"], strict=False)
    resnet.fc = torch.nn.Identity()
    resnet.eval()
    data = dataset_helpers.load_labelled(data_dir, 36, CPU, 3)
    with torch.no_grad():
        features = resnet(normalize(data.images, PIXEL_MEAN, PIXEL_STD))
    features = features.double().numpy()
    labels = data.labels.numpy()

    known = (features[data.train], labels[data.train])
    expected = knn_by_hand(*known, features[data.val], labels[data.val])
    assert content["history"][-1]["knn_acc"] == pytest.approx(expected)

    # Another split of so few images may have the same accuracy.
    args = types.SimpleNamespace(
        data_dir=data_dir, image_size=36, batch_size=16, seed=3
    )
    assert evaluation.make_monitor(args, CPU).data.val.equal(data.val)
    assert not data.val.equal(dataset_helpers.load_labelled(data_dir, 36, CPU, 0).val)


def test_tensorboard_without_its_package(pretrain, monkeypatch):
    plain_import = builtins.__import__

    def import_without(name, *arguments, **options):
        if "tensorboard" in name:
            raise ImportError(name)
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", import_without)
    outcome = pretrain("exp", "--tensorboard", "True")
    assert outcome.is_one_line_error("pip install tensorboard")


def test_tensorboard_has_the_numbers_of_the_csv(pretrain, tmp_path, monkeypatch):
    """And a resumed run hides what came after its checkpoint."""
    opened = []
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder.name, purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            written.append("flush")

    package = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 7)
        assert pretrain("exp", "--tensorboard", "True").status == 143
    assert pretrain("exp", "--resume").status == 0

    assert opened == [("exp_tensorboard", 1), ("exp_tensorboard", 2)]
    history = weights(tmp_path, "exp")["history"]
    assert history[0]["knn_acc"] is None, "it is measured in every fifth epoch"
    expected = []
    for metrics in history:
        for name, value in metrics.items():
            if value is not None:
                expected.append((name, value, metrics["epoch"]))
        expected.append("flush")
    assert written == expected


def test_a_warm_start_does_not_replace_a_fine_tuning(call, tiny, tmp_path):
    flags = (*tiny, "--epochs", 1, "--experiment-name", "exp")
    assert call("train_stl_after_ssl", *flags).status == 0
    before = (tmp_path / "weights/exp.ckpt").read_bytes()

    outcome = call("pirl_stl_train_test", *flags, "--warm-start")
    assert outcome.is_one_line_error("exp.pt is not a pretrained model")
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before
