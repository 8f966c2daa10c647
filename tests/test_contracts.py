"""What a step, a validation, an export and a run of pretraining promise.

Each is computed a second time by plain_reference.py.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ThinResNet
from plain_reference import (
    SlowPIRL,
    assert_same_change,
    assert_statistics,
    make_precise,
    note_calls,
    slow_statistics,
    state_of,
)
from records import checkpoint, weights
from torch import nn

import evaluation
import models
import pirl_stl_train_test
from runtime.experiment import Experiment
from runtime.randomness import (
    BANK,
    INITIAL_WEIGHTS,
    ORDER,
    VIEWS,
    derived_seed,
    make_generator,
)

CPU = torch.device("cpu")
SIDE = 36
TRAIN_IMAGES = 10
VALIDATION_IMAGES = 8

# Every number differs from its neighbours and from what leaving it out would mean; the
# weight decay is large, so that a step without it is another one.
# fmt: off
FLAGS = [
    "--device", "cpu", "--image-size", SIDE, "--batch-size", 6, "--epochs", 3,
    "--lr", 0.3, "--warmup-steps", 8, "--tmax-for-cos-decay", 5, "--weight-decay", 0.05,
    "--count-negatives", 3, "--beta", 0.3, "--loss-weight", 0.3, "--zero-init", "False",
]
# fmt: on


def make_pretraining(*flags):
    """Pretraining on images of noise: the first ten train, eight validate."""
    parser = pirl_stl_train_test.make_parser()
    args = parser.parse_args([str(flag) for flag in (*FLAGS, *flags)])
    pirl_stl_train_test.resolve_defaults(args, CPU)

    generator = torch.Generator().manual_seed(1)
    size = (TRAIN_IMAGES + VALIDATION_IMAGES, 3, SIDE, SIDE)
    images = torch.randint(0, 256, size, generator=generator).byte()
    trainer = pirl_stl_train_test.PretrainingTrainer(args, CPU, images, TRAIN_IMAGES)
    make_precise(trainer, trainer.image_view, trainer.pretext)
    return trainer


# ---- Steps ---------------------------------------------------------------------------
# With test_losses.py, which has all eight: each setting by itself, and with the others.
LOSSES = [
    "--loss modified-nce --positive bank --batch-negatives True",
    "--loss modified-nce --positive pair --batch-negatives False",
    "--loss nce --positive bank --batch-negatives False",
    "--loss nce --positive pair --batch-negatives True",
]


@pytest.mark.parametrize(
    "flags",
    [
        *LOSSES,
        "--pretext rotation --seed 3",
        "--temp-parameter 5 --weight-decay 0.01 --seed 4",
    ],
)
def test_two_training_steps(flags):
    """The second epoch: a full batch, and the four images that are left."""
    trainer = make_pretraining(*flags.split())
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(2)
    order = torch.tensor([7, 2, 9, 4, 0, 5, 3, 8, 1, 6])

    for step, index in enumerate(order.split(6)):
        before = state_of(trainer.model)
        bank_before = trainer.bank.vectors.clone()
        trainer.model.eval()  # as validation leaves it
        totals = trainer.train_step(index, uniforms, 2, step)
        slow_totals = slow.train_step(index, uniforms, 2, step)

        assert totals.tolist() == pytest.approx(slow_totals, rel=1e-4)
        lr = trainer.optimizer.param_groups[0]["lr"]
        assert lr == pytest.approx(slow.learning_rate(2, step), rel=1e-9)
        assert_same_change(before, state_of(trainer.model), state_of(slow.model))

        bank = trainer.bank.vectors
        torch.testing.assert_close(bank.double(), slow.bank, rtol=0, atol=2e-5)
        changed = (bank != bank_before).any(1).nonzero().flatten()
        assert changed.tolist() == sorted(index.tolist())

        # The limit of the gradient's norm takes part, or, at a high τ, does not.
        assert (slow.gradient_norm > 2) == (trainer.args.temp_parameter < 1)


@pytest.mark.parametrize(("rank", "places"), [(0, [0, 1, 2]), (1, [3, 4])])
def test_a_rank_takes_its_share_of_the_whole_batch_s_step(monkeypatch, rank, places):
    """Of five images on two ranks: its losses, the other's embeddings as negatives.

    At this temperature the gradient is not clipped, which would hide a factor.
    """
    trainer = make_pretraining("--temp-parameter", 20)
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(1)
    index = torch.tensor([7, 2, 9, 4, 0])
    before = state_of(trainer.model)
    others = torch.randn(5, 128, generator=torch.Generator().manual_seed(5))
    reduced = []

    def gather_rows(rows, counts):
        assert counts == [3, 2]
        gathered = list(others)
        for place, row in zip(places, rows, strict=True):
            gathered[place] = row
        return torch.stack(gathered)

    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    monkeypatch.setattr(pirl_stl_train_test, "RANK", rank)
    monkeypatch.setattr(pirl_stl_train_test, "gather_rows", gather_rows)
    connection = SimpleNamespace(all_reduce=reduced.append)
    monkeypatch.setattr(pirl_stl_train_test, "distributed", connection)
    totals = trainer.train_step(index, uniforms, 1, 0)
    slow_totals = slow.train_step(index, uniforms, 1, 0, places, others)

    assert totals.tolist() == pytest.approx(slow_totals, rel=1e-4)
    assert reduced[0] is totals, "the totals are summed over the ranks"
    assert slow.gradient_norm < 2
    assert_same_change(before, state_of(trainer.model), state_of(slow.model))
    bank = trainer.bank.vectors.double()
    torch.testing.assert_close(bank, slow.bank, rtol=0, atol=2e-5)


def test_a_rank_without_a_share_takes_part_and_counts_nothing(monkeypatch):
    """The last of four, of three images: the others wait for its gradients."""
    trainer = make_pretraining()
    index = torch.tensor([7, 2, 9])
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0]))
    )

    def gather_rows(rows, counts):
        assert counts == [1, 1, 1, 0]
        return torch.ones(3, 128)

    def all_correct(embeddings, *others):
        return torch.ones(len(embeddings), dtype=torch.bool)

    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 4)
    monkeypatch.setattr(pirl_stl_train_test, "RANK", 3)
    monkeypatch.setattr(pirl_stl_train_test, "gather_rows", gather_rows)
    monkeypatch.setattr(pirl_stl_train_test, "pretext_correct", all_correct)
    connection = SimpleNamespace(all_reduce=lambda totals: None)
    monkeypatch.setattr(pirl_stl_train_test, "distributed", connection)
    batch = trainer.load_batch(index, trainer.epoch_uniforms(1), 1, 0)
    embeddings, loss, totals = trainer.forward_batch(batch)

    assert seen == [1]
    assert embeddings.equal(torch.ones(3, 128))
    assert loss.item() == 0
    assert loss.requires_grad
    assert totals.tolist() == [0, 0]


def test_the_network_is_what_the_flags_say(monkeypatch):
    trainer = make_pretraining(
        "--seed", 5, "--crop-area", 0.4, "--colour-strength", 0.3
    )
    trunk = trainer.model.trunk
    assert trunk.conv1.kernel_size == (7, 7)
    assert trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (trunk.layer1[0].bn2.weight == 1).all()
    assert len(trainer.model.head_f) == len(trainer.model.head_g.together) == 1
    assert trainer.image_view.area == (0.4, 1.0)
    assert trainer.image_view.colour_jitter.strength == 0.3
    assert trainer.pretext.colour_jitter.strength == 0.3
    assert trainer.negative_count == 3

    # The first weights have a stream of random numbers of their own.
    torch.manual_seed(derived_seed(5, INITIAL_WEIGHTS))
    first_trunk, _ = models.make_trunk("res18", zero_init=False)
    assert trunk.conv1.weight.equal(first_trunk.conv1.weight.double())

    class OtherResNet(ThinResNet):
        pass

    monkeypatch.setitem(models.TRUNKS, "res50", OtherResNet)
    flags = "--model-type res50 --stem small --zero-init True --non-linear-head True"
    others = make_pretraining(*flags.split())
    trunk = others.model.trunk
    assert type(trunk) is OtherResNet
    assert trunk.conv1.kernel_size == (3, 3)
    assert (trunk.layer1[0].bn2.weight == 0).all()
    assert len(others.model.head_f) == len(others.model.head_g.together) == 3


def test_by_default_all_other_training_images_are_negatives(monkeypatch):
    """If they are fewer than 6,400."""
    args = pirl_stl_train_test.make_parser().parse_args(["--device", "cpu"])
    pirl_stl_train_test.resolve_defaults(args, CPU)
    images = torch.zeros(18, 3, SIDE, SIDE, dtype=torch.uint8)
    for default, count in ((pirl_stl_train_test.DEFAULT_NEGATIVES, 9), (4, 4)):
        monkeypatch.setattr(pirl_stl_train_test, "DEFAULT_NEGATIVES", default)
        trainer = pirl_stl_train_test.PretrainingTrainer(args, CPU, images, 10)
        assert trainer.negative_count == count


def test_two_ranks_average_their_gradients_and_not_their_statistics(monkeypatch):
    """And with --compile, the trunk and the views are compiled for fixed shapes."""
    wrapped = []
    compiled = []

    def parallel(model, **options):
        wrapped.append((model, options))
        return "parallel"

    def compile_function(function, **options):
        compiled.append((function.__name__, options))
        return function

    def compile_module(module, **options):
        compiled.append((type(module).__name__, options))

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", parallel)
    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(nn.Module, "compile", compile_module)
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    monkeypatch.setattr(pirl_stl_train_test, "check_compiler", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make_pretraining("--compile", "True")
        # This one of DistributedDataParallel is not shown.
        warnings.warn("Grad strides do not match bucket view strides.", stacklevel=1)
    assert trainer.parallel_model == "parallel"
    assert wrapped == [(trainer.model, {"broadcast_buffers": False})]
    fixed = {"dynamic": False}
    assert compiled == [("ThinResNet", fixed), ("make_views", fixed)]

    compiled.clear()
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 1)
    alone = make_pretraining()
    assert alone.parallel_model is alone.model
    assert compiled == []


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_the_network_runs_in_the_precision_of_the_flag(precision, dtype):
    """What its convolutions give; the loss and the bank are float32 in any case."""
    trainer = make_pretraining("--precision", precision)
    trainer.model.float()
    for state in trainer.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()
    trainer.image_view.register_forward_hook(lambda *hooked: hooked[2].float())
    trainer.pretext.register_forward_hook(lambda *hooked: hooked[2].float())
    types = set()
    trainer.model.trunk.layer4[0].conv2.register_forward_hook(
        lambda *hooked: types.add(hooked[2].dtype)
    )
    index = torch.arange(6)
    uniforms = trainer.epoch_uniforms(1)
    batch = trainer.load_batch(index, uniforms, 1, 0)
    embeddings, loss, totals = trainer.forward_batch(batch)
    assert types == {dtype}
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    for result in (embeddings, loss, totals, trainer.bank.vectors):
        assert result.dtype == torch.float32


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 5])
def test_the_learning_rate_of_every_step(warmup_steps):
    """Three steps per epoch; the run begins in epoch 2, and the cosine ends after 4."""
    args = SimpleNamespace(
        lr=0.5, warmup_steps=warmup_steps, tmax_for_cos_decay=4, cont_epoch=2
    )
    for epoch in range(2, 7):
        for step in range(3):
            epochs_done = epoch - 1 + step / 3
            expected = 0.5 * (1 + math.cos(math.pi * epochs_done / 4)) / 2
            if epochs_done >= 4:
                expected = 0
            steps_of_this_run = 3 * (epoch - 2) + step + 1
            if steps_of_this_run < warmup_steps:
                expected *= steps_of_this_run / warmup_steps
            rate = pirl_stl_train_test.learning_rate(args, epoch, step, 3)
            assert rate == pytest.approx(expected, abs=1e-12), (epoch, step)


@pytest.mark.parametrize("flags", LOSSES[::3])
def test_validation(flags):
    """Eight images in batches of six and two, in eval mode, by the training's rules."""
    trainer = make_pretraining(*flags.split())
    slow = SlowPIRL(trainer)
    uniforms = trainer.epoch_uniforms(2)
    before = state_of(trainer.model)
    bank_before = trainer.bank.vectors.clone()
    trainer.model.train()  # as training leaves it
    with_gradients = []
    trainer.model.register_forward_hook(
        lambda *_: with_gradients.append(torch.is_grad_enabled())
    )

    result = pirl_stl_train_test.validate(trainer, uniforms, 2)

    assert with_gradients == [False, False], "they would take memory for nothing"
    assert result == pytest.approx(slow.validate(uniforms, 2), rel=1e-4)
    assert 0 < result[1] < 1, "some answers are correct and some are not"
    bank = trainer.bank.vectors
    torch.testing.assert_close(bank.double(), slow.bank, rtol=0, atol=2e-5)
    rows_of_training = slice(None, TRAIN_IMAGES)
    assert bank[rows_of_training].equal(bank_before[rows_of_training])
    assert (bank[TRAIN_IMAGES:] != bank_before[TRAIN_IMAGES:]).any(1).all()

    # It trains nothing, and leaves the running statistics alone.
    for name, value in trainer.model.state_dict().items():
        assert value.equal(before[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_validation_takes_the_running_statistics_of_rank_0(monkeypatch):
    """And the totals of the batches are added up in double precision.

    A float32 total of 2^24 would stay the same whatever is added.
    """
    trainer = make_pretraining("--batch-size", 4)
    uniforms = trainer.epoch_uniforms(1)
    sums = iter([2.0**24, 1.0])
    broadcast = []

    def forward_batch(batch):
        embeddings = torch.ones(len(batch.index), 128)
        return embeddings, None, torch.tensor([next(sums), 2.0])

    def take_over(buffer, rank):
        broadcast.append((buffer.data_ptr(), rank))

    connection = SimpleNamespace(broadcast=take_over)
    monkeypatch.setattr(pirl_stl_train_test, "distributed", connection)
    monkeypatch.setattr(trainer, "forward_batch", forward_batch)
    monkeypatch.setattr(pirl_stl_train_test, "WORLD_SIZE", 2)
    result = pirl_stl_train_test.validate(trainer, uniforms, 1)

    assert result == ((2**24 + 1) / VALIDATION_IMAGES, 0.5)
    assert broadcast == [(buffer.data_ptr(), 0) for buffer in trainer.model.buffers()]


# ---- Random numbers, and where tensors are made --------------------------------------
def test_order_views_and_bank_are_functions_of_the_seed():
    """Each has a stream of its own, which no other use of random numbers moves."""
    trainer = make_pretraining("--seed", 5)
    torch.manual_seed(7)  # as if much had been drawn meanwhile
    torch.rand(3)

    generator = make_generator("cpu", 5, ORDER, 2)
    order = torch.randperm(TRAIN_IMAGES, generator=generator)
    batches = trainer.epoch_batches(2)
    assert [len(batch) for batch in batches] == [6, 4]
    assert torch.cat(batches).equal(order)

    images = TRAIN_IMAGES + VALIDATION_IMAGES
    generator = make_generator("cpu", 5, VIEWS, 2)
    uniforms = torch.rand(images, 96, generator=generator)
    assert trainer.epoch_uniforms(2).equal(uniforms)

    generator = make_generator("cpu", 5, BANK)
    vectors = torch.randn(images, 128, generator=generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.bank.vectors, vectors)


def test_a_step_makes_no_tensor_on_another_device():
    """Where device= is forgotten, a tensor would be made on the default device.

    Here that is "meta", whose tensors have no numbers: the step would be another one.
    """
    trainer = make_pretraining()
    other_trainer = make_pretraining()
    uniforms = trainer.epoch_uniforms(1)
    index = torch.arange(6)
    totals = trainer.train_step(index, uniforms, 1, 0)
    with torch.device("meta"):
        same_totals = other_trainer.train_step(index, uniforms, 1, 0)
        assert trainer.epoch_uniforms(2).device == CPU
    assert totals.equal(same_totals)
    assert trainer.bank.vectors.equal(other_trainer.bank.vectors)


# ---- The exported trunk --------------------------------------------------------------
@pytest.mark.parametrize(("most", "batches_of"), [(4096, 5), (7, 4)])
def test_the_exported_statistics_are_of_whole_training_images(
    monkeypatch, most, batches_of
):
    """Of many images a part is enough."""
    monkeypatch.setattr(evaluation, "STATISTICS_IMAGES", most)
    trainer = make_pretraining("--batch-size", 5)
    trainer.model.float()
    before = state_of(trainer.model)

    exported = trainer.exported_trunk()

    batches = trainer.images[: min(most, TRAIN_IMAGES)].split(batches_of)
    statistics = slow_statistics(trainer.model.trunk, batches)
    assert len(statistics) > 10
    assert_statistics(exported.state_dict(), statistics)
    for name, parameter in exported.named_parameters():
        assert parameter.equal(before[f"trunk.{name}"]), name

    # The trunk that is trained keeps its own.
    for name, value in trainer.model.state_dict().items():
        assert value.equal(before[name]), name


# ---- A whole run ---------------------------------------------------------------------
def test_a_run_of_pretraining(call, tiny, tmp_path, monkeypatch):
    """Three epochs of five steps, kNN in the second and in the last, then the export.

    Checkpoints are due all the time: one comes after every step, before validation.
    """
    module = pirl_stl_train_test
    events = []
    indices = {}
    sums = {}
    validated = {}
    uniforms_of = {}
    trainers = []

    def after_step(arguments, totals):
        trainer, index, uniforms, epoch, step = arguments
        trainers.append(trainer)
        assert step == len(indices.setdefault(epoch, []))
        indices[epoch].append(index)
        uniforms_of.setdefault(epoch, uniforms)
        assert uniforms.equal(uniforms_of[epoch])
        sums[epoch] = sums.get(epoch, 0) + totals
        events.append("step")

    def after_validation(arguments, result):
        _, uniforms, epoch = arguments
        assert uniforms.equal(uniforms_of[epoch])
        validated[epoch] = result
        events.append("validate")

    note_calls(monkeypatch, module.PretrainingTrainer, "train_step", after_step)
    note_calls(monkeypatch, module, "validate", after_validation)
    knn = []

    def after_knn(arguments, accuracy):
        knn.append(accuracy)
        events.append("kNN")

    note_calls(monkeypatch, evaluation.KNNMonitor, "accuracy", after_knn)

    def noting(event):
        return lambda *_: events.append(event)

    note_calls(monkeypatch, module, "log_epoch", noting("log"))
    note_calls(monkeypatch, Experiment, "save_checkpoint", noting("checkpoint"))
    note_calls(monkeypatch, module, "export", noting("export"))

    # fmt: off
    outcome = call(
        "pirl_stl_train_test", *tiny, "--epochs", 3, "--knn-every", 2,
        "--checkpoint-minutes", 0, "--experiment-name", "exp", "--lr", 0.1,
    )
    # fmt: on
    assert outcome.status == 0, outcome.err

    epoch = " step checkpoint" * 5 + " validate"
    expected = f"{epoch} log {epoch} kNN log {epoch} kNN log checkpoint export"
    assert events == expected.split()

    # Each epoch sees each training image once, in another order and by other views.
    orders = [torch.cat(indices[epoch]) for epoch in (1, 2, 3)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(70))
    for values in (orders, [*uniforms_of.values()]):
        assert not values[0].equal(values[1])
        assert not values[1].equal(values[2])

    # The record, and the finished model: the weights of the end.
    content = weights(tmp_path, "exp")
    history = content["history"]
    rates = []
    for epoch, metrics in enumerate(history, start=1):
        assert metrics["epoch"] == epoch
        train_means = [metrics["train_loss"], metrics["train_acc"]]
        assert train_means == pytest.approx((sums[epoch] / 70).tolist(), rel=1e-5)
        assert (metrics["val_loss"], metrics["val_acc"]) == validated[epoch]
        last_step = (epoch - 1) * 5 + 4
        cosine_decay = 0.5 * (1 + math.cos(math.pi * last_step / 15))
        rates.append(pytest.approx(0.1 * (last_step + 1) / 100 * cosine_decay))
        line = (
            "epoch {epoch}/3: loss {train_loss:.4f}, pretext {train_acc:.2%}, "
            "validation loss {val_loss:.4f}, pretext {val_acc:.2%}, "
        )
        assert line.format(**metrics) in outcome.out
    assert [metrics["learning_rate"] for metrics in history] == rates
    assert [metrics["knn_acc"] for metrics in history] == [None, *knn]

    trainer = trainers[0]
    trunk = trainer.model.trunk
    for name, parameter in trainer.model.named_parameters():
        part, rest = name.split(".", 1)
        assert parameter.equal(content[part][rest]), name
    batches = trainer.images[:70].split(14)  # 5 of at most 16
    assert_statistics(content["trunk"], slow_statistics(trunk, batches))

    assert content["kind"] == "PIRL weights"
    assert content["images"] == 70
    assert content["pixel_mean"] == (0.4467, 0.4398, 0.4066)
    assert content["pixel_std"] == (0.2603, 0.2566, 0.2713)
    settings = content["settings"]
    assert settings["lr"] == 0.1
    assert settings["epochs"] == 3
    assert settings["experiment_name"] == "exp"

    # The last checkpoint is of the same moment, validation's bank rows included.
    saved = checkpoint(tmp_path, "exp")
    assert saved["training"]["epoch"] == 4
    assert saved["training"]["history"] == history
    assert saved["bank"]["vectors"].equal(trainer.bank.vectors)
    for name, value in trunk.state_dict().items():
        assert value.equal(saved["trunk"][name]), name
