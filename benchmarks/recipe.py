"""What each part of the recipe brings: one change at a time, equal images and epochs, softmax-only and kNN accuracy.

    python -m benchmarks.recipe --data-dir photos [--rows crops lr-0.2 …] [--seeds 0 1]

Runs what has not been run yet, one after the other (each goes on where it was interrupted), and adds all finished runs
in --runs-dir to the table, from their own files. A row's command names what differs from today's defaults.
"""

import shlex
from pathlib import Path

import torch

import pirl_stl_train_test as pirl
from benchmarks.runs import fine_tune, pretrain
from run_helpers import Parser, UserError, number, run_script, settings_of, whole_file
from train_stl_after_ssl import NEIGHBOURS, SOFTMAX

JITTER = "--colour-strength 1 --patch-colour-strength 1 --hue 0.1"
EARLIER = "--lr 0.1 --batch-negatives False"
PLAIN = f"{EARLIER} --zero-init False"
ROWS = {  # name: flags of pretraining
    # how the defaults came about, from the first to the last
    "bank-64": f"{PLAIN} {JITTER} --batch-size 64",
    "tau-0.2": f"{PLAIN} {JITTER} --batch-size 64 --temp-parameter 0.2",
    "pair-batch-64": f"{PLAIN} {JITTER} --batch-size 64 --positive pair --batch-negatives True",
    "colours-64": f"{PLAIN} --batch-size 64",
    "colours-32": f"{PLAIN} --batch-size 32",
    "colours-16": f"{PLAIN} --batch-size 16",
    "zero-init-64-full": f"{EARLIER} {JITTER} --batch-size 64",
    "zero-init-64": f"{EARLIER} --batch-size 64",
    "zero-init-128-0.3": f"{EARLIER} --batch-size 128 --lr 0.3",
    "zero-init-32": EARLIER,
    "mlp-heads": f"{EARLIER} --non-linear-head True",
    "faint": f"{EARLIER} --colour-strength 0.2 --patch-colour-strength 0.2 --hue 0.02",
    "lr-0.2": f"{EARLIER} --lr 0.2",
    "bank-batch": "--lr 0.1",
    "default": "",
    # one change to the defaults each
    "pair": "--positive pair --batch-negatives False",
    "pair-batch": "--positive pair",
    "bank-alone": "--batch-negatives False",
    "paper-loss": "--loss nce",
    "random-bank": "--bank-start random",
    "visited": "--bank-start visited",
    "crops": "--crop-area 0.4",
    "patch-colours": "--patch-colour-strength 1",
    "negatives-1000": "--count-negatives 1000",
    "beta-0": "--beta 0",
    "tau-0.15": "--temp-parameter 0.15",
    "lighter-jigsaw": "--loss-weight 0.25",
    "heavier-jigsaw": "--loss-weight 0.75",
    "lr-0.4": "--lr 0.4",
    "norms-not-decayed": "--decay-norms False",
    "small-stem": "--stem small",
}
HEAD = ["pretraining", "images × epochs", "seed", "softmax, test", "kNN, test", "minutes", "device"]
HEADER = """Best first. Made by `python -m benchmarks.recipe`, from the runs' own files. What a command does not name
was at today's default (batch_size None: 128, or 64 or 32 where the run would have less than 1,000 steps): {}.

"""
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
    if row not in ROWS:
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
    head = HEADER.format(" ".join(f"{k} {v}," for k, v in defaults.items() if k not in SHOWN_NOWHERE).rstrip(","))
    if before and not before.startswith(head):
        raise UserError("the table is of other defaults than today's: mend its commands and first lines, or remove it")
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
    return head + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


if __name__ == "__main__":
    run_script(main)
