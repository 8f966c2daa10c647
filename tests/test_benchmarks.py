"""Tables and reports: made of real runs, small ones; and the synthetic images."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import augmentations
import jigsaw
import pirl_stl_train_test
from benchmarks import compare, equal_time, gpu_report, results, synthetic, throughput
from dataset_helpers import load_labelled
from run_helpers import UserError
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
        arguments = ["--data-dir", str(data_dir), "--seeds", "2"]
        arguments += ["--epochs", "1", "--labelled-epochs", "2"]
        arguments += [f"--flags={flags} {tiny}", f"--labelled-flags={tiny}"]
        results.main(arguments)
        return (tmp_path / "results/data.md").read_text("utf-8").splitlines()

    return make_table


def test_results(make_table, run_here, tmp_path):
    """All stages once; then nothing is run again; a change of settings is refused."""
    make_table("--only-train True")
    lines = make_table("--only-train True")
    assert len(run_here.runs) == 6

    # The table of test images, then the one of validation images; a cell per trunk.
    for name in results.STAGES:
        rows = [line for line in lines if line.startswith(f"{name} | ")]
        assert len(rows) == 2
        assert all(row.count("±") == row.count("%") == 2 for row in rows)

    picture = tmp_path / "results/data.svg"
    assert "<svg" in picture.read_text("utf-8")
    assert picture.stat().st_size < 300_000

    for changed in ("--lr 0.1", "--tmax-for-cos-decay 5"):
        refusal = f"pirl_0.sh is the command .*{changed}.*: remove"
        with pytest.raises(UserError, match=refusal):
            make_table(f"--only-train True {changed}")


def test_results_ask_for_matplotlib_before_they_begin(
    make_table, run_here, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r": pip install -r requirements-dev\.txt$"):
        make_table("")
    assert run_here.runs == []


def test_results_tell_how_long_each_stage_took():
    """Minutes of each stage, and cumulative: pretraining counts for the PIRL trunk."""
    pretrained = [{"history": [{"seconds": 120.0}, {"seconds": 60.0}]}]
    accuracies = dict.fromkeys(("neighbours", "softmax", "full"), (0.5, None))
    tuned = [{"results": accuracies, "seconds": {"softmax": 30.0, "full": 90.0}}]
    paragraphs = results.tables(pretrained, tuned, tuned)
    lines = "\n".join(paragraphs).splitlines()

    assert "stage | minutes | cumulative minutes" in lines
    assert "PIRL pretraining with validation and kNN | 3.00 | 3.00" in lines
    probe = "linear probe (only the softmax layer)"
    assert f"{probe}, random trunk | 0.50 | 0.50" in lines
    assert "full fine-tuning, random trunk | 1.50 | 2.00" in lines
    assert f"{probe}, PIRL trunk | 0.50 | 3.50" in lines
    assert "full fine-tuning, PIRL trunk | 1.50 | 5.00" in lines

    for name in ("kNN", probe, "full fine-tuning"):
        assert f"{name} | none | none" in lines  # test images: there are none
        assert f"{name} | 50.00 % | 50.00 %" in lines


# ---- Beside another library ----------------------------------------------------------
class OneView(torch.nn.Module):
    """In the place of a method of lightly."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, views):
        return self.backbone(views[0]).square().mean()

    def before_step(self, progress):
        assert 0 <= progress < 1

    @staticmethod
    def transform(size):
        return lambda image: [to_tensor(image.resize((size, size)))]


class FlatFolder:
    """In the place of LightlyDataset."""

    def __init__(self, folder, transform):
        self.files = sorted(Path(folder).iterdir())
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        file = self.files[number]
        return self.transform(Image.open(file)), 0, file.name


@pytest.fixture
def at_equal_time(run_here, data_dir, tmp_path, monkeypatch):
    """at_equal_time() -> the lines of the table's file, of runs of half a second."""
    monkeypatch.setattr(equal_time, "HAS_LIGHTLY", True)
    monkeypatch.setattr(equal_time, "LightlyDataset", FlatFolder, raising=False)
    monkeypatch.setattr(equal_time, "METHODS", {"OneView": OneView})
    monkeypatch.setattr(equal_time, "LEARNING_RATES", (0.1,))
    monkeypatch.setattr(equal_time, "BATCH_SIZE", 16)

    def at_equal_time():
        flags = "--image-size 36 --device cpu --minutes 0.01 --workers 0 --seeds 1"
        equal_time.main(["--data-dir", str(data_dir), *flags.split()])
        table = tmp_path / "results/data_0.01_minutes.md"
        return table.read_text("utf-8").splitlines()

    return at_equal_time


@pytest.mark.slow
def test_equal_time(at_equal_time, run_here, tmp_path):
    """PIRL and both variants of the one method, with a softmax layer each."""
    at_equal_time()
    lines = at_equal_time()
    names = run_here.runs
    assert names.count("pirl_stl_train_test") == 2, "an epoch to measure, then the run"
    assert names.count("train_stl_after_ssl") == 3
    assert len(names) == 5, "what is finished is not run again"

    rows = [line.split(" | ") for line in lines if line.count(" | ") == 9][2:]
    assert [row[:4] for row in rows] == [
        ["PIRL", "its own", "yes", "0"],
        ["OneView", "0.1", "yes", "0"],
        ["OneView", "0.1", "no", "0"],
    ]
    for row in rows:
        assert int(row[4]) > 0, "images"
        assert all(cell.endswith(" %") for cell in row[7:])

    # The trunk is the one that was trained, and the time was over.
    weights = tmp_path / "results/data_0.01_minutes/weights"
    run = torch.load(weights / "OneView_0.1_plain_0.pth", weights_only=True)
    assert run["seconds"] >= 0.6
    assert run["image_count"] % 16 == 0
    fine_tuned = torch.load(weights / "from_OneView_0.1_plain_0.pt", weights_only=True)
    for name, value in run["state_dict"].items():
        own_name = name.removeprefix("backbone.")
        assert torch.equal(fine_tuned["trunk"][own_name], value), name


def test_equal_time_without_lightly(monkeypatch):
    monkeypatch.setattr(equal_time, "HAS_LIGHTLY", False)
    with pytest.raises(UserError, match="lightly is not installed: pip install"):
        equal_time.main([])


def test_the_learning_rate_of_equal_time():
    """A rise over a twentieth of the time, then a cosine to 0."""
    expected = {0.0: 0.0, 0.025: 1.0, 0.05: 2.0, 0.525: 1.0, 1.0: 0.0}
    for progress, lr in expected.items():
        assert equal_time.learning_rate(2.0, progress) == pytest.approx(lr)


def test_the_best_variant_is_that_of_the_validation_images():
    def result(method, lr, seed, validation, test):
        variant = equal_time.Variant(method, lr, True)
        softmax = (validation, test)
        return equal_time.Result(variant, seed, 1280, 60.0, softmax, (0.3, 0.2))

    results = [
        result("PIRL", None, 0, 0.5, 0.51),
        result("SimCLR", 0.02, 0, 0.4, 0.46),
        result("SimCLR", 0.06, 0, 0.45, 0.44),
        result("SimCLR", 0.06, 1, 0.44, 0.42),
        result("BYOL", 0.02, 0, 0.0, None),
        result("Barlow Twins", 0.2, 0, 0.3, 0.31),
    ]
    lines = equal_time.summary_table(results).splitlines()
    assert lines[2:] == [
        "PIRL | 20.00 % | 51.00 % | 1",
        "SimCLR | 20.00 ± 0.00 % | 43.00 ± 1.41 % | 2",
        "BYOL | 20.00 % | none | 1",
        "Barlow Twins | 20.00 % | 31.00 % | 1",
    ]


# ---- Two runs side by side -----------------------------------------------------------
def write_model(path, trunk, accuracies):
    """A model file as fine-tuning writes it, as far as the comparison reads it."""
    torch.save({"settings": {"pirl_model_name": trunk}, "results": accuracies}, path)


def test_compare(tmp_path, capsys):
    """The reference's rows, and kNN below them; the two trunks beside each other."""
    random = {"neighbours": (0.3, 0.31), "softmax": (0.4, 0.41), "full": (0.5, 0.51)}
    pirl = {"neighbours": (0.6, 0.61), "softmax": (0.7, 0.71), "full": (0.8, 0.81)}
    write_model(tmp_path / "a.pt", None, random)
    write_model(tmp_path / "b.pt", "exp", pirl)
    compare.main(["--weights-dir", str(tmp_path), "a", "b"])

    assert capsys.readouterr().out.splitlines() == [
        "Fine tuning strategy | val, random trunk | val, PIRL trunk"
        " | test, random trunk | test, PIRL trunk",
        "--- | --- | --- | --- | ---",
        "Only softmax layer is fine tuned | 40.00 % | 70.00 % | 41.00 % | 71.00 %",
        "Full model is fine tuned | 50.00 % | 80.00 % | 51.00 % | 81.00 %",
        "kNN | 30.00 % | 60.00 % | 31.00 % | 61.00 %",
    ]


def test_compare_what_there_is(tmp_path, capsys):
    """Without test images, and where not all stages were gone through."""
    random = {"neighbours": (0.3, None), "softmax": (0.4, None)}
    write_model(tmp_path / "a.pt", None, random)
    write_model(tmp_path / "b.pt", "exp", random)
    compare.main(["--weights-dir", str(tmp_path), "a", "b"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "Only softmax layer is fine tuned | 40.00 % | 40.00 % | none | none",
        "kNN | 30.00 % | 30.00 % | none | none",
    ]

    write_model(tmp_path / "b.pt", "exp", {**random, "full": (0.8, None)})
    compare.main(["--weights-dir", str(tmp_path), "a", "b"])
    full = capsys.readouterr().out.splitlines()[3]
    assert full == "Full model is fine tuned |  | 80.00 % |  | none"


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


def test_compare_reads_the_models_of_real_runs(call, tiny, tmp_path, capsys):
    pretraining = call("pirl_stl_train_test", *tiny, "--experiment-name", "exp")
    assert pretraining.status == 0, pretraining.err
    for name, flags in (("a", []), ("b", ["--pirl-model-name", "exp"])):
        outcome = call("train_stl_after_ssl", *tiny, *flags, "--experiment-name", name)
        assert outcome.status == 0, outcome.err
    compare.main(["--weights-dir", str(tmp_path / "weights"), "a", "b"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("%") for line in lines] == [0, 0, 4, 4]


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


@pytest.mark.parametrize("pretext", ["rotation", "jigsaw-rotation"])
def test_throughput_of_other_pretext_tasks(monkeypatch, capsys, pretext):
    """The conventional pipeline has jigsaw puzzles alone."""
    monkeypatch.setattr(throughput, "IMAGES", 32)
    flags = [*TINY, "--batch-size", "8", "--rounds", "1", "--pretext", pretext]
    throughput.main([*flags, "--conventional", "False"])
    assert "training step | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        throughput.main(flags)
    assert "use --conventional False" in capsys.readouterr().err


def test_the_yardstick_is_a_product_in_the_network_s_precision(monkeypatch):
    dtypes = []

    def product_rate(device, dtype):
        dtypes.append(dtype)
        return 1e12

    monkeypatch.setattr(throughput, "IMAGES", 32)
    monkeypatch.setattr(throughput, "product_rate", product_rate)
    flags = [*TINY, "--batch-size", "8", "--rounds", "1", "--conventional", "False"]
    for precision in ("fp32", "bf16"):
        result = throughput.measure(
            throughput.parse_args([*flags, "--precision", precision])
        )
        assert result["share"] == pytest.approx(result["rate"])
    assert dtypes == [torch.float32, torch.bfloat16]


def test_the_conventional_pipeline_s_views_are_those_of_the_step():
    """The same shapes, and about the same mean and spread over many images."""
    torch.manual_seed(0)
    small = torch.randint(0, 256, (100, 3, 12, 12), dtype=torch.uint8)
    images = small.repeat_interleave(4, 2).repeat_interleave(4, 3)

    per_image = throughput.PerImageViews(images)
    indices = []
    image_views = []
    patch_views = []
    for i in range(100):
        index, image_view, patches = per_image[i]
        indices.append(index)
        image_views.append(image_view)
        patch_views.append(patches)
    assert indices == list(range(100))

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


@pytest.mark.slow
def test_gpu_report(monkeypatch, tmp_path, capsys):
    """On a CPU, with everything small.

    What fails, here for want of a compiler, is named, and the rest goes on.
    """
    monkeypatch.setattr(throughput, "IMAGES", 32)
    monkeypatch.setattr(pirl_stl_train_test.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_report, "run_cuda_tests", lambda: "9 skipped")
    monkeypatch.chdir(tmp_path)
    gpu_report.main([*TINY, "--batch-sizes", "8", "--images", "40"])

    first_line = capsys.readouterr().out.splitlines()[0]
    assert "4 measurements of speed" in first_line
    assert "ten minutes" in first_line

    lines = (tmp_path / "results/gpu_CPU.md").read_text("utf-8").splitlines()
    assert "`tests/test_cuda.py`: 9 skipped" in lines
    rows = [line.split(" | ") for line in lines if line.startswith("8 | ")]
    assert [row[:3] for row in rows] == [
        ["8", "fp32", "eager"],
        ["8", "fp32", "compiled"],
        ["8", "bf16", "eager"],
        ["8", "bf16", "compiled"],
    ]
    for row in rows:
        if row[2] == "compiled":
            failure = "failed: UserError: --compile needs a C++ compiler"
            assert row[3].startswith(failure)
        else:
            assert len(row) == 8
            assert float(row[3]) > 0

    epochs = [line.split(" | ") for line in lines if line.startswith("40 | ")]
    assert len(epochs) == 2
    for row in epochs:
        assert len(row) == 5
        assert float(row[3]) > 0

    for headings, rule in itertools.pairwise(lines):
        if "---" in rule:
            assert headings.count("|") == rule.count("|")


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


class FakeSubprocess:
    """In the place of the module: every process writes `out` and ends."""

    PIPE = None

    def __init__(self, out):
        self.out = out

    def run(self, command, **options):
        return SimpleNamespace(stdout=self.out)


def test_gpu_report_names_the_tests_that_fail(monkeypatch):
    failure = "FAILED tests/test_cuda.py::test_a - assert 1 == 2"
    summary = "1 failed, 1 passed in 3.00s"
    for out, text in (
        (f"F.\n{failure}\n{summary}\n", f"{failure}; {summary}"),
        ("", "not run: there is no pytest (pip install pytest)"),
    ):
        monkeypatch.setattr(gpu_report, "subprocess", FakeSubprocess(out))
        assert gpu_report.run_cuda_tests() == text


# ---- Synthetic images ----------------------------------------------------------------
def test_synthetic_set(tmp_path):
    counts = {"train": 200, "test": 40, "unlabelled": 30}
    content = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write_synthetic(tmp_path / name, counts, seed)
        content[name] = (tmp_path / name / "train_X.bin").read_bytes()
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]

    for split in SPLITS:
        write_split(tmp_path / "a", tmp_path / "data", split)
    folder = tmp_path / "data/train"
    images, labels, *_ = load_labelled(folder, 96, torch.device("cpu"))
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
