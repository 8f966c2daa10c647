"""Two finished fine-tunings side by side: from a random trunk, and from a PIRL trunk.

python -m benchmarks.compare --weights-dir demo/weights from_random from_pirl
"""

import statistics
from pathlib import Path

from report import TABLE_ROWS
from runtime.arguments import Parser, file_path
from runtime.errors import UserError
from runtime.files import read_torch_file
from runtime.script import run_script

# The stages as in the tables of fine-tuning, and by their names in a model file.
STAGES = {TABLE_ROWS[stage]: stage for stage in ("softmax", "full", "knn")}
# A stage's result in a model file is the pair (validation accuracy, test accuracy).
VALIDATION = 0
TEST = 1


def parse_args(argv=None):
    parser = Parser(
        "Two finished fine-tunings, of a random and of a PIRL trunk, in one table."
    )
    parser.add_argument("random", help="the experiment that began with a random trunk")
    parser.add_argument("pirl", help="the experiment that began with a PIRL trunk")
    parser.add_argument(
        "--weights-dir",
        type=file_path,
        default=Path("weights"),
        help="the folder with <experiment>.pt of both",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    random = read_finished(args.weights_dir / f"{args.random}.pt")
    pirl = read_finished(args.weights_dir / f"{args.pirl}.pt")

    # Names in the wrong order would put PIRL's accuracies under "random trunk".
    trunks = [model["settings"]["pirl_model_name"] for model in (random, pirl)]
    if trunks[0] is not None or trunks[1] is None:
        raise UserError(
            f"{args.random} had a pretrained trunk, or {args.pirl} a random one",
            "name the run without --pirl-model-name first",
        )

    columns = {
        "val, random trunk": ([random], VALIDATION),
        "val, PIRL trunk": ([pirl], VALIDATION),
        "test, random trunk": ([random], TEST),
        "test, PIRL trunk": ([pirl], TEST),
    }
    print(accuracy_table("Fine tuning strategy", STAGES, columns))


def read_finished(path):
    """The content of a finished fine-tuning's model file."""
    model = read_torch_file(path)
    if "results" not in model:
        raise UserError(
            f"{path} holds no accuracies of fine-tuning",
            "name a model that train_stl_after_ssl.py has written",
        )
    return model


def accuracy_table(title, stages, columns):
    """Accuracies as the text of a Markdown table, each the mean of a column's models.

    stages: {name in the table: name in the model files}; columns: {heading: (models,
    VALIDATION or TEST)}. A stage that no model has gone through gets no row.
    """
    rows = [[title, *columns]]
    for name, stage in stages.items():
        cells = []
        for models, split in columns.values():
            results = [model["results"].get(stage) for model in models]
            cells.append(accuracy_cell(results, split))
        if any(cells):
            rows.append([name, *cells])
    return markdown_table(rows)


def accuracy_cell(results, split):
    if None in results:
        return ""  # a model without this stage
    accuracies = [result[split] for result in results]
    if None in accuracies:
        return "none"  # there are no test images
    return spread(accuracies, scale=100, unit=" %")


def spread(values, scale=1.0, unit=""):
    """Mean ± standard deviation (of the sample) as text; of one value, itself."""
    text = f"{scale * statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.2f}"
    return text + unit


def markdown_table(rows):
    """Rows of texts, the headings first, as a Markdown table."""
    rule = ["---"] * len(rows[0])
    lines = [" | ".join(row) for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
