"""What a step, a validation and a run of fine-tuning promise.

Each is computed a second time by plain_reference.py.
"""

import pytest
import torch
from plain_reference import (
    MomentumSGD,
    assert_same_change,
    assert_statistics,
    make_precise,
    note_calls,
    plain,
    plain_copy,
    slow_statistics,
    state_of,
)
from records import weights

import dataset_helpers
import train_stl_after_ssl
from runtime.experiment import TrainingState
from runtime.randomness import ORDER, VIEWS, make_generator
from runtime.weights import choose_architecture, read_weights

CPU = torch.device("cpu")


def make_fine_tuning(tiny, *flags, path=None, weights=None):
    """Fine-tuning of a random trunk, or of what read_weights() found in `path`."""
    parser = train_stl_after_ssl.make_parser()
    args = parser.parse_args([str(flag) for flag in (*tiny, *flags)])
    choose_architecture(args, path, weights or {})
    args.precision = "fp32"
    data = dataset_helpers.load_labelled(args.data_dir, args.image_size, CPU, args.seed)
    return train_stl_after_ssl.FineTuningTrainer(
        args, CPU, data, path, weights or {}, None
    )


def slow_cross_entropy(logits, labels):
    """The mean of −log softmax, by loops."""
    losses = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        total = sum(logit.exp() for logit in row)
        losses.append(-(row[label].exp() / total).log())
    return sum(losses) / len(losses)


def test_two_steps_of_fine_tuning(tiny):
    """View, cross entropy, momentum, weight decay; every weight, no frozen mode."""
    flags = ("--full-lr", 0.2, "--lr", 0.7, "--weight-decay", 0.05)
    trainer = make_fine_tuning(tiny, *flags, "--zero-init", "False")
    make_precise(trainer, trainer.view)
    trainer.averaged_model.double()
    slow_model = plain_copy(trainer.model)
    sgd = MomentumSGD(slow_model.parameters(), 0.05)
    uniforms = trainer.epoch_uniforms(1)

    for index in trainer.data.train[:16].flip(0).split(8):
        before = state_of(trainer.model)
        trainer.model.eval()  # as validation leaves it
        totals = trainer.train_step(index, uniforms)

        slow_model.train()
        images = trainer.data.images[index].float()
        labels = trainer.data.labels[index]
        logits = slow_model(trainer.view(images, uniforms[index]))
        loss = slow_cross_entropy(logits, labels)
        sgd.step(torch.autograd.grad(loss, sgd.parameters), lr=0.2)

        correct = (logits.argmax(1) == labels).sum().item()
        assert totals.tolist() == pytest.approx([8 * loss.item(), correct], rel=1e-4)
        assert_same_change(before, state_of(trainer.model), state_of(slow_model))
    assert trainer.full_steps == 2


def test_the_average_of_the_weights(tiny):
    """After n steps: a ← d·a + (1 − d)·w with d = min(n / (n + 9), 0.99)."""
    trainer = make_fine_tuning(tiny, "--zero-init", "False", "--full-lr", 0.2)
    trainer.model.double()
    trainer.averaged_model.double()
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.2)
    trainer.view.register_forward_hook(lambda *arguments: arguments[2].double())
    uniforms = trainer.epoch_uniforms(1)

    average = {name: torch.zeros(()) for name in trainer.model.state_dict()}
    for steps, decay in {0: 0, 1: 0.1, 2: 2 / 11, 890: 890 / 899, 5000: 0.99}.items():
        trainer.full_steps = steps
        trainer.train_step(trainer.data.train[:8], uniforms)
        assert trainer.full_steps == steps + 1
        averaged_state = trainer.averaged_model.state_dict()
        for name, weight in trainer.model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            average[name] = decay * average[name] + (1 - decay) * weight
            torch.testing.assert_close(averaged_state[name], average[name])


def test_validation_of_fine_tuning(tiny):
    """The average, on plain validation images, in eval mode; nothing changes."""
    trainer = make_fine_tuning(tiny, "--zero-init", "False")
    with torch.no_grad():
        # The features of a random trunk nearly coincide: their differences must count.
        trainer.averaged_model.softmax_layer.weight *= 100
        trainer.averaged_model.trunk.conv1.weight.copy_(
            trainer.model.trunk.conv1.weight.flip(0)
        )
    slow_model = plain_copy(trainer.averaged_model).eval()
    before = state_of(trainer.averaged_model)
    trainer.averaged_model.train()

    loss, accuracy = trainer.validate()

    images = trainer.data.images[trainer.data.val]
    labels = trainer.data.labels[trainer.data.val]
    with torch.no_grad():
        logits = slow_model(plain(images).double())
    assert loss == pytest.approx(slow_cross_entropy(logits, labels).item(), rel=1e-3)
    shares = (logits.argmax(1) == labels).double()
    assert accuracy == pytest.approx(shares.mean().item())
    for name, value in trainer.averaged_model.state_dict().items():
        assert value.equal(before[name]), name


@pytest.mark.parametrize("is_random", [True, False])
def test_a_trunk_begins_with_statistics_of_the_training_split(
    finished, tiny, tmp_path, is_random
):
    """A random one has none, and a checkpoint's has those of augmented views."""
    path, content = None, {}
    if not is_random:
        finished("exp")
        path, content = read_weights("exp.ckpt", tmp_path / "weights")
    trainer = make_fine_tuning(tiny, "--batch-size", 25, path=path, weights=content)
    assert len(trainer.data.train) == 50
    batches = trainer.data.images[trainer.data.train].split(25)
    statistics = slow_statistics(trainer.model.trunk, batches)
    assert_statistics(trainer.model.trunk.state_dict(), statistics)


def test_order_and_views_of_fine_tuning_are_functions_of_the_seed(tiny):
    trainer = make_fine_tuning(tiny, "--seed", 5)
    torch.manual_seed(7)
    order = torch.randperm(50, generator=make_generator("cpu", 5, ORDER, 2))
    assert torch.cat(trainer.epoch_batches(2)).equal(trainer.data.train[order])
    uniforms = torch.rand(60, 7, generator=make_generator("cpu", 5, VIEWS, 2))
    assert trainer.epoch_uniforms(2).equal(uniforms)


def test_a_run_of_fine_tuning(call, tiny, tmp_path, monkeypatch):
    """Four epochs: order, views, learning rate, and the best average in the file."""
    fine_tuning = train_stl_after_ssl.FineTuningTrainer
    indices = []
    uniforms_seen = []
    states = []
    rates = []
    trainers = []
    sums = []
    seconds = []
    results = [(1.0, 0.3), (2.0, 0.5), (3.0, 0.2), (4.0, 0.5)]

    def after_step(arguments, totals):
        trainer, index, uniforms = arguments
        trainers.append(trainer)
        indices.append(index)
        uniforms_seen.append(uniforms)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        sums.append(totals)

    def validate(trainer):
        states.append(state_of(trainer.averaged_model))
        return results[len(states) - 1]

    note_calls(monkeypatch, fine_tuning, "train_step", after_step)

    def before_finishing(state, metrics):
        seconds.append(state.seconds)
        finish_epoch(state, metrics)

    finish_epoch = TrainingState.finish_epoch
    monkeypatch.setattr(TrainingState, "finish_epoch", before_finishing)
    monkeypatch.setattr(fine_tuning, "validate", validate)
    # fmt: off
    outcome = call(
        "train_stl_after_ssl", *tiny, "--full-fine-tune", "--full-epochs", 4,
        "--full-lr", 0.05, "--patience-for-lr-decay", 1, "--experiment-name", "exp",
    )
    # fmt: on
    assert outcome.status == 0, outcome.err

    # 50 images in batches of 16: four steps per epoch.
    assert len(indices) == 16
    train = trainers[0].data.train
    orders = [torch.cat(indices[first : first + 4]) for first in (0, 4, 8, 12)]
    for order in orders:
        assert order.sort().values.equal(train)
    assert not orders[0].equal(orders[1])
    assert not uniforms_seen[0].equal(uniforms_seen[4])
    assert uniforms_seen[4].equal(uniforms_seen[7])

    # After more than one epoch without a lower loss, a tenth of the learning rate.
    assert rates == pytest.approx([0.05] * 12 + [0.005] * 4)

    # Of two epochs with the same accuracy, the first one is kept.
    content = weights(tmp_path, "exp")
    for name, value in states[1].items():
        part, rest = name.split(".", 1)
        assert value.equal(content[part][rest]), name
    validation_accuracy, test_accuracy = content["results"]["full"]
    assert validation_accuracy == 0.5

    model = plain_copy(trainers[0].model).eval()
    model.load_state_dict(states[1])
    test, _ = dataset_helpers.load_test(
        trainers[0].args.data_dir, 36, CPU, trainers[0].data.folders
    )
    with torch.no_grad():
        logits = model(plain(test.images).double())
    shares = (logits.argmax(1) == test.labels).double()
    assert test_accuracy == pytest.approx(shares.mean().item())

    full_history = content["history"][2:]
    assert [metrics["stage"] for metrics in full_history] == ["full"] * 4
    for number, metrics in enumerate(full_history):
        assert (metrics["val_loss"], metrics["val_acc"]) == results[number]
        assert metrics["images_per_second"] == round(50 / seconds[number], 1)
        loss, accuracy = sum(sums[4 * number : 4 * number + 4]) / 50
        assert metrics["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["train_acc"] == pytest.approx(accuracy.item())
    assert content["pixel_mean"] == (0.4467, 0.4398, 0.4066)
    assert content["pixel_std"] == (0.2603, 0.2566, 0.2713)
    assert content["classes"] == [str(number) for number in range(1, 11)]
