"""Tables and reports: made of real runs, small ones; and the synthetic images."""

import copy
import itertools
import math
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from records import same
from torchvision.transforms.functional import to_tensor

import augmentations
import jigsaw
from benchmarks import compare, equal_time, gpu_report, results, synthetic, throughput
from dataset_helpers import load_labelled
from models import SmallMapConv2d, make_trunk
from runtime import devices
from runtime.errors import UserError
from runtime.weights import find_trunk
from stl10_data_load import SPLITS, write_split


# ---- The results table ---------------------------------------------------------------
@pytest.fixture
def run_here(call, tmp_path, monkeypatch):
    """The scripts run in this process instead of one of their own.

    run_here.runs: their names. The current folder is the test's.
    """
    runs = []

    def run(command):
        script = Path(command[1]).stem
        outcome = call(script, *command[2:])
        assert outcome.status == 0, outcome.err
        runs.append(script)
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "subprocess", SimpleNamespace(run=run))
    return SimpleNamespace(runs=runs)


@pytest.fixture
def make_table(run_here, data_dir, tmp_path):
    """make_table(flags of pretraining) -> the lines of the table's file."""

    def make_table(flags):
        tiny = "--image-size 36 --device cpu --batch-size 16"
        arguments = ["--data-dir", str(data_dir), "--seeds", "1"]
        arguments += ["--epochs", "1", "--labelled-epochs", "2"]
        arguments += [f"--flags={flags} {tiny}", f"--labelled-flags={tiny}"]
        results.main(arguments)
        return (tmp_path / "results/data.md").read_text("utf-8").splitlines()

    return make_table


def test_results(make_table, run_here, tmp_path, capsys):
    """All stages once; then nothing is run again; a change of settings is refused."""
    lines = make_table("")
    assert make_table("") == lines
    assert len(run_here.runs) == 3
    assert lines[0] == "# data: 100 unlabelled training images, seeds: 1"

    # The table of test images, then the one of validation images; a cell per trunk.
    for name in results.STAGES:
        rows = [line for line in lines if line.startswith(f"{name} | ")]
        assert len(rows) == 2
        assert all(row.count("%") == 2 for row in rows)

    picture = tmp_path / "results/data.svg"
    assert "<svg" in picture.read_text("utf-8")
    assert picture.stat().st_size < 300_000

    for changed in ("--lr 0.1", "--tmax-for-cos-decay 5"):
        refusal = f"pirl_0.sh is the command .*{changed}.*: rename"
        with pytest.raises(UserError, match=refusal):
            make_table(changed)

    # The other table is of the same files, by real runs.
    capsys.readouterr()
    weights = tmp_path / "results/data/weights"
    compare.main(["--weights-dir", str(weights), "from_random_0", "from_pirl_0"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.count("%") for row in rows] == [4, 4, 4]


def test_results_ask_for_matplotlib_before_they_begin(
    make_table, run_here, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r": pip install -r requirements-dev\.txt$"):
        make_table("")
    assert run_here.runs == []


STAGES = ("knn", "softmax", "full")


def made_up_accuracy(trunk, seed, stage, split):
    """split: 0 for validation, 1 for test. No two of these are the same."""
    base = {"random": 0.2, "pirl": 0.6}[trunk]
    return base + 0.1 * STAGES.index(stage) + 0.03 * seed + 0.004 * split


def made_up_run(trunk, seed):
    """As finished_run() gives it, as far as the table reads it; trunk: None of PIRL."""
    columns = ("epoch", "seconds", "train_loss", "train_acc", "knn_acc")
    epochs = ((1, 120.0, 2.0, 0.1, None), (2, 60.0 + 12 * seed, 1, 0.2, 0.3))
    results_of = {}
    for stage in STAGES if trunk else ():
        pair = [made_up_accuracy(trunk, seed, stage, split) for split in (0, 1)]
        results_of[stage] = tuple(pair)
    return {
        "images": 70,
        "machine": "a machine",
        "history": [dict(zip(columns, epoch, strict=True)) for epoch in epochs],
        "results": results_of,
        "seconds": {
            "softmax": 30.0 + 6 * seed,
            "full": {"random": 90.0, "pirl": 150.0}.get(trunk, 0) + 24 * seed,
        },
    }


def test_results_run_the_recommended_commands_and_each_column_has_its_runs(
    tmp_path, monkeypatch
):
    flags_of = {}

    def finished_run(folder, name, script, flags):
        assert flags_of.keys().isdisjoint([name])
        flags_of[name] = dict(zip(flags[::2], flags[1::2], strict=True))
        trunk = {"from_random": "random", "from_pirl": "pirl"}.get(name[:-2])
        is_pretraining = script == "pirl_stl_train_test.py"
        assert is_pretraining == (trunk is None)
        return made_up_run(trunk, int(name[-1]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "finished_run", finished_run)
    figure = MagicMock()
    panels = [MagicMock(), MagicMock(), MagicMock()]
    figure.return_value.subplots.return_value = panels
    monkeypatch.setattr(results, "import_figure", lambda: figure)
    arguments = ["--data-dir", "data", "--seeds", "2", "--epochs", "7"]
    arguments += ["--labelled-epochs", "9"]
    arguments += ["--flags=--stem small", "--labelled-flags=--full-lr 0.5"]
    results.main(arguments)

    # With the defaults of both scripts, but for what the README recommends.
    for seed in ("0", "1"):
        common = {"--data-dir": "data", "--seed": seed}
        assert flags_of[f"pirl_{seed}"] == {
            **common,
            "--epochs": "7",
            "--only-train": "True",
            "--stem": "small",
        }
        labelled = {
            **common,
            "--epochs": "9",
            "--full-fine-tune": "True",
            "--full-lr": "0.5",
        }
        assert flags_of[f"from_random_{seed}"] == labelled
        with_trunk = {**labelled, "--pirl-model-name": f"pirl_{seed}"}
        assert flags_of[f"from_pirl_{seed}"] == with_trunk

    def cell(values):
        return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"

    lines = (tmp_path / "results/data.md").read_text("utf-8").splitlines()
    names = ["kNN", "linear probe (only the softmax layer)", "full fine-tuning"]
    for name, stage in zip(names, STAGES, strict=True):
        expected = []
        for split in (1, 0):  # the table of the test images comes first
            cells = [name]
            for trunk in ("random", "pirl"):
                pair = [made_up_accuracy(trunk, seed, stage, split) for seed in (0, 1)]
                cells.append(cell([100 * accuracy for accuracy in pair]) + " %")
            expected.append(" | ".join(cells))
        assert [line for line in lines if line.startswith(f"{name} | ")] == expected

    # Minutes of each stage, and cumulative: pretraining counts for the PIRL trunk.
    # Of the two seeds: 3 and 3.2, then 0.5 and 0.6, then 1.5 and 1.9, or 2.5 and 2.9.
    for row in (
        "PIRL pretraining with validation and kNN | 3.10 ± 0.14 | 3.10 ± 0.14",
        f"{names[1]}, random trunk | 0.55 ± 0.07 | 0.55 ± 0.07",
        f"{names[2]}, random trunk | 1.70 ± 0.28 | 2.25 ± 0.35",
        f"{names[1]}, PIRL trunk | 0.55 ± 0.07 | 3.65 ± 0.21",
        f"{names[2]}, PIRL trunk | 2.70 ± 0.28 | 6.35 ± 0.49",
    ):
        assert row in lines

    curves = (([1, 2], [2.0, 1]), ([1, 2], [0.1, 0.2]), ([2], [0.3]))
    for panel, curve in zip(panels, curves, strict=True):
        assert [drawn.args for drawn in panel.plot.call_args_list] == [curve] * 2

    command = "python pirl_stl_train_test.py --data-dir data --epochs 7"
    assert f"    {command} --only-train True --stem small" in lines


def test_an_interrupted_run_ends_the_table_and_goes_on_next_time(tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=143)

    monkeypatch.setattr(results, "subprocess", SimpleNamespace(run=run))
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            results.finished_run(tmp_path, "a", results.PRETRAINING, ["--seed", "0"])
        assert end.value.code == 143
    assert len(commands) == 2
    for command in commands:
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        assert flags["--resume"] == "True"
        assert flags["--weights-dir"] == str(tmp_path / "weights")
        assert flags["--observations-dir"] == str(tmp_path / "observations_dir")


# ---- Beside another library ----------------------------------------------------------
class MeanSquare(torch.nn.Module):
    """In the place of a method of lightly."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, view):
        return self.backbone(view)

    def loss(self, outputs):
        assert len(outputs[0]) == equal_time.BATCH_SIZE, "a batch is whole"
        return (outputs[0] - outputs[1]).square().mean()

    def before_step(self):
        pass


class Diverging(MeanSquare):
    def loss(self, outputs):
        return super().loss(outputs) * float("nan")


def make_transform(size):
    def two_views(image):
        image = to_tensor(image.resize((size, size)))
        return [image, image.flip(2)]

    return two_views


@pytest.fixture
def without_lightly(monkeypatch):
    monkeypatch.setattr(equal_time, "LIGHTLY_ERROR", None)
    monkeypatch.setattr(equal_time, "lightly_version", lambda: "0")
    monkeypatch.setattr(equal_time, "make_transform", make_transform)
    methods = {"MeanSquare": MeanSquare, "Diverging": Diverging}
    monkeypatch.setattr(equal_time, "METHODS", methods)
    rates = {"MeanSquare": (0.1,), "Diverging": (0.1,)}
    monkeypatch.setattr(equal_time, "LEARNING_RATES", rates)
    monkeypatch.setattr(equal_time, "BATCH_SIZE", 16)


@pytest.mark.parametrize("method", ["MeanSquare", "Diverging"])
def test_a_peer_trains_for_its_time(without_lightly, data_dir, monkeypatch, method):
    """Of whole batches, by half a cosine; a look at this clock takes a second."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(equal_time, "time", clock)
    optimizers = []
    rates = []
    starts = []

    def make_optimizer(parameters, lr, weight_decay):
        assert weight_decay == 5e-4
        optimizers.append(devices.make_optimizer(parameters, lr, weight_decay))
        return optimizers[0]

    def before_step(model):
        rates.append(optimizers[0].param_groups[0]["lr"])
        starts.append(copy.deepcopy(model.backbone.state_dict()))

    monkeypatch.setattr(equal_time, "make_optimizer", make_optimizer)
    monkeypatch.setattr(equal_time.METHODS[method], "before_step", before_step)
    flags = ["--data-dir", str(data_dir), "--image-size", "36", "--workers", "0"]
    args = equal_time.parse_args([*flags, "--precision", "fp32"])
    variant = equal_time.Variant(method, 0.1, False)
    run = equal_time.pretrain_peer(args, torch.device("cpu"), variant, 3, limit=12)

    # Batches of 16 of 100 images: six in an epoch. Every tenth loss is looked at.
    steps = 11 if method == "MeanSquare" else 10
    assert run["image_count"] == 16 * steps
    expected = [0.05 * (1 + math.cos(math.pi * second / 12)) for second in range(1, 12)]
    assert rates == pytest.approx(expected[:steps])
    assert run["diverged"] == (method == "Diverging")
    assert run["seconds"] >= 12 or run["diverged"]
    torch.manual_seed(3)
    trunk, _ = make_trunk("res18", zero_init=False)
    assert same(dict(starts[0]), dict(trunk.state_dict()))
    trained = run["state_dict"]["backbone.conv1.weight"]
    assert not trunk.conv1.weight.equal(trained)
    pixels = (run["pixel_mean"], run["pixel_std"])
    assert pixels == (augmentations.PIXEL_MEAN, augmentations.PIXEL_STD)
    if not run["diverged"]:
        statistics = run["state_dict"]["backbone.bn1.num_batches_tracked"]
        assert statistics == math.ceil(100 / 16), "of all images, as they are"


def test_a_peer_is_trained_once_and_measured_as_pirl_is(
    without_lightly, tmp_path, monkeypatch
):
    """Of one that has diverged there is nothing to measure."""
    trained = []
    tuned = []

    def pretrain_peer(args, device, variant, seed, limit):
        trained.append((variant, seed, limit))
        facts = {"image_count": 320, "seconds": 61.0, "machine": "a machine"}
        return facts | {"diverged": variant.method == "Diverging"}

    def finished_run(folder, name, script, flags):
        tuned.append((name, script, flags[flags.index("--seed") :]))
        return {"results": {"softmax": (0.5, 0.4), "knn": (0.3, 0.2)}}

    monkeypatch.setattr(equal_time, "pretrain_peer", pretrain_peer)
    monkeypatch.setattr(equal_time, "finished_run", finished_run)

    def run(method, zero_init, *flags):
        args = equal_time.parse_args(flags)
        variant = equal_time.Variant(method, 0.1, zero_init)
        device = torch.device("cpu")
        return equal_time.run_peer(args, tmp_path, device, variant, 2, 60.0)

    for _ in range(2):
        plain = run("Mean Square", False, "--seeds", "1")
        lost = run("Diverging", True)
    variants = [equal_time.Variant("Mean Square", 0.1, False), lost.variant]
    assert trained == [(variant, 2, 60.0) for variant in variants]
    common = (2, 320, 61.0, "a machine")
    assert plain == (variants[0], *common, (0.5, 0.4), (0.3, 0.2))
    assert lost == (variants[1], *common, None, None)
    name = "Mean_Square_0.1_plain_2"
    trunk = str(tmp_path / f"weights/{name}.pth")
    flags = ["--seed", "2", "--pirl-model-name", trunk]
    assert tuned == [(f"from_{name}", results.FINE_TUNING, flags)] * 2
    with pytest.raises(UserError, match="was made with other settings: remove"):
        run("Mean Square", False, "--workers", "7")


def test_equal_time_chooses_by_validation_and_runs_all_seeds(
    without_lightly, tmp_path, monkeypatch
):
    accuracies = {(0.1, True): 0.3, (0.1, False): 0.2, (0.5, True): 0.4}
    peers = []

    def run_pirl(args, folder, seed):
        return made_up_result("PIRL", 0.2, True, seed, 0.5)

    def run_peer(args, folder, device, variant, seed, limit):
        assert limit == 60.0 + seed, "the time that PIRL took"
        table = next((tmp_path / "results").glob("*_minutes.md")).read_text("utf-8")
        rows = [line for line in table.splitlines() if line.count(" | ") == 9][2:]
        assert len(rows) == 3 + len(peers), "three of PIRL, and what has ended since"
        accuracy = accuracies.get((variant.lr, variant.zero_init))
        result = made_up_result(*variant, seed, accuracy)
        peers.append((result.variant, seed))
        return result

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equal_time, "run_pirl", run_pirl)
    monkeypatch.setattr(equal_time, "run_peer", run_peer)
    rates = {"MeanSquare": (0.1, 0.5), "Diverging": (0.02, 0.1, 0.5)}
    monkeypatch.setattr(equal_time, "LEARNING_RATES", rates)
    flags = "--device cpu --seeds 3 --minutes 7.5 --workers 5 --image-size 40"
    equal_time.main(flags.split())
    for method, its_rates in rates.items():
        own = [(variant, seed) for variant, seed in peers if variant.method == method]
        variants = [(True, lr) for lr in its_rates] + [(False, lr) for lr in its_rates]
        expected = [(equal_time.Variant(method, lr, init), 0) for init, lr in variants]
        best = equal_time.Variant(method, 0.5, True)
        assert own == [*expected, (best, 1), (best, 2)]

    # A row per run, and the printed command makes the same table.
    text = (tmp_path / "results/stl10_data_7.5_minutes.md").read_text("utf-8")
    row = "MeanSquare | 0.5 | yes | 1 | 1280 | 1.0 | 21 | 20.00 % | 40.00 % | 10.00 %"
    assert row in text.splitlines()
    (printed,) = [line for line in text.splitlines() if "python -m" in line]
    args = equal_time.parse_args(shlex.split(printed)[3:])
    expected = equal_time.parse_args([*flags.split(), "--precision", "fp32"])
    assert vars(args) == vars(expected)


def made_up_result(method, lr, zero_init, seed, validation, test=0.1):
    """validation: None of a run that has diverged."""
    variant = equal_time.Variant(method, lr, zero_init)
    softmax = None if validation is None else (validation, test)
    knn = None if validation is None else (0.3, 0.2)
    seconds = 60.0 + seed
    return equal_time.Result(variant, seed, 1280, seconds, "a machine", softmax, knn)


def test_the_best_variant_is_that_of_the_validation_images():
    rows = [
        made_up_result("PIRL", 0.2, True, 0, 0.5, 0.51),
        made_up_result("SimCLR", 0.02, True, 0, 0.4, 0.46),
        made_up_result("SimCLR", 0.06, True, 0, 0.45, 0.44),
        made_up_result("SimCLR", 0.06, True, 1, 0.44, 0.42),
        made_up_result("BYOL", 0.02, True, 0, None),
        made_up_result("Barlow Twins", 0.2, True, 0, 0.3, 0.31),
    ]
    lines = equal_time.summary_table(rows).splitlines()
    assert lines[2:] == [
        "PIRL | 20.00 % | 51.00 % | 1",
        "SimCLR | 20.00 ± 0.00 % | 43.00 ± 1.41 % | 2",
        "BYOL | diverged | diverged | 1",
        "Barlow Twins | 20.00 % | 31.00 % | 1",
    ]


@pytest.mark.slow
@pytest.mark.full_trunk
@pytest.mark.parametrize("method", equal_time.METHODS)
def test_the_methods_of_lightly(method, data_dir):
    """A few steps of each; the trunk is the one that gradients have changed."""
    pytest.importorskip("lightly")
    args = SimpleNamespace(
        data_dir=data_dir, image_size=36, precision="bf16", workers=0
    )
    variant = equal_time.Variant(method, 0.06, True)
    with patch.object(equal_time, "BATCH_SIZE", 16):
        run = equal_time.pretrain_peer(args, torch.device("cpu"), variant, 0, limit=2)
    assert not run["diverged"]
    assert run["image_count"] > 0
    trunk = find_trunk(run)
    assert trunk["conv1.weight"].equal(run["state_dict"]["backbone.conv1.weight"])


@pytest.mark.parametrize(
    ("minutes", "epochs"), [(0.99, None), (1, 1), (1.49, 1), (1.5, 2), (12, 23)]
)
def test_equal_time_counts_the_epochs_that_fit(monkeypatch, tmp_path, minutes, epochs):
    """The first epoch of a process takes a minute, the others half a minute each."""
    counts = []

    def finished_run(folder, name, script, flags):
        if script == results.FINE_TUNING:
            return {"results": {"softmax": (0.5, 0.4), "knn": (0.3, 0.2)}}
        counts.append(int(flags[flags.index("--epochs") + 1]))
        seconds = [60.0] + [30.0] * (counts[-1] - 1)
        return {
            "history": [{"seconds": of_epoch} for of_epoch in seconds],
            "settings": {"lr": 0.2, "zero_init": True},
            "images": 100,
            "machine": "a machine",
        }

    monkeypatch.setattr(equal_time, "finished_run", finished_run)
    args = equal_time.parse_args(["--minutes", str(minutes)])
    if epochs is None:
        with pytest.raises(UserError, match=r"longer than 0\.99 minutes: raise"):
            equal_time.run_pirl(args, tmp_path, 0)
        return

    result = equal_time.run_pirl(args, tmp_path, 0)
    assert counts == [2, epochs]
    assert result.image_count == 100 * epochs
    assert result.seconds == 60 + 30 * (epochs - 1)


def test_equal_time_without_lightly(monkeypatch):
    monkeypatch.setattr(equal_time, "LIGHTLY_ERROR", ImportError("no lightly"))
    with pytest.raises(UserError, match=r"lightly is missing \(no lightly\): pip"):
        equal_time.main([])


# ---- Two runs side by side -----------------------------------------------------------
def write_model(path, trunk, accuracies):
    """A model file as fine-tuning writes it, as far as the comparison reads it."""
    torch.save({"settings": {"pirl_model_name": trunk}, "results": accuracies}, path)


def compared(tmp_path, capsys, random, pirl):
    """The lines of the table of two models with these accuracies."""
    write_model(tmp_path / "a.pt", None, random)
    write_model(tmp_path / "b.pt", "exp", pirl)
    compare.main(["--weights-dir", str(tmp_path), "a", "b"])
    return capsys.readouterr().out.splitlines()


def test_compare(tmp_path, capsys):
    """The reference's rows, and kNN below them; the two trunks beside each other."""
    random = {"knn": (0.3, 0.31), "softmax": (0.4, 0.41), "full": (0.5, 0.51)}
    pirl = {"knn": (0.6, 0.61), "softmax": (0.7, 0.71), "full": (0.8, 0.81)}
    assert compared(tmp_path, capsys, random, pirl) == [
        "Fine tuning strategy | val, random trunk | val, PIRL trunk"
        " | test, random trunk | test, PIRL trunk",
        "--- | --- | --- | --- | ---",
        "Only softmax layer is fine tuned | 40.00 % | 70.00 % | 41.00 % | 71.00 %",
        "Full model is fine tuned | 50.00 % | 80.00 % | 51.00 % | 81.00 %",
        "kNN | 30.00 % | 60.00 % | 31.00 % | 61.00 %",
    ]


def test_compare_what_there_is(tmp_path, capsys):
    """Without test images, and where not all stages were gone through."""
    random = {"knn": (0.3, None), "softmax": (0.4, None)}
    pirl = {**random, "full": (0.8, None)}
    softmax = "Only softmax layer is fine tuned | 40.00 % | 40.00 % | none | none"
    full = "Full model is fine tuned |  | 80.00 % |  | none"
    knn = "kNN | 30.00 % | 30.00 % | none | none"
    assert compared(tmp_path, capsys, random, random)[2:] == [softmax, knn]
    assert compared(tmp_path, capsys, random, pirl)[2:] == [softmax, full, knn]


def test_compare_refuses_other_models(tmp_path):
    write_model(tmp_path / "a.pt", None, {})
    write_model(tmp_path / "b.pt", "exp", {})
    torch.save({"trunk": {}, "settings": {}}, tmp_path / "exp.pt")
    for first, second, refusal in (
        ("b", "a", "b had a pretrained trunk, or a a random one: name the run"),
        ("a", "a", "a had a pretrained trunk, or a a random one: name the run"),
        ("a", "exp", "exp.pt holds no accuracies of fine-tuning: name a model"),
    ):
        with pytest.raises(UserError, match=refusal):
            compare.main(["--weights-dir", str(tmp_path), first, second])


# ---- Speed ---------------------------------------------------------------------------
TINY = ["--image-size", "36", "--device", "cpu", "--steps", "1"]


def test_throughput(monkeypatch, capsys):
    """One table of three; the contestants are what they are called."""
    monkeypatch.setattr(throughput, "IMAGES", 64)
    monkeypatch.setattr(throughput.os, "cpu_count", lambda: 1)
    throughput.main([*TINY, "--batch-size", "16", "--rounds", "1"])

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    names = [row[0] for row in rows]
    assert names == ["bare network", "training step", "conventional pipeline"]
    assert rows[0][3] == "1.000"
    for _, speed, _, time_ratio in rows:
        assert float(speed) > 0
        assert float(time_ratio) > 0

    with pytest.raises(SystemExit):
        throughput.main([*TINY, "--pretext", "rotation"])
    assert "use --conventional False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_figures_of_throughput(monkeypatch, precision, dtype):
    """Of made-up seconds: speeds, ratios and the share of the yardstick."""
    products = []

    def made_up_rate(device, dtype):
        products.append((device.type, dtype))
        return 28e9

    kinds = {}

    def contestant(name):
        def make(trainer, *_):
            modules = trainer.model.modules()
            kinds[name] = {type(m) for m in modules if isinstance(m, torch.nn.Conv2d)}
            return lambda: None

        return make

    seconds = iter([1.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(throughput, "IMAGES", 32)
    monkeypatch.setattr(throughput, "bare_network", contestant("bare network"))
    monkeypatch.setattr(throughput, "training_step", contestant("training step"))
    monkeypatch.setattr(throughput, "count_flops", lambda trainer, size: 1e9 * size)
    with monkeypatch.context() as changed:
        changed.setattr(throughput, "product_rate", made_up_rate)
        changed.setattr(throughput, "timed", lambda *_: (next(seconds), 0.5))
        flags = "--image-size 36 --device cpu --steps 6 --batch-size 8 --rounds 2"
        flags += f" --conventional False --pretext rotation --precision {precision}"
        result = throughput.measure(throughput.parse_args(flags.split()))

    speeds = {"bare network": [48, 24], "training step": [16, 12]}
    assert result["speeds"] == speeds
    assert result["ratios"] == {"bare network": 1, "training step": 2.5}
    assert result["memory"] == 0.5
    assert result["rate"] == pytest.approx(0.014)
    assert result["share"] == pytest.approx(0.5)
    assert products == [("cpu", dtype)], "in the network's own precision"
    conv = torch.nn.Conv2d
    assert kinds == {"bare network": {conv}, "training step": {conv, SmallMapConv2d}}

    monkeypatch.setattr(throughput, "timed", lambda *_: (1.0, 0))
    rate = throughput.product_rate(torch.device("cpu"), torch.float32)
    assert rate == 20 * 2 * 256**3


def test_what_is_timed_is_done_and_the_first_call_does_not_count(monkeypatch):
    events = []
    times = iter([10.0, 13.0])

    def perf_counter():
        events.append("clock")
        return next(times)

    clock = SimpleNamespace(perf_counter=perf_counter)
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "synchronize", lambda: events.append("wait"))
    seconds, _ = throughput.timed(lambda: events.append("step"), 2)
    assert seconds == 3
    assert events == ["step", "wait", "clock", "step", "step", "wait", "clock"]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_bare_network_trains_in_the_precision_of_the_step(precision, dtype):
    flags = [*TINY, "--batch-size", "8", "--precision", precision]
    trainer = throughput.make_trainer(throughput.parse_args(flags), 32)
    trunk = trainer.model.trunk
    types = []

    def note(module, inputs, output):
        types.append(output.dtype)

    trunk.layer4[0].conv2.register_forward_hook(note)
    before = trunk.conv1.weight.detach().clone()
    throughput.bare_network(trainer)()
    assert types == [dtype] * 2
    assert not trunk.conv1.weight.equal(before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_conventional_pipeline_s_views_are_those_of_the_step():
    """The same shapes, and about the same mean and spread over many images."""
    torch.manual_seed(0)
    small = torch.randint(0, 256, (100, 3, 12, 12), dtype=torch.uint8)
    images = small.repeat_interleave(4, 2).repeat_interleave(4, 3)

    per_image = throughput.PerImageViews(images)
    items = [per_image[i] for i in range(100)]
    indices, image_views, patch_views = zip(*items, strict=True)
    assert indices == tuple(range(100))

    uniforms = torch.rand(100, augmentations.IMAGE_VIEW_UNIFORMS)
    project_images = augmentations.ImageView()(images.float(), uniforms)
    task = jigsaw.Jigsaw()
    project_patches = task(images.float(), torch.rand(100, task.uniforms))

    for conventional, project in (
        (torch.stack(image_views), project_images),
        (torch.cat(patch_views), project_patches),
    ):
        assert conventional.shape == project.shape
        assert (conventional.mean() - project.mean()).abs() < 0.1
        assert 0.8 < conventional.std() / project.std() < 1.25


@pytest.mark.parametrize(
    ("has_bf16", "precisions"), [(True, ["fp32", "bf16"]), (False, ["fp32", "fp16"])]
)
def test_gpu_report_s_precisions_are_those_of_the_card(
    has_bf16, precisions, monkeypatch
):
    def is_bf16_supported(including_emulation):
        assert not including_emulation
        return has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert gpu_report.precisions_of(torch.device("cuda")) == precisions
    assert gpu_report.precisions_of(torch.device("cpu")) == ["fp32", "bf16"]


def test_gpu_report_takes_an_epoch_by_the_defaults_and_by_the_fastest(
    monkeypatch, tmp_path
):
    measured = []
    epochs = []

    def measure(args):
        assert (args.steps, args.rounds, args.conventional) == (3, 3, False)
        assert (args.device, args.image_size) == ("cpu", 36)
        measured.append((args.batch_size, args.precision, args.compile))
        if len(measured) == 6:
            raise RuntimeError("a | b\nmore")
        speed = (5, 7, 8, 5, 9)[len(measured) - 1]
        speeds = [speed, speed, 100]  # of which the median counts
        return {
            "speeds": {"bare network": [1.0], "training step": speeds},
            "ratios": {"bare network": 1.0, "training step": 0.5},
            "memory": 2.0,
            "rate": 3.0,
            "share": 0.25,
        }

    def epoch_cells(images, flags):
        epochs.append((images, flags))
        return "1.0 | 1.7 | 2.00 GiB"

    common = ["--device", "cpu", "--image-size", "36"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_report, "run_cuda_tests", lambda: "9 skipped")
    monkeypatch.setattr(throughput, "measure", measure)
    with monkeypatch.context() as changed:
        changed.setattr(gpu_report, "epoch_cells", epoch_cells)
        flags = ["--batch-sizes", "8", "16", "--images", "40", "--steps", "3"]
        gpu_report.main([*common, *flags])

    assert measured == [
        (batch, precision, compiled)
        for batch in (8, 16)
        for precision in ("fp32", "bf16")
        for compiled in (False, True)
    ]
    default = ["--batch-size", "8"]
    fastest = ["--batch-size", "16", "--precision", "fp32", "--compile", "False"]
    assert epochs == [(40, [*common, *default]), (40, [*common, *fastest])]
    lines = (tmp_path / "results/gpu_CPU.md").read_text("utf-8").splitlines()
    assert "`tests/test_cuda.py`: 9 skipped" in lines
    assert "8 | fp32 | compiled | 7 | 0.500 | 2.00 GiB | 3.0 | 25.0%" in lines
    assert "16 | fp32 | compiled | failed: RuntimeError: a / b" in lines
    assert f"40 | {' '.join(default)} | 1.0 | 1.7 | 2.00 GiB" in lines
    for headings, rule in itertools.pairwise(lines):
        assert "---" not in rule or headings.count("|") == rule.count("|")

    monkeypatch.setattr(throughput, "timed", lambda step, count: (30.0 * count, 1.5))
    cells = gpu_report.epoch_cells(40, [*common, "--batch-size", "16"])
    assert cells == "90.0 | 150.0 | 1.50 GiB", "of three steps"


def test_gpu_report_names_the_tests_that_fail(monkeypatch):
    failure = "FAILED tests/test_cuda.py::test_a - assert 1 == 2"
    summary = "1 failed, 1 passed in 3.00s"
    for out, text in (
        (f"F.\n{failure}\n{summary}\n", f"{failure}; {summary}"),
        ("", "not run: there is no pytest (pip install pytest)"),
    ):
        result = SimpleNamespace(stdout=out)
        fake = SimpleNamespace(PIPE=None, run=lambda *_, result=result, **__: result)
        monkeypatch.setattr(gpu_report, "subprocess", fake)
        assert gpu_report.run_cuda_tests() == text


# ---- Synthetic images ----------------------------------------------------------------
def test_synthetic_set(tmp_path):
    counts = {"train": 10, "test": 10, "unlabelled": 3}
    content = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write_synthetic(tmp_path / name, counts, seed)
        content[name] = (tmp_path / name / "train_X.bin").read_bytes()
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]
    assert content["a"] != (tmp_path / "a/test_X.bin").read_bytes()

    counts = {"train": 200, "test": 10, "unlabelled": 3}
    synthetic.write_synthetic(tmp_path / "raw", counts, 1)
    write_split(tmp_path / "raw", tmp_path / "data", "train")
    images, labels, *_ = load_labelled(tmp_path / "data", 96, torch.device("cpu"), 0)
    assert torch.bincount(labels).tolist() == [20] * 10

    # Mean colour does not tell the classes apart: nearest class mean on half of the
    # images, tried on the other half.
    means = images.float().mean((2, 3))
    class_means = []
    for label in range(10):
        class_means.append(means[:100][labels[:100] == label].mean(0))
    distances = torch.cdist(means[100:], torch.stack(class_means))
    accuracy = (distances.argmin(1) == labels[100:]).float().mean()
    assert accuracy < 0.25


def test_a_synthetic_label_is_that_of_its_image_s_pattern(tmp_path, monkeypatch):
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    maps = [pattern(x, y) for pattern in synthetic.PATTERNS]
    assert len(maps) == 10
    for one, other in itertools.combinations(maps, 2):
        assert abs(one - other).mean() > 0.02

    drawn = []

    def noting(label):
        return lambda x, y: drawn.append(label) or 0 * x

    monkeypatch.setattr(synthetic, "PATTERNS", [noting(label) for label in range(10)])
    for label in range(10):
        synthetic.synthetic_image(label, np.random.default_rng(0))
    assert drawn == list(range(10))

    def two_halves(label, rng):
        image = np.full((96, 96, 3), 20 * label, np.uint8)
        image[:, 48:] += np.uint8([1, 2, 3])  # the right half, in another colour
        return image

    monkeypatch.setattr(synthetic, "synthetic_image", two_halves)
    counts = {"train": 30, "test": 20, "unlabelled": 10}
    synthetic.write_synthetic(tmp_path / "raw", counts, 0)
    for split in ("train", "test"):
        images_name, labels_name = SPLITS[split]
        images = np.fromfile(tmp_path / "raw" / images_name, np.uint8)
        labels = np.fromfile(tmp_path / "raw" / labels_name, np.uint8)
        columns = images.reshape(len(labels), 3, 96, 96)
        base = 20 * (labels[:, None, None, None] - 1)
        assert (columns[:, :, :48] == base).all()
        right = base + np.uint8([1, 2, 3])[:, None, None]
        assert (columns[:, :, 48:] == right).all()
