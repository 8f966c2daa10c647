"""What each part of the recipe brings: one change at a time, equal images and epochs, softmax-only and kNN accuracy.

    python -m benchmarks.recipe --data-dir photos [--rows bank-64 lr-0.3 …] [--seeds 0 1]

Runs what has not been run yet, one after the other (each goes on where it was interrupted), and writes the table of all
finished runs in --runs-dir from their own files. Settings that a row does not name are those of the run's default then.
"""

import shlex
from pathlib import Path

import torch

import pirl_stl_train_test as pirl
from benchmarks.runs import fine_tune, pretrain
from run_helpers import Parser, number, run_script, settings_of, whole_file
from train_stl_after_ssl import NEIGHBOURS, SOFTMAX

BASE = "--batch-size 32 --lr 0.1 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05"
ROWS = {  # name: flags of pretraining
    "bank-64": "--batch-size 64 --lr 0.1",
    "pair-batch-64": "--batch-size 64 --lr 0.1 --positive pair --batch-negatives True",
    "tau-0.2": "--batch-size 64 --lr 0.1 --temp-parameter 0.2",
    "colours-64": "--batch-size 64 --lr 0.1 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05",
    "bank-32-colours": BASE,
    "mlp-32-colours": BASE + " --non-linear-head True",
    "beta-0-32-colours": BASE + " --beta 0",
    "crops-32-colours": BASE + " --crop-area 0.4",
    "lr-0.03-32-colours": "--batch-size 32 --lr 0.03 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05",
    "lr-0.3-32-colours": "--batch-size 32 --lr 0.3 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05",
    "faint-32": "--batch-size 32 --lr 0.1 --colour-strength 0.2 --patch-colour-strength 0.2 --hue 0.02",
    "bank-16-colours": "--batch-size 16 --lr 0.1 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05",
    "bank-128": "--batch-size 128 --lr 0.1",
    "pair-64": "--batch-size 64 --lr 0.1 --positive pair",
    "bank-batch-64": "--batch-size 64 --lr 0.1 --batch-negatives True",
    "random-bank-64": "--batch-size 64 --lr 0.1 --bank-start random",
    "visited-64": "--batch-size 64 --lr 0.1 --bank-start visited",
    "crops-64": "--batch-size 64 --lr 0.1 --crop-area 0.4",
    "plain-patches-64": "--batch-size 64 --lr 0.1 --patch-colour-strength 0",
    "lr-0.3": "--batch-size 64 --lr 0.3",
    "beta-0": "--batch-size 64 --lr 0.1 --beta 0",
    "jigsaw-heavier": "--batch-size 64 --lr 0.1 --loss-weight 0.8",
    "negatives-1000": "--batch-size 64 --lr 0.1 --count-negatives 1000",
    "norms-not-decayed": "--batch-size 64 --lr 0.1 --decay-norms False",
    "mlp-heads": "--batch-size 64 --lr 0.1 --non-linear-head True",
    "paper-loss": "--batch-size 64 --lr 0.1 --loss nce",
}
SHOWN_NOWHERE = pirl.MAY_DIFFER | {"experiment_name", "seed", "data_dir", "tmax_for_cos_decay", "epochs"}


def parse_args():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("stl10_data"), help="what stl10_data_load.py wrote")
    parser.add_argument("--runs-dir", type=Path, default=Path("recipe_runs"), help="for the files of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/recipe.md"), help="the table")
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, "random"], default=[], help="what to run")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0], help="of each row")
    parser.add_argument("--epochs", type=number(int, 1), default=8, help="of pretraining")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of pretraining")
    return parser.parse_args()


def main():
    args = parse_args()
    for seed in args.seeds:
        for row in args.rows:
            run_row(args, row, seed)
    with whole_file(args.out, "w") as file:
        file.write(table(args.runs_dir))
    print(f"wrote {args.out}")


def run_row(args, row, seed):
    common, name = ["--data-dir", args.data_dir, "--seed", seed], f"{row}_{seed}"
    labelled = ["--lr", 0.1, "--patience-for-lr-decay", 4, *common]
    if row != "random":
        flags = ["--only-train", True, "--epochs", args.epochs, "--precision", args.precision, *common]
        flags += shlex.split(ROWS[row])
        pretrain(args.runs_dir, name, flags)
        labelled += ["--pirl-model-name", name]
    fine_tune(args.runs_dir, f"{name}_labelled", labelled)


def table(runs_dir):
    """Markdown: a row per finished run, the best first, with the flags by which it differs from today's defaults."""
    defaults, rows = settings_of(pirl.parse_args([])), []
    for path in sorted((runs_dir / "weights").glob("*_labelled.pt")):
        labelled = torch.load(path, map_location="cpu", weights_only=True)
        pretrained = path.with_name(path.name.replace("_labelled", ""))
        command, seconds, images = "random trunk", 0, ""
        if pretrained.exists():
            content = torch.load(pretrained, map_location="cpu", weights_only=True)
            changed = {k: v for k, v in content["settings"].items() if v != defaults.get(k) and k not in SHOWN_NOWHERE}
            flags = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
            command = " ".join(["`python pirl_stl_train_test.py", f"--epochs {content['settings']['epochs']}", *flags])
            command, images = command + "`", f"{content['images']} × {len(content['rows'])}"
            seconds = sum(row["seconds"] for row in content["rows"])
        softmax, neighbours = (labelled["results"][strategy][1] for strategy in (SOFTMAX, NEIGHBOURS))
        seed, machine = labelled["settings"]["seed"], labelled["machine"]
        where = f"{machine['device']}, {machine['threads']} threads"
        time = f"{seconds / 60:.1f}" if seconds else "0"
        accuracies = f"{softmax:.2%}", f"{neighbours:.2%}"
        rows.append((softmax, [command, images, seed, *accuracies, time, where]))
    head = ["pretraining", "images × epochs", "seed", "softmax, test", "kNN, test", "minutes", "device"]
    lines = [head, ["---"] * len(head), *(row for _, row in sorted(rows, key=lambda pair: -pair[0]))]
    text = "Best first. Made by `python -m benchmarks.recipe`, which names the data, from the runs' own files.\n\n"
    return text + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


if __name__ == "__main__":
    run_script(main)
