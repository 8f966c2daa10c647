"""This project beside SimCLR, BYOL and Barlow Twins of lightly, at equal time.

All pretrain a ResNet-18 on the same images for as many minutes of this machine. Then
train_stl_after_ssl.py trains the same softmax layer on the features of each trunk, and
classifies by their nearest neighbours.

python -m benchmarks.equal_time --data-dir photos_10000 --image-size 64 --minutes 12

On seed 0, each method of lightly is tried with three learning rates, with and without
residual blocks that start as the identity. The variant whose softmax layer has the best
validation accuracy then runs with the other seeds. Writes results/<folder>.md; the
runs' files are under results/<folder>/, and what is finished there is not run again.
"""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.compare import TEST, VALIDATION, markdown_table, spread
from benchmarks.results import (
    FINE_TUNING,
    PRETRAINING,
    RESULTS,
    command_line,
    finished_run,
    pretraining_seconds,
)
from checkpoints import atomic_write, read_torch_file
from models import make_trunk
from progress import progress_bar
from run_helpers import (
    Parser,
    UserError,
    autocast,
    bounded,
    choose_device,
    choose_precision,
    describe_machine,
    file_path,
    make_optimizer,
    run_script,
)

try:
    from lightly.data import LightlyDataset
    from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import (
        BarlowTwinsProjectionHead,
        BYOLPredictionHead,
        BYOLProjectionHead,
        SimCLRProjectionHead,
    )
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, SimCLRTransform
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    HAS_LIGHTLY = True
except ImportError:
    HAS_LIGHTLY = False

LEARNING_RATES = (0.02, 0.06, 0.2)  # 0.06 is that of lightly's examples
BATCH_SIZE = 128
# As in lightly's benchmark of these methods on small images.
WEIGHT_DECAY = 5e-4
WARM_UP = 0.05  # of the time, with a learning rate that rises from 0


def parse_args(argv=None):
    parser = Parser("This project beside three methods of lightly, at equal time.")
    # fmt: off
    add = parser.add_argument
    add("--data-dir", type=file_path, default=Path("stl10_data"),
        help="the folder with the images")
    add("--minutes", type=bounded(float, 0.01), default=12.0,
        help="of every pretraining")
    add("--image-size", type=bounded(int, 36, 224), default=96)
    add("--seeds", type=bounded(int, 1), default=2, help="how many seeds, from 0")
    add("--workers", type=bounded(int, 0, 1024), default=2,
        help="the processes that read images for lightly")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    # fmt: on
    args = parser.parse_args(argv)
    args.deterministic = False
    return args


def main(argv=None):
    args = parse_args(argv)
    if not HAS_LIGHTLY:
        raise UserError("lightly is not installed", "pip install lightly")
    device = choose_device(args)
    args.precision = choose_precision(args, device)

    name = f"{args.data_dir.resolve().name}_{args.minutes:g}_minutes"
    folder = RESULTS / name

    results = [run_pirl(args, folder, seed) for seed in range(args.seeds)]
    for method in METHODS:
        tried = []
        for lr in LEARNING_RATES:
            for zero_init in (True, False):
                variant = Variant(method, lr, zero_init)
                tried.append(run_peer(args, folder, device, variant, seed=0))
        best = max(tried, key=lambda result: result.softmax[VALIDATION])
        results += tried
        for seed in range(1, args.seeds):
            results.append(run_peer(args, folder, device, best.variant, seed))

    text = report(name, results, describe_machine(device), args)
    table = RESULTS / f"{name}.md"
    with atomic_write(table, "w") as file:
        file.write(text)
    print(f"\n{text}\nwrote {table}")


class Variant(NamedTuple):
    """What is trained. lr: None of PIRL, which has its own."""

    method: str
    lr: float | None
    zero_init: bool


class Result(NamedTuple):
    """A finished run. softmax, neighbours: pairs (validation, test) of accuracies."""

    variant: Variant
    seed: int
    image_count: int
    seconds: float
    softmax: tuple
    neighbours: tuple


# ---- This project --------------------------------------------------------------------
def run_pirl(args, folder, seed):
    """Pretrain by this project, for as many epochs as fit into the minutes."""
    flags = [*common_flags(args), "--only-train", "True", "--knn-every", "0"]

    # How long an epoch takes, warm-up of the first steps included.
    measured = finished_run(
        folder, "one_epoch", PRETRAINING, [*flags, "--seed", "0", "--epochs", "1"]
    )
    epochs = max(1, round(60 * args.minutes / pretraining_seconds(measured)))

    flags += ["--seed", str(seed), "--epochs", str(epochs)]
    run = finished_run(folder, f"pirl_{seed}", PRETRAINING, flags)
    labelled = fine_tuned(args, folder, f"pirl_{seed}", f"pirl_{seed}", seed)
    return Result(
        Variant("PIRL", None, True),
        seed,
        epochs * run["images"],
        pretraining_seconds(run),
        labelled["softmax"],
        labelled["neighbours"],
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


# ---- The methods of lightly, as in its examples --------------------------------------
class SimCLR(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss()

    def forward(self, views):
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(z0, z1)

    def before_step(self, progress):
        pass

    @staticmethod
    def transform(size):
        return SimCLRTransform(input_size=size, gaussian_blur=0.0)


class BarlowTwins(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BarlowTwinsProjectionHead(512, 2048, 2048)
        self.criterion = BarlowTwinsLoss()

    def forward(self, views):
        z0, z1 = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(z0, z1)

    def before_step(self, progress):
        pass

    @staticmethod
    def transform(size):
        return BYOL.transform(size)


class BYOL(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

        # Running averages, which no gradient changes.
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        self.backbone_momentum.requires_grad_(False)
        self.projection_head_momentum.requires_grad_(False)

    def forward(self, views):
        predictions = []
        targets = []
        for view in views:
            z = self.projection_head(self.backbone(view))
            predictions.append(self.prediction_head(z))
            with torch.no_grad():
                y = self.backbone_momentum(view)
                targets.append(self.projection_head_momentum(y))
        one_way = self.criterion(predictions[0], targets[1])
        the_other = self.criterion(predictions[1], targets[0])
        return (one_way + the_other) / 2

    def before_step(self, progress):
        # The momentum rises from 0.996 to 1.
        m = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2
        update_momentum(self.backbone, self.backbone_momentum, m)
        update_momentum(self.projection_head, self.projection_head_momentum, m)

    @staticmethod
    def transform(size):
        return BYOLTransform(
            BYOLView1Transform(input_size=size, gaussian_blur=0.0),
            BYOLView2Transform(input_size=size, gaussian_blur=0.0),
        )


METHODS = {"SimCLR": SimCLR, "BYOL": BYOL, "Barlow Twins": BarlowTwins}


def run_peer(args, folder, device, variant, seed):
    """Pretrain by a method of lightly for the minutes. What is there already counts."""
    blocks = "zero_init" if variant.zero_init else "plain"
    name = f"{variant.method.replace(' ', '_')}_{variant.lr}_{blocks}_{seed}"
    path = folder / "weights" / f"{name}.pth"
    if not path.exists():
        run = pretrain_peer(args, device, variant, seed)
        with atomic_write(path) as file:
            torch.save(run, file)

    run = read_torch_file(path)
    image_count = run["image_count"]
    if run["diverged"]:
        nothing = (0.0, None)
        return Result(variant, seed, image_count, run["seconds"], nothing, nothing)
    labelled = fine_tuned(args, folder, name, str(path), seed)
    return Result(
        variant,
        seed,
        image_count,
        run["seconds"],
        labelled["softmax"],
        labelled["neighbours"],
    )


def pretrain_peer(args, device, variant, seed):
    """Train until the time is over.

    Returns the model's state, how many images it has seen, in how many seconds, and
    whether the loss was not finite, which ends the training.
    """
    torch.manual_seed(seed)
    trunk, _ = make_trunk("res18", zero_init=variant.zero_init)
    model = METHODS[variant.method](trunk).to(device)
    optimizer = make_optimizer(model.parameters(), variant.lr, WEIGHT_DECAY)

    folder = args.data_dir / "unlabelled"
    transform = METHODS[variant.method].transform(args.image_size)
    loader = DataLoader(
        LightlyDataset(str(folder), transform=transform),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )

    limit = 60 * args.minutes
    description = f"{variant.method}, lr {variant.lr}, seed {seed}"
    image_count = 0
    diverged = False
    start = time.perf_counter()
    with progress_bar(None, description, " images") as bar:
        for views in endless(loader):
            seconds = time.perf_counter() - start
            if seconds >= limit or diverged:
                break
            views = [view.to(device, non_blocking=True) for view in views]
            optimizer.param_groups[0]["lr"] = learning_rate(variant.lr, seconds / limit)
            model.before_step(seconds / limit)
            with autocast(device, args.precision):
                loss = model(views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            image_count += BATCH_SIZE
            diverged = not math.isfinite(loss.item())
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update(BATCH_SIZE)

    return {
        "state_dict": model.state_dict(),
        "image_count": image_count,
        "seconds": time.perf_counter() - start,
        "diverged": diverged,
    }


def endless(loader):
    """The views of batch after batch, epoch after epoch."""
    while True:
        for views, _, _ in loader:
            yield views


def learning_rate(peak, progress):
    """A linear rise, then a cosine to 0.

    progress: the part of the time that is over, 0 … 1.
    """
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    return peak * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


# ---- The report ----------------------------------------------------------------------
def report(name, results, machine, args):
    """The text of results/<name>.md."""
    command = command_line(
        "-m benchmarks.equal_time",
        [*common_flags(args), "--minutes", f"{args.minutes:g}"],
    )
    paragraphs = [
        f"# {name}: pretraining at equal time",
        "The best variant of each method by validation accuracy of the softmax layer; "
        "accuracy on the test images, mean ± standard deviation over seeds:",
        summary_table(results),
        "All runs:",
        run_table(results),
        f"    {command}",
        machine,
    ]
    return "\n\n".join(paragraphs) + "\n"


def summary_table(results):
    """A row for each method: the variant that was run with most seeds, or is best."""
    rows = [["method", "kNN", "softmax layer", "seeds"]]
    for method in ("PIRL", *METHODS):
        own = [result for result in results if result.variant.method == method]
        first = [result for result in own if result.seed == 0]
        best = max(first, key=lambda result: result.softmax[VALIDATION])
        seeds = [result for result in own if result.variant == best.variant]
        rows.append(
            [
                method,
                accuracy([result.neighbours for result in seeds]),
                accuracy([result.softmax for result in seeds]),
                str(len(seeds)),
            ]
        )
    return markdown_table(rows)


def accuracy(pairs):
    values = [pair[TEST] for pair in pairs]
    return "none" if None in values else spread(values, scale=100, unit=" %")


def run_table(results):
    rows = [
        [
            "method",
            "learning rate",
            "blocks start as the identity",
            "seed",
            "images",
            "minutes",
            "images/s",
            "kNN, test",
            "softmax layer, validation",
            "softmax layer, test",
        ]
    ]
    for result in results:
        variant = result.variant
        rows.append(
            [
                variant.method,
                "its own" if variant.lr is None else f"{variant.lr:g}",
                "yes" if variant.zero_init else "no",
                str(result.seed),
                str(result.image_count),
                f"{result.seconds / 60:.1f}",
                f"{result.image_count / result.seconds:.0f}",
                accuracy([result.neighbours]),
                spread([result.softmax[VALIDATION]], scale=100, unit=" %"),
                accuracy([result.softmax]),
            ]
        )
    return markdown_table(rows)


if __name__ == "__main__":
    run_script(main)
