"""2,000 steps on tiny images, a checkpoint every few steps: memory and open files at the end as at step 200.

python tests/endurance.py        # or: make endurance
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import start, write_raw

import stl10_data_load

STEPS, STEPS_PER_EPOCH, BATCH, MINUTES = 2000, 25, 4, 0.01
MOST = 20e6  # bytes


def main():
    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    raw = write_raw(folder / "raw", {"train": 60, "test": 40, "unlabelled": STEPS_PER_EPOCH * BATCH})
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw, folder / "data", split)
    sizes = ["--image-size", 36, "--batch-size", BATCH, "--epochs", STEPS // STEPS_PER_EPOCH, "--only-train"]
    times = ["--checkpoint-minutes", MINUTES, "--knn-every", 20]
    paths = ["--data-dir", folder / "data", "--weights-dir", folder / "weights"]
    paths += ["--observations-dir", folder / "observations", "--experiment-name", "run"]
    process = start("pirl_stl_train_test", *sizes, *times, *paths, "--device", "cpu")
    rows, checkpoints, seen, written = folder / "observations/run_observations.csv", 0, {}, None
    while process.poll() is None:
        time.sleep(0.05)
        try:
            step = STEPS_PER_EPOCH * (len(rows.read_text().splitlines()) - 1) if rows.exists() else 0
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            seen.setdefault(step, []).append((resident, len(os.listdir(f"/proc/{process.pid}/fd"))))
            now = (folder / "weights/run.ckpt").stat().st_mtime_ns
            checkpoints, written = checkpoints + (now != written), now
        except (OSError, StopIteration):
            continue  # it has just ended, or begun
    assert process.returncode == 0, process.stderr.read()
    first, last = seen[200], seen[max(step for step in seen if step < STEPS)]
    print("step | resident memory, median | highest | open files, most\n--- | --- | --- | ---")
    for step in sorted(step for step in seen if step % 200 == 0 or step == STEPS - STEPS_PER_EPOCH):
        memory, files = zip(*seen[step], strict=True)
        print(f"{step} | {statistics.median(memory) / 1e6:.1f} MB | {max(memory) / 1e6:.1f} MB | {max(files)}")
    print(f"{checkpoints} checkpoints were written")
    growth = statistics.median(memory for memory, _ in last) - statistics.median(memory for memory, _ in first)
    more = max(files for _, files in last) - max(files for _, files in first)
    print(f"from step 200 to the end: {growth / 1e6:+.1f} MB, {more:+d} open files")
    sys.exit(abs(growth) > MOST or more > 0)


if __name__ == "__main__":
    main()
