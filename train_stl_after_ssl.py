"""Train on the labelled images of STL-10 after pretraining: the softmax layer alone, then the whole network.

    python train_stl_after_ssl.py --model-type res18 --batch-size 128 --lr 0.1 --patience-for-lr-decay 4 \\
        --full-fine-tune True --pirl-model-name exp

Without --pirl-model-name the trunk starts at random: the baseline that shows what pretraining brought.
"""

import fcntl
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

from dataset_helpers import (
    CLASSES,
    LABELLED_VIEW_DRAWS,
    MEAN,
    STD,
    labelled_view,
    load_labelled,
    progress_bar,
    stratified_split,
    uniform_draws,
)
from models import Classifier, estimate_statistics, make_trunk, nearest, neighbour_accuracy, trunk_features
from pictures import confusion_picture, neighbour_picture, save_picture
from run_helpers import (
    INITIAL_WEIGHTS,
    ORDER,
    VIEWS,
    Experiment,
    Parser,
    StopSignal,
    Ticker,
    UserError,
    add_run_arguments,
    autocast,
    check_fields,
    check_position,
    check_rows,
    choose_device,
    choose_precision,
    cpu_state,
    damaged,
    derived_seed,
    epoch_means,
    file_to_write,
    find_weights,
    fits,
    generator,
    load_optimizer,
    load_weights,
    machine,
    note_incomplete,
    number,
    rank,
    read_text,
    read_torch_file,
    run_script,
    settings_of,
    whole_file,
    world_size,
)

FEATURE_SPREAD = 0.25  # standard deviation; with it --lr 0.01 and 0.1 reach the same accuracy, with 1 they do not
NEIGHBOURS, SOFTMAX, FULL = "nearest neighbours, nothing trained", "only the softmax layer", "the whole network"
FOLDS = "only the softmax layer, ten folds"
SHOWN_NEIGHBOURS, LONGEST_NAME = 5, 30
MAY_DIFFER = {"data_dir", "weights_dir", "observations_dir", "device", "resume", "full_fine_tune"}
MAY_DIFFER |= {"checkpoint_minutes", "neighbours"}
COLUMNS = ["stage", "epoch", "train_loss", "val_loss", "train_acc", "val_acc", "learning_rate", "images_per_second"]
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # what changes in the schedule


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add_run_arguments(parser, experiment="e1_pirl_sup_")
    add = parser.add_argument
    add("--stem", choices=["imagenet", "small"], help="of a random trunk (default: imagenet, or that of the weights)")
    parser.add_switch("--zero-init", True, "every residual block of a random trunk starts as its shortcut")
    add("--pirl-model-name", help="a path, or a name under the weights folder (default: a random trunk)")
    parser.add_switch("--full-fine-tune", False, "train the whole network after the softmax layer")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--epochs", type=number(int, 1), default=100, help="of each stage")
    add("--full-epochs", type=number(int, 1), help="of the full stage, if not as many (default: --epochs)")
    add("--lr", type=number(float, 0, 100), default=0.01, help="learning rate of SGD (momentum 0.9), softmax stage")
    add("--full-lr", type=number(float, 0, 100), default=0.01, help="the same for the full stage")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4, help="of all weights that are trained")
    add(
        "--patience-for-lr-decay",
        type=number(int, 0),
        default=10,
        help="epochs without a better validation loss until the learning rate falls to a tenth",
    )
    parser.add_switch("--folds", False, "train the softmax layer on each of STL-10's ten folds of 1,000 images, too")
    add("--neighbours", type=file_to_write, help="where to draw test images with the nearest training images")
    args = parser.parse_args(argv)
    args.full_epochs = args.full_epochs or args.epochs
    return args


def main():
    args = parse_args()
    if world_size() > 1:
        if rank():
            return
        print(f"fine-tuning is small: one process does it, the other {world_size() - 1} end here")
        os.environ["WORLD_SIZE"] = "1"
    device = choose_device(args)
    experiment = Experiment(args, "labelled checkpoint")
    checkpoint = experiment.load_checkpoint(settings_of(args), MAY_DIFFER) if args.resume else None
    if checkpoint is None:
        experiment.refuse_taken_name(args.resume)
    run = start_run(args, device)
    if checkpoint is not None:
        resume(run, checkpoint, experiment)
    experiment.check_space(run.model, 2, 0)  # momentum, and the best epoch's weights
    announce(run)
    if SOFTMAX not in run.results:
        train_softmax_layer(run)
        experiment.save_checkpoint(state_of(run))
        experiment.write_rows(run.rows)
    if args.full_fine_tune and FULL not in run.results:
        train_whole_network(run, experiment, StopSignal())
        experiment.save_checkpoint(state_of(run))
    if args.neighbours:
        draw_neighbours(run)
    report(run, experiment)


@dataclass
class Run:
    """The labelled images on the device, the network, and what came of it so far."""

    args: object
    device: torch.device
    precision: str
    images: torch.Tensor  # uint8 [N, 3, S, S], labelled training images
    labels: torch.Tensor  # int64 [N] from 0
    test_images: torch.Tensor
    test_labels: torch.Tensor
    checksum: list  # of both
    train: torch.Tensor  # indices into images
    validation: torch.Tensor
    folds: list  # of indices, with --folds
    class_names: list
    trunk_name: str
    model: Classifier
    results: dict = field(default_factory=dict)  # strategy -> (validation accuracy, test accuracy)
    predictions: torch.Tensor = None  # int64, of the test images, by the stage that has just ended
    rows: list = field(default_factory=list)  # of the CSV
    seconds: dict = field(default_factory=dict)  # strategy -> time that it took
    full_stage: dict = None  # where the full stage stands


def start_run(args, device):
    """Labelled images, and the trunk: pretrained, or at random."""
    path = None if args.pirl_model_name is None else find_weights(args.pirl_model_name, args.weights_dir)
    pretrained = read_torch_file(path, "PIRL weights") if path else {}
    if pretrained:
        check_fields(pretrained, {"trunk": dict}, path)
    torch.manual_seed(derived_seed(args.seed, INITIAL_WEIGHTS))
    stem = args.stem or pretrained.get("stem", "imagenet")
    trunk, dimension = make_trunk(args.model_type, stem, args.zero_init)
    if pretrained:
        load_weights(trunk, pretrained["trunk"], path)
        then = pretrained["settings"].get("image_size")
        if then != args.image_size:
            print(f"note: {path} was pretrained with --image-size {then}")
    note_incomplete(args.data_dir)
    images, labels, checksum = load_labelled(args.data_dir / "train", args.image_size, device)
    test_images, test_labels, test_checksum = load_labelled(args.data_dir / "test", args.image_size, device)
    train, validation = (part.to(device) for part in stratified_split(labels.cpu(), args.seed))
    if len(validation) == 0:
        raise UserError(f"{args.data_dir / 'train'} has too few images to set some apart for validation: give it more")
    if args.batch_size > len(train):
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {len(train)} training images: choose a smaller one"
        )
    folds = read_folds(args.data_dir, len(images), device) if args.folds else None
    model = Classifier(trunk, dimension, CLASSES).to(device, memory_format=torch.channels_last)
    precision = choose_precision(args, device)
    if not pretrained:  # a pretrained trunk comes with the statistics of whole images; give the random one the same
        estimate_statistics(trunk, images[train], args.batch_size)
    return Run(
        args=args,
        device=device,
        precision=precision,
        images=images,
        labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        checksum=[checksum, test_checksum],
        train=train,
        validation=validation,
        folds=folds,
        class_names=class_names(args.data_dir),
        trunk_name=f"PIRL trunk ({path})" if path else "random trunk",
        model=model,
    )


def read_folds(data_dir, count, device):
    """The lines of fold_indices.txt: indices of training images, int64 each."""
    path = data_dir / "fold_indices.txt"
    try:
        lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
        folds = [torch.tensor(list(map(int, words))) for words in lines]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: leave --folds out, or copy the release's file there") from None
    except (ValueError, RuntimeError):
        raise UserError(f"{path} is no list of whole numbers: copy the release's file there") from None
    if not folds or any(len(fold) == 0 or fold.min() < 0 or fold.max() >= count for fold in folds):
        raise UserError(
            f"{path} names images beyond the {count} in {data_dir / 'train'}: complete them, or leave it out"
        )
    return [fold.to(device) for fold in folds]


def announce(run):
    args = run.args
    precision = f" in {run.precision}" if args.full_fine_tune else ""
    print(
        f"{args.experiment_name}: {args.model_type}, {run.trunk_name}, on {run.device.type}{precision}, "
        f"seed {args.seed}\n"
        f"  {len(run.train)} training, {len(run.validation)} validation and {len(run.test_images)} test images of "
        f"{args.image_size} × {args.image_size} pixels, {args.epochs} epochs of {steps_per_epoch(run)} steps for "
        f"{SOFTMAX}{f', then {args.full_epochs} for {FULL}' if args.full_fine_tune else ''}",
        flush=True,
    )


def steps_per_epoch(run):
    return -(-len(run.train) // run.args.batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Only the softmax layer, on features that are computed once
# ---------------------------------------------------------------------------------------------------------------------


def train_softmax_layer(run):
    """Train the linear layer on the frozen trunk's features of two views, the image and its mirror image.

    The nearest-neighbour accuracy of the same features and the folds come with it.
    """
    started, args = time.monotonic(), run.args
    features = torch.stack([features_of(run, run.images, flip) for flip in (False, True)])  # [2, N, d]
    test_features = features_of(run, run.test_images)
    known, known_labels = features[0, run.train], run.labels[run.train]
    run.results[NEIGHBOURS] = tuple(
        neighbour_accuracy(known, known_labels, queries, labels, CLASSES)
        for queries, labels in (
            (features[0, run.validation], run.labels[run.validation]),
            (test_features, run.test_labels),
        )
    )
    accuracy = train_and_test(run, features, test_features, run.train, run.validation)
    run.results[SOFTMAX] = accuracy
    run.predictions = predictions(run, test_features)
    print(f"{SOFTMAX}: accuracy {accuracy[0]:.2%} on validation in the best of {args.epochs} epochs", flush=True)
    if args.folds:
        layer, rows = run.model.softmax_layer.state_dict(), run.rows
        layer = {name: value.clone() for name, value in layer.items()}
        run.results[FOLDS] = []
        for fold in run.folds:  # no label beyond a fold's: its own images also decide on learning rate and epoch
            run.results[FOLDS].append(train_and_test(run, features, test_features, fold, fold))
        run.model.softmax_layer.load_state_dict(layer)
        run.rows = rows
    run.seconds[SOFTMAX] = time.monotonic() - started


def train_and_test(run, features, test_features, train, validation):
    """Train the model's linear layer on features [2, N, d] of the images `train`: (validation, test accuracy)."""
    mean, scale = standardisation(features[:, train])
    layer, fit = fit_softmax_layer((features - mean) / scale, run.labels, train, validation, run.args)
    run.rows = run.rows + fit["rows"]
    fold_standardisation(layer, mean, scale, run.model.softmax_layer)
    hits = predictions(run, test_features) == run.test_labels
    return fit["val_acc"], hits.float().mean().item()


def draw_neighbours(run):
    """The first test image of every class with its nearest training images by the finished trunk, as a picture."""
    present = run.test_labels.unique().tolist()
    shown = torch.tensor([(run.test_labels == label).nonzero()[0].item() for label in present], device=run.device)
    features, queries = features_of(run, run.images), features_of(run, run.test_images[shown])
    _, rows = nearest(features, queries, min(SHOWN_NEIGHBOURS, len(features)))
    grid = neighbour_picture(run.test_images[shown], run.test_labels[shown], run.images[rows], run.labels[rows])
    save_picture(grid, run.args.neighbours)
    print(
        f"wrote {run.args.neighbours}: test images, and to the right the nearest training images, green if of its class"
    )


def features_of(run, images, flip=False):
    return trunk_features(run.model.trunk, images, run.args.batch_size, flip)


@torch.no_grad()
def predictions(run, features):
    """features [N, d] -> the classes int64 [N] by the softmax layer as it stands."""
    return run.model.softmax_layer(features).argmax(1)


def standardisation(features):
    """(mean [d], scale [d]) that bring features [..., d] to mean 0 and FEATURE_SPREAD: one --lr suits any trunk."""
    flat = features.flatten(0, -2)
    return flat.mean(0), flat.std(0).clamp(min=1e-5) / FEATURE_SPREAD


def fold_standardisation(layer, mean, scale, target):
    """Give `target` the weights by which it does on plain features what `layer` does on standardised ones."""
    with torch.no_grad():
        target.weight.copy_(layer.weight / scale)
        target.bias.copy_(layer.bias - (layer.weight / scale) @ mean)


def fit_softmax_layer(features, labels, train, validation, args):
    """Logistic regression by SGD, from zero; the weights of the epoch with the best validation accuracy.

    features [V, N, d]: V views of all images, of which each epoch takes one per image; train and validation index N
    (validation uses view 0). Returns (Linear, {"val_acc", "rows"}).
    """
    layer = torch.nn.Linear(features.shape[2], CLASSES).to(features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = ReduceLROnPlateau(optimizer, patience=args.patience_for_lr_decay)
    best, rows = {"val_acc": -1.0}, []
    for epoch in tqdm(
        range(1, args.epochs + 1), SOFTMAX, unit=" epochs", disable=None, dynamic_ncols=True, leave=False
    ):
        order, view = epoch_order(train, len(features), args.seed, epoch)
        sums = torch.zeros(2, device=features.device)
        for index, chosen in zip(order.split(args.batch_size), view.split(args.batch_size), strict=True):
            logits = layer(features[chosen, index])
            loss = F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += batch_sums(logits, labels[index], loss)
        with torch.no_grad():
            logits = layer(features[0, validation])
            loss = F.cross_entropy(logits, labels[validation])
            means = torch.stack([sums / len(train), batch_sums(logits, labels[validation], loss) / len(validation)])
        rows.append(row_of("softmax", epoch, means.tolist(), optimizer, None))
        if not means.isfinite().all():
            raise UserError(f"the loss is not finite in epoch {epoch} of {SOFTMAX}: lower --lr")
        schedule.step(rows[-1]["val_loss"])
        if rows[-1]["val_acc"] > best["val_acc"]:
            state = {name: value.clone() for name, value in layer.state_dict().items()}
            best = {"val_acc": rows[-1]["val_acc"], "state": state}
    layer.load_state_dict(best["state"])
    return layer, {"val_acc": best["val_acc"], "rows": rows}


def epoch_order(train, views, seed, epoch):
    """(the training indices in this epoch's order, the view of each)."""
    draw = generator("cpu", seed, ORDER, epoch)
    order = torch.randperm(len(train), generator=draw)
    view = torch.randint(views, (len(train),), generator=draw)
    return train[order.to(train.device)], view.to(train.device)


def batch_sums(logits, labels, loss):
    """[sum of the losses, number of right answers] of a batch, on its device."""
    return torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])


def row_of(stage, epoch, means, optimizer, images_per_second):
    (train_loss, train_acc), (val_loss, val_acc) = means
    lr = optimizer.param_groups[0]["lr"]
    values = [stage, epoch, train_loss, val_loss, train_acc, val_acc, lr, images_per_second]
    return dict(zip(COLUMNS, values, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The whole network
# ---------------------------------------------------------------------------------------------------------------------


def train_whole_network(run, experiment, stop):
    """Train every weight, starting from the softmax stage's classifier; keeps the best epoch's weights."""
    args, model = run.args, run.model
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.full_lr, momentum=0.9, weight_decay=args.weight_decay, fused=True
    )
    schedule = ReduceLROnPlateau(optimizer, patience=args.patience_for_lr_decay)
    steps = steps_per_epoch(run)
    stage = run.full_stage or {"epoch": 1, "step": 0, "best": {"val_acc": -1.0, "epoch": 0}}
    stage.setdefault("statistics", torch.zeros(steps, 2))  # sum of losses and number of right answers of each step
    if run.full_stage:
        expected = {"epoch": int, "step": int, "best": {"val_acc": float}, "optimizer": dict}
        expected |= {"schedule": dict.fromkeys(PLATEAU, int | float), "statistics": torch.Size([steps, 2])}
        check_fields(stage, expected, experiment.checkpoint)
        check_position(stage, steps, experiment.checkpoint)
        load_optimizer(optimizer, stage["optimizer"], experiment.checkpoint)
        schedule.load_state_dict({name: stage["schedule"][name] for name in PLATEAU})
    run.full_stage, stage["statistics"] = stage, stage["statistics"].to(run.device, torch.float32).contiguous()
    last_kept = time.monotonic()

    def keep():
        nonlocal last_kept
        now = time.monotonic()
        run.seconds[FULL], last_kept = run.seconds.get(FULL, 0.0) + now - last_kept, now
        stage.update(optimizer=optimizer.state_dict(), schedule={name: getattr(schedule, name) for name in PLATEAU})
        experiment.save_checkpoint(state_of(run))

    while stage["epoch"] <= args.full_epochs:
        train, speed = train_epoch(run, experiment, optimizer, keep, stop)
        validation = evaluate(run, run.images[run.validation], run.labels[run.validation])
        run.rows.append(row_of("full", stage["epoch"], (train, validation), optimizer, speed))
        schedule.step(validation[0])
        if validation[1] > stage["best"]["val_acc"]:
            stage["best"] = {"val_acc": validation[1], "epoch": stage["epoch"], "model": cpu_state(model)}
        print(
            f"{FULL}, epoch {stage['epoch']}/{args.full_epochs}: loss {train[0]:.4f}, accuracy {train[1]:.2%}, "
            f"validation loss {validation[0]:.4f}, accuracy {validation[1]:.2%}, {speed} images/s",
            flush=True,
        )
        stage.update(epoch=stage["epoch"] + 1, step=0)
        keep()
        experiment.write_rows(run.rows)
    load_weights(model, stage["best"].get("model"), experiment.checkpoint)
    run.predictions = predictions(run, features_of(run, run.test_images))
    run.results[FULL] = (stage["best"]["val_acc"], (run.predictions == run.test_labels).float().mean().item())
    run.full_stage = None


def train_epoch(run, experiment, optimizer, keep, stop):
    """The rest of the epoch over the augmented training images: ((mean loss, accuracy), images per second).

    Calls keep() every --checkpoint-minutes, and on a signal before the process ends.
    """
    args, model, stage = run.args, run.model, run.full_stage
    epoch, first = stage["epoch"], stage["step"]
    draws = uniform_draws(len(run.images), LABELLED_VIEW_DRAWS, args.seed, VIEWS, epoch, device=run.device)
    order, _ = epoch_order(run.train, 1, args.seed, epoch)
    shown, due, started = Ticker(1), Ticker(60 * args.checkpoint_minutes), time.monotonic()
    model.train()
    with progress_bar(len(order), f"{FULL}, epoch {epoch}", " images", first * args.batch_size) as bar:
        for index in order.split(args.batch_size)[first:]:
            number = stop.number  # once: a signal may come at any moment
            if number or due.due():
                means_so_far(run, experiment)
                keep()
            if number:
                print(f"stopped in epoch {epoch} of {FULL}; --resume True with the same command goes on")
                sys.exit(128 + number)
            view = labelled_view(run.images.index_select(0, index).float(), draws[index])
            with autocast(run.device, run.precision):
                logits = model(view)
            loss = F.cross_entropy(logits.float(), run.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            stage["statistics"][stage["step"]] = batch_sums(logits, run.labels[index], loss)
            stage["step"] += 1
            bar.update(len(index))
            if shown.due():
                loss, accuracy = means_so_far(run, experiment)
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1%}")
    means = means_so_far(run, experiment)
    speed = (len(order) - first * args.batch_size) / (time.monotonic() - started)
    return means, round(speed, 1)


def means_so_far(run, experiment):
    """(loss, accuracy) of the epoch so far. Waits for the device; ends the run if a number is not finite."""
    stage, where = run.full_stage, f"epoch {run.full_stage['epoch']} of {FULL}"
    images = min(stage["step"] * run.args.batch_size, len(run.train))
    return epoch_means(stage["statistics"][: stage["step"]], images, run.model, where, "lower --full-lr", experiment)


@torch.no_grad()
def evaluate(run, images, labels):
    """(mean loss, accuracy) of the network in eval mode on images as they are, uint8 [N, 3, S, S]."""
    logits = run.model.softmax_layer(features_of(run, images))
    return (batch_sums(logits, labels, F.cross_entropy(logits, labels)) / len(labels)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint and report
# ---------------------------------------------------------------------------------------------------------------------


def state_of(run):
    """What resume() needs, for torch.save."""
    return {
        "settings": settings_of(run.args),
        "images": run.checksum,
        "model": run.model.state_dict(),
        "results": run.results,
        "seconds": run.seconds,
        "rows": run.rows,
        "full_stage": run.full_stage,
    }


def resume(run, checkpoint, experiment):
    """Put everything back to where the checkpoint was written."""
    pair = (float, float)  # validation and test accuracy
    expected = {"images": [int], "model": dict, "results": dict, "rows": [dict], "seconds": {str: float}}
    expected |= {"full_stage": dict | None}
    check_fields(checkpoint, expected, experiment.checkpoint)
    expected = {NEIGHBOURS: pair, SOFTMAX: pair, FULL: pair, FOLDS: [pair]}
    for name, value in checkpoint["results"].items():
        if not value or name not in expected or not fits(value, expected[name]):
            raise damaged(experiment.checkpoint, "a result")
    check_rows(checkpoint["rows"], COLUMNS, experiment.checkpoint)
    if checkpoint["images"] != run.checksum:
        raise UserError(
            f"{experiment.checkpoint} is of other images than those in {run.args.data_dir}: give their --data-dir"
        )
    if checkpoint.get("full_stage") and not run.args.full_fine_tune:
        raise UserError(f"{experiment.checkpoint} is of a full stage that was interrupted: add --full-fine-tune True")
    load_weights(run.model, checkpoint["model"], experiment.checkpoint)
    run.results, run.rows, run.full_stage = checkpoint["results"], checkpoint["rows"], checkpoint.get("full_stage")
    run.seconds = checkpoint["seconds"]
    experiment.write_rows(run.rows)
    print(f"going on from {experiment.checkpoint}")


def report(run, experiment):
    """Write <experiment>.pt, print the table and append it to results.md."""
    with whole_file(experiment.model) as file:
        torch.save(
            {
                "kind": "labelled weights",
                "stem": "small" if run.model.trunk.conv1.stride == (1, 1) else "imagenet",
                "trunk": cpu_state(run.model.trunk),
                "softmax_layer": cpu_state(run.model.softmax_layer),
                "settings": settings_of(run.args),
                "results": run.results,
                "seconds": run.seconds,
                "rows": run.rows,
                "machine": machine(run.device),
                "pixel_mean": MEAN,
                "pixel_std": STD,
            },
            file,
        )
    if run.predictions is None:  # all stages had been done before
        run.predictions = predictions(run, features_of(run, run.test_images))
    confusion = experiment.observations.with_name(f"{experiment.name}_confusion.png")
    save_picture(confusion_picture(run.test_labels, run.predictions, run.class_names), confusion)
    table = "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy\n--- | --- | ---\n"
    for strategy, accuracies in run.results.items():
        if strategy == FOLDS:
            validation, test = "none", spread([test for _, test in accuracies], unit="%")
        else:
            validation, test = (f"{accuracy:.2%}" for accuracy in accuracies)
        table += f"{strategy}, {run.trunk_name} | {validation} | {test}\n"
    results = run.args.observations_dir / "results.md"
    add_to_results(results, experiment.name, table)
    print(f"\n{table}\nwrote {experiment.model}, {experiment.observations}, {confusion} and {results}")


def spread(values, scale=100, unit=" %"):
    """mean ± standard deviation (of the sample), as text."""
    deviation = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.2f}{deviation}{unit}"


def class_names(data_dir):
    """The lines of class_names.txt, or the labels where there is none."""
    path = data_dir / "class_names.txt"
    names = [name[:LONGEST_NAME] for name in read_text(path).splitlines()[:CLASSES]] if path.is_file() else []
    return names if len(names) == CLASSES else [str(label + 1) for label in range(CLASSES)]


def add_to_results(results, name, table):
    """Add a run's table to results.md, unless it stands there already: a finished run may be resumed."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    with open(results.with_name(".results.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other runs write their tables here, too
        text = results.read_bytes().decode(errors="surrogateescape") if results.is_file() else ""  # any bytes
        if f"## {name}\n" not in text or table not in text[text.rindex(f"## {name}\n") :]:
            text += f"## {name}\n\n{datetime.now(UTC):%Y-%m-%d %H:%M} UTC: `{command}`\n\n{table}\n"
            with whole_file(results) as file:
                file.write(text.encode(errors="surrogateescape"))


if __name__ == "__main__":
    run_script(main)
