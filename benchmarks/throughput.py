"""Images per second of the bare network, of this project's training step, and of the conventional pipeline.

    python -m benchmarks.throughput [--device cuda] [--precision bf16] [--compile True] [--batch-size 512]

The bare network is torchvision's ResNet with the heads, forward, backward and optimiser, on fixed random inputs of the
step's shapes. The conventional pipeline makes the same two views of each image with torchvision's transforms in
DataLoader workers and feeds that network; loss and memory bank are the project's. Rounds of the three take turns.
"""

import gc
import itertools
import os
import time
from statistics import median

import run_helpers as rh
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import dataset_helpers as dh
import jigsaw
import models
import pirl_stl_train_test as pirl

IMAGES = 8192
BANK = 70_000  # rows of the memory bank, as in a run on STL-10


def parse_args(argv=None):
    parser = rh.Parser(__doc__.split("\n")[0])
    add, between, switch = parser.add_argument, rh.between, rh.switch
    add("--model-type", choices=list(models.TRUNKS), default="res18", help="the trunk: ResNet-18, -34 or -50")
    add("--batch-size", type=between(int, 2, IMAGES), default=128, help="images per step")
    add("--image-size", type=between(int, 36, 224), default=96, help="side of the images in pixels")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as in training")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="as in training")
    add("--compile", **switch(False), help="whether to compile the network, as in training")
    add("--rounds", type=between(int, 1), default=5, help="rounds of each of the three")
    add("--steps", type=between(int, 1), help="steps in a round, after one that does not count; None is 6, on a GPU 48")
    add("--workers", type=between(int, 0), default=os.cpu_count(), help="processes of the conventional pipeline")
    add("--conventional", **switch(True), help="whether to measure the conventional pipeline too")
    return parser.parse_args(argv)


def measure(args):
    """A dict: "speeds" {what: images per second of each round}, "memory", the peak of training steps in bytes (0 on a
    CPU), "rate" of the training step and "matrix_rate" of a large bf16 matrix product, both in operations per second.
    """
    gc.collect()
    torch.compiler.reset()  # what was measured before counts against the limit of compilations
    run = make_run(args)
    speeds, half, cuda = {}, args.batch_size // 2, run.device.type == "cuda"
    with FlopCounterMode(display=False) as counter:  # of half a batch, which is never compiled
        training_step(run, half)()
    step = training_step(run, args.batch_size)
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
    memory = torch.cuda.max_memory_allocated() if cuda else 0
    steps = args.steps or (48 if cuda else 6)
    steps += -steps % max(1, args.workers * args.conventional)  # workers' batches come in waves: whole ones are timed
    plain = make_run(args)
    for module in plain.model.modules():
        if isinstance(module, models.SmallMapConv2d):
            module.__class__ = nn.Conv2d  # torchvision's own
    for _ in range(args.rounds):
        step = None  # ends the last round's workers
        for name in ["bare network", "training step"] + ["conventional pipeline"] * args.conventional:
            if name == "training step":
                step = training_step(run, args.batch_size)
            else:
                step = bare_network(plain) if name == "bare network" else conventional(plain, args.workers, steps)
            speeds.setdefault(name, []).append(steps * args.batch_size / timed(step, steps, cuda))
    side = 8192 if cuda else 256
    a, b = torch.randn(2, side, side, device=run.device, dtype=torch.bfloat16)
    matrix_rate = 20 * 2 * side**3 / timed(lambda: a @ b, 20, cuda)
    rate = counter.get_total_flops() / half * median(speeds["training step"])
    return {"speeds": speeds, "memory": memory, "rate": rate, "matrix_rate": matrix_rate}


def timed(step, count, cuda):
    """Seconds of `count` calls, after one that does not count."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    step()
    wait()
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - started


def make_run(args):
    """A training run as the script makes it, on random images, with a memory bank of STL-10's size."""
    names = ("model_type", "batch_size", "image_size", "device", "precision", "compile")
    flags = [flag for name in names for flag in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    settings = pirl.parse_args([*flags, "--lr", "0.01"])
    device, draw = rh.choose_device(settings), rh.generator("cpu", 0)
    pirl.settle(settings, device, None)
    images = torch.randint(0, 256, (IMAGES, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=draw)
    run = pirl.Pretraining(settings, device, images.to(device), IMAGES)
    run.bank = pirl.MemoryBank(torch.randn(BANK, 128, generator=draw).to(device), BANK, settings.beta)
    return run


def training_step(run, size):
    """The very method that the training loop calls, on another batch each time."""
    batches = itertools.cycle(torch.arange(IMAGES // size * size, device=run.device).split(size))
    draws = run.view_draws(1)
    return lambda: run.step(next(batches), draws, 1, 0)


def plain_step(run, inputs, loss):
    """Forward, backward and optimiser. loss: a function of f(φ(I)) and g(φ(I_t))."""
    inputs = [each.contiguous(memory_format=torch.channels_last) for each in inputs]
    with rh.autocast(run.device, run.args.precision):
        vectors = run.model.train()(*inputs)
    loss(*vectors).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def bare_network(run):
    batch, side = run.args.batch_size, run.args.image_size
    shapes = ((batch, side), (batch * models.PATCHES, jigsaw.patch_sizes(side)[1]))
    inputs = [torch.randn(count, 3, side, side, device=run.device) for count, side in shapes]
    inputs = [each.contiguous(memory_format=torch.channels_last) for each in inputs]
    return lambda: plain_step(run, inputs, lambda f, g: f.float().square().mean() + g.float().square().mean())


class PerImageViews:
    """(index, image view, nine patches), made image by image with torchvision's transforms."""

    def __init__(self, images):
        self.images, side = images, images.shape[-1]
        self.cell, patch = jigsaw.patch_sizes(side)
        factors = (dh.COLOUR_STRENGTH * factor for factor in (dh.BRIGHTNESS, dh.CONTRAST, dh.SATURATION, dh.HUE))
        jitter = transforms.RandomApply([transforms.ColorJitter(*factors)], dh.JITTER_SHARE)
        finish = [transforms.ToTensor(), transforms.Normalize(dh.MEAN, dh.STD)]
        colour = [jitter, transforms.RandomGrayscale(dh.GRAY_SHARE), *finish]
        crop = transforms.RandomResizedCrop(side, dh.CROP_AREA, dh.CROP_ASPECT)
        self.image_view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *colour])
        self.pretext_crop = transforms.RandomResizedCrop(side, jigsaw.PRETEXT_CROP_AREA, dh.CROP_ASPECT)
        self.patch_view = transforms.Compose([transforms.RandomCrop(patch), *colour])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, c = to_pil_image(self.images[i]), self.cell
        whole = self.pretext_crop(image)
        cells = [whole.crop((x, y, x + c, y + c)) for y in range(0, 3 * c, c) for x in range(0, 3 * c, c)]
        return i, self.image_view(image), torch.stack([self.patch_view(cells[n]) for n in torch.randperm(9)])


def conventional(run, workers, steps):
    """Its workers live for a round: they neither disturb the others nor work ahead while those are measured."""
    data, size, pin = PerImageViews(run.images.cpu()), run.args.batch_size, run.device.type == "cuda"
    order, ahead = RandomSampler(data, True, (3 * workers + steps + 1) * size), 1 if workers else None
    loader = DataLoader(data, size, None, order, num_workers=workers, prefetch_factor=ahead, pin_memory=pin)
    batches, draw = iter(loader), rh.generator(run.device, 0)

    def step():
        index, view, patches = (part.to(run.device, non_blocking=True) for part in next(batches))

        def loss(f, g):
            negatives, memory = run.bank.draw_negatives(index, run.negatives, draw), run.bank.vectors[index]
            run.bank.update(index, f.detach())
            return pirl.pirl_loss(f, g, memory, *negatives, run.args, (f.float(), index[:, None] == index))[0].mean()

        plain_step(run, (view, patches.flatten(0, 1)), loss)

    for _ in range(workers):  # the batches that all workers begin with come at once, and do not count
        step()
    return step


def main():
    args = parse_args()
    result = measure(args)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    precision = f"{args.precision} precision, compile {args.compile}, torch {torch.__version__}"
    print(f"{args.model_type}, batch {args.batch_size}, {args.image_size} px, {name}, {precision}; medians\n")
    print("what | images/s | lowest … highest | time, bare network = 1\n--- | --- | --- | ---")
    for what, values in result["speeds"].items():
        ratio = median(b / v for b, v in zip(result["speeds"]["bare network"], values, strict=True))
        print(f"{what} | {median(values):.1f} | {min(values):.1f} … {max(values):.1f} | {ratio:.3f}")
    if cuda:
        rate, most = result["rate"], result["matrix_rate"]
        print(f"\npeak memory of training steps {result['memory'] / 2**30:.2f} GiB")
        print(f"{rate / 1e12:.0f} TFLOP/s, {rate / most:.1%} of the {most / 1e12:.0f} of a bf16 matrix product")


if __name__ == "__main__":
    rh.run_script(main)
