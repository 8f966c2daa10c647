"""The share of a training step that several ranks spend in collectives.

torchrun --standalone --nproc-per-node 2 -m benchmarks.collectives [--batch-size 128] [--device cpu]
"""

import statistics
import time
from collections import defaultdict

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

import pirl_stl_train_test as pirl
from benchmarks import throughput
from run_helpers import Parser, choose_device, join_ranks, number, rank, run_script, world_size


def parse_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model-type", choices=["res18", "res34", "res50"], default="res18", help="the trunk")
    add("--batch-size", type=number(int, 1, throughput.IMAGES), default=128, help="images per step, of all ranks")
    add("--image-size", type=number(int, 36, 96), default=96, help="pixels")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="as in training")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="as in training")
    add("--steps", type=number(int, 1), default=8, help="that are measured, after two that are not")
    parser.set_defaults(compile=False, deterministic=False)
    return parser.parse_args()


def main():
    args = parse_args()
    device = choose_device(args)
    join_ranks(device)
    run = throughput.make_run(args, device)
    step = throughput.training_step(run)
    for _ in range(2):
        step()
    distributed.barrier()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    started = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(args.steps):
            step()
        throughput.finish(device)
        seconds = time.perf_counter() - started
    spans = defaultdict(list)
    for event in profiler.events():
        if event.name.startswith(("gloo:", "nccl:")):
            shapes = "x".join(map(str, event.input_shapes[0])) if event.input_shapes else ""
            spans[f"{event.name} {shapes}".strip()].append((event.time_range.start, event.time_range.end))
    print(
        f"{args.model_type}, batch {args.batch_size} over {world_size()} ranks, {args.image_size} px, {device.type}, "
        f"{run.precision}, {torch.get_num_threads()} threads per rank, {args.steps} steps of "
        f"{seconds / args.steps:.3f} s with the profiler on; rank {rank()}\n\n"
        "collective | calls per step | share of the time\n--- | --- | ---"
    )
    for name, times in sorted(spans.items()):
        print(f"{name} | {len(times) / args.steps:g} | {covered(times) / seconds:.2%}")
    everything = [span for times in spans.values() for span in times]
    print(f"any of them | {len(everything) / args.steps:g} | {covered(everything) / seconds:.2%}")
    vectors = exchange_time(run, args)
    share = vectors / (seconds / args.steps)
    print(f"\nthe exchange of the batch's vectors, by itself: {1e3 * vectors:.2f} ms, {share:.2%} of a step")
    distributed.destroy_process_group()


def exchange_time(run, args):
    """Seconds that the bank's new vectors take from rank to rank, the median of many times."""
    times = []
    share = torch.randn(args.batch_size // world_size(), pirl.VECTOR_SIZE, device=run.device)
    for _ in range(50):
        distributed.barrier()
        started = time.perf_counter()
        pirl.gathered(share, rank() * len(share), args.batch_size)
        throughput.finish(run.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def covered(spans):
    """Seconds in which at least one of the spans, in microseconds, was under way."""
    total, end = 0.0, 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


if __name__ == "__main__":
    run_script(main)
