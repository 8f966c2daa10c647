"""Images per second of the bare network, of this project's training step, and of the conventional pipeline.

The bare network is torchvision's ResNet with the heads, forward, backward and optimiser, on fixed random inputs of the
step's shapes. The conventional pipeline makes the same two views of each image with torchvision's transforms in
DataLoader workers and feeds that network; loss and memory bank are the project's. Rounds of the three take turns.
"""

import itertools
import os
import time
from operator import truediv
from statistics import median

import run_helpers as rh
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import dataset_helpers as dh
import jigsaw
import models
import pirl_stl_train_test as pirl

IMAGES = 8192


def parse_args(argv=None):
    parser = rh.Parser("Images per second. All flags of pirl_stl_train_test.py may be given besides.")
    add = parser.add_argument
    add("--rounds", type=rh.between(int, 1), default=5, help="rounds of each of the three")
    add("--steps", type=rh.between(int, 1), help="steps that count in a round; None is 6, on a GPU 48")
    add("--conventional", **rh.switch(True), help="whether to measure the conventional pipeline too")
    args, others = parser.parse_known_args(argv)
    args.training = pirl.parse_args(others)
    return args


def measure(args):
    """A dict: "speeds" {what: images per second of each round}, "ratios" {what: time, bare network = 1}, and of the
    training step "memory", its peak in GiB (0 on a CPU), "rate" in TFLOP/s, "share" of a bf16 matrix product's rate."""
    torch.compiler.reset()  # what was measured before counts against the limit of compilations
    run, plain, speeds, peaks = make_run(args.training), make_run(args.training), {}, {}
    plain.images, batch, cuda = run.images, args.training.batch_size, run.device.type == "cuda"
    for module in [each for each in plain.model.modules() if isinstance(each, models.SmallMapConv2d)]:
        module.__class__ = nn.Conv2d  # torchvision's own
    with FlopCounterMode(display=False) as counter:  # of another size, which is never compiled
        training_step(run, batch + 1)()
    contestants = {"bare network": lambda: bare_network(plain), "training step": lambda: training_step(run, batch)}
    steps, side = args.steps or (48 if cuda else 6), 8192 if cuda else 256
    if args.conventional:
        steps += -steps % os.cpu_count()  # workers' batches come in waves: whole ones are timed
        contestants["conventional pipeline"] = lambda: conventional(plain, os.cpu_count(), steps)
    for name in [*contestants] * args.rounds:
        seconds, peaks[name] = timed(contestants[name](), steps)
        speeds.setdefault(name, []).append(steps * batch / seconds)
    a, b = torch.randn(2, side, side, device=run.device, dtype=torch.bfloat16)
    product = 20 * 2 * side**3 / timed(lambda: a @ b, 20)[0]
    rate = counter.get_total_flops() / (batch + 1) * median(speeds["training step"])
    ratios = {name: median(map(truediv, speeds["bare network"], values)) for name, values in speeds.items()}
    result = {"speeds": speeds, "ratios": ratios, "memory": peaks["training step"]}
    return result | {"rate": rate / 1e12, "share": rate / product}


def timed(step, count):
    """(seconds of `count` calls, after one that does not count; the GPU's peak memory in them in GiB)."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    for calls in (1, count):
        wait()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(calls):
            step()
    wait()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30  # 0 without a GPU


def make_run(settings, count=IMAGES):
    """A training run as the script makes it, on random images."""
    device, side, settings.lr = rh.choose_device(settings), settings.image_size, 0.01
    pirl.settle(settings, device, None)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    return pirl.Pretraining(settings, device, images, count)


def training_step(run, batch):
    """The very method that the training loop calls, on another batch each time."""
    count, draws = len(run.images), run.view_draws(1)
    batches = itertools.cycle(torch.randperm(count, device=run.device)[: count // batch * batch].split(batch))
    return lambda: run.step(next(batches), draws, 1, 0)


def plain_step(run, inputs, loss):
    """Forward, backward and optimiser. loss: a function of f(φ(I)), which is returned, and g(φ(I_t))."""
    with rh.autocast(run.device, run.args.precision):
        vectors = run.model.train()(*(each.contiguous(memory_format=torch.channels_last) for each in inputs))
    loss(*(each.float() for each in vectors)).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return vectors[0]


def bare_network(run):
    batch, side = run.args.batch_size, run.args.image_size
    shapes = ((batch, side), (batch * jigsaw.CELLS, jigsaw.patch_sizes(side)[1]))
    inputs = [torch.randn(count, side, side, 3, device=run.device).permute(0, 3, 1, 2) for count, side in shapes]
    return lambda: plain_step(run, inputs, lambda f, g: f.square().mean() + g.square().mean())


class PerImageViews:
    """(index, image view, nine patches), made image by image with torchvision's transforms."""

    def __init__(self, images):
        self.images, side = images, images.shape[-1]
        self.cell, patch = jigsaw.patch_sizes(side)
        jitter = transforms.ColorJitter(*[dh.COLOUR_STRENGTH * x for x in (*[dh.COLOUR_RANGE] * 3, dh.HUE)])
        colour = [transforms.RandomApply([jitter], dh.JITTER_SHARE), transforms.RandomGrayscale(dh.GRAY_SHARE)]
        colour += [transforms.ToTensor(), transforms.Normalize(dh.MEAN, dh.STD)]
        crop = transforms.RandomResizedCrop(side, dh.CROP_AREA, dh.CROP_ASPECT)
        self.image_view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *colour])
        self.pretext_crop = transforms.RandomResizedCrop(side, jigsaw.PRETEXT_CROP_AREA, dh.CROP_ASPECT)
        self.patch_view = transforms.Compose([transforms.RandomCrop(patch), *colour])

    def __getitem__(self, i):
        image, c = to_pil_image(self.images[i]), self.cell
        whole = self.pretext_crop(image)
        cells = [whole.crop((x, y, x + c, y + c)) for y in range(0, 3 * c, c) for x in range(0, 3 * c, c)]
        return i, self.image_view(image), torch.stack([self.patch_view(cells[n]) for n in torch.randperm(9)])


def conventional(run, workers, steps):
    """Its workers live for a round: they neither disturb the others nor work ahead while those are measured."""
    data, batch, pin = PerImageViews(run.images.cpu()), run.args.batch_size, run.device.type == "cuda"
    order = torch.randint(IMAGES, ((3 * workers + steps + 1) * batch,)).tolist()
    loader = DataLoader(data, batch, None, order, num_workers=workers, prefetch_factor=1, pin_memory=pin)
    batches, draw = iter(loader), rh.generator(run.device, 0)

    def step():
        index, view, patches = (part.to(run.device, non_blocking=True) for part in next(batches))
        negatives, hidden = run.bank.draw_negatives(index, run.negatives, draw)
        bank, same = (run.bank.vectors[index], negatives, hidden, run.args), index[:, None] == index
        inputs = view, patches.flatten(0, 1)
        f = plain_step(run, inputs, lambda f, g: pirl.pirl_loss(f, g, *bank, (f, same))[0].mean())
        run.bank.update(index, f.detach())

    for _ in range(workers):  # the batches that all workers begin with come at once, and do not count
        step()
    return step


def main():
    args = parse_args()
    result, run = measure(args), args.training
    network = f"{run.model_type}, batch {run.batch_size}, {run.image_size} px, {run.precision}, compile {run.compile}"
    print(network, rh.machine(rh.choose_device(run)), sep="\n")
    print("\nwhat | images/s | lowest … highest | time, bare network = 1\n--- | --- | --- | ---")
    for what, values in result["speeds"].items():
        print(f"{what} | {median(values):.1f} | {min(values):.1f} … {max(values):.1f} | {result['ratios'][what]:.3f}")


if __name__ == "__main__":
    rh.run_script(main)
