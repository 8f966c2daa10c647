"""Train on labelled images: the softmax layer, then the whole network.

python train_stl_after_ssl.py --lr 0.1 --patience-for-lr-decay 4 \\
    --full-fine-tune True --pirl-model-name exp

Without --pirl-model-name the trunk starts at random: the baseline.
"""

import copy
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

import augmentations
import dataset_helpers
import evaluation
import models
from checkpoints import (
    CHANGEABLE,
    Experiment,
    TrainingState,
    atomic_write,
    cpu_state_dict,
    explain_mismatch,
    load_weights,
    read_weights,
    stem_of,
)
from pictures import (
    confusion_picture,
    neighbour_picture,
    save_picture,
    write_confusion_csv,
)
from progress import LoopControl, progress_bar
from run_helpers import (
    INITIAL_WEIGHTS,
    ORDER,
    RANKS,
    VIEWS,
    Parser,
    UserError,
    add_run_arguments,
    autocast,
    bool_flag,
    bounded,
    choose_device,
    choose_precision,
    derived_seed,
    file_path,
    make_generator,
    make_optimizer,
    make_scaler,
    non_empty,
    run_script,
)

# Features are brought to this standard deviation. With it, --lr 0.01 and --lr 0.1 reach
# the same accuracy; with 1 they do not.
FEATURE_STD = 0.25
SHOWN_NEIGHBOURS = 5
# The full stage keeps an exponential moving average of the weights, over about the last
# 100 steps. On two seeds, its accuracy on photographs was 2.7 and 0.5 points above that
# of the weights themselves (docs/recipe.md).
AVERAGE_DECAY = 0.99

TABLE_HEADER = (
    "Fine tuning strategy | Val Classification Accuracy | "
    "Test Classification Accuracy\n--- | --- | ---\n"
)
# The rows of the table, by the names of the results in our files.
TABLE_ROWS = {
    "softmax": "Only softmax layer is fine tuned",
    "full": "Full model is fine tuned",
    "neighbours": "kNN",
    "folds": "Only softmax layer is fine tuned, predefined folds",
}


def make_parser():
    parser = Parser(
        "Train a softmax layer, then the whole network, on labelled images."
    )
    add_run_arguments(parser, experiment="e1_pirl_sup_")
    # fmt: off
    add = parser.add_argument_group("network").add_argument
    add("--model-type", choices=[*models.TRUNKS], default="res18",
        help="the trunk: ResNet-18, -34 or -50")
    add("--pirl-model-name", type=non_empty,
        help="a file of weights, or a name in the weights folder; without it, the trunk"
             " starts at random")
    add("--stem", choices=["imagenet", "small"],
        help="the first convolution; defaults to the checkpoint's, or to imagenet")
    add("--zero-init", **bool_flag(True),
        help="whether every residual block of a random trunk starts as the identity")
    add("--image-size", type=bounded(int, 36, 224), default=96,
        help="images are resized and cropped to this side length in pixels")

    add = parser.add_argument_group("training").add_argument
    add("--full-fine-tune", **bool_flag(False),
        help="whether to train the whole network after the softmax layer")
    add("--batch-size", type=bounded(int, 1), default=128,
        help="images per step")
    add("--epochs", type=bounded(int, 1), default=100,
        help="passes over the training images, in each stage")
    add("--full-epochs", type=bounded(int, 1),
        help="the same for the full stage; defaults to --epochs")
    add("--lr", type=bounded(float, 0, 100), default=0.01,
        help="learning rate of the softmax stage (SGD, momentum 0.9)")
    add("--full-lr", type=bounded(float, 0, 100), default=0.03,
        help="learning rate of the full stage")
    add("--weight-decay", type=bounded(float, 0, 1), default=5e-4,
        help="weight decay of all weights that are trained")
    add("--patience-for-lr-decay", type=bounded(int, 0), default=10,
        help="epochs without improvement before the learning rate is divided by 10")

    add = parser.add_argument_group("results").add_argument
    add("--folds", **bool_flag(False),
        help="whether to train the softmax layer on each fold of fold_indices.txt too")
    add("--neighbours", type=file_path,
        help="a PNG picture to write: test images (or validation images, without a test"
             " folder) with the nearest training images")
    # fmt: on
    return parser


def main(argv=None):
    # What is to be done. A resumed run takes its settings from its checkpoint.
    parser = make_parser()
    args = parser.parse_args(argv)
    if RANKS > 1:
        raise UserError(
            "fine-tuning is small and runs on one process",
            "start it without torchrun",
        )
    if args.neighbours and args.neighbours.is_dir():
        parser.error(
            f"argument --neighbours: {args.neighbours} is a folder, not a file"
        )

    experiment = Experiment(args, "labelled checkpoint")
    checkpoint = experiment.open_checkpoint(args.resume)
    if checkpoint:
        changeable = CHANGEABLE | {"full_fine_tune"}
        if not checkpoint.get("full_steps"):
            changeable |= {"full_lr", "full_epochs"}
        args = experiment.restore_settings(parser, argv, args, checkpoint, changeable)
    full_epochs = 0
    if args.full_fine_tune:
        full_epochs = args.full_epochs or args.epochs
    device = choose_device(args)
    args.precision = choose_precision(args, device)

    # The trunk to start from, the images, and all that is trained on them.
    path = None
    weights = {}
    if args.pirl_model_name:
        path, weights = read_weights(args.pirl_model_name, args.weights_dir)
    if args.stem is None:
        args.stem = "imagenet"
        if weights:
            args.stem = weights["settings"].get("stem") or stem_of(weights["trunk"])
    trainer = FineTuning(args, device, path, weights)
    state = TrainingState(device)

    def save():
        experiment.save_checkpoint(args, trainer.checksum, trainer, state)

    title = "whole network, epoch"
    advice = "lower --full-lr, or use --precision fp32"
    loop = LoopControl(trainer, state, experiment, save, title, advice)
    if checkpoint:
        experiment.restore(checkpoint, trainer.checksum, trainer, state)
    half_done = trainer.full_steps > 0 and "full" not in trainer.results
    if half_done and not args.full_fine_tune:
        raise UserError(
            f"{experiment.checkpoint_file} is from within the full stage",
            "add --full-fine-tune True",
        )
    print_summary(trainer, loop.steps_per_epoch, full_epochs)

    # A resumed run may begin before the softmax layer, after it, within the epochs of
    # the whole network, or at the end. The softmax layer takes a minute or two: a run
    # that is stopped in it begins again.
    if "softmax" not in trainer.results:
        state.history = train_softmax_layer(trainer)
        loop.checkpoint()
        experiment.write_history(state.history)

    # The whole network, starting from that layer.
    with loop:
        while state.epoch <= full_epochs:
            epoch = state.epoch
            uniforms = trainer.epoch_uniforms(epoch)
            batches = trainer.epoch_batches(epoch)

            loop.begin_epoch()
            for index in batches[state.step :]:
                totals = trainer.train_step(index, uniforms)
                # Saves a checkpoint if one is due; on a signal, the process ends here.
                loop.after_step(totals)
            train_loss, train_accuracy = loop.end_epoch()

            val_loss, val_accuracy = trainer.validate()
            metrics = {
                "stage": "full",
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "train_acc": train_accuracy,
                "val_acc": val_accuracy,
                "learning_rate": trainer.optimizer.param_groups[0]["lr"],
                "images_per_second": round(trainer.train_count / state.seconds, 1),
            }
            trainer.schedule.step(val_loss)
            trainer.keep_best(epoch, val_accuracy)
            trainer.seconds["full"] += loop.epoch_seconds()
            state.finish_epoch(metrics)
            experiment.write_history(state.history)
            print(
                f"whole network, epoch {epoch}/{full_epochs}: loss {train_loss:.4f},"
                f" accuracy {train_accuracy:.2%}, validation loss {val_loss:.4f},"
                f" accuracy {val_accuracy:.2%}",
                flush=True,
            )
            # A signal that came during validation ends the process here.
            loop.after_epoch()

        if args.full_fine_tune and "full" not in trainer.results:
            trainer.use_best_epoch()
            loop.checkpoint()
        write_results(trainer, state, experiment, argv)
        loop.after_export()


class FineTuning:
    """The labelled images, the network, its optimiser, and the results so far."""

    def __init__(self, args, device, path, weights):
        """weights: what read_weights() found in the file `path`; {}: a random trunk."""
        self.args = args
        self.device = device
        trunk, dimension, self.trunk_name = make_start_trunk(args, path, weights)
        self.load_images()

        classes = len(self.classes)
        self.model = models.make_classifier(trunk, dimension, classes)
        self.model.to(device, memory_format=torch.channels_last)
        if not weights or weights["from_checkpoint"]:
            # Our finished models have the batch-norm statistics of plain images; other
            # projects' files keep theirs.
            self.model.trunk = evaluation.with_plain_bn_statistics(
                self.model.trunk, self.images[self.train_index], args.batch_size
            )
        self.view = augmentations.LabelledView().to(device)
        parameters = self.model.parameters()
        self.optimizer = make_optimizer(parameters, args.full_lr, args.weight_decay)
        self.scaler = make_scaler(device, args.precision)
        self.schedule = ReduceLROnPlateau(
            self.optimizer, patience=args.patience_for_lr_decay
        )

        # What the full stage validates and keeps. The validation loss of self.model
        # goes up and down by more than it falls, which lowers the rate too early.
        self.averaged_model = copy.deepcopy(self.model)

        self.full_steps = 0  # steps of the full stage so far
        self.best = {"val_acc": -1.0}  # the best epoch of the full stage
        # (validation, test accuracy) by the names of TABLE_ROWS; under "folds", a list.
        self.results = {}
        self.seconds = {"softmax": 0.0, "full": 0.0}  # how long each stage has taken

    def load_images(self):
        """Read the images: to train, to validate and, where there are any, to test."""
        args = self.args
        device = self.device
        folder = args.data_dir / "train"
        labelled = dataset_helpers.load_labelled(folder, args.image_size, device)
        self.images, self.labels, classes, self.checksum = labelled
        self.train_index, self.val_index = dataset_helpers.stratified_split(
            self.labels, args.seed, folder
        )
        self.train_count = len(self.train_index)
        if args.batch_size > self.train_count:
            raise UserError(
                f"--batch-size {args.batch_size} is more than the {self.train_count} "
                "images",
                "lower it",
            )

        self.test_images = None
        self.test_labels = None
        test_folder = args.data_dir / "test"
        if test_folder.is_dir():
            test = dataset_helpers.load_labelled(
                test_folder, args.image_size, device, classes
            )
            self.test_images, self.test_labels, _, test_checksum = test
            self.checksum += test_checksum
        self.classes = dataset_helpers.class_names(args.data_dir, classes)
        self.folds = []
        if args.folds:
            self.folds = read_folds(args.data_dir, len(self.images), device)

    def state_dict(self):
        return {
            "trunk": self.model.trunk.state_dict(),
            "softmax_layer": self.model.softmax_layer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "averaged_model": self.averaged_model.state_dict(),
            "full_steps": self.full_steps,
            "best": self.best,
            "results": self.results,
            "seconds": self.seconds,
            "classes": self.classes,
        }

    def load_state_dict(self, saved):
        self.model.trunk.load_state_dict(saved["trunk"])
        self.model.softmax_layer.load_state_dict(saved["softmax_layer"])
        self.full_steps = saved["full_steps"]
        if self.full_steps > 0:
            # Until then, --full-lr may still be changed.
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.averaged_model.load_state_dict(saved["averaged_model"])
            # A resumed run may have another precision. Only fp16's scaler has a state.
            if saved["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
        self.best = saved["best"]
        self.results = saved["results"]
        self.seconds.update(saved["seconds"])

    def epoch_batches(self, epoch):
        """The training images in this epoch's order: a list of int64 [B] indices."""
        order, _ = epoch_order(self.train_index, 1, self.args.seed, epoch)
        return order.split(self.args.batch_size)

    def epoch_uniforms(self, epoch):
        """A row of random numbers in [0, 1) for the view of every image, [N, 7]."""
        generator = make_generator(self.device, self.args.seed, VIEWS, epoch)
        size = (len(self.images), augmentations.LABELLED_VIEW_UNIFORMS)
        return torch.rand(size, generator=generator, device=self.device)

    def train_step(self, index, uniforms):
        """One step of the full stage on the training images `index` [B].

        Returns [sum of the losses, number of correct answers], on the device.
        """
        self.model.train()
        images = self.images.index_select(0, index).float()
        labels = self.labels[index]
        view = self.view(images, uniforms[index])

        with autocast(self.device, self.args.precision):
            logits = self.model(view)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_average()
        self.full_steps += 1
        return batch_totals(logits, labels, loss)

    @torch.no_grad()
    def update_average(self):
        """Move the averaged network, with its batch-norm statistics, towards the model.

        The decay rises from 0 (a copy) to AVERAGE_DECAY. With 0.99 from the beginning,
        a run of a hundred steps would still hold a third of its first weights.
        """
        decay = min(AVERAGE_DECAY, self.full_steps / (self.full_steps + 9))
        averages = self.averaged_model.state_dict().values()
        weights = self.model.state_dict().values()
        for average, weight in zip(averages, weights, strict=True):
            if weight.is_floating_point():  # num_batches_tracked is not
                average.lerp_(weight, 1 - decay)

    def validate(self):
        """(mean loss, accuracy) of the averaged network on plain validation images."""
        features = evaluation.trunk_features(
            self.averaged_model.trunk,
            self.images[self.val_index],
            self.args.batch_size,
        )
        labels = self.labels[self.val_index]
        return evaluate(self.averaged_model.softmax_layer, features, labels)

    def keep_best(self, epoch, val_accuracy):
        """Keep the averaged weights of the epoch with the best validation accuracy."""
        if val_accuracy > self.best["val_acc"]:
            self.best = {
                "val_acc": val_accuracy,
                "epoch": epoch,
                "trunk": cpu_state_dict(self.averaged_model.trunk),
                "softmax_layer": cpu_state_dict(self.averaged_model.softmax_layer),
            }

    def use_best_epoch(self):
        """End the full stage with the weights of its best epoch."""
        self.model.trunk.load_state_dict(self.best["trunk"])
        self.model.softmax_layer.load_state_dict(self.best["softmax_layer"])
        test_accuracy = None
        if self.test_images is not None:
            features = self.features(self.test_images)
            _, test_accuracy = evaluate(
                self.model.softmax_layer, features, self.test_labels
            )
        self.results["full"] = (self.best["val_acc"], test_accuracy)

    def features(self, images, flip=False):
        """Features [N, d] of images uint8 [N, 3, S, S]; flip: mirrored."""
        trunk = self.model.trunk
        return evaluation.trunk_features(trunk, images, self.args.batch_size, flip)

    @torch.no_grad()
    def predictions(self, features):
        """features [N, d] -> classes int64 [N], by the softmax layer as it is now."""
        return self.model.softmax_layer(features).argmax(1)


def make_start_trunk(args, path, weights):
    """(trunk, its output dimension, what to call it): pretrained, or from the seed."""
    torch.manual_seed(derived_seed(args.seed, INITIAL_WEIGHTS))
    trunk, dimension = models.make_trunk(args.model_type, args.stem, args.zero_init)
    if not weights:
        return trunk, dimension, "random trunk"

    load_weights({"trunk": trunk}, weights, path)
    pretrained_size = weights["settings"].get("image_size", args.image_size)
    if pretrained_size != args.image_size:
        print(f"note: {path} was pretrained with --image-size {pretrained_size}")
    if not weights["settings"]:
        return trunk, dimension, f"trunk of another project ({path})"
    if "softmax_layer" in weights:
        return trunk, dimension, f"fine-tuned trunk ({path})"
    return trunk, dimension, f"PIRL trunk ({path})"


def read_folds(data_dir, count, device):
    """The lines of fold_indices.txt: int64 indices of training images, a fold each."""
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


# ---- The softmax stage, on features that are computed once ---------------------------
def train_softmax_layer(trainer):
    """Train the softmax layer on the frozen trunk's features; measure kNN with them.

    Returns the metrics of the epochs.
    """
    started = time.monotonic()
    # Two views of an image: as it is, and mirrored.
    plain = trainer.features(trainer.images)
    mirrored = trainer.features(trainer.images, flip=True)
    features = torch.stack([plain, mirrored])  # [2, N, d]
    test_features = None
    if trainer.test_images is not None:
        test_features = trainer.features(trainer.test_images)
    trainer.results["neighbours"] = measure_knn(trainer, plain, test_features)

    def fit(train, validation):
        layer, val_accuracy, history = fit_softmax_layer(
            features, trainer.labels, train, validation, trainer.args
        )
        test_accuracy = None
        if test_features is not None:
            _, test_accuracy = evaluate(layer, test_features, trainer.test_labels)
        return layer, (val_accuracy, test_accuracy), history

    for fold in trainer.folds:
        # A fold's own images also decide on learning rate and epoch, so that no label
        # beyond the fold's is used.
        _, result, _ = fit(fold, fold)
        trainer.results.setdefault("folds", []).append(result)

    layer, result, history = fit(trainer.train_index, trainer.val_index)
    trainer.model.softmax_layer.load_state_dict(layer.state_dict())
    trainer.results["softmax"] = result
    trainer.seconds["softmax"] = time.monotonic() - started
    print(
        f"softmax layer: accuracy {result[0]:.2%} on validation in the best of"
        f" {trainer.args.epochs} epochs",
        flush=True,
    )
    return history


def measure_knn(trainer, features, test_features):
    """(validation, test accuracy) of kNN among the training images, None without test.

    features [N, d] are of all labelled images.
    """
    train = trainer.train_index
    validation = trainer.val_index
    train_features = features[train]
    train_labels = trainer.labels[train]
    val_accuracy = evaluation.knn_accuracy(
        train_features, train_labels, features[validation], trainer.labels[validation]
    )
    test_accuracy = None
    if test_features is not None:
        test_accuracy = evaluation.knn_accuracy(
            train_features, train_labels, test_features, trainer.test_labels
        )
    return val_accuracy, test_accuracy


def fit_softmax_layer(features, labels, train, validation, args):
    """Logistic regression by SGD from zero, up to the best epoch of validation.

    features [V, N, d]: V views of all images, of which each epoch takes one per image.
    train and validation index N; validation uses view 0. Returns (a Linear for
    features that are not standardised, its validation accuracy, the metrics of the
    epochs).
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
    schedule = ReduceLROnPlateau(optimizer, patience=args.patience_for_lr_decay)

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
            schedule.step(val_loss)
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
    """One pass over the features [V, N, d] at (views, order); (mean loss, accuracy)."""
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
    """(mean loss, accuracy) of a softmax layer on features [N, d] with labels [N]."""
    logits = layer(features)
    loss = F.cross_entropy(logits, labels)
    totals = batch_totals(logits, labels, loss)
    loss, accuracy = (totals / len(labels)).tolist()
    return loss, accuracy


def epoch_order(train, view_count, seed, epoch):
    """(the training indices in this epoch's order, which of the views each gets)."""
    generator = make_generator("cpu", seed, ORDER, epoch)
    order = torch.randperm(len(train), generator=generator)
    view = torch.randint(view_count, (len(train),), generator=generator)
    return train[order.to(train.device)], view.to(train.device)


def batch_totals(logits, labels, loss):
    """[sum of the losses, number of correct answers] of a batch, on its device."""
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), correct])


# ---- The beginning and the end of a run ----------------------------------------------
def print_summary(trainer, steps, full_epochs):
    """Say what is about to be done."""
    args = trainer.args
    tests = 0 if trainer.test_images is None else len(trainer.test_images)
    classes = f"{len(trainer.classes)} classes in {args.data_dir}"
    side = args.image_size
    counts = f"{len(trainer.val_index)} to validate, {tests} to test"

    print(f"{args.experiment_name}: {args.model_type}, {trainer.trunk_name}")
    print(f"  {trainer.device.type}, {args.precision}, seed {args.seed}, {classes}")
    print(f"  {trainer.train_count} images of {side} × {side} pixels, {counts}")
    print(
        f"  {steps} steps of {args.batch_size} per epoch; epochs: {args.epochs} for the"
        f" softmax layer, {full_epochs or 'none'} for the whole network",
        flush=True,
    )


def write_results(trainer, state, experiment, argv):
    """Write <experiment>.pt, the tables and the pictures, and print the table."""
    experiment.export(
        trainer.args,
        {"trunk": trainer.model.trunk, "softmax_layer": trainer.model.softmax_layer},
        state,
        classes=trainer.classes,
        results=trainer.results,
        seconds=trainer.seconds,
        pixel_mean=augmentations.PIXEL_MEAN,
        pixel_std=augmentations.PIXEL_STD,
    )

    # The finished model's answers, on test images where there are any.
    images = trainer.test_images
    labels = trainer.test_labels
    if images is None:
        images = trainer.images[trainer.val_index]
        labels = trainer.labels[trainer.val_index]
    predictions = trainer.predictions(trainer.features(images))

    # What is confused with what.
    confusion_file = experiment.observation("confusion.png")
    picture = confusion_picture(labels, predictions, trainer.classes)
    save_picture(picture, confusion_file)
    csv_file = experiment.observation("confusion.csv")
    write_confusion_csv(csv_file, labels, predictions, trainer.classes)

    table = results_table(trainer)
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", Path(__file__).name, *arguments])
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    results_file = experiment.observation("results.md")
    with atomic_write(results_file, "w") as file:
        file.write(f"## {experiment.name}\n\n{date} UTC: `{command}`\n\n{table}\n")
        file.write(class_table(trainer, labels, predictions))

    files = f"{experiment.model_file}, {experiment.history_file}, {confusion_file}"
    print(f"\n{table}\nwrote {files}, {csv_file} and {results_file}", flush=True)
    if trainer.args.neighbours:
        draw_neighbours(trainer, images, labels)


def results_table(trainer):
    """The results in Markdown; the first rows are worded as aniket03/pirl_pytorch's."""
    table = (
        f"{trainer.trunk_name}, images of {trainer.args.data_dir}:\n\n{TABLE_HEADER}"
    )
    for name, title in TABLE_ROWS.items():
        if name not in trainer.results:
            continue
        result = trainer.results[name]
        if name == "folds":
            # A fold's images also validate it, so its validation accuracy says nothing.
            tests = [test for _, test in result if test is not None]
            validation_cell = "none"
            test_cell = spread(tests) if tests else "none"
        else:
            validation, test = result
            validation_cell = f"{validation:.2%}"
            test_cell = "none" if test is None else f"{test:.2%}"
        table += f"{title} | {validation_cell} | {test_cell}\n"
    return table + balanced_row(trainer)


def balanced_row(trainer):
    """A row of the table for classes of different sizes; else an empty text.

    The mean of the classes' accuracies by the finished model: there, accuracy alone may
    hide a bad class.
    """
    balanced = True
    for labels in (trainer.labels, trainer.test_labels):
        if labels is not None:
            class_sizes = torch.bincount(labels)
            balanced &= (class_sizes == class_sizes[0]).all().item()
    if balanced:
        return ""

    def balanced_accuracy(images, labels):
        correct = (trainer.predictions(trainer.features(images)) == labels).float()
        of_classes = [correct[labels == label].mean() for label in labels.unique()]
        return f"{torch.stack(of_classes).mean():.2%}"

    val = trainer.val_index
    validation_cell = balanced_accuracy(trainer.images[val], trainer.labels[val])
    test_cell = "none"
    if trainer.test_images is not None:
        test_cell = balanced_accuracy(trainer.test_images, trainer.test_labels)
    return f"Balanced accuracy at the end | {validation_cell} | {test_cell}\n"


def class_table(trainer, labels, predictions):
    """Each class's number of images and accuracy, in Markdown."""
    split = "validation" if trainer.test_images is None else "test"
    table = f"Class | Labelled images | Of {split} | Accuracy at the end\n"
    table += "--- | --- | --- | ---\n"
    for label, name in enumerate(trainer.classes):
        labelled = (trainer.labels == label).sum().item()
        of_class = labels == label
        count = of_class.sum().item()
        accuracy = "none"
        if count:
            correct = (predictions[of_class] == label).sum().item()
            accuracy = f"{correct / count:.2%}"
        table += f"{name} | {labelled} | {count} | {accuracy}\n"
    return table


def spread(accuracies):
    """mean ± standard deviation (of the sample) in per cent, as text."""
    text = f"{100 * statistics.mean(accuracies):.2f}"
    if len(accuracies) > 1:
        text += f" ± {100 * statistics.stdev(accuracies):.2f}"
    return text + "%"


def draw_neighbours(trainer, images, labels):
    """A picture: the first image of every class, with its nearest training images."""
    firsts = [(labels == label).nonzero()[0].item() for label in labels.unique()]
    shown = torch.tensor(firsts, device=trainer.device)
    train_images = trainer.images[trainer.train_index]
    train_labels = trainer.labels[trainer.train_index]
    _, nearest = evaluation.nearest_neighbours(
        trainer.features(train_images),
        trainer.features(images[shown]),
        SHOWN_NEIGHBOURS,
    )
    picture = neighbour_picture(
        images[shown],
        labels[shown],
        train_images[nearest],
        train_labels[nearest],
        trainer.classes,
    )
    save_picture(picture, trainer.args.neighbours)
    what = "images, and the nearest training images, in green if of the same class"
    print(f"wrote {trainer.args.neighbours}: {what}", flush=True)


if __name__ == "__main__":
    run_script(main)
