"""Train on labelled images: the softmax layer, then the whole network.

python train_stl_after_ssl.py --full-fine-tune True --pirl-model-name exp \\
    --experiment-name exp_labels

Without --pirl-model-name the trunk starts at random: the baseline.
"""

import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import augmentations
import dataset_helpers
import evaluation
import models
from linear_probe import batch_totals, epoch_order, evaluate, linear_probe, read_folds
from report import (
    Answers,
    accuracy_of,
    class_table,
    draw_neighbours,
    results_table,
    write_report,
)
from runtime.arguments import (
    Parser,
    add_file_arguments,
    add_machine_arguments,
    add_run_arguments,
    add_trunk_arguments,
    bool_flag,
    bounded,
    non_empty,
    output_file,
)
from runtime.devices import (
    autocast,
    choose_device,
    choose_precision,
    make_optimizer,
    make_scaler,
    optimizer_step,
    restore_optimizer,
)
from runtime.errors import UserError
from runtime.experiment import CHANGEABLE, Experiment, TrainingState
from runtime.files import cpu_state_dict
from runtime.loop import LoopControl
from runtime.randomness import (
    INITIAL_WEIGHTS,
    VIEWS,
    derived_seed,
    make_generator,
)
from runtime.ranks import WORLD_SIZE
from runtime.script import run_script
from runtime.weights import choose_architecture, load_weights, read_weights

# The full stage keeps an exponential moving average of the weights, over about the last
# 100 steps. On two seeds, its test accuracy was 2.7 and 0.5 points above that of the
# weights themselves (docs/experiments.md).
AVERAGE_DECAY = 0.99
ADVICE_IF_DIVERGED = "lower --full-lr, or use --precision fp32"


def make_parser():
    parser = Parser(
        "Train a softmax layer, then the whole network, on the labelled images in\n"
        "<data-dir>/train/<class>/.",
        example="python train_stl_after_ssl.py --full-fine-tune True "
        "--pirl-model-name exp --experiment-name exp_labels",
    )
    # fmt: off
    add_run_arguments(
        parser,
        name="e1_pirl_sup_",
        epochs_help="passes over the training images, in each of the two stages",
        batch_help="images per step",
        lr=0.01,
        lr_help="learning rate of the softmax stage (SGD, momentum 0.9)",
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--pirl-model-name", type=non_empty, metavar="NAME",
        help="file of weights, or a name in the weights folder; by default, the trunk"
             " starts at random")
    add("--full-fine-tune", **bool_flag(False),
        help="train the whole network after the softmax layer")
    add("--full-epochs", type=bounded(int, 1), metavar="N",
        help="passes over the training images in the full stage; by default --epochs")
    add("--full-lr", type=bounded(float, 0, 100), default=0.03, metavar="RATE",
        help="learning rate of the full stage, 0 to 100")
    add("--patience-for-lr-decay", type=bounded(int, 0), default=10, metavar="N",
        help="epochs without improvement before the learning rate is divided by 10")

    add_trunk_arguments(parser, [*models.TRUNKS], from_weights=True)

    add = parser.add_argument_group("results").add_argument
    add("--folds", **bool_flag(False),
        help="train the softmax layer on each fold of fold_indices.txt, too")
    add("--neighbours", type=output_file, metavar="PATH",
        help="PNG picture to write: test images (or validation images, without a test"
             " folder) with the nearest training images")
    add("--evaluate", **bool_flag(False),
        help="train nothing: print the test accuracy of the fine-tuned model"
             " --pirl-model-name on <data-dir>/test/")
    # fmt: on
    add_machine_arguments(parser)
    add_file_arguments(parser)
    return parser


def main(argv=None):
    # A resumed run takes its settings from its checkpoint.
    parser = make_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.evaluate:
        evaluate_only(args)
        return

    experiment = Experiment(args, "labelled checkpoint")
    checkpoint = experiment.open_checkpoint(args.resume)
    if checkpoint:
        changeable = CHANGEABLE | {"full_fine_tune", "full_epochs"}
        if not checkpoint.get("full_steps"):
            changeable |= {"full_lr"}
        args = experiment.restore_settings(parser, argv, args, checkpoint, changeable)
    if args.full_epochs is None:
        args.full_epochs = args.epochs
    device = choose_device(args)
    args.precision = choose_precision(args, device)

    # The trunk to start from (a resumed run has it in its checkpoint), the images, and
    # the trainer.
    path = None
    weights = {}
    if args.pirl_model_name and not checkpoint:
        path, weights = read_weights(args.pirl_model_name, args.weights_dir)
    if not checkpoint:
        choose_architecture(args, path, weights)
    data = dataset_helpers.load_labelled(
        args.data_dir, args.image_size, device, args.seed
    )
    check_batch_size(args, data)
    test, test_checksum = dataset_helpers.load_test(
        args.data_dir, args.image_size, device, data.folders
    )
    folds = []
    if args.folds:
        train_count = sum(name.startswith("train/") for name in data.files)
        folds = read_folds(args.data_dir, train_count, device)
    trainer = FineTuningTrainer(args, device, data, path, weights, checkpoint)
    state = TrainingState(device)

    def save():
        experiment.save_checkpoint(args, data.fingerprint, trainer, state)

    loop = LoopControl(
        state,
        trainer.model,
        images_per_epoch=len(data.train),
        batch_size=args.batch_size,
        save=save,
        checkpoint_file=experiment.checkpoint_file,
        checkpoint_minutes=args.checkpoint_minutes,
        title="whole network, epoch",
        advice=ADVICE_IF_DIVERGED,
    )
    if checkpoint:
        experiment.restore(checkpoint, data.fingerprint, trainer, state)
        keep_begun_epochs(args, experiment, trainer, state)
    print_summary(trainer, test, loop.steps_per_epoch)

    # The linear probe runs once. A resumed run repeats it only if the images of test/
    # have changed, to measure on the new ones. If the full stage has begun by then, it
    # has already trained the probe's layer further, so only the results are taken. The
    # probe takes a minute or two and has no checkpoints of its own.
    never_probed = "softmax" not in trainer.results
    if never_probed or trainer.test_checksum != test_checksum:
        started = time.monotonic()
        probe = linear_probe(trainer.start_trunk(), data, test, folds, args)
        trainer.results.update(probe.results)
        trainer.test_checksum = test_checksum
        if not trainer.full_stage_begun:
            trainer.take_softmax_layer(probe.layer)
            trainer.seconds["softmax"] = time.monotonic() - started
            state.history = probe.history
        loop.checkpoint()
        experiment.write_history(state.history)

    # The whole network, starting from that layer.
    with loop:
        while args.full_fine_tune and state.epoch <= args.full_epochs:
            epoch = state.epoch
            uniforms = trainer.epoch_uniforms(epoch)
            batches = trainer.epoch_batches(epoch)

            loop.begin_epoch()
            for index in batches[state.step :]:
                totals = trainer.train_step(index, uniforms)
                # Adds 1 to state.step, and saves a checkpoint if one is due; on a
                # signal, the process ends here.
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
                "images_per_second": round(len(data.train) / state.seconds, 1),
            }
            trainer.scheduler.step(val_loss)
            trainer.keep_best(epoch, val_accuracy)
            trainer.seconds["full"] += loop.epoch_seconds()
            state.finish_epoch(metrics)
            experiment.write_history(state.history)
            print(
                f"whole network, epoch {epoch}/{args.full_epochs}: loss "
                f"{train_loss:.4f}, accuracy {train_accuracy:.2%}, validation loss "
                f"{val_loss:.4f}, accuracy {val_accuracy:.2%}",
                flush=True,
            )
            # A signal that came during validation ends the process here.
            loop.after_epoch()

        finish(trainer, test, state, experiment, argv, loop)
        # A signal that came during the report ends the process here.
        loop.after_export()


def finish(trainer, test, state, experiment, argv, loop):
    """Test the finished model, and write it with the report."""
    args = trainer.args
    data = trainer.data
    finished = trainer.finished_model()
    test_answers = answers_of(finished, test, args.batch_size)
    val_images = data.images[data.val]
    val_labels = data.labels[data.val]
    val = dataset_helpers.LabelledImages(val_images, val_labels)
    val_answers = answers_of(finished, val, args.batch_size)
    if trainer.full_stage_begun:
        test_accuracy = accuracy_of(test_answers)
        trainer.results["full"] = (trainer.best["val_acc"], test_accuracy)
        if trainer.best["epoch"] == 0:
            print(
                "note: no epoch of the whole network was better on validation than the "
                "softmax layer alone, so that model is kept"
            )
    loop.checkpoint()

    experiment.write_history(state.history)  # also of a copied checkpoint
    experiment.export(
        args,
        {"trunk": finished.trunk, "softmax_layer": finished.softmax_layer},
        state,
        classes=trainer.classes,
        class_folders=data.folders,
        validation_images=[data.files[row] for row in data.val.tolist()],
        results=trainer.results,
        seconds=trainer.seconds,
        pixel_mean=finished.trunk.pixel_mean,
        pixel_std=finished.trunk.pixel_std,
    )
    table = results_table(
        f"{trainer.trunk_name}, images of {args.data_dir}", trainer.results
    )
    train_labels = data.labels[data.train]
    write_report(
        experiment,
        argv,
        table,
        trainer.classes,
        train_labels,
        val_answers,
        test_answers,
    )
    if args.neighbours:
        train_images = data.images[data.train]
        known = dataset_helpers.LabelledImages(train_images, train_labels)
        shown = test if len(test.labels) else val
        trunk = finished.trunk
        draw_neighbours(
            args.neighbours, trunk, known, shown, trainer.classes, args.batch_size
        )


@torch.no_grad()
def answers_of(classifier, labelled, batch_size):
    """The Answers of a classifier about LabelledImages."""
    features = evaluation.trunk_features(classifier.trunk, labelled.images, batch_size)
    predictions = classifier.softmax_layer(features).argmax(1)
    return Answers(labelled.labels, predictions)


class FineTuningTrainer:
    """The network, its optimiser, a step of the full stage, and the results so far."""

    def __init__(self, args, device, data, path, weights, checkpoint):
        """data: LabelledData. weights: what read_weights() found in the file `path`;
        {}: a random trunk. checkpoint: of a resumed run, which has the trunk; or None.
        """
        self.args = args
        self.device = device
        self.data = data
        self.classes = dataset_helpers.class_names(args.data_dir, data.folders)

        torch.manual_seed(derived_seed(args.seed, INITIAL_WEIGHTS))
        trunk, dimension = models.make_trunk(args.model_type, args.stem, args.zero_init)
        models.speed_up_small_maps(trunk)
        self.trunk_name = "random trunk"
        if weights:
            load_weights({"trunk": trunk}, weights, path)
            self.trunk_name = trunk_name_of(path, weights)
        models.use_pixels_of(trunk, checkpoint or weights)
        softmax_layer = nn.Linear(dimension, len(self.classes))
        self.model = models.as_classifier(trunk, softmax_layer)
        self.model.to(device, memory_format=torch.channels_last)

        # Measure batch-norm statistics for a random trunk, which has none, and for a
        # checkpoint of pretraining, which has those of augmented images. Finished
        # models, other projects' files and a resumed run keep theirs.
        is_random = not weights and not checkpoint
        if is_random or weights.get("from_checkpoint"):
            self.model.trunk = evaluation.with_plain_bn_statistics(
                self.model.trunk, data.images[data.train], args.batch_size
            )
        # The softmax stage uses these weights, and the full stage starts from them.
        self.start_weights = cpu_state_dict(self.model.trunk)

        self.view = augmentations.LabelledView(trunk.pixel_mean, trunk.pixel_std)
        self.view.to(device)
        parameters = self.model.parameters()
        self.optimizer = make_optimizer(parameters, args.full_lr, args.weight_decay)
        self.scaler = make_scaler(device, args.precision)
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, patience=args.patience_for_lr_decay
        )

        # What the full stage validates and keeps. The validation loss of self.model is
        # so noisy that the scheduler would lower the learning rate too early.
        self.averaged_model = copy.deepcopy(self.model)

        self.full_steps = 0  # steps of the full stage so far
        self.best = None  # the best epoch of the full stage, see keep_best()
        # (validation, test accuracy) by the names of TABLE_ROWS; under "folds", a list.
        self.results = {}
        self.test_checksum = None  # of the test images that were measured
        self.seconds = {"softmax": 0.0, "full": 0.0}  # how long each stage has taken

    @property
    def full_stage_begun(self):
        return self.full_steps > 0

    def state_dict(self):
        return {
            "trunk": self.model.trunk.state_dict(),
            "softmax_layer": self.model.softmax_layer.state_dict(),
            "start_trunk": self.start_weights,
            "trunk_name": self.trunk_name,
            "pixel_mean": self.model.trunk.pixel_mean,
            "pixel_std": self.model.trunk.pixel_std,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "averaged_model": self.averaged_model.state_dict(),
            "full_steps": self.full_steps,
            "best": self.best,
            "results": self.results,
            "test_checksum": self.test_checksum,
            "seconds": self.seconds,
            "classes": self.classes,
            "class_folders": self.data.folders,
        }

    def load_state_dict(self, saved):
        self.model.trunk.load_state_dict(saved["trunk"])
        self.model.softmax_layer.load_state_dict(saved["softmax_layer"])
        self.start_weights = saved["start_trunk"]
        self.trunk_name = saved["trunk_name"]
        self.averaged_model.load_state_dict(saved["averaged_model"])
        self.full_steps = saved["full_steps"]
        if self.full_stage_begun:
            # Until then, --full-lr may still be changed.
            restore_optimizer(self.optimizer, self.scaler, saved)
            self.scheduler.load_state_dict(saved["scheduler"])
        self.best = saved["best"]
        self.results = saved["results"]
        self.test_checksum = saved["test_checksum"]
        self.seconds.update(saved["seconds"])

    # ---- The softmax stage -----------------------------------------------------------
    def start_trunk(self):
        """The trunk that the run starts from, in eval mode."""
        trunk = copy.deepcopy(self.model.trunk)
        trunk.load_state_dict(self.start_weights)
        return trunk.eval()

    def take_softmax_layer(self, layer):
        """Start the full stage from this layer.

        It counts as epoch 0 when the best epoch is chosen.
        """
        self.model.softmax_layer.load_state_dict(layer.state_dict())
        self.averaged_model.softmax_layer.load_state_dict(layer.state_dict())
        self.best = None
        val_accuracy, _ = self.results["softmax"]
        self.keep_best(0, val_accuracy)

    # ---- The full stage --------------------------------------------------------------
    def epoch_batches(self, epoch):
        """The training images in this epoch's order: a list of int64 [B] indices."""
        order, _ = epoch_order(self.data.train, 1, self.args.seed, epoch)
        return order.split(self.args.batch_size)

    def epoch_uniforms(self, epoch):
        """A row of random numbers in [0, 1) for the view of every image, [N, 7]."""
        generator = make_generator(self.device, self.args.seed, VIEWS, epoch)
        size = (len(self.data.images), augmentations.LABELLED_VIEW_UNIFORMS)
        return torch.rand(size, generator=generator, device=self.device)

    def train_step(self, index, uniforms):
        """One step of the full stage on the training images `index` [B].

        Returns [sum of the losses, number of correct answers], on the device.
        """
        self.model.train()
        images = self.data.images.index_select(0, index).float()
        labels = self.data.labels[index]
        view = self.view(images, uniforms[index])

        with autocast(self.device, self.args.precision):
            logits = self.model(view)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer_step(loss, self.optimizer, self.scaler)
        self.update_average()
        self.full_steps += 1
        return batch_totals(logits, labels, loss)

    @torch.no_grad()
    def update_average(self):
        """Move the averaged network, with its batch-norm statistics, towards the model.

        With a decay of 0.99 from the first step on, the average of a run of a hundred
        steps would still hold a third of its first weights. So the decay after n steps
        is n / (n + 9), which averages over about (n + 9) / 9 steps: 2 after nine steps,
        12 after a hundred, 100 from step 891 on, where the decay reaches 0.99.
        """
        decay = min(AVERAGE_DECAY, self.full_steps / (self.full_steps + 9))
        averages = self.averaged_model.state_dict().values()
        weights = self.model.state_dict().values()
        for average, weight in zip(averages, weights, strict=True):
            if weight.is_floating_point():  # num_batches_tracked is not
                average.lerp_(weight, 1 - decay)

    def validate(self):
        """(mean loss, accuracy) of the averaged network on plain validation images."""
        data = self.data
        features = evaluation.trunk_features(
            self.averaged_model.trunk, data.images[data.val], self.args.batch_size
        )
        return evaluate(
            self.averaged_model.softmax_layer, features, data.labels[data.val]
        )

    def keep_best(self, epoch, val_accuracy):
        """Keep the averaged weights of the epoch with the best validation accuracy."""
        if self.best is None or val_accuracy > self.best["val_acc"]:
            self.best = {
                "val_acc": val_accuracy,
                "epoch": epoch,
                "trunk": cpu_state_dict(self.averaged_model.trunk),
                "softmax_layer": cpu_state_dict(self.averaged_model.softmax_layer),
            }

    def finished_model(self):
        """The classifier of the best epoch, in eval mode."""
        model = copy.deepcopy(self.model)
        model.trunk.load_state_dict(self.best["trunk"])
        model.softmax_layer.load_state_dict(self.best["softmax_layer"])
        return model.eval()


def trunk_name_of(path, weights):
    """What the results table calls the trunk of a file."""
    if not weights["settings"]:
        return f"trunk of another project ({path})"
    if "softmax_layer" in weights:
        return f"fine-tuned trunk ({path})"
    return f"PIRL trunk ({path})"


# ---- The beginning of a run ----------------------------------------------------------
def check_flags(parser, args):
    """Refuse what cannot work, before anything is read."""
    if WORLD_SIZE > 1:
        raise UserError(
            "fine-tuning is small and runs on one process",
            "start it without torchrun",
        )
    if args.evaluate and not args.pirl_model_name:
        parser.error("--evaluate needs --pirl-model-name")
    if args.evaluate and args.neighbours:
        parser.error("--neighbours needs a training run, so not --evaluate")


def check_batch_size(args, data):
    """Refuse a batch of more images than there are to train on."""
    if args.batch_size > len(data.train):
        raise UserError(
            f"--batch-size {args.batch_size} is more than the {len(data.train)} images",
            "lower it",
        )


def keep_begun_epochs(args, experiment, trainer, state):
    """If a resumed run is beyond --full-epochs already, raise that to where it is.

    A checkpoint from within the full stage cannot be resumed without that stage.
    """
    if trainer.full_stage_begun and not args.full_fine_tune:
        raise UserError(
            f"{experiment.checkpoint_file} is from within the full stage",
            "add --full-fine-tune True",
        )
    begun = state.epoch if state.step > 0 else state.epoch - 1
    if begun > args.full_epochs:
        print(f"note: epoch {begun} has begun already, so --full-epochs is {begun}")
        args.full_epochs = begun


def print_summary(trainer, test, steps):
    """Print the settings of the run."""
    args = trainer.args
    data = trainer.data
    side = args.image_size
    full_epochs = args.full_epochs if args.full_fine_tune else "none"

    print(f"{args.experiment_name}: {args.model_type}, {trainer.trunk_name}")
    print(
        f"  {trainer.device.type}, {args.precision}, seed {args.seed},"
        f" {len(trainer.classes)} classes in {args.data_dir}"
    )
    print(
        f"  {len(data.train)} images of {side} × {side} pixels, {len(data.val)} to"
        f" validate, {len(test.labels)} to test"
    )
    print(
        f"  {steps} steps of {args.batch_size} per epoch; epochs: {args.epochs} for the"
        f" softmax layer, {full_epochs} for the whole network",
        flush=True,
    )


# ---- Testing alone -------------------------------------------------------------------
def evaluate_only(args):
    """Print the table of a fine-tuned model for data_dir/test, without training."""
    device = choose_device(args)
    path, weights = read_weights(args.pirl_model_name, args.weights_dir)
    if "softmax_layer" not in weights:
        raise UserError(
            f"{path} has no softmax layer, so it has no accuracy",
            "name a model that train_stl_after_ssl.py has written",
        )
    choose_architecture(args, path, weights)
    trunk, softmax_layer = models.load_network(path, weights)
    classifier = models.as_classifier(trunk, softmax_layer)
    classifier.to(device, memory_format=torch.channels_last)

    classes = weights["classes"]
    folders = weights.get("class_folders", classes)
    test, _ = dataset_helpers.load_test(args.data_dir, args.image_size, device, folders)
    if len(test.labels) == 0:
        raise UserError(
            f"there are no test images in {args.data_dir / 'test'}",
            "put them into a folder per class there",
        )
    answers = answers_of(classifier.eval(), test, args.batch_size)
    nothing = torch.empty(0, dtype=torch.int64)
    empty = Answers(nothing, nothing)
    # An interrupted run has no result of its full stage yet.
    full = "full" in weights.get("results", {}) or weights.get("full_steps")
    stage = "full" if full else "softmax"
    table = results_table(
        f"{Path(path).name}, images of {args.data_dir}",
        {stage: (None, accuracy_of(answers))},
    )
    print(f"\n{table}\n{class_table(classes, nothing, empty, answers)}", flush=True)


if __name__ == "__main__":
    run_script(main)
