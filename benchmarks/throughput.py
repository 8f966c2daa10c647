"""Images per second of the bare network, of this project's training step, and of the conventional pipeline.

    python -m benchmarks.throughput [--device cuda] [--precision bf16] [--compile True] [--batch-size 512]

The bare network is trunk and heads, forward, backward and optimiser, on fixed random inputs of the step's shapes. The
conventional pipeline makes the same augmentations of each image with torchvision's transforms in DataLoader workers
and feeds the same network. Rounds of all three are interleaved; the table has their medians.
"""

import os
import statistics
import time
from pathlib import Path

import torch
from run_helpers import NEGATIVES, Parser, autocast, choose_device, generator, number, run_script
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import dataset_helpers as dh
import jigsaw
import pirl_stl_train_test as pirl

IMAGES = 8192
POOL = 70_000  # rows of the memory bank, as in a run on STL-10
VECTORS = pirl.VECTOR_SIZE


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model-type", choices=["res18", "res34", "res50"], default="res18", help="the trunk")
    add("--batch-size", type=number(int, 1, IMAGES), default=128, help="images per step")
    add("--image-size", type=number(int, 36, 96), default=96, help="pixels")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as in training")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="as in training")
    parser.add_switch("--compile", False, "as in training")
    add("--rounds", type=number(int, 1), default=5, help="of each of the three")
    add("--steps", type=number(int, 1), help="per round, after one that does not count (default: 6, or 48 on cuda)")
    add("--workers", type=number(int, 0), default=len(os.sched_getaffinity(0)), help="of the conventional pipeline")
    parser.add_switch("--conventional", True, "measure the conventional pipeline too")
    parser.add_switch("--deterministic-too", False, "measure the step under --deterministic True as well")
    parser.set_defaults(deterministic=False)
    add("--trace", type=Path, help="write a torch.profiler trace of two steps here")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    device = choose_device(args)
    args.steps = args.steps or (6 if device.type == "cpu" else 48)
    args.steps += -args.steps % max(1, args.workers)  # workers' batches come in waves: whole ones are timed
    run = make_run(args, device)
    contestants = {"bare network": bare_network, "training step": training_step}
    if args.conventional:
        contestants["conventional pipeline"] = conventional_pipeline
    if args.deterministic_too:
        contestants["training step, deterministic"] = deterministic_step
    speeds = measure(contestants, run, args)
    print_table(args, run, speeds)
    print_stages(run, device)
    if device.type == "cuda":
        print_device_share(run, speeds["training step"])
    if args.trace:
        write_trace(run, args.trace)


def make_run(args, device):
    """A training run as the script sets it up, on random images."""
    settings = pirl.parse_args(
        [
            *("--model-type", args.model_type, "--batch-size", str(args.batch_size), "--device", args.device),
            *("--precision", args.precision, "--compile", str(args.compile), "--lr", "0.01"),
        ]
    )
    draw = generator("cpu", 0)
    images = torch.randint(0, 256, (IMAGES, 3, args.image_size, args.image_size), dtype=torch.uint8, generator=draw)
    run = pirl.make_run(settings, device, images.to(device), IMAGES, checksum=0)
    run.bank = pirl.MemoryBank(torch.randn(POOL, VECTORS, generator=draw).to(device), POOL, settings.beta)
    run.negatives = min(pirl.DEFAULT_NEGATIVES, POOL - 1)
    run.model.train()
    return run


def training_step(run, args=None):
    """The very function that the training loop calls, on another batch each time."""
    draws = pirl.view_draws(run, 1)
    batches = torch.randperm(IMAGES, generator=generator("cpu", 1)).to(run.device).split(run.args.batch_size)

    def step():
        index = batches[run.step % (IMAGES // run.args.batch_size)]
        pirl.training_step(run, index, draws)
        run.step = (run.step + 1) % run.steps

    return step


def deterministic_step(run, args):
    step = training_step(run)

    def exact():
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        step()
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True

    return exact


def optimise(run, loss, clip):
    run.optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(run.model.parameters(), pirl.GRADIENT_NORM)
    run.optimizer.step()


def bare_network(run, args=None):
    batch, side = run.args.batch_size, run.images.shape[-1]
    patch = jigsaw.patch_sizes(side)[1]
    images = torch.randn(batch, 3, side, side, device=run.device).to(memory_format=torch.channels_last)
    patches = torch.randn(batch * 9, 3, patch, patch, device=run.device).to(memory_format=torch.channels_last)

    def step():
        with autocast(run.device, run.precision):
            outputs = run.model(images, patches)
        optimise(run, sum(vectors.float().square().mean() for vectors in outputs), clip=False)  # it costs nothing

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The conventional pipeline
# ---------------------------------------------------------------------------------------------------------------------


class PerImageViews(Dataset):
    """The same two views, made image by image by torchvision's transforms."""

    def __init__(self, images):
        self.images, side = images, images.shape[-1]
        self.cell, self.patch = jigsaw.patch_sizes(side)
        factors = (dh.COLOUR_STRENGTH * factor for factor in (dh.BRIGHTNESS, dh.CONTRAST, dh.SATURATION))
        jitter = transforms.ColorJitter(*factors, dh.HUE)
        colour = [transforms.RandomApply([jitter], dh.JITTER_SHARE), transforms.RandomGrayscale(dh.GRAY_SHARE)]
        finish = [transforms.ToTensor(), transforms.Normalize(dh.MEAN, dh.STD)]
        crop = transforms.RandomResizedCrop(side, dh.CROP_AREA, dh.CROP_ASPECT)
        self.image_view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *colour, *finish])
        self.pretext_crop = transforms.RandomResizedCrop(side, jigsaw.PRETEXT_CROP_AREA, dh.CROP_ASPECT)
        self.patch_crop, self.patch_view = transforms.RandomCrop(self.patch), transforms.Compose([*colour, *finish])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = to_pil_image(self.images[i])
        whole = self.pretext_crop(image)
        cells = [
            whole.crop((x, y, x + self.cell, y + self.cell))
            for y in range(0, 3 * self.cell, self.cell)
            for x in range(0, 3 * self.cell, self.cell)
        ]
        patches = [self.patch_view(self.patch_crop(cells[c])) for c in torch.randperm(9)]
        return i, self.image_view(image), torch.stack(patches)


def conventional_pipeline(run, args):
    """Its workers live for a round: they neither disturb the others nor work ahead while those are measured."""
    images = PerImageViews(run.images.cpu())
    loader = DataLoader(
        images,
        args.batch_size,
        sampler=RandomSampler(images, True, (3 * args.workers + args.steps + 1) * args.batch_size),
        num_workers=args.workers,
        prefetch_factor=1 if args.workers else None,
        pin_memory=run.device.type == "cuda",
    )
    batches = iter(loader)

    def step():
        index, view, patches = (part.to(run.device, non_blocking=True) for part in next(batches))
        view = view.contiguous(memory_format=torch.channels_last)
        patches = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        with autocast(run.device, run.precision):
            image_vectors, patch_vectors = run.model(view, patches)
        negatives, hidden = run.bank.draw_negatives(index, run.negatives, generator(run.device, 0, NEGATIVES, run.step))
        fresh = image_vectors.float(), index[:, None] == index
        memory = run.bank.vectors[index]
        losses, _ = pirl.pirl_loss(image_vectors, patch_vectors, memory, negatives, hidden, run.args, fresh)
        optimise(run, losses.mean(), clip=True)
        run.bank.update(index, image_vectors.detach())

    for _ in range(args.workers):  # the batches that all workers begin with come at once, and do not count
        step()
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(contestants, run, args):
    """Images per second of each round of each contestant, in turn."""
    speeds = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, contestant in contestants.items():
            step = contestant(run, args)
            step()
            finish(run.device)
            started = time.perf_counter()
            for _ in range(args.steps):
                step()
            finish(run.device)
            speeds[name].append(args.steps * args.batch_size / (time.perf_counter() - started))
            del step  # ends the conventional pipeline's workers
    return speeds


def print_table(args, run, speeds):
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
    print(
        f"{args.model_type}, batch {args.batch_size}, {args.image_size} px, {name}{threads}, {run.precision}, "
        f"compile {args.compile}, torch {torch.__version__}, median of {args.rounds} rounds of {args.steps} steps\n"
    )
    print("what | images/s | lowest … highest | time, bare network = 1\n--- | --- | --- | ---")
    for what, values in speeds.items():
        median = statistics.median(values)
        ratio = statistics.median(b / v for b, v in zip(speeds["bare network"], values, strict=True))
        print(f"{what} | {median:.1f} | {min(values):.1f} … {max(values):.1f} | {ratio:.3f}")


def print_stages(run, device):
    """The time of each part of a step, run one after the other with the device waited for in between."""
    draws = pirl.view_draws(run, 1)
    index = torch.arange(run.args.batch_size, device=device)
    draw = generator(device, 0, NEGATIVES, 0)
    times = {}

    def timed(name, function, *arguments):
        finish(device)
        started = time.perf_counter()
        result = function(*arguments)
        finish(device)
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def network(view, patches):
        with autocast(device, run.precision):
            return run.model(view, patches)

    def loss(image_vectors, patch_vectors):
        negatives, hidden = run.bank.draw_negatives(index, run.negatives, draw)
        memory, fresh = run.bank.vectors[index], (image_vectors.float(), index[:, None] == index)
        return pirl.pirl_loss(image_vectors, patch_vectors, memory, negatives, hidden, run.args, fresh)[0].mean()

    def optimiser():
        nn.utils.clip_grad_norm_(run.model.parameters(), pirl.GRADIENT_NORM)
        run.optimizer.step()

    for _ in range(5):
        images = timed("batch selection", lambda: run.images.index_select(0, index).float())
        image_draws, jigsaw_draws = draws[index].split([dh.IMAGE_VIEW_DRAWS, jigsaw.JIGSAW_DRAWS], 1)
        view = timed("image view", dh.image_view, images, image_draws)
        patches = timed("jigsaw view", jigsaw.jigsaw_view, images, jigsaw_draws)
        image_vectors, patch_vectors = timed("forward", network, view, patches)
        value = timed("loss", loss, image_vectors, patch_vectors)
        run.optimizer.zero_grad()
        timed("backward", value.backward)
        timed("optimiser", optimiser)
        timed("bank", run.bank.update, index, image_vectors.detach())
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    total = sum(medians.values())
    print("\nstage | ms | share\n--- | --- | ---")
    for name, seconds in medians.items():
        print(f"{name} | {1e3 * seconds:.2f} | {seconds / total:.1%}")


def print_device_share(run, speeds):
    """The bf16 rate that the step reaches against what a large matrix product reaches on this card, and peak memory."""
    from torch.utils.flop_counter import FlopCounterMode

    step = bare_network(run)
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        step()
    step = training_step(run)
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    memory = torch.cuda.max_memory_allocated()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        rates.append(2 * 8192**3 / (time.perf_counter() - started))
    peak = statistics.median(rates)
    rate = counter.get_total_flops() * statistics.median(speeds) / run.args.batch_size
    print(
        f"\nthe step reaches {rate / 1e12:.0f} TFLOP/s, {rate / peak:.1%} of a bf16 matrix product's {peak / 1e12:.0f}"
        f"\npeak memory {memory / 2**30:.2f} GiB"
    )


def write_trace(run, path):
    """A torch.profiler trace of two steps, and the operators that take the most time."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    step = training_step(run)
    step()
    with profile(activities=activities) as profiler:
        step()
        step()
        finish(run.device)
    profiler.export_chrome_trace(str(path))
    key = "self_cpu_time_total" if run.device.type == "cpu" else "self_cuda_time_total"
    print("\n" + profiler.key_averages().table(sort_by=key, row_limit=25))


if __name__ == "__main__":
    run_script(main)
