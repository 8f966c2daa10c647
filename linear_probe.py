"""The linear probe: a softmax layer on the features of a frozen trunk, and kNN on them.

(Paper, section 3: the standard measure of what a pretrained trunk has learnt.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import evaluation
from runtime.bars import progress_bar
from runtime.errors import UserError
from runtime.files import cpu_state_dict, explain_mismatch
from runtime.randomness import ORDER, make_generator

# Features are rescaled to this standard deviation. With it, --lr 0.01 and --lr 0.1
# reach the same accuracy; with 1 they do not.
FEATURE_STD = 0.25


class Probe(NamedTuple):
    """The outcome of a linear probe."""

    layer: torch.nn.Linear  # for features as the trunk gives them
    # (validation, test accuracy) of "softmax" and "knn"; of "folds", a list of them. An
    # accuracy is None where there are no such images.
    results: dict
    history: list  # the metrics of each epoch


def linear_probe(trunk, data, test, folds, args):
    """Train a softmax layer on the frozen trunk's features; measure kNN with them.

    data: LabelledData. test: LabelledImages. folds: int64 indices of training images, a
    tensor each; on each of them, another layer is trained. Returns a Probe.
    """
    # Two views of an image: as it is, and mirrored.
    plain = evaluation.trunk_features(trunk, data.images, args.batch_size)
    mirrored = evaluation.trunk_features(trunk, data.images, args.batch_size, flip=True)
    features = torch.stack([plain, mirrored])  # [2, N, d]
    test_features = evaluation.trunk_features(trunk, test.images, args.batch_size)

    def fit(train, validation):
        layer, val_accuracy, history = fit_softmax_layer(
            features, data.labels, train, validation, args
        )
        _, test_accuracy = evaluate(layer, test_features, test.labels)
        return layer, (val_accuracy, test_accuracy), history

    layer, softmax_result, history = fit(data.train, data.val)
    print(
        f"softmax layer: accuracy {softmax_result[0]:.2%} on validation in the best of"
        f" {args.epochs} epochs",
        flush=True,
    )
    results = {"softmax": softmax_result}

    known = plain[data.train], data.labels[data.train]
    results["knn"] = (
        evaluation.knn_accuracy(*known, plain[data.val], data.labels[data.val]),
        evaluation.knn_accuracy(*known, test_features, test.labels),
    )

    for fold in folds:
        # A fold's own images also decide on learning rate and epoch, so that no label
        # beyond the fold's is used.
        _, fold_result, _ = fit(fold, fold)
        results.setdefault("folds", []).append(fold_result)
    return Probe(layer, results, history)


def fit_softmax_layer(features, labels, train, validation, args):
    """Logistic regression by SGD from zero; the epoch best on validation is kept.

    features [V, N, d]: V views of all images, of which each epoch takes one per image.
    train and validation index N; validation uses view 0. Returns (a Linear for
    features that are not standardised, its validation accuracy, the metrics of each
    epoch).
    """
    # Standardised features, so that one --lr suits any trunk.
    train_features = features[:, train].flatten(0, 1)  # [V·n, d]
    mean = train_features.mean(0)
    scale = train_features.std(0).clamp(min=1e-5) / FEATURE_STD
    features = (features - mean) / scale

    layer = torch.nn.Linear(features.shape[2], int(labels.max()) + 1)
    layer.to(features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(
        layer.parameters(),
        lr=args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
    )
    scheduler = ReduceLROnPlateau(optimizer, patience=args.patience_for_lr_decay)

    best_accuracy = -1.0
    best_weights = None
    history = []
    with progress_bar(args.epochs, "softmax layer", " epochs") as bar:
        for epoch in range(1, args.epochs + 1):
            order, views = epoch_order(train, len(features), args.seed, epoch)
            train_loss, train_accuracy = train_epoch(
                layer, optimizer, features, labels, order, views, args.batch_size
            )
            val_loss, val_accuracy = evaluate(
                layer, features[0, validation], labels[validation]
            )
            metrics = {
                "stage": "softmax",
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_acc": train_accuracy,
                "val_acc": val_accuracy,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "images_per_second": None,
            }
            if not torch.tensor([train_loss, val_loss]).isfinite().all():
                raise UserError(
                    f"the loss is not finite in epoch {epoch} of the softmax layer",
                    "lower --lr",
                )
            history.append(metrics)
            scheduler.step(val_loss)
            if val_accuracy > best_accuracy:
                best_accuracy = val_accuracy
                best_weights = cpu_state_dict(layer)
            bar.set_postfix_str(f"loss {train_loss:.3f}", refresh=False)
            bar.update()

    layer.load_state_dict(best_weights)
    with torch.no_grad():
        # The same layer on features x as the trunk gives them:
        # W (x − mean) / scale + b = (W / scale) x + (b − (W / scale) mean).
        layer.weight /= scale
        layer.bias -= layer.weight @ mean
    return layer, best_accuracy, history


def train_epoch(layer, optimizer, features, labels, order, views, batch_size):
    """One pass over the training images; (mean loss, accuracy).

    features [V, N, d]: of the image order[i], the view views[i] is used.
    """
    totals = torch.zeros(2, device=features.device)
    batches = zip(order.split(batch_size), views.split(batch_size), strict=True)
    for index, view in batches:
        logits = layer(features[view, index])
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals += batch_totals(logits, labels[index], loss)
    loss, accuracy = (totals / len(order)).tolist()
    return loss, accuracy


@torch.no_grad()
def evaluate(layer, features, labels):
    """(mean loss, accuracy) of a softmax layer on features [N, d] with labels [N].

    (None, None) without images.
    """
    if len(labels) == 0:
        return None, None
    logits = layer(features)
    loss = F.cross_entropy(logits, labels)
    totals = batch_totals(logits, labels, loss)
    loss, accuracy = (totals / len(labels)).tolist()
    return loss, accuracy


def batch_totals(logits, labels, loss):
    """[sum of the losses, number of correct answers] of a batch, on its device."""
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), correct])


def epoch_order(train, view_count, seed, epoch):
    """(the training indices in this epoch's order, which of the views each gets)."""
    generator = make_generator("cpu", seed, ORDER, epoch)
    order = torch.randperm(len(train), generator=generator)
    view = torch.randint(view_count, (len(train),), generator=generator)
    return train[order.to(train.device)], view.to(train.device)


def read_folds(data_dir, count, device):
    """The lines of fold_indices.txt: int64 indices of training images, a fold each.

    count: how many images there are in data_dir/train.
    """
    path = data_dir / "fold_indices.txt"
    content = f"it must list images, from 0 to {count - 1}, a fold per line"
    with explain_mismatch(path, f"{content}; or leave --folds out"):
        folds = []
        for line in path.read_text().splitlines():
            if line.strip():
                folds.append(torch.tensor([int(number) for number in line.split()]))
        if not folds:
            raise ValueError("it is empty")
        if any(fold.min() < 0 or fold.max() >= count for fold in folds):
            raise ValueError("an index out of range")
    return [fold.to(device) for fold in folds]
