"""The softmax layer, kNN and folds, each beside a computation of our own in numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import linear_probe
from augmentations import PIXEL_MEAN, PIXEL_STD
from dataset_helpers import LabelledData, LabelledImages
from models import use_pixels_of
from runtime.errors import UserError

CPU = torch.device("cpu")
CLASS_SIZES = [19, 3, 11, 1, 8]


def make_args(**changes):
    settings = {
        "lr": 0.05,
        "weight_decay": 0.01,
        "patience_for_lr_decay": 1,
        "epochs": 8,
        "batch_size": 8,
        "seed": 5,
    }
    return SimpleNamespace(**settings | changes)


def one_hot(labels, count):
    return np.eye(count)[labels]


def probabilities(x, weight, bias):
    logits = x @ weight.T + bias
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def loss_and_accuracy(p, labels):
    losses = -np.log(p[np.arange(len(labels)), labels])
    return losses.mean(), (p.argmax(1) == labels).mean()


def probe_by_hand(features, labels, train, val, args):
    """SGD with momentum on standardised features, from the definitions.

    features float64 [V, N, d]. Returns (weight, bias) for the features as they are, the
    best validation accuracy, and a row of figures per epoch.
    """
    known = features[:, train].reshape(-1, features.shape[2])
    mean = known.mean(0)
    scale = np.maximum(known.std(0, ddof=1), 1e-5) / 0.25
    x = (features - mean) / scale
    classes = labels.max() + 1
    weight = np.zeros((classes, x.shape[2]))
    bias = np.zeros(classes)
    weight_speed = 0 * weight
    bias_speed = 0 * bias
    rate = args.lr
    lowest_loss = np.inf
    bad_epochs = 0
    best = None
    rows = []

    for epoch in range(1, args.epochs + 1):
        order, views = linear_probe.epoch_order(
            torch.from_numpy(train), len(x), args.seed, epoch
        )
        losses = 0.0
        correct = 0.0
        for start in range(0, len(order), args.batch_size):
            index = order[start : start + args.batch_size].numpy()
            view = views[start : start + args.batch_size].numpy()
            batch = x[view, index]
            p = probabilities(batch, weight, bias)
            loss, accuracy = loss_and_accuracy(p, labels[index])
            losses += loss * len(index)
            correct += accuracy * len(index)
            error = (p - one_hot(labels[index], classes)) / len(index)
            gradient = error.T @ batch + args.weight_decay * weight
            weight_speed = 0.9 * weight_speed + gradient
            bias_gradient = error.sum(0) + args.weight_decay * bias
            bias_speed = 0.9 * bias_speed + bias_gradient
            weight = weight - rate * weight_speed
            bias = bias - rate * bias_speed

        p = probabilities(x[0, val], weight, bias)
        val_loss, val_accuracy = loss_and_accuracy(p, labels[val])
        figures = (losses / len(order), val_loss, correct / len(order), val_accuracy)
        rows.append((*figures, rate))
        if best is None or val_accuracy > best[0]:
            best = (val_accuracy, weight / scale, bias - weight / scale @ mean)
        if val_loss < lowest_loss * (1 - 1e-4):
            lowest_loss = val_loss
            bad_epochs = 0
        else:
            bad_epochs += 1
        if bad_epochs > args.patience_for_lr_decay:
            rate *= 0.1
            bad_epochs = 0
    accuracy, weight, bias = best
    return (weight, bias), accuracy, rows


def knn_by_hand(features, labels, queries, query_labels):
    """Each of the 20 nearest votes with exp(cosine / 0.07)."""
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    right = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = features @ query
        nearest = np.argsort(-cosines)[:20]
        votes = np.zeros(labels.max() + 1)
        for row in nearest:
            votes[labels[row]] += np.exp(cosines[row] / 0.07)
        right += votes.argmax() == label
    return right / len(queries)


# ---- The softmax layer ---------------------------------------------------------------
@pytest.fixture
def noise():
    """(features [2, N, d], labels, train, val) of uneven classes, in no order.

    The labels of the validation images are random, so that their loss soon rises while
    that of the training images falls.
    """
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 60)
    first_view = rng.normal(3, 2, (60, 30))
    features = np.stack([first_view, first_view + rng.normal(0, 0.5, (60, 30))])
    features *= rng.uniform(0.1, 10, 30)
    features[:, :, 7] = 4.0  # a dead feature has no spread
    features[:, :, 8] *= 1e-3
    order = rng.permutation(60)
    labels[order[-1]] = 5  # a class that does not train
    return features, labels, order[:37], order[37:]


def test_the_softmax_layer_is_logistic_regression_by_sgd(noise):
    features, labels, train, val = noise
    args = make_args()
    layer, accuracy, history = linear_probe.fit_softmax_layer(
        torch.from_numpy(features).float(),
        torch.from_numpy(labels),
        torch.from_numpy(train),
        torch.from_numpy(val),
        args,
    )

    (weight, bias), best_accuracy, rows = probe_by_hand(*noise, args)
    columns = ["train_loss", "val_loss", "train_acc", "val_acc", "learning_rate"]
    for epoch, (metrics, row) in enumerate(zip(history, rows, strict=True), start=1):
        assert (metrics["stage"], metrics["epoch"]) == ("softmax", epoch)
        assert [metrics[name] for name in columns] == pytest.approx(row, rel=1e-3)
    assert accuracy == pytest.approx(best_accuracy)
    live = np.arange(30) != 7
    np.testing.assert_allclose(
        layer.weight.detach()[:, live], weight[:, live], rtol=1e-2, atol=1e-4
    )
    plain = torch.from_numpy(features[0]).float()
    expected = features[0] @ weight.T + bias
    np.testing.assert_allclose(layer(plain).detach(), expected, rtol=1e-2, atol=2e-3)

    # The data are such that the columns cannot be taken for one another.
    rates = [row[4] for row in rows]
    assert 1 < len(set(rates)) < len(rates)
    train_losses = [row[0] for row in rows]
    val_losses = [row[1] for row in rows]
    assert train_losses[-1] < 0.8 * train_losses[0]
    assert val_losses[-1] > min(val_losses)
    val_accuracies = [row[3] for row in rows]
    assert val_accuracies.index(best_accuracy) < len(rows) - 1


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_rate_that_is_too_high_is_one_line(noise, where):
    """With one step, training's loss is of before it, and only validation's is not."""
    features, labels, train, val = (torch.from_numpy(part) for part in noise)
    features = features.float()
    if where == "train":
        features, args = features * 1e18, make_args(lr=1e38)
    else:
        features[:, val] *= 1e18
        args = make_args(lr=1e24, epochs=1, batch_size=60)
    with pytest.raises(UserError, match=r"not finite in epoch \d+ of .*: lower --lr"):
        linear_probe.fit_softmax_layer(features, labels, train, val, args)


def test_an_epoch_has_every_image_once_in_a_view_at_random():
    train = torch.tensor([3, 8, 1, 40, 22, 5, 31, 17, 2, 90, 11, 60])
    order, views = linear_probe.epoch_order(train, 2, 0, 1)
    assert order.sort().values.equal(train.sort().values)
    assert set(views.tolist()) == {0, 1}

    again = linear_probe.epoch_order(train, 2, 0, 1)
    assert order.equal(again[0])
    assert views.equal(again[1])
    for seed, epoch in ((0, 2), (1, 1)):
        other_order, other_views = linear_probe.epoch_order(train, 2, seed, epoch)
        assert not order.equal(other_order)
        assert not views.equal(other_views)


# ---- The whole probe -----------------------------------------------------------------
def features_by_hand(images, flip=False):
    """Of the trunk below: the mean of each of 4 × 4 fields, float64 [N, 48]."""
    images = images.numpy().astype(np.float64)
    if flip:
        images = images[..., ::-1]
    mean = np.array(PIXEL_MEAN)[:, None, None]
    std = np.array(PIXEL_STD)[:, None, None]
    normal = (images / 255 - mean) / std
    return normal.reshape(-1, 3, 4, 9, 4, 9).mean((3, 5)).reshape(len(images), -1)


def labelled_images(sizes, seed):
    """Images of classes that can be told apart, but not all, in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    colours = np.random.default_rng(0).integers(60, 196, (len(sizes), 3, 4, 4))
    fields = colours[labels] + rng.normal(0, 45, (len(labels), 3, 4, 4))
    images = fields.repeat(9, 2).repeat(9, 3).clip(0, 255).astype(np.uint8)
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels))


def test_the_probe_of_a_trunk():
    """Softmax, kNN and folds, on validation and on test images."""
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    use_pixels_of(trunk, {})
    images, labels = labelled_images(CLASS_SIZES, 1)
    test = labelled_images([4, 7, 0, 2, 10], 2)
    order = np.random.default_rng(3).permutation(len(labels))
    train = order[:29]
    val = order[29:]
    data = LabelledData(
        images, labels, torch.from_numpy(train), torch.from_numpy(val), [], [], {}
    )
    folds = [order[:12], order[20:41], order[[5, 1, 33]]]
    args = make_args(epochs=5, weight_decay=1e-3)
    probe = linear_probe.linear_probe(
        trunk, data, test, [torch.from_numpy(fold) for fold in folds], args
    )

    plain = features_by_hand(images)
    features = np.stack([plain, features_by_hand(images, flip=True)])
    test_features = features_by_hand(test.images)
    numbers = labels.numpy()

    def fit(train, val):
        (weight, bias), accuracy, _ = probe_by_hand(features, numbers, train, val, args)
        predictions = (test_features @ weight.T + bias).argmax(1)
        return accuracy, (predictions == test.labels.numpy()).mean()

    assert probe.results["softmax"] == pytest.approx(fit(train, val))
    for result, fold in zip(probe.results["folds"], folds, strict=True):
        assert result == pytest.approx(fit(fold, fold))
    known = plain[train], numbers[train]
    assert probe.results["knn"] == pytest.approx(
        (
            knn_by_hand(*known, plain[val], numbers[val]),
            knn_by_hand(*known, test_features, test.labels.numpy()),
        )
    )
    # The layer is that of the training images, not of a fold.
    (weight, _), *_ = probe_by_hand(features, numbers, train, val, args)
    np.testing.assert_allclose(probe.layer.weight.detach(), weight, atol=1e-3)
    assert len(probe.history) == 5
    pairs = [probe.results["softmax"], probe.results["knn"], *probe.results["folds"]]
    assert len({round(figure, 4) for pair in pairs for figure in pair}) >= 6

    nothing = LabelledImages(test.images[:0], test.labels[:0])
    results = linear_probe.linear_probe(trunk, data, nothing, [], args).results
    assert results == {
        name: (probe.results[name][0], None) for name in ("softmax", "knn")
    }


# ---- Folds ---------------------------------------------------------------------------
def test_folds_are_lines_of_any_length(tmp_path):
    (tmp_path / "fold_indices.txt").write_text("11 0 7 \n\n3\n10 2\n\n")
    folds = linear_probe.read_folds(tmp_path, 12, CPU)
    assert [fold.tolist() for fold in folds] == [[11, 0, 7], [3], [10, 2]]


@pytest.mark.parametrize("content", ["1 2 x", "1 2 12", "", "-1", "9" * 30])
def test_folds_that_cannot_be_used(tmp_path, content):
    (tmp_path / "fold_indices.txt").write_text(content)
    with pytest.raises(UserError, match=r"fold_indices\.txt .*from 0 to 11"):
        linear_probe.read_folds(tmp_path, 12, CPU)
