"""The whole results table: pretraining, both fine-tunings and both baselines from a random trunk, over several seeds.

Writes results/<name of data-dir>.md (mean ± standard deviation, times, commands, versions, device) and a picture of the
learning curves beside it. The runs' files are under results/<name>/; what is finished there is not run again, and what
was interrupted goes on.
"""

import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import run_helpers as rh
import torch

import pirl_stl_train_test as pirl
import train_stl_after_ssl as labelled
from pictures import curve_picture, save_picture
from train_stl_after_ssl import HEADER, ROWS, spread

TIMES = "Stage | Minutes | Minutes from the start until it is done\n--- | --- | ---\n"
CURVES = {"train_loss": "training loss", "knn_acc": "nearest-neighbour accuracy, training images"}


def parse_args():
    parser = rh.Parser(__doc__.split("\n")[0])
    add, count = parser.add_argument, rh.between(int, 1)
    add("--data-dir", type=Path, default=Path("stl10_data"), help="the folder with the images")
    add("--results-dir", type=Path, default=Path("results"), help="the folder for table, picture and the runs' files")
    add("--seeds", type=count, default=3, help="how many seeds, from 0")
    add("--epochs", type=count, default=100, help="epochs of pretraining")
    add("--labelled-epochs", type=count, default=100, help="epochs of each labelled stage")
    add("--flags", default="", help="further flags of pretraining, in one word: '--lr 0.1 --stem small'")
    add("--labelled-flags", default="", help="further flags of fine-tuning; full fine-tuning and --lr 0.1 are given")
    add("--common-flags", default="", help="further flags of both, such as '--precision bf16'")
    return parser.parse_args()


def main():
    args = parse_args()
    name = args.data_dir.resolve().name
    folder, table, picture = (args.results_dir / f"{name}{suffix}" for suffix in ("", ".md", ".png"))
    common = ["--data-dir", str(args.data_dir), *shlex.split(args.common_flags)]
    first = ["--epochs", str(args.epochs), *common, *shlex.split(args.flags)]
    then = ["--epochs", str(args.labelled_epochs), "--full-fine-tune", "True", "--lr", "0.1", *common]
    then += ["--patience-for-lr-decay", "4", *shlex.split(args.labelled_flags)]
    pretrained, tuned, random = [], [], []
    for number in range(args.seeds):
        trunk, seed = f"pirl_{number}", ["--seed", str(number)]
        pretrained.append(finished_run(pirl, folder, trunk, first + seed))
        tuned.append(finished_run(labelled, folder, f"from_{trunk}", [*then, *seed, "--pirl-model-name", trunk]))
        random.append(finished_run(labelled, folder, f"from_random_{number}", then + seed))
    if len({run["images"] for run in pretrained}) > 1:
        raise rh.UserError(f"the runs in {folder} are of different images: remove them")
    text = f"# {name}: {pretrained[0]['images']} unlabelled training images, {args.seeds} seeds\n\n"
    text += f"{tables(pretrained, tuned, random)}\n![Learning curves]({name}.png)\n\n"
    text += "Commands, for `--seed` 0 and on:\n\n"
    for module, flags in ((pirl, first), (labelled, [*then, "--pirl-model-name", "…"]), (labelled, then)):
        text += f"    python {Path(module.__file__).name} {shlex.join(flags)}\n"
    text += "".join(f"\n{machine}\n" for machine in sorted({run["machine"] for run in pretrained + tuned + random}))
    curves = {c: [[(r["epoch"], r[c]) for r in run["rows"] if r[c] is not None] for run in pretrained] for c in CURVES}
    save_picture(curve_picture([(CURVES[column], lines) for column, lines in curves.items()]), picture)
    with rh.whole_file(table, "w") as file:
        file.write(text)
    print(f"\n{text}\nwrote {table} and {picture}")


def finished_run(module, folder, name, flags):
    """The content of folder/weights/<name>.pt, after the run that makes it, or the rest of it, where it is missing.
    flags are those of the run alone; a finished run of the same name with others is refused."""
    weights = folder / "weights" / f"{name}.pt"
    flags = [*flags, "--experiment-name", name, "--weights-dir", str(folder / "weights")]
    flags += ["--observations-dir", str(folder / "observations_dir")]
    if not weights.exists():
        print(f"\n$ python {Path(module.__file__).name} {shlex.join(flags)}", flush=True)
        if status := subprocess.run([sys.executable, module.__file__, *flags, "--resume", "True"]).returncode:
            sys.exit(status)  # the script has said why
    content = torch.load(weights, map_location="cpu", weights_only=True)
    then, asked = content["settings"], rh.settings_of(module.parse_args(flags))
    chosen = {"tmax_for_cos_decay": asked["epochs"], "cont_epoch": 1}  # what a run takes where no flag says it
    chosen |= {key: then.get(key) for key in ("precision", "stem")}
    asked |= {key: value for key, value in chosen.items() if key in asked and asked[key] in (None, "auto")}
    fixed = asked.keys() - (module.MAY_DIFFER - {"epochs", "full_fine_tune", *module.KEPT})
    if differ := sorted(key for key in fixed if asked[key] != then.get(key)):
        raise rh.UserError(f"{weights} was made with another {', '.join(differ)}: remove {folder} to run all anew")
    return content


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
        folds = [[test for _, test in run["results"].get("folds", []) if test is not None] for run in runs]
        if all(folds):
            table += f"{ROWS['folds']}, {trunk} | none | {spread([mean(tests) for tests in folds])}\n"
    return f"Accuracy of the epoch with the best validation accuracy, mean ± standard deviation.\n\n{table}\n{times}"


if __name__ == "__main__":
    rh.run_script(main)
