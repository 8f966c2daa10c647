"""Train on labelled images after pretraining: the softmax layer alone, then the whole network; print the table.

python train_stl_after_ssl.py --lr 0.1 --patience-for-lr-decay 4 --full-fine-tune True --pirl-model-name exp

Without --pirl-model-name the trunk starts at random: the baseline that shows what pretraining brought.
"""

import functools
import shlex
import statistics
import sys
import time
from pathlib import Path

import run_helpers as rh
import filelock
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import dataset_helpers as dh
import models
from pictures import confusion_picture, neighbour_picture, save_picture

FEATURE_SPREAD = 0.25  # standard deviation; with it --lr 0.01 and 0.1 reach the same accuracy, with 1 they do not
HEADER = "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy\n--- | --- | ---\n"
ROWS = {  # of the table, by their names in our files
    "softmax": "Only softmax layer is fine tuned",
    "full": "Full model is fine tuned",
    "neighbours": "Nothing is trained, nearest neighbours",
    "folds": "Only softmax layer is fine tuned, predefined folds",
}
SHOWN_NEIGHBOURS = 5
# What a resumed run may change, also before its full stage has begun; and what it keeps from its checkpoint.
MAY_DIFFER = rh.MAY_DIFFER | {"full_fine_tune", "neighbours"}
BEFORE_FULL = {"full_lr", "full_epochs"}
KEPT = ("precision",)


def parse_args(argv=None):
    parser = rh.Parser(__doc__.split("\n")[0])
    rh.add_run_arguments(parser, experiment="e1_pirl_sup_")
    switch, number = rh.switch, rh.between
    add = parser.add_argument_group("network").add_argument
    add("--model-type", choices=[*models.TRUNKS], default="res18", help="the trunk: ResNet-18, -34 or -50")
    add("--pirl-model-name", help="a file of weights, or a name in the weights folder; None is a random trunk")
    add("--stem", choices=["imagenet", "small"], help="the first convolution; None is that of the weights, or imagenet")
    add("--zero-init", **switch(True), help="whether every residual block of a random trunk starts as its shortcut")
    add("--image-size", type=number(int, 36, 224), default=96, help="the side of the images in pixels, once read")
    add = parser.add_argument_group("training").add_argument
    add("--full-fine-tune", **switch(False), help="whether to train the whole network after the softmax layer")
    add("--batch-size", type=number(int, 1), default=128, help="images per step")
    add("--epochs", type=number(int, 1), default=100, help="passes over the training images, in each stage")
    add("--full-epochs", type=number(int, 1), help="the same for the full stage; None is --epochs")
    add("--lr", type=number(float, 0, 100), default=0.01, help="learning rate of the softmax stage (SGD, momentum 0.9)")
    add("--full-lr", type=number(float, 0, 100), default=0.03, help="learning rate of the full stage")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4, help="weight decay of all weights that are trained")
    add("--patience-for-lr-decay", type=number(int, 0), default=10, help="epochs without lower loss until lr / 10")
    add = parser.add_argument_group("results").add_argument
    add("--folds", **switch(False), help="whether to train the softmax layer on each fold of fold_indices.txt too")
    add("--neighbours", type=Path, help="a picture to write: test images with the nearest training images")
    args = parser.parse_args(argv)
    if args.neighbours and (args.neighbours.name in ("", "..") or args.neighbours.is_dir()):
        parser.error(f"argument --neighbours: '{args.neighbours}' names no file")
    return args


def main():
    args = parse_args()
    if rh.RANKS > 1:
        raise rh.UserError("fine-tuning is small and runs on one process: start it without torchrun")
    device = rh.choose_device(args)
    path, weights = models.read_weights(args.pirl_model_name, args.weights_dir) if args.pirl_model_name else (None, {})
    args.stem = args.stem or weights.get("settings", {}).get("stem", "imagenet")
    experiment = rh.Experiment(args, "labelled checkpoint")
    checkpoint = experiment.start(lambda c: MAY_DIFFER | (set() if c["run"]["begun"] else BEFORE_FULL), KEPT)
    args.precision = rh.choose_precision(args, device)
    run = FineTuning(args, device, path, weights)
    progress = rh.Progress(experiment, run, len(run.train), "whole network, epoch", "lower --full-lr")
    save = functools.partial(experiment.save, run.checksum, run, progress, classes=run.classes)
    if checkpoint:
        experiment.load(checkpoint, run.checksum, run, progress)
    if run.begun and "full" not in run.results and not args.full_fine_tune:
        raise rh.UserError(f"{experiment.checkpoint_file} is from within the full stage: add --full-fine-tune True")
    full_epochs = (args.full_epochs or args.epochs) if args.full_fine_tune else 0
    tests = 0 if run.test_images is None else len(run.test_images)
    print(f"{args.experiment_name}: {args.model_type}, {run.trunk_name}")
    print(f"  {device.type}, {args.precision}, seed {args.seed}, {len(run.classes)} classes in {args.data_dir}")
    print(f"  {len(run.train)} images of {args.image_size} pixels, {len(run.validation)} to validate, {tests} to test")
    print(f"  epochs: {args.epochs} for the softmax layer, {full_epochs or 'none'} for the whole network", flush=True)
    if "softmax" not in run.results:
        progress.rows += train_softmax_layer(run)
        save()
        experiment.write_rows(progress.rows)
    while progress.epoch <= full_epochs:
        epoch = progress.epoch
        order, _ = epoch_order(run.train, 1, args.seed, epoch)
        draws = dh.uniform_draws(len(run.images), dh.LABELLED_VIEW_DRAWS, args.seed, rh.VIEWS, epoch, device=device)
        for index in progress.steps(order.split(args.batch_size), save):
            progress.sums[progress.step] = run.step(index, draws)
        row = {"stage": "full", **progress.row(run.validate(), run.optimizer)}
        run.schedule.step(row["val_loss"])
        if row["val_acc"] > run.best["val_acc"]:
            run.best = {"val_acc": row["val_acc"], "epoch": epoch, "model": rh.cpu_state(run.model)}
        progress.finish_epoch(row)
        text = "loss {train_loss:.4f}, accuracy {train_acc:.2%}, validation loss {val_loss:.4f}, accuracy {val_acc:.2%}"
        print(f"whole network, epoch {epoch}/{full_epochs}: {text.format(**row)}", flush=True)
    if args.full_fine_tune and "full" not in run.results:
        run.use_best(progress.rows)
        save()
    report(run, progress, experiment)


class FineTuning:
    """The labelled images on the device, the network, its optimiser and schedule, and the results so far."""

    def __init__(self, args, device, path, weights):
        """weights: what models.read_weights() found in the file `path`, or {} for a random trunk."""
        self.args, self.device = args, device
        torch.manual_seed(rh.derived_seed(args.seed, rh.INITIAL_WEIGHTS))
        trunk, dimension = models.make_trunk(args.model_type, args.stem, args.zero_init)
        if weights:
            models.load_weights({"trunk": trunk}, weights, path)
            if (size := weights["settings"].get("image_size", args.image_size)) != args.image_size:
                print(f"note: {path} was pretrained with --image-size {size}")
        kind = "PIRL" if weights.get("settings") else "torchvision"
        self.trunk_name = f"{kind} trunk ({path})" if weights else "random trunk"
        folder = args.data_dir / "train"
        self.images, self.labels, classes, self.checksum = dh.load_labelled(folder, args.image_size, device)
        self.test_images, self.test_labels, test = None, None, args.data_dir / "test"
        if test.is_dir():
            test = dh.load_labelled(test, args.image_size, device, classes)
            self.test_images, self.test_labels, self.checksum = *test[:2], self.checksum + test[3]
        self.train, self.validation = dh.stratified_split(self.labels, args.seed, folder)
        if args.batch_size > len(self.train):
            raise rh.UserError(f"--batch-size {args.batch_size} is more than the {len(self.train)} images: lower it")
        self.classes = dh.class_names(args.data_dir, classes)
        self.folds = read_folds(args.data_dir, len(self.images), device) if args.folds else []
        self.model = models.classifier(trunk, dimension, len(classes)).to(device, memory_format=torch.channels_last)
        if not weights or path.suffix == ".ckpt":  # a finished one comes with the statistics of whole images
            self.model.trunk = models.plain_statistics(self.model.trunk, self.images[self.train], args.batch_size)
        rates = {"lr": args.full_lr, "momentum": 0.9, "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **rates, fused=True)
        self.schedule = ReduceLROnPlateau(self.optimizer, patience=args.patience_for_lr_decay)
        self.begun, self.best = False, {"val_acc": -1.0}  # of the full stage
        self.results, self.seconds = {}, {}  # by the names of ROWS; results are (validation, test accuracy)

    def state_dict(self):
        plain = {name: getattr(self, name) for name in ("begun", "best", "results", "seconds")}
        return plain | {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}

    def load_state_dict(self, state):
        self.begun, self.best, self.results, self.seconds = (state[n] for n in ("begun", "best", "results", "seconds"))
        for name in ("model", "optimizer", "schedule") if self.begun else ("model",):
            getattr(self, name).load_state_dict(state[name])

    def step(self, index, draws):
        """One step of the full stage on the training images `index` [B]. Returns [sum of losses, right answers]."""
        self.begun = True
        self.model.train()
        view = dh.labelled_view(self.images.index_select(0, index).float(), draws[index])
        with rh.autocast(self.device, self.args.precision):
            logits = self.model(view)
        loss = F.cross_entropy(logits.float(), self.labels[index])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return batch_sums(logits, self.labels[index], loss)

    def features(self, images, flip=False):
        """Features [N, d] of images uint8 [N, 3, S, S], by default as they are; None of None."""
        return None if images is None else models.trunk_features(self.model.trunk, images, self.args.batch_size, flip)

    @torch.no_grad()
    def predictions(self, features):
        """features [N, d] -> the classes int64 [N] by the softmax layer as it stands."""
        return self.model.softmax_layer(features).argmax(1)

    @torch.no_grad()
    def validate(self):
        """(mean loss, accuracy) of the network in eval mode on the validation images as they are."""
        labels = self.labels[self.validation]
        logits = self.model.softmax_layer(self.features(self.images[self.validation]))
        return (batch_sums(logits, labels, F.cross_entropy(logits, labels)) / len(labels)).tolist()

    def use_best(self, rows):
        """End the full stage with the weights of its best epoch."""
        self.model.load_state_dict(self.best["model"])
        self.results["full"] = (self.best["val_acc"], self.test_accuracy(self.features(self.test_images)))
        self.seconds["full"] = sum(len(self.train) / row["images_per_second"] for row in rows if row["stage"] == "full")

    def test_accuracy(self, features):
        """Accuracy on the test images, given their features; None without test images."""
        return None if features is None else (self.predictions(features) == self.test_labels).float().mean().item()


def read_folds(data_dir, count, device):
    """The lines of fold_indices.txt: indices of training images, int64 each."""
    path = data_dir / "fold_indices.txt"
    with rh.fitting(path, f"it must list images, from 0 to {count - 1}, a fold per line; or leave --folds out"):
        folds = [torch.tensor(list(map(int, line.split()))) for line in path.read_text().splitlines() if line.strip()]
        if not folds or any(fold.min() < 0 or fold.max() >= count for fold in folds):
            raise ValueError("an index out of range")
        return [fold.to(device) for fold in folds]


# ---- Only the softmax layer, on features that are computed once ------------------------------------------------------
def train_softmax_layer(run):
    """Train it on the frozen trunk's features of each image and its mirror image. Returns the rows of the CSV.

    The folds, and the nearest-neighbour accuracy of the same features, come with it.
    """
    started = time.monotonic()
    features = torch.stack([run.features(run.images, flip) for flip in (False, True)])  # [2, N, d]
    test = run.features(run.test_images)
    known = features[0, run.train], run.labels[run.train]
    run.results["neighbours"] = (
        models.neighbour_accuracy(*known, features[0, run.validation], run.labels[run.validation]),
        None if test is None else models.neighbour_accuracy(*known, test, run.test_labels),
    )
    results = []  # a fold's own images also decide on learning rate and epoch: no label beyond the fold's is used
    for train, validation in [*((fold, fold) for fold in run.folds), (run.train, run.validation)]:
        mean, scale = standardisation(features[:, train])
        layer, accuracy, rows = fit_softmax_layer((features - mean) / scale, run.labels, train, validation, run.args)
        fold_standardisation(layer, mean, scale, run.model.softmax_layer)
        results.append((accuracy, run.test_accuracy(test)))
    *folds, run.results["softmax"] = results
    if folds:
        run.results["folds"] = folds
    print(f"softmax layer: accuracy {accuracy:.2%} on validation in the best of {run.args.epochs} epochs", flush=True)
    run.seconds["softmax"] = time.monotonic() - started
    return rows


def standardisation(features):
    """(mean [d], scale [d]) that bring features [..., d] to mean 0 and FEATURE_SPREAD: one --lr suits any trunk."""
    flat = features.flatten(0, -2)
    return flat.mean(0), flat.std(0).clamp(min=1e-5) / FEATURE_SPREAD


@torch.no_grad()
def fold_standardisation(layer, mean, scale, target):
    """Give `target` the weights by which it does on plain features what `layer` does on standardised ones."""
    target.weight.copy_(layer.weight / scale)
    target.bias.copy_(layer.bias - target.weight @ mean)


def fit_softmax_layer(features, labels, train, validation, args):
    """Logistic regression by SGD, from zero; the weights of the epoch with the best validation accuracy.

    features [V, N, d]: V views of all images, of which each epoch takes one per image; train and validation index N
    (validation uses view 0). Returns (Linear, validation accuracy, rows of the CSV).
    """
    layer = torch.nn.Linear(features.shape[2], int(labels.max()) + 1).to(features.device)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    schedule = ReduceLROnPlateau(optimizer, patience=args.patience_for_lr_decay)
    best, state, rows = -1.0, None, []
    with rh.progress_bar(args.epochs, "softmax layer", " epochs") as bar:
        for epoch in range(1, args.epochs + 1):
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
            if not means.isfinite().all():
                raise rh.UserError(f"the loss is not finite in epoch {epoch} of the softmax layer: lower --lr")
            rows.append({"stage": "softmax", **rh.row_of(epoch, *means.tolist(), optimizer)})
            schedule.step(rows[-1]["val_loss"])
            if rows[-1]["val_acc"] > best:
                best, state = rows[-1]["val_acc"], rh.cpu_state(layer)
            bar.update()
    layer.load_state_dict(state)
    return layer, best, rows


def epoch_order(train, views, seed, epoch):
    """(the training indices in this epoch's order, the view of each)."""
    draw = rh.generator("cpu", seed, rh.ORDER, epoch)
    order = torch.randperm(len(train), generator=draw)
    view = torch.randint(views, (len(train),), generator=draw)
    return train[order.to(train.device)], view.to(train.device)


def batch_sums(logits, labels, loss):
    """[sum of the losses, number of right answers] of a batch, on its device."""
    return torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])


# ---- The report ------------------------------------------------------------------------------------------------------
def report(run, progress, experiment):
    """Write <experiment>.pt and the pictures, print the table and append it to results.md."""
    parts = {"trunk": run.model.trunk, "softmax_layer": run.model.softmax_layer}
    more = {"classes": run.classes, "results": run.results, "seconds": run.seconds}
    experiment.export(parts, progress, **more, pixel_mean=dh.MEAN, pixel_std=dh.STD)
    images, labels = run.test_images, run.test_labels
    if images is None:
        images, labels = run.images[run.validation], run.labels[run.validation]
    confusion = experiment.observations.with_name(f"{experiment.name}_confusion.png")
    save_picture(confusion_picture(labels, run.predictions(run.features(images)), run.classes), confusion)
    table = f"{run.trunk_name}, images of {run.args.data_dir}:\n\n{HEADER}"
    for name in filter(run.results.get, ROWS):
        if name == "folds":
            tests = [test for _, test in run.results[name] if test is not None]
            cells = ["none", spread(tests, unit="%") if tests else "none"]
        else:
            cells = ["none" if accuracy is None else f"{accuracy:.2%}" for accuracy in run.results[name]]
        table += f"{ROWS[name]} | {' | '.join(cells)}\n"
    results = run.args.observations_dir / "results.md"
    add_to_results(results, experiment.name, table)
    print(f"\n{table}\nwrote {experiment.model_file}, {experiment.observations}, {confusion} and {results}")
    if run.args.neighbours:
        draw_neighbours(run, images, labels)


def spread(values, scale=100, unit=" %"):
    """mean ± standard deviation (of the sample), as text."""
    deviation = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.2f}{deviation}{unit}"


def draw_neighbours(run, images, labels):
    """The first image of every class with its nearest training images by the finished trunk, as a picture."""
    shown = torch.tensor([(labels == label).nonzero()[0].item() for label in labels.unique()], device=run.device)
    _, rows = models.nearest(run.features(run.images), run.features(images[shown]), SHOWN_NEIGHBOURS)
    picture = neighbour_picture(images[shown], labels[shown], run.images[rows], run.labels[rows], run.classes)
    save_picture(picture, run.args.neighbours)
    print(f"wrote {run.args.neighbours}: images, and the nearest training images, in green if of the same class")


def add_to_results(results, name, table):
    """Add a run's table to results.md, unless it stands there already: a finished run may be resumed."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    with filelock.FileLock(results.with_name(".results.lock")):  # other runs write their tables here too
        text = results.read_text("utf-8", "surrogateescape") if results.is_file() else ""
        if f"## {name}\n" not in text or table not in text[text.rindex(f"## {name}\n") :]:
            text += f"## {name}\n\n{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC: `{command}`\n\n{table}\n"
            with rh.whole_file(results) as file:
                file.write(text.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    rh.run_script(main)
