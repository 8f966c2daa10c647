"""The whole results table: pretraining, both fine-tunings and both baselines from a random trunk, over several seeds.

    python -m benchmarks.results --data-dir stl10_data --seeds 3 --epochs 100        # or: make results

Writes results/<name of data-dir>.md (mean ± standard deviation, commands, versions, device, times) and a picture of the
learning curves beside it. The runs' files are under results/<name>/; what is finished there is not run again, and what
was interrupted goes on.
"""

import shlex
import statistics
from pathlib import Path

from run_helpers import Parser, UserError, number, run_script, whole_file

from benchmarks.runs import fine_tune, pretrain
from pictures import curve_picture, save_picture
from train_stl_after_ssl import FOLDS, FULL, NEIGHBOURS, SOFTMAX, spread


def parse_args():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("stl10_data"), help="what stl10_data_load.py wrote")
    add("--results-dir", type=Path, default=Path("results"), help="for the table, the picture and the runs' files")
    add("--seeds", type=number(int, 1), default=3, help="how many, from 0")
    add("--epochs", type=number(int, 1), default=100, help="of pretraining")
    add("--labelled-epochs", type=number(int, 1), default=100, help="of each labelled stage")
    add("--flags", default="", help="further flags of pretraining, in one word: '--lr 0.1 --stem small'")
    add("--labelled-flags", default="", help="further flags of fine-tuning; full fine-tuning and --lr 0.1 are given")
    add("--common-flags", default="", help="further flags of both, such as '--precision bf16'")
    return parser.parse_args()


def main():
    args = parse_args()
    name = args.data_dir.resolve().name
    folder = args.results_dir / name
    common = ["--data-dir", str(args.data_dir), *shlex.split(args.common_flags)]
    pirl = ["--epochs", str(args.epochs), *common, *shlex.split(args.flags)]
    labelled = ["--epochs", str(args.labelled_epochs), "--full-fine-tune", "True", "--lr", "0.1", *common]
    labelled += ["--patience-for-lr-decay", "4", *shlex.split(args.labelled_flags)]
    pretrained, tuned, random = [], [], []
    for seed in range(args.seeds):
        seeded = ["--seed", str(seed)]
        pretrained.append(pretrain(folder, f"pirl_{seed}", pirl + seeded))
        tuned.append(fine_tune(folder, f"from_pirl_{seed}", [*labelled, *seeded, "--pirl-model-name", f"pirl_{seed}"]))
        random.append(fine_tune(folder, f"from_random_{seed}", labelled + seeded))
    picture = args.results_dir / f"{name}.png"
    save_picture(learning_curves(pretrained), picture)
    with whole_file(args.results_dir / f"{name}.md", "w") as file:
        file.write(document(args, pirl, labelled, pretrained, tuned, random, picture.name))
    print(f"\n{(args.results_dir / f'{name}.md').read_text()}\nwrote {args.results_dir / f'{name}.md'} and {picture}")


def document(args, pirl, labelled, pretrained, tuned, random, picture):
    machines = {tuple(run["machine"].items()) for run in (*pretrained, *tuned, *random)}
    if len({run["images"] for run in pretrained}) > 1:
        raise UserError(f"the runs under {args.results_dir} are of different images: remove them")
    lines = [
        f"# {args.data_dir.resolve().name}: {pretrained[0]['images']} unlabelled training images, {args.seeds} seeds",
        "",
        "Accuracy, mean ± standard deviation over the seeds; of the epoch with the best validation accuracy.",
        "",
        "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy",
        "--- | --- | ---",
    ]
    for trunk, runs in (("random trunk", random), ("PIRL trunk", tuned)):
        for strategy in (NEIGHBOURS, SOFTMAX, FULL):
            validation, test = zip(*(run["results"][strategy] for run in runs), strict=True)
            lines.append(f"{strategy}, {trunk} | {spread(validation)} | {spread(test)}")
        if all(FOLDS in run["results"] for run in runs):
            means = [statistics.mean(test for _, test in run["results"][FOLDS]) for run in runs]
            lines.append(f"{FOLDS}, {trunk} | none | {spread(means)}")
    lines += ["", "Stage | Minutes", "--- | ---"]
    stages = {
        "pretraining: steps, validation, monitor": [sum(row["seconds"] for row in run["rows"]) for run in pretrained]
    }
    for trunk, runs in (("random trunk", random), ("PIRL trunk", tuned)):
        for strategy in (SOFTMAX, FULL):
            stages[f"{strategy}, {trunk}"] = [run["seconds"][strategy] for run in runs]
    lines += [f"{stage} | {spread(seconds, 1 / 60, '')}" for stage, seconds in stages.items()]
    lines += ["", f"![Learning curves]({picture})", "", "Commands, for `--seed` 0 and on:", ""]
    for script, flags in (
        ("pirl_stl_train_test.py", pirl),
        ("train_stl_after_ssl.py", [*labelled, "--pirl-model-name", "…"]),
        ("train_stl_after_ssl.py", labelled),
    ):
        lines.append(f"    python {script} {shlex.join(flags)}")
    lines += ["", *("; ".join(f"{k} {v}" for k, v in machine) for machine in sorted(machines)), ""]
    return "\n".join(lines)


def learning_curves(pretrained):
    """Loss and nearest-neighbour accuracy over the epochs, a line per seed, as a Pillow image."""
    panels = []
    for title, column in (("training loss", "train_loss"), ("nearest-neighbour accuracy, training images", "knn_acc")):
        curves = [[(row["epoch"], row[column]) for row in run["rows"] if row[column] is not None] for run in pretrained]
        panels.append((title, curves))
    return curve_picture(panels)


if __name__ == "__main__":
    run_script(main)
