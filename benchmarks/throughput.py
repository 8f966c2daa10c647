"""Images per second of the bare network, the training step and a usual pipeline.

    python -m benchmarks.throughput     # and any flags of pirl_stl_train_test.py

The bare network is torchvision's ResNet with the heads: forward, backward and
optimiser, on fixed random inputs of the step's shapes. The training step is this
project's. The conventional pipeline makes the same two views of each image with
torchvision's transforms in DataLoader workers and feeds that network; loss and memory
bank are the project's. Rounds of the three take turns.
"""

import itertools
import os
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import augmentations
import jigsaw
import losses
import pirl_stl_train_test
from benchmarks.compare import markdown_table
from models import SmallMapConv2d
from runtime.arguments import bool_flag, bounded
from runtime.devices import autocast, choose_device, describe_machine
from runtime.randomness import make_generator
from runtime.script import run_script

IMAGES = 8192
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv=None):
    parser = pirl_stl_train_test.make_parser()
    parser.description = "A training step beside the bare network."
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--rounds", type=bounded(int, 1), default=5, help="rounds of each of the three"
    )
    group.add_argument(
        "--steps",
        type=bounded(int, 1),
        help="steps that count in a round; defaults to 6, on a GPU to 48",
    )
    group.add_argument(
        "--conventional",
        **bool_flag(True),
        help="whether to measure the conventional pipeline too",
    )
    args = parser.parse_args(argv)
    if args.conventional and args.pretext != "jigsaw":
        parser.error("of other tasks than jigsaw, use --conventional False")
    return args


def main(argv=None):
    args = parse_args(argv)
    result = measure(args)

    print(
        f"{args.model_type}, batch {args.batch_size}, {args.image_size} px, "
        f"{args.precision}, compile {args.compile}"
    )
    print(describe_machine(choose_device(args)))
    rows = [["what", "images/s", "lowest … highest", "time, bare network = 1"]]
    for name, speeds in result["speeds"].items():
        extremes = f"{min(speeds):.1f} … {max(speeds):.1f}"
        time_ratio = f"{result['ratios'][name]:.3f}"
        rows.append([name, f"{median(speeds):.1f}", extremes, time_ratio])
    print(f"\n{markdown_table(rows)}")


# ---- Measuring -----------------------------------------------------------------------
def measure(args):
    """Speeds of the contestants, and what the training step asks of the device.

    Returns a dict: "speeds" {contestant: images per second in each round}, "ratios"
    {contestant: time, the bare network's being 1}, and of the training step "memory",
    its peak in GiB (0 on a CPU), "rate" in TFLOP/s, and "share", that rate as a
    fraction of what a matrix product reaches in the same precision.
    """
    # What was measured before counts against torch's limit of compilations.
    torch.compiler.reset()
    trainer = make_trainer(args, IMAGES)
    plain = make_trainer(args, IMAGES)  # the network of the other two contestants
    plain.images = trainer.images  # not twice in memory
    for module in plain.model.modules():
        if isinstance(module, SmallMapConv2d):
            module.__class__ = nn.Conv2d  # torchvision's own

    batch_size = args.batch_size
    flops_per_image = count_flops(trainer, batch_size + 1) / (batch_size + 1)

    steps = args.steps
    if steps is None:
        steps = 48 if trainer.device.type == "cuda" else 6
    contestants = {
        "bare network": lambda: bare_network(plain),
        "training step": lambda: training_step(trainer, batch_size),
    }
    if args.conventional:
        # Batches come from the workers in waves: only whole waves are timed.
        workers = os.cpu_count()
        steps += -steps % workers
        contestants["conventional pipeline"] = lambda: conventional(
            plain, workers, steps
        )

    # In turns, so that a change of the machine's own speed meets all of them.
    speeds = {name: [] for name in contestants}
    peaks = {}
    for _ in range(args.rounds):
        for name, make_step in contestants.items():
            seconds, peaks[name] = timed(make_step(), steps)
            speeds[name].append(steps * batch_size / seconds)

    rate = flops_per_image * median(speeds["training step"])
    return {
        "speeds": speeds,
        "ratios": {name: time_ratio(speeds, name) for name in contestants},
        "memory": peaks["training step"],
        "rate": rate / 1e12,
        "share": rate / product_rate(trainer.device, DTYPES[args.precision]),
    }


def make_trainer(args, count):
    """The training script's own trainer, on random images."""
    device = choose_device(args)
    pirl_stl_train_test.resolve_defaults(args, device)
    args.lr = 0.01  # noise cannot be learnt; this does not diverge on it either
    shape = (count, 3, args.image_size, args.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    return pirl_stl_train_test.PretrainingTrainer(args, device, images, count)


def count_flops(trainer, batch_size):
    """Floating point operations of a training step of another size than --batch-size.

    The counter sees nothing of compiled code, and only the usual size is compiled.
    """
    with FlopCounterMode(display=False) as counter:
        step = training_step(trainer, batch_size)
        step()
    return counter.get_total_flops()


def timed(step, count):
    """Time `count` calls, after one that does not count: it may compile or tune itself.

    Returns (seconds, the GPU's peak memory in them in GiB, 0 without a GPU).
    """
    step()
    synchronize()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()

    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 2**30


def synchronize():
    """Wait for the GPU, if there is one: its calls return before the work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def time_ratio(speeds, name):
    """A contestant's time, the bare network's in the same round being 1; the median."""
    pairs = zip(speeds["bare network"], speeds[name], strict=True)
    return median(bare / own for bare, own in pairs)


def product_rate(device, dtype):
    """FLOP/s of a large matrix product: the yardstick, what the device can reach.

    In float32 it uses TF32 on GPUs that have it, as the convolutions do by default.
    """
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 256
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)

    before = torch.get_float32_matmul_precision()
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    products = 20
    seconds, _ = timed(lambda: a @ b, products)
    torch.set_float32_matmul_precision(before)
    return products * 2 * side**3 / seconds


# ---- The contestants: each makes a function that does one step -----------------------
def training_step(trainer, batch_size):
    """The very method that the training loop calls, on another batch each time."""
    count = len(trainer.images)
    whole_batches = count // batch_size * batch_size
    order = torch.randperm(count)[:whole_batches]
    if trainer.device.type == "cuda":
        order = order.pin_memory()  # as in training: the copy is not waited for
    batches = itertools.cycle(order.split(batch_size))
    uniforms = trainer.epoch_uniforms(1)
    return lambda: trainer.train_step(next(batches), uniforms, epoch=1, step=0)


def bare_network(trainer):
    """Forward, backward and optimiser on inputs that stay the same."""
    index = torch.arange(trainer.args.batch_size)
    batch = trainer.load_batch(index, trainer.epoch_uniforms(1), epoch=1, step=0)
    views = trainer.make_views(batch.images, batch.uniforms)
    # Of the views, only the shapes matter.
    view, pretext_inputs = [torch.randn_like(view) for view in views]

    def step():
        image_embeddings, patch_embeddings = forward(trainer, view, pretext_inputs)
        loss = image_embeddings.square().mean() + patch_embeddings.square().mean()
        backward(trainer, loss)

    return step


def forward(trainer, view, patches):
    """f(φ(I)) and g(φ(I_t)), each float32 [B, 128]."""
    trainer.model.train()
    view = view.contiguous(memory_format=torch.channels_last)
    patches = patches.contiguous(memory_format=torch.channels_last)
    with autocast(trainer.device, trainer.args.precision):
        image_embeddings, patch_embeddings = trainer.model(view, patches)
    return image_embeddings.float(), patch_embeddings.float()


def backward(trainer, loss):
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


class PerImageViews:
    """(index, image view, nine patches) of an image, by torchvision's transforms."""

    def __init__(self, images):
        """images: uint8 [N, 3, S, S] on the host."""
        self.images = images
        side = images.shape[-1]
        self.cell, patch = jigsaw.patch_sizes(side)

        strength = augmentations.COLOUR_STRENGTH
        jitter = transforms.ColorJitter(
            brightness=strength * augmentations.COLOUR_RANGE,
            contrast=strength * augmentations.COLOUR_RANGE,
            saturation=strength * augmentations.COLOUR_RANGE,
            hue=strength * augmentations.HUE_RANGE,
        )
        colour = [
            transforms.RandomApply([jitter], augmentations.JITTER_PROBABILITY),
            transforms.RandomGrayscale(augmentations.GRAY_PROBABILITY),
            transforms.ToTensor(),
            transforms.Normalize(augmentations.PIXEL_MEAN, augmentations.PIXEL_STD),
        ]

        aspect = augmentations.CROP_ASPECT
        crop = transforms.RandomResizedCrop(side, augmentations.CROP_AREA, aspect)
        flip = transforms.RandomHorizontalFlip()
        self.image_view = transforms.Compose([crop, flip, *colour])
        self.pretext_crop = transforms.RandomResizedCrop(
            side, jigsaw.PRETEXT_CROP_AREA, aspect
        )
        self.patch_view = transforms.Compose([transforms.RandomCrop(patch), *colour])

    def __getitem__(self, index):
        image = to_pil_image(self.images[index])
        crop = self.pretext_crop(image)
        patches = []
        for cell in torch.randperm(jigsaw.CELLS).tolist():
            top = cell // jigsaw.GRID * self.cell
            left = cell % jigsaw.GRID * self.cell
            box = (left, top, left + self.cell, top + self.cell)
            patches.append(self.patch_view(crop.crop(box)))
        return index, self.image_view(image), torch.stack(patches)


def conventional(trainer, workers, steps):
    """PerImageViews from DataLoader workers, then a step with the project's loss.

    The workers live for a round: they neither disturb the other contestants nor work
    ahead while those are measured.
    """
    batch_size = trainer.args.batch_size
    # The loader never runs dry, or its workers would idle in the last steps.
    batches = 3 * workers + steps + 1
    order = torch.randint(len(trainer.images), (batches * batch_size,)).tolist()
    loader = DataLoader(
        PerImageViews(trainer.images.cpu()),
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        prefetch_factor=1,
        pin_memory=trainer.device.type == "cuda",
    )
    loaded = iter(loader)
    generator = make_generator(trainer.device, 0)

    def step():
        index, view, patches = [
            part.to(trainer.device, non_blocking=True) for part in next(loaded)
        ]
        image_embeddings, patch_embeddings = forward(
            trainer, view, patches.flatten(0, 1)
        )

        bank = trainer.bank
        drawn = bank.draw(trainer.negative_count, generator)
        negatives, mask = bank.negatives(drawn, index)
        f = F.normalize(image_embeddings, dim=1)
        is_own = index[:, None] == index
        loss = losses.pirl_loss(
            image_embeddings,
            patch_embeddings,
            bank.vectors[index],
            torch.cat([negatives, f]),
            torch.cat([mask, is_own], 1),
            trainer.args,
        )
        backward(trainer, loss.mean())
        bank.update(index, image_embeddings.detach())

    # The batches that all workers begin with come at once, and do not count.
    for _ in range(workers):
        step()
    return step


if __name__ == "__main__":
    run_script(main)
