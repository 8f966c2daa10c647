"""How fast image folders become the tensor, against threads that decode and do nothing else.

python -m benchmarks.decoding --data-dir stl10_data
"""

import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import dataset_helpers as dh
from run_helpers import Parser, number, run_script


def resident():
    """This process's resident memory, without pages mapped from files, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def sample(peak):
    while True:
        peak.append(resident())
        time.sleep(0.02)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("stl10_data"), help="its folder unlabelled is read")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="of each way")
    args = parser.parse_args()
    folder = args.data_dir / "unlabelled"
    files, cores = dh.image_files(folder), len(os.sched_getaffinity(0))
    rows = list(range(len(files)))

    def decode(first):
        for file in files[first : first + dh.TASK]:
            dh.read_image(file, 96)

    def decode_only():
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(decode, rows[:: dh.TASK]))

    def to_tensor(keep_copy):
        for copy in args.data_dir.glob(f".{folder.name}.96.*.npy"):
            if not keep_copy:
                copy.unlink()
        return dh.load_images(files, folder, rows, 96, torch.device("cpu"))

    ways = {
        f"{cores} threads that only decode": decode_only,
        "first start: PNGs to tensor and decoded copy": lambda: to_tensor(False),
        "later starts: decoded copy to tensor": lambda: to_tensor(True),
    }
    seconds = {name: [] for name in ways}
    before, peak = resident(), []
    threading.Thread(target=sample, args=[peak], daemon=True).start()
    for _ in range(args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    alone = statistics.median(seconds[next(iter(ways))])
    print(
        f"{len(files)} images, {cores} cores, median of {args.rounds} rounds\n\nway | images/s | share\n--- | --- | ---"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name} | {len(files) / median:.0f} | {alone / median:.0%}")
    above = max(peak) - before - len(files) * dh.IMAGE_BYTES
    print(f"\nanonymous memory at its highest: {above / 1e6:.0f} MB above the program's own and the tensor's")


if __name__ == "__main__":
    run_script(main)
