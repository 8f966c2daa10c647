"""Tables and reports: made of real runs, small ones; and the synthetic images."""

import itertools
from types import SimpleNamespace

import run_helpers as rh
import pytest
import torch

import dataset_helpers as dh
import pirl_stl_train_test as pirl
from benchmarks import gpu_report, results, synthetic, throughput
from stl10_data_load import SPLITS, write_split
from train_stl_after_ssl import ROWS


@pytest.fixture
def make_table(call, data_dir, tmp_path, monkeypatch):
    """make_table(flags of pretraining); its runs are made in this process instead of one of their own, and counted."""

    def run(command):
        script = command[1].rsplit("/", 1)[1].removesuffix(".py")
        outcome = call(script, *command[2:])
        assert outcome.status == 0, outcome.err
        made.append(script)
        return SimpleNamespace(returncode=0)

    tiny = "--image-size 36 --device cpu --batch-size 16"

    def make_table(flags):
        command = ["results", "--data-dir", str(data_dir), "--seeds", "2", "--epochs", "1", "--labelled-epochs", "2"]
        monkeypatch.setattr("sys.argv", [*command, f"--flags={flags} {tiny}", f"--labelled-flags={tiny}"])
        results.main()
        return (tmp_path / "results/data.md").read_text().splitlines()

    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results.subprocess, "run", run)
    make_table.made = made
    return make_table


def test_results(make_table, tmp_path):
    """All stages once; then nothing is run again, and a change of settings is refused."""
    make_table("--only-train True")
    lines = make_table("--only-train True")
    assert len(make_table.made) == 6
    for trunk in ("random", "PIRL"):
        for stage in ("neighbours", "softmax", "full"):
            (line,) = [line for line in lines if line.startswith(f"{ROWS[stage]}, {trunk} trunk | ") and "%" in line]
            assert line.count("±") == 2
    assert (tmp_path / "results/data.svg").exists()
    for changed in ("--lr 0.1", "--tmax-for-cos-decay 5"):
        with pytest.raises(rh.UserError, match=f"pirl_0.sh is the command .*{changed}.*: remove"):
            make_table(f"--only-train True {changed}")


def test_results_tell_how_long_each_stage_took():
    """Minutes of each stage, and from the start until it is done: pretraining counts for the PIRL trunk alone."""
    pretrained = [{"rows": [{"seconds": 120.0}, {"seconds": 60.0}]}]
    accuracies = dict.fromkeys(("neighbours", "softmax", "full"), (0.5, None))
    tuned = [{"results": accuracies, "seconds": {"softmax": 30.0, "full": 90.0}}]
    text = results.tables(pretrained, tuned, tuned)
    assert "PIRL pretraining with validation and monitor | 3.00 | 3.00\n" in text
    for stage, trunk, minutes in (
        ("softmax", "random", "0.50 | 0.50"),
        ("full", "random", "1.50 | 2.00"),
        ("softmax", "PIRL", "0.50 | 3.50"),
        ("full", "PIRL", "1.50 | 5.00"),
    ):
        assert f"{ROWS[stage]}, {trunk} trunk | {minutes}\n" in text
        assert f"{ROWS[stage]}, {trunk} trunk | 50.00 % | none\n" in text


TINY = ["--image-size", "36", "--device", "cpu", "--steps", "1"]


def test_throughput(monkeypatch, capsys):
    """One table of three; the contestants are what they are called."""
    monkeypatch.setattr(throughput, "IMAGES", 64)
    monkeypatch.setattr("sys.argv", ["throughput", *TINY, "--batch-size", "16", "--rounds", "1"])
    monkeypatch.setattr(throughput.os, "cpu_count", lambda: 1)
    throughput.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["bare network", "training step", "conventional pipeline"]
    assert lines[-3].endswith(" | 1.000")
    assert all(float(cell) > 0 for line in lines[-3:] for cell in line.split(" | ")[1::2])


def test_the_conventional_pipeline_s_views_are_those_of_the_step(monkeypatch):
    """The same shapes, and about the same mean and spread over many images, as image_view() and jigsaw_view()."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (100, 3, 12, 12), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    views = throughput.PerImageViews(images)
    rows, mine, patches = zip(*(views[i] for i in range(100)), strict=True)
    assert list(rows) == list(range(100))
    draws = torch.rand(100, dh.IMAGE_VIEW_DRAWS)
    theirs = dh.image_view(images.float(), draws)
    nine = pirl.jigsaw_view(images.float(), torch.rand(100, pirl.JIGSAW_DRAWS))
    for conventional, project in ((torch.stack(mine), theirs), (torch.cat(patches), nine)):
        assert conventional.shape == project.shape
        assert (conventional.mean() - project.mean()).abs() < 0.1
        assert 0.8 < conventional.std() / project.std() < 1.25


@pytest.mark.slow
def test_gpu_report(monkeypatch, tmp_path):
    """On a CPU, with everything small. What fails, here for want of a compiler, is named, and the rest goes on."""
    monkeypatch.setattr(throughput, "IMAGES", 32)
    monkeypatch.setattr(pirl.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_report, "cuda_tests", lambda: "9 skipped")
    monkeypatch.setattr("sys.argv", ["gpu_report", *TINY, "--batch-sizes", "8", "--images", "40"])
    monkeypatch.chdir(tmp_path)
    gpu_report.main()
    lines = (tmp_path / "results/gpu_CPU.md").read_text().splitlines()
    assert "`tests/test_cuda.py`: 9 skipped" in lines
    rows = [line.split(" | ") for line in lines if line.startswith("8 | ")]
    named = [("8", p, n) for p in ("fp32", "bf16") for n in ("eager", "compiled")]
    assert [tuple(row[:3]) for row in rows] == named
    for row in rows:
        if row[2] == "compiled":
            assert row[3].startswith("failed: UserError: --compile needs a C++ compiler")
        else:
            assert len(row) == 8
            assert float(row[3]) > 0
    epochs = [line.split(" | ") for line in lines if line.startswith("40 | ")]
    assert len(epochs) == 2
    assert all(len(row) == 5 and float(row[3]) > 0 for row in epochs)
    assert all(table.count("|") == rule.count("|") for table, rule in itertools.pairwise(lines) if "---" in rule)


def test_gpu_report_names_the_tests_that_fail(monkeypatch):
    out = "F.\nFAILED tests/test_cuda.py::test_a - assert 1 == 2\n1 failed, 1 passed in 3.00s\n"
    monkeypatch.setattr(gpu_report.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=out))
    assert gpu_report.cuda_tests() == out.split("\n", 1)[1].strip().replace("\n", "; ")


def test_synthetic_set(tmp_path):
    counts = {"train": 200, "test": 40, "unlabelled": 30}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.write_synthetic(tmp_path / name, counts, seed)
    read = {name: (tmp_path / name / "train_X.bin").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
    for split in SPLITS:
        write_split(tmp_path / "a", tmp_path / "data", split)
    images, labels, *_ = dh.load_labelled(tmp_path / "data/train", 96, torch.device("cpu"))
    assert torch.bincount(labels).tolist() == [20] * 10
    # mean colour does not tell the classes apart: nearest class mean on half of the images, tried on the other half
    means = images.float().mean((2, 3))
    centres = torch.stack([means[:100][labels[:100] == c].mean(0) for c in range(10)])
    accuracy = (torch.cdist(means[100:], centres).argmin(1) == labels[100:]).float().mean()
    assert accuracy < 0.25
