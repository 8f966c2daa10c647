"""The whole results table: PIRL and the baselines from a random trunk, over some seeds.

Each seed pretrains a trunk, then fine-tunes it and a random one. Writes
results/<name of data-dir>.md (accuracies, times, commands, versions, device) and a
picture of the learning curves beside it. The runs' files are under results/<name>/;
what is finished there is not run again, and what was interrupted is continued.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.compare import (
    TEST,
    VALIDATION,
    accuracy_table,
    markdown_table,
    spread,
)
from runtime.arguments import Parser, bounded, file_path
from runtime.errors import UserError
from runtime.files import atomic_write, read_torch_file
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
RESULTS = Path("results")
PRETRAINING = "pirl_stl_train_test.py"
FINE_TUNING = "train_stl_after_ssl.py"

# The stages as the README calls them, and as the model files do.
STAGES = {
    "kNN": "knn",
    "linear probe (only the softmax layer)": "softmax",
    "full fine-tuning": "full",
}
# The columns of the training record that are drawn.
CURVES = {
    "train_loss": "training loss",
    "train_acc": "pretext accuracy",
    "knn_acc": "kNN accuracy, validation images",
}


def parse_args(argv=None):
    parser = Parser("The whole results table, over several seeds.")
    parser.add_argument(
        "--data-dir",
        type=file_path,
        default=Path("stl10_data"),
        help="the folder with the images",
    )
    parser.add_argument(
        "--seeds", type=bounded(int, 1), default=3, help="how many seeds, from 0"
    )
    parser.add_argument(
        "--epochs", type=bounded(int, 1), default=100, help="epochs of pretraining"
    )
    parser.add_argument(
        "--labelled-epochs",
        type=bounded(int, 1),
        default=100,
        help="epochs of each labelled stage",
    )
    parser.add_argument(
        "--flags",
        default="",
        help="more flags of pretraining, in one word, as '--lr 0.1 --stem small'; "
        "--only-train True is given",
    )
    parser.add_argument(
        "--labelled-flags",
        default="",
        help="more flags of fine-tuning, in one word; --full-fine-tune True is given",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import_figure()  # if it is missing, say so now instead of after hours of training

    name = args.data_dir.resolve().name
    folder = RESULTS / name
    data = ["--data-dir", str(args.data_dir)]
    pretraining_flags = [*data, "--epochs", str(args.epochs), "--only-train", "True"]
    pretraining_flags += shlex.split(args.flags)
    labelled_flags = [*data, "--epochs", str(args.labelled_epochs)]
    labelled_flags += ["--full-fine-tune", "True"]
    labelled_flags += shlex.split(args.labelled_flags)

    pretrained = []
    random = []
    pirl = []
    for seed in range(args.seeds):
        seed_flags = ["--seed", str(seed)]
        trunk = f"pirl_{seed}"

        flags = pretraining_flags + seed_flags
        pretrained.append(finished_run(folder, trunk, PRETRAINING, flags))

        flags = [*labelled_flags, *seed_flags, "--pirl-model-name", trunk]
        pirl.append(finished_run(folder, f"from_{trunk}", FINE_TUNING, flags))

        flags = labelled_flags + seed_flags
        random.append(finished_run(folder, f"from_random_{seed}", FINE_TUNING, flags))

    # A run that was finished before somebody added images has the same command.
    image_counts = {run["images"] for run in pretrained}
    if len(image_counts) > 1:
        raise UserError(
            f"the runs in {folder} are of different images",
            "remove them",
        )

    picture = RESULTS / f"{name}.svg"
    draw_curves(pretrained, picture)

    commands = [
        command_line(PRETRAINING, pretraining_flags),
        command_line(FINE_TUNING, [*labelled_flags, "--pirl-model-name", "…"]),
        command_line(FINE_TUNING, labelled_flags),
    ]
    text = report(name, pretrained, random, pirl, commands)
    table = RESULTS / f"{name}.md"
    with atomic_write(table, "w") as file:
        file.write(text)
    print(f"\n{text}\nwrote {table} and {picture}")


# ---- The runs ------------------------------------------------------------------------
def finished_run(folder, name, script, flags):
    """The content of folder/weights/<name>.pt; where it is missing, run what makes it.

    A run that was interrupted continues from its checkpoint.
    """
    weights = folder / "weights" / f"{name}.pt"
    record = folder / f"{name}.sh"
    flags = [*flags, "--experiment-name", name]
    flags += ["--weights-dir", str(folder / "weights")]
    flags += ["--observations-dir", str(folder / "observations_dir")]

    # A finished run is not run again: one with other flags would slip into the table.
    command = command_line(script, flags)
    if record.exists() and record.read_text("utf-8") != command + "\n":
        raise UserError(
            f"{record} is the command of {name}, not {command}",
            f"rename {folder} to keep its runs, or remove it",
        )

    if not weights.exists():
        with atomic_write(record, "w") as file:
            file.write(command + "\n")
        print(f"\n$ {command}", flush=True)
        process = [sys.executable, str(ROOT / script), *flags, "--resume", "True"]
        status = subprocess.run(process).returncode
        if status != 0:
            sys.exit(status)  # the script has said why
    return read_torch_file(weights)


def command_line(script, flags):
    return f"python {script} {shlex.join(flags)}"


# ---- The report ----------------------------------------------------------------------
def report(name, pretrained, random, pirl, commands):
    """The text of results/<name>.md."""
    machines = {run["machine"] for run in pretrained + random + pirl}
    image_count = pretrained[0]["images"]
    seeds = len(pretrained)
    paragraphs = [
        f"# {name}: {image_count} unlabelled training images, seeds: {seeds}",
        *tables(pretrained, random, pirl),
        f"![Learning curves]({name}.svg)",
        "Commands, `--seed` 0 and on:",
        "\n".join(f"    {command}" for command in commands),
        *sorted(machines),
    ]
    return "\n\n".join(paragraphs) + "\n"


def tables(pretrained, random, pirl):
    """Accuracies and times as paragraphs, each argument being one model per seed."""
    test_columns = {"random trunk": (random, TEST), "PIRL trunk": (pirl, TEST)}
    validation_columns = {
        "random trunk": (random, VALIDATION),
        "PIRL trunk": (pirl, VALIDATION),
    }
    how = "in the epoch of the best validation accuracy, mean ± standard deviation"
    return [
        f"Accuracy on the test images, {how}:",
        accuracy_table("method", STAGES, test_columns),
        "Accuracy on the validation images:",
        accuracy_table("method", STAGES, validation_columns),
        "Times; cumulative minutes include the stages before:",
        time_table(pretrained, random, pirl),
    ]


def time_table(pretrained, random, pirl):
    """Minutes of each stage, and of all the stages up to its end."""
    pretraining = [pretraining_seconds(run) for run in pretrained]
    minutes = spread_minutes(pretraining)
    rows = [
        ["stage", "minutes", "cumulative minutes"],
        ["PIRL pretraining with validation and kNN", minutes, minutes],
    ]

    starts = {"random trunk": [0.0] * len(random), "PIRL trunk": pretraining}
    runs_of = {"random trunk": random, "PIRL trunk": pirl}
    for trunk, runs in runs_of.items():
        softmax = [run["seconds"]["softmax"] for run in runs]
        full = [run["seconds"]["full"] for run in runs]
        after_softmax = add_each(starts[trunk], softmax)
        after_full = add_each(after_softmax, full)

        # There is no row of kNN: the softmax layer is trained on the same features.
        probe = f"linear probe (only the softmax layer), {trunk}"
        rows.append([probe, spread_minutes(softmax), spread_minutes(after_softmax)])
        fine_tuning = f"full fine-tuning, {trunk}"
        rows.append([fine_tuning, spread_minutes(full), spread_minutes(after_full)])
    return markdown_table(rows)


def pretraining_seconds(run):
    return sum(epoch["seconds"] for epoch in run["history"])


def add_each(first, second):
    return [a + b for a, b in zip(first, second, strict=True)]


def spread_minutes(seconds):
    return spread(seconds, scale=1 / 60)


# ---- The picture ---------------------------------------------------------------------
def import_figure():
    """matplotlib's Figure. Only this module needs matplotlib, so it may be missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the picture needs matplotlib",
            "pip install -r requirements-dev.txt",
        ) from None
    return Figure


def draw_curves(pretrained, path):
    """A panel for each of CURVES, in it a line for each seed."""
    figure = import_figure()(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for panel, (column, title) in zip(panels, CURVES.items(), strict=True):
        for seed, run in enumerate(pretrained):
            # kNN accuracy is not measured in every epoch.
            measured = [row for row in run["history"] if row[column] is not None]
            epochs = [row["epoch"] for row in measured]
            values = [row[column] for row in measured]
            panel.plot(epochs, values, marker=".", label=f"seed {seed}")
        panel.set_title(title)
        panel.set_xlabel("epoch")
        panel.locator_params(axis="x", integer=True)
        panel.grid(alpha=0.3)
    if len(pretrained) > 1:
        panels[0].legend()

    with atomic_write(path) as file:
        figure.savefig(file, format="svg")


if __name__ == "__main__":
    run_script(main)
