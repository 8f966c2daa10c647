"""This project beside SimCLR, BYOL and Barlow Twins of lightly, at equal time.

Each method pretrains a ResNet-18 on the same images, for the same number of minutes on
this machine. train_stl_after_ssl.py then trains a softmax layer on the features of each
trunk and measures kNN.

OMP_WAIT_POLICY=passive python -m benchmarks.equal_time --data-dir photos_10000 \\
    --image-size 64 --minutes 12

On CPUs, OMP_WAIT_POLICY makes idle threads leave their cores to the processes that
read images for lightly.

Each method of lightly is tried with three learning rates, with and without
zero-initialised residual blocks, on seed 0; the best by validation accuracy of the
softmax layer runs with the other seeds. Each run adds its row to
results/<data>_<minutes>_minutes.md; the runs' files are in a folder of that name. After
an interruption, finished runs are not repeated.

PIRL's minutes do not include reading the images into memory once; lightly reads them
again in every epoch, which is included.
"""

import copy
import importlib.metadata
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from augmentations import PIXEL_MEAN, PIXEL_STD
from benchmarks.compare import TEST, VALIDATION, markdown_table, spread
from benchmarks.results import (
    FINE_TUNING,
    PRETRAINING,
    RESULTS,
    command_line,
    finished_run,
    pretraining_seconds,
)
from dataset_helpers import list_images, load_images, unlabelled_folder
from evaluation import STATISTICS_IMAGES, with_plain_bn_statistics
from models import make_trunk
from runtime.arguments import Parser, bounded, file_path
from runtime.bars import progress_bar
from runtime.devices import (
    autocast,
    choose_device,
    choose_precision,
    describe_machine,
    make_optimizer,
)
from runtime.errors import UserError
from runtime.files import atomic_save, atomic_write, read_torch_file
from runtime.script import run_script

LIGHTLY_ERROR = None
try:
    from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules.heads import (
        BYOLPredictionHead,
        BYOLProjectionHead,
        ProjectionHead,
        SimCLRProjectionHead,
    )
    from lightly.models.utils import update_momentum
    from lightly.transforms import SimCLRTransform
except ImportError as error:
    LIGHTLY_ERROR = error

# The settings of lightly's own benchmark of these methods on small images
# (cifar10_benchmark.py). The learning rate of all three is 0.06 there, which is too
# much for a short run of Barlow Twins: its loss is a sum over 2,048 × 2,048
# correlations (docs/experiments.md).
LEARNING_RATES = {
    "SimCLR": (0.06, 0.2, 0.6),
    "BYOL": (0.06, 0.2, 0.6),
    "Barlow Twins": (0.002, 0.006, 0.02),
}
BATCH_SIZE = 128
WEIGHT_DECAY = 5e-4


def parse_args(argv=None):
    parser = Parser("This project beside three methods of lightly, at equal time.")
    # fmt: off
    add = parser.add_argument
    add("--data-dir", type=file_path, default=Path("stl10_data"),
        help="the folder with the images")
    add("--minutes", type=bounded(float, 0.001), default=12.0,
        help="minutes of PIRL's pretraining, rounded down to whole epochs; the others"
             " get the time that it took")
    add("--image-size", type=bounded(int, 36, 224), default=96,
        help="images are resized and cropped to this side length in pixels")
    add("--seeds", type=bounded(int, 1), default=2, help="how many seeds, from 0")
    add("--workers", type=bounded(int, 0, 1024), default=os.cpu_count(),
        help="processes that read images for lightly")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="where to train")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="precision of the networks")
    # fmt: on
    # choose_device() asks for it; deterministic operations are slower.
    parser.set_defaults(deterministic=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if LIGHTLY_ERROR:
        raise UserError(f"lightly is missing ({LIGHTLY_ERROR})", "pip install lightly")
    device = choose_device(args)
    args.precision = choose_precision(args, device)

    name = f"{args.data_dir.resolve().name}_{args.minutes:g}_minutes"
    folder = RESULTS / name

    results = [run_pirl(args, folder, seed) for seed in range(args.seeds)]
    # The peers get the time that PIRL took, which is that of whole epochs.
    limits = [result.seconds for result in results]
    write_report(name, results, args)

    def run(variant, seed):
        result = run_peer(args, folder, device, variant, seed, limits[seed])
        results.append(result)
        write_report(name, results, args)
        return result

    for method, learning_rates in LEARNING_RATES.items():
        tried = []
        for zero_init in (True, False):
            for lr in learning_rates:
                tried.append(run(Variant(method, lr, zero_init), 0))
        best = best_on_seed_0(tried)
        for seed in range(1, args.seeds):
            run(best, seed)


class Variant(NamedTuple):
    """A method with its settings. lr: the peak of the learning rate."""

    method: str
    lr: float
    zero_init: bool


class Result(NamedTuple):
    """A finished run. softmax, knn: pairs (validation, test) of accuracies.

    Both are None if the run has diverged.
    """

    variant: Variant
    seed: int
    image_count: int
    seconds: float
    machine: str
    softmax: tuple | None
    knn: tuple | None


def best_on_seed_0(results):
    """The variant with the best validation accuracy of the softmax layer."""

    def validation_accuracy(result):
        return result.softmax[VALIDATION] if result.softmax else 0.0

    on_seed_0 = [result for result in results if result.seed == 0]
    return max(on_seed_0, key=validation_accuracy).variant


# ---- This project --------------------------------------------------------------------
def run_pirl(args, folder, seed):
    """Pretrain by this project, for as many whole epochs as fit into the minutes."""
    flags = [*common_flags(args), "--only-train", "True", "--knn-every", "0"]
    two_epochs = [*flags, "--seed", "0", "--epochs", "2"]
    measured = finished_run(folder, "two_epochs", PRETRAINING, two_epochs)
    # On a GPU, the first epoch of a process takes several times as long as the others.
    first, later = (epoch["seconds"] for epoch in measured["history"])
    epochs = 1 + math.floor((60 * args.minutes - first) / later)
    if epochs < 1:
        raise UserError(
            f"an epoch of PIRL takes longer than {args.minutes:g} minutes",
            "raise --minutes",
        )

    name = f"pirl_{seed}"
    flags += ["--seed", str(seed), "--epochs", str(epochs)]
    run = finished_run(folder, name, PRETRAINING, flags)
    labelled = fine_tuned(args, folder, name, name, seed)
    return Result(
        Variant("PIRL", run["settings"]["lr"], run["settings"]["zero_init"]),
        seed,
        epochs * run["images"],
        pretraining_seconds(run),
        run["machine"],
        labelled["softmax"],
        labelled["knn"],
    )


def common_flags(args):
    # fmt: off
    return [
        "--data-dir", str(args.data_dir), "--image-size", str(args.image_size),
        "--batch-size", str(BATCH_SIZE),
        "--device", args.device, "--precision", args.precision,
    ]
    # fmt: on


def fine_tuned(args, folder, name, trunk, seed):
    """The accuracies of a softmax layer and of kNN on the features of a trunk.

    trunk: a file, or a name in the weights folder.
    """
    flags = [*common_flags(args), "--lr", "0.1", "--seed", str(seed)]
    flags += ["--pirl-model-name", trunk]
    return finished_run(folder, f"from_{name}", FINE_TUNING, flags)["results"]


# ---- The methods of lightly ----------------------------------------------------------
class TwoViews(nn.Module):
    """A method that compares the projections of both views with one another."""

    def __init__(self, backbone, projection_head, criterion):
        super().__init__()
        self.backbone = backbone
        self.projection_head = projection_head
        self.criterion = criterion

    def forward(self, view):
        return self.projection_head(self.backbone(view))

    def loss(self, outputs):
        return self.criterion(outputs[0].float(), outputs[1].float())

    def before_step(self):
        pass


def make_simclr(backbone):
    return TwoViews(backbone, SimCLRProjectionHead(512, 512, 128), NTXentLoss())


def make_barlow_twins(backbone):
    hidden = (512, 2048, nn.BatchNorm1d(2048), nn.ReLU())
    projection_head = ProjectionHead([hidden, (2048, 2048, None, None)])
    return TwoViews(backbone, projection_head, BarlowTwinsLoss())


class BYOL(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

        # Running averages of the weights; they get no gradients.
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        self.backbone_momentum.requires_grad_(False)
        self.projection_head_momentum.requires_grad_(False)

    def forward(self, view):
        prediction = self.prediction_head(self.projection_head(self.backbone(view)))
        target = self.projection_head_momentum(self.backbone_momentum(view))
        return prediction, target

    def loss(self, outputs):
        (prediction_0, target_0), (prediction_1, target_1) = outputs
        loss_01 = self.criterion(prediction_0.float(), target_1.float())
        loss_10 = self.criterion(prediction_1.float(), target_0.float())
        return (loss_01 + loss_10) / 2

    def before_step(self):
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)


METHODS = {"SimCLR": make_simclr, "BYOL": BYOL, "Barlow Twins": make_barlow_twins}


def make_transform(size):
    """Two views of an image, normalised as PIRL's; the file of the trunk says so."""
    normalize = {"mean": PIXEL_MEAN, "std": PIXEL_STD}
    return SimCLRTransform(
        input_size=size, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize
    )


class Views:
    """A dataset of the two views of every unlabelled image."""

    def __init__(self, files, transform):
        self.files = files
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        with Image.open(self.files[number]) as image:
            return self.transform(image.convert("RGB"))


def run_peer(args, folder, device, variant, seed, limit):
    """Pretrain by a method of lightly, unless that is done, and measure its trunk.

    limit: in seconds.
    """
    blocks = "zero_init" if variant.zero_init else "plain"
    name = f"{variant.method.replace(' ', '_')}_{variant.lr}_{blocks}_{seed}"
    path = folder / "weights" / f"{name}.pth"
    settings = {**vars(args), "data_dir": str(args.data_dir), "limit": limit}
    if not path.exists():
        run = pretrain_peer(args, device, variant, seed, limit)
        atomic_save({**run, "settings": settings}, path)

    run = read_torch_file(path)
    own = run["settings"] | {"seeds": args.seeds, "device": args.device}
    if own != settings:
        raise UserError(
            f"{path} was made with other settings", f"remove {folder} to run all again"
        )
    labelled = {"softmax": None, "knn": None}
    if not run["diverged"]:
        labelled = fine_tuned(args, folder, name, str(path), seed)
    return Result(
        variant,
        seed,
        run["image_count"],
        run["seconds"],
        run["machine"],
        labelled["softmax"],
        labelled["knn"],
    )


def pretrain_peer(args, device, variant, seed, limit):
    """Train until `limit` seconds are over, or the loss is not finite.

    Returns the model's state with how it came about. The trunk has the batch-norm
    statistics of whole images, as PIRL's has.
    """
    torch.manual_seed(seed)
    trunk, _ = make_trunk("res18", zero_init=variant.zero_init)
    model = METHODS[variant.method](trunk)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model.parameters(), variant.lr, WEIGHT_DECAY)

    files = list_images(unlabelled_folder(args.data_dir))
    loader = DataLoader(
        Views(files, make_transform(args.image_size)),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    description = f"{variant.method}, lr {variant.lr}, seed {seed}"
    image_count = 0
    diverged = False
    start = time.perf_counter()
    with progress_bar(None, description, " images") as bar:
        for views in endless(loader):
            seconds = time.perf_counter() - start
            if seconds >= limit or diverged:
                break
            # Half a cosine over the time.
            cosine = math.cos(math.pi * seconds / limit)
            optimizer.param_groups[0]["lr"] = variant.lr * (1 + cosine) / 2

            model.before_step()
            outputs = []
            for view in views:
                view = view.to(
                    device, memory_format=torch.channels_last, non_blocking=True
                )
                with autocast(device, args.precision):
                    outputs.append(model(view))
            loss = model.loss(outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            image_count += BATCH_SIZE
            bar.update(BATCH_SIZE)
            if image_count % (10 * BATCH_SIZE) == 0:
                diverged = not loss.isfinite()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    seconds = time.perf_counter() - start

    state_dict = model.state_dict()
    floats = [value for value in state_dict.values() if value.is_floating_point()]
    diverged = not get_total_norm(floats).isfinite()
    if not diverged:
        # A random part of the images, which is enough for PIRL, too.
        order = torch.randperm(len(files)).tolist()
        chosen = [files[number] for number in order[:STATISTICS_IMAGES]]
        images, _ = load_images(chosen, args.image_size, device, "images")
        model.backbone = with_plain_bn_statistics(model.backbone, images, BATCH_SIZE)

    return {
        "state_dict": model.state_dict(),
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "image_count": image_count,
        "seconds": seconds,
        "diverged": bool(diverged),
        "machine": f"{describe_machine(device)}, lightly {lightly_version()}",
    }


def endless(loader):
    """The batches of epoch after epoch."""
    while True:
        yield from loader


def lightly_version():
    return importlib.metadata.version("lightly")


# ---- The report ----------------------------------------------------------------------
def write_report(name, results, args):
    """Write and print what has been measured so far: all may take a day."""
    text = report(name, results, args)
    table = RESULTS / f"{name}.md"
    with atomic_write(table, "w") as file:
        file.write(text)
    print(f"\n{text}\nwrote {table}", flush=True)


def report(name, results, args):
    """The text of results/<name>.md."""
    # fmt: off
    flags = [
        "--data-dir", str(args.data_dir), "--image-size", str(args.image_size),
        "--minutes", f"{args.minutes:g}", "--seeds", str(args.seeds),
        "--workers", str(args.workers), "--device", args.device,
        "--precision", args.precision,
    ]
    # fmt: on
    paragraphs = [
        f"# {name}: pretraining at equal time",
        "Of each method, the variant with the best validation accuracy of the softmax "
        "layer on seed 0. Accuracy on the test images, mean ± standard deviation over "
        "seeds:",
        summary_table(results),
        "All runs:",
        run_table(results),
        f"    {command_line('-m benchmarks.equal_time', flags)}",
        *sorted({result.machine for result in results}),
    ]
    return "\n\n".join(paragraphs) + "\n"


def summary_table(results):
    """A row per method: its best variant on seed 0, over all seeds."""
    rows = [["method", "kNN", "softmax layer", "seeds"]]
    for method in ("PIRL", *METHODS):
        own = [result for result in results if result.variant.method == method]
        if not own:
            continue  # its turn has not come
        best = best_on_seed_0(own)
        runs = [result for result in own if result.variant == best]
        knn = accuracy([run.knn for run in runs], TEST)
        softmax = accuracy([run.softmax for run in runs], TEST)
        rows.append([method, knn, softmax, str(len(runs))])
    return markdown_table(rows)


def accuracy(pairs, split):
    """The accuracies of some runs as the text of a table's cell."""
    if None in pairs:
        return "diverged"
    values = [pair[split] for pair in pairs]
    return "none" if None in values else spread(values, scale=100, unit=" %")


def run_table(results):
    """A row per run."""
    heading = ["method", "learning rate", "zero-initialised blocks", "seed", "images"]
    heading += ["minutes", "images/s", "kNN, test"]
    heading += ["softmax layer, validation", "softmax layer, test"]
    rows = [heading]
    for result in results:
        rows.append(
            [
                result.variant.method,
                f"{result.variant.lr:g}",
                "yes" if result.variant.zero_init else "no",
                str(result.seed),
                str(result.image_count),
                f"{result.seconds / 60:.1f}",
                f"{result.image_count / result.seconds:.0f}",
                accuracy([result.knn], TEST),
                accuracy([result.softmax], VALIDATION),
                accuracy([result.softmax], TEST),
            ]
        )
    return markdown_table(rows)


if __name__ == "__main__":
    run_script(main)
