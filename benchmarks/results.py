"""The whole results table: pretraining, both fine-tunings and both baselines from a random trunk, over several seeds.

Writes results/<name of data-dir>.md (mean ± standard deviation, times, commands, versions, device) and a picture of the
learning curves beside it. The runs' files are under results/<name>/; what is finished there is not run again, and what
was interrupted goes on.
"""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import run_helpers as rh
import torch

import pirl_stl_train_test as pirl
import train_stl_after_ssl as labelled
from train_stl_after_ssl import HEADER, ROWS, spread

TIMES = "Stage | Minutes | Minutes from the start until it is done\n--- | --- | ---\n"
CURVES = {"train_loss": "training loss", "knn_acc": "nearest-neighbour accuracy, training images"}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")  # of the seeds


def parse_args():
    parser = rh.Parser(__doc__.split("\n")[0])
    add, count = parser.add_argument, rh.between(int, 1)
    add("--data-dir", type=Path, default=Path("stl10_data"), help="the folder with the images")
    add("--seeds", type=count, default=3, help="how many seeds, from 0")
    add("--epochs", type=count, default=100, help="epochs of pretraining")
    add("--labelled-epochs", type=count, default=100, help="epochs of each labelled stage")
    add("--flags", default="", help="further flags of pretraining, in one word: '--lr 0.1 --stem small'")
    add("--labelled-flags", default="", help="further flags of fine-tuning; full fine-tuning and --lr 0.1 are given")
    return parser.parse_args()


def main():
    args = parse_args()
    name = args.data_dir.resolve().name
    folder, table, picture = (Path("results") / f"{name}{suffix}" for suffix in ("", ".md", ".svg"))
    first, then = (["--data-dir", str(args.data_dir), "--epochs", str(n)] for n in (args.epochs, args.labelled_epochs))
    first += shlex.split(args.flags)
    then += shlex.split(f"--full-fine-tune True --lr 0.1 --patience-for-lr-decay 4 {args.labelled_flags}")
    pretrained, tuned, random = [], [], []
    for number in range(args.seeds):
        trunk, seed = f"pirl_{number}", ["--seed", str(number)]
        pretrained.append(finished_run(pirl, folder, trunk, first + seed))
        tuned.append(finished_run(labelled, folder, f"from_{trunk}", [*then, *seed, "--pirl-model-name", trunk]))
        random.append(finished_run(labelled, folder, f"from_random_{number}", then + seed))
    if len({run["images"] for run in pretrained}) > 1:
        raise rh.UserError(f"the runs in {folder} are of different images: remove them")
    text = f"# {name}: {pretrained[0]['images']} unlabelled training images, {args.seeds} seeds\n\n"
    text += f"{tables(pretrained, tuned, random)}\n![Learning curves]({name}.svg)\n\nCommands, `--seed` 0 and on:\n\n"
    for module, flags in ((pirl, first), (labelled, [*then, "--pirl-model-name", "…"]), (labelled, then)):
        text += f"    python {Path(module.__file__).name} {shlex.join(flags)}\n"
    text += "".join(f"\n{machine}\n" for machine in sorted({run["machine"] for run in pretrained + tuned + random}))
    curves = {c: [[(r["epoch"], r[c]) for r in run["rows"] if r[c] is not None] for run in pretrained] for c in CURVES}
    picture.write_text(curve_picture(curves), "utf-8")
    table.write_text(text, "utf-8")
    print(f"\n{text}\nwrote {table} and {picture}")


def finished_run(module, folder, name, flags):
    """The content of folder/weights/<name>.pt, after the run that makes it, or the rest of it, where it is missing."""
    weights, record = folder / "weights" / f"{name}.pt", folder / f"{name}.sh"
    flags = [*flags, "--experiment-name", name, "--weights-dir", str(folder / "weights")]
    flags += ["--observations-dir", str(folder / "observations_dir")]
    command = f"python {Path(module.__file__).name} {shlex.join(flags)}\n"
    if record.exists() and record.read_text("utf-8") != command:
        raise rh.UserError(f"{record} is the command of {name}, not {command.strip()}: remove {folder} to run all anew")
    if not weights.exists():
        with rh.whole_file(record, "w") as file:
            file.write(command)
        print(f"\n$ {command}", flush=True)
        if status := subprocess.run([sys.executable, module.__file__, *flags, "--resume", "True"]).returncode:
            sys.exit(status)  # the script has said why
    return torch.load(weights, map_location="cpu", weights_only=True)


def tables(pretrained, tuned, random):
    """The accuracies, and how long it took, as text."""
    took = [sum(row["seconds"] for row in run["rows"]) for run in pretrained]
    minutes = spread(took, 1 / 60, "")
    table, times = HEADER, f"{TIMES}PIRL pretraining with validation and monitor | {minutes} | {minutes}\n"
    for trunk, runs, done in (("random trunk", random, [0] * len(random)), ("PIRL trunk", tuned, took)):
        for key in ("neighbours", "softmax", "full"):
            columns = zip(*(run["results"][key] for run in runs), strict=True)  # validation and test accuracy
            cells = ["none" if None in column else spread(column) for column in columns]
            table += " | ".join([f"{ROWS[key]}, {trunk}", *cells]) + "\n"
            if key != "neighbours":  # those are a part of the softmax stage
                seconds = [run["seconds"][key] for run in runs]
                done = [a + b for a, b in zip(done, seconds, strict=True)]
                times += f"{ROWS[key]}, {trunk} | {spread(seconds, 1 / 60, '')} | {spread(done, 1 / 60, '')}\n"
    return f"Accuracy of the epoch with the best validation accuracy, mean ± standard deviation.\n\n{table}\n{times}"


def curve_picture(panels):
    """SVG with a panel per column of the CSV: {column: a list of (epoch, value) for each seed}."""
    shapes = []
    for place, (column, curves) in enumerate(panels.items()):
        points, left = [point for curve in curves for point in curve] or [(1, 0)], 70 + 560 * place
        last, low, high = max(points)[0], min(v for _, v in points), max(v for _, v in points)
        shapes.append(f'<text x="{left}" y="25" font-size="16">{CURVES[column]}</text>')
        for share in (0, 0.5, 1):
            y, value, epoch = 310 - 260 * share, low + share * (high - low), round(1 + share * (last - 1))
            shapes.append(f'<path d="M{left} {y}h460" stroke="#ddd"/><text x="{left - 60}" y="{y}">{value:.3f}</text>')
            shapes.append(f'<text x="{left + 440 * share}" y="335">{"epoch " * (share == 0)}{epoch}</text>')
        for curve, colour in zip(curves, itertools.cycle(COLOURS)):
            wide, tall = 460 / max(1, last - 1), 260 / (high - low or 1)
            line = " ".join(f"{left + (e - 1) * wide:.1f},{310 - (v - low) * tall:.1f}" for e, v in curve)
            shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {560 * len(panels)} 350" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *shapes, "</svg>\n"])


if __name__ == "__main__":
    rh.run_script(main)
