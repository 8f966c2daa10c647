"""What each part of the recipe brings: one change at a time, equal images and epochs, softmax-only and kNN accuracy.

    python -m benchmarks.recipe --data-dir photos [--rows crops lr-0.2 …] [--seeds 0 1]

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

FULL = "--lr 0.1 --colour-strength 1 --patch-colour-strength 1 --hue 0.1"
HALF = "--lr 0.1 --colour-strength 0.5 --patch-colour-strength 0.5 --hue 0.05"
PLAIN = "--zero-init False"
ROWS = {  # name: flags of pretraining
    "bank-64": f"{FULL} {PLAIN} --batch-size 64",
    "tau-0.2": f"{FULL} {PLAIN} --batch-size 64 --temp-parameter 0.2",
    "pair-batch-64": f"{FULL} {PLAIN} --batch-size 64 --positive pair --batch-negatives True",
    "colours-64": f"{HALF} {PLAIN} --batch-size 64",
    "bank-32-colours": f"{HALF} {PLAIN} --batch-size 32",
    "bank-16-colours": f"{HALF} {PLAIN} --batch-size 16",
    "zero-init-32-colours": f"{HALF} --batch-size 32",
    "zero-init-64": f"{HALF} --batch-size 64",
    "zero-init-64-full": f"{FULL} --batch-size 64",
    "zero-init-128": f"{HALF} --batch-size 128",
    "zero-init-128-0.3": f"{HALF} --batch-size 128 --lr 0.3",
    "zero-init-64-0.03": f"{HALF} --batch-size 64 --lr 0.03",
    "faint": f"{HALF} --batch-size 32 --colour-strength 0.2 --patch-colour-strength 0.2 --hue 0.02",
    "crops": f"{HALF} --batch-size 32 --crop-area 0.4",
    "lr-0.2": f"{HALF} --batch-size 32 --lr 0.2",
    "mlp-heads": f"{HALF} --batch-size 32 --non-linear-head True",
    "beta-0": f"{HALF} --batch-size 32 --beta 0",
    "tau-0.15": f"{HALF} --batch-size 32 --temp-parameter 0.15",
    "lighter-jigsaw": f"{HALF} --batch-size 32 --loss-weight 0.25",
    "heavier-jigsaw": f"{HALF} --batch-size 32 --loss-weight 0.75",
    "random-bank": f"{HALF} --batch-size 32 --bank-start random",
    "visited": f"{HALF} --batch-size 32 --bank-start visited",
    "pair": f"{HALF} --batch-size 32 --positive pair",
    "pair-batch": f"{HALF} --batch-size 32 --positive pair --batch-negatives True",
    "bank-batch": f"{HALF} --batch-size 32 --batch-negatives True",
    "negatives-1000": f"{HALF} --batch-size 32 --count-negatives 1000",
    "norms-not-decayed": f"{HALF} --batch-size 32 --decay-norms False",
    "paper-loss": f"{HALF} --batch-size 32 --loss nce",
}
HEAD = ["pretraining", "images × epochs", "seed", "softmax, test", "kNN, test", "minutes", "device"]
SHOWN_NOWHERE = pirl.MAY_DIFFER | {"experiment_name", "seed", "data_dir", "tmax_for_cos_decay", "epochs"}


def parse_args():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("stl10_data"), help="what stl10_data_load.py wrote")
    parser.add_argument("--runs-dir", type=Path, default=Path("recipe_runs"), help="for the files of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/recipe.md"), help="the table")
    parser.add_argument(
        "--rows", nargs="*", choices=[*ROWS, "random", "random-plain-init"], default=[], help="what to run"
    )
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0], help="of each row")
    parser.add_argument("--epochs", type=number(int, 1), default=8, help="of pretraining")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of pretraining")
    return parser.parse_args()


def main():
    args = parse_args()
    for seed in args.seeds:
        for row in args.rows:
            run_row(args, row, seed)
    text = table(args.runs_dir, args.out.read_text() if args.out.exists() else "")
    with whole_file(args.out, "w") as file:
        file.write(text)
    print(f"wrote {args.out}")


def run_row(args, row, seed):
    common, name = ["--data-dir", args.data_dir, "--seed", seed], f"{row}_{seed}"
    labelled = ["--lr", 0.1, "--patience-for-lr-decay", 4, *common]
    if row.startswith("random"):
        labelled += ["--zero-init", row == "random"]
    else:
        flags = ["--only-train", True, "--epochs", args.epochs, "--precision", args.precision, *common]
        flags += shlex.split(ROWS[row])
        pretrain(args.runs_dir, name, flags)
        labelled += ["--pirl-model-name", name]
    fine_tune(args.runs_dir, f"{name}_labelled", labelled)


def table(runs_dir, before):
    """Markdown: a row per finished run, the best first, with the flags by which it differs from today's defaults.

    Rows of the table as it was `before` stay, unless there is a run of the same command, images and seed.
    """
    defaults, rows = settings_of(pirl.parse_args([])), {}
    for line in before.splitlines():
        row = line.strip("| ").split(" | ")
        if len(row) == len(HEAD) and row[2].isdecimal():
            rows[tuple(row[:3])] = row
    for path in sorted((runs_dir / "weights").glob("*_labelled.pt")):
        labelled = torch.load(path, map_location="cpu", weights_only=True)
        pretrained = path.with_name(path.name.replace("_labelled", ""))
        seconds, images, machine = 0, "", labelled["machine"]
        command = f"random trunk, `--zero-init {labelled['settings']['zero_init']}`"
        if pretrained.exists():
            content = torch.load(pretrained, map_location="cpu", weights_only=True)
            then = content["settings"]
            defaults["batch_size"] = pirl.default_batch_size(content["images"], then["tmax_for_cos_decay"])
            changed = {k: v for k, v in then.items() if v != defaults.get(k) and k not in SHOWN_NOWHERE}
            flags = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
            command = " ".join(["`python pirl_stl_train_test.py", f"--epochs {then['epochs']}", *flags])
            command, machine = command + "`", content["machine"]
            images = f"{content['images']} × {len(content['rows'])}"
            seconds = sum(row["seconds"] for row in content["rows"])
        softmax, neighbours = (labelled["results"][strategy][1] for strategy in (SOFTMAX, NEIGHBOURS))
        seed = str(labelled["settings"]["seed"])
        where = f"{machine['device']}, {machine['threads']} threads"
        time = f"{seconds / 60:.1f}" if seconds else "0"
        accuracies = f"{softmax:.2%}", f"{neighbours:.2%}"
        rows[command, images, seed] = [command, images, seed, *accuracies, time, where]
    lines = [HEAD, ["---"] * len(HEAD), *sorted(rows.values(), key=lambda row: -float(row[3].rstrip("%")))]
    text = "Best first. Made by `python -m benchmarks.recipe`, which names the data, from the runs' own files.\n\n"
    return text + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


if __name__ == "__main__":
    run_script(main)
