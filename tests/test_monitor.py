"""The nearest-neighbour monitor and the statistics that features are measured with."""

import builtins
import csv
import shutil

import pytest
import torch
import torchvision
from conftest import start_of

import pirl_stl_train_test as pirl
from dataset_helpers import normalised
from models import neighbour_accuracy


def labelled_of(flags):
    run = start_of(flags)
    return pirl.load_monitor(run.args, run.device)


def test_neighbour_accuracy_against_loops():
    draw = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 16, generator=draw, dtype=torch.float64) for n in (90, 40))
    labels, query_labels = (torch.randint(0, 5, (n,), generator=draw) for n in (90, 40))
    hits = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = [(query @ f / query.norm() / f.norm()).item() for f in features]
        votes = [0.0] * 5
        for i in sorted(range(90), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += torch.tensor(cosines[i] / 0.07, dtype=torch.float64).exp().item()
        hits += votes.index(max(votes)) == label
    assert neighbour_accuracy(features.float(), labels, queries.float(), query_labels) == pytest.approx(hits / 40)
    assert neighbour_accuracy(features[:3].float(), labels[:3], features[:3].float(), labels[:3]) == 1.0


def test_the_monitor_is_in_the_csv_and_reads_no_test_image(call, tiny, tmp_path, data_dir, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(data_dir, own)
    shutil.rmtree(own / "test")
    opened, plain = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda name, *a, **k: opened.append(str(name)) or plain(name, *a, **k))
    flags = ("--data-dir", own, "--epochs", 3, "--knn-every", 2, "--experiment-name", "exp")
    outcome = call("pirl_stl_train_test", *tiny, *flags)
    assert outcome.status == 0, outcome.err
    assert not [name for name in opened if "/test" in name.removeprefix(str(tmp_path))]
    with plain(tmp_path / "observations/exp_observations.csv", newline="") as file:
        values = [row["knn_acc"] for row in csv.DictReader(file)]
    assert [bool(value) for value in values] == [False, True, True], "every second epoch, and the last"
    assert all(0 <= float(value) <= 1 for value in values[1:])
    assert "kNN" in outcome.out


def test_search_and_queries_are_apart(tiny):
    _, labels, search, query = labelled_of(tiny)
    assert sorted([*search.tolist(), *query.tolist()]) == list(range(60))
    assert len(query) == round(0.16 * 60)
    assert labels[query].unique().tolist() == list(range(10))


def test_training_does_not_notice_the_monitor(call, tiny, tmp_path):
    for name, every in (("with", 1), ("without", 0)):
        outcome = call("pirl_stl_train_test", *tiny, "--knn-every", every, "--experiment-name", name)
        assert outcome.status == 0, outcome.err
    a, b = (torch.load(tmp_path / f"weights/{name}.pt", weights_only=True) for name in ("with", "without"))
    assert all(torch.equal(a["trunk"][name], b["trunk"][name]) for name in a["trunk"])


@pytest.mark.full_trunk
def test_the_monitor_measures_the_exported_features(call, tiny, data_dir, tmp_path):
    """The last epoch's accuracy is that of the features that a reader of the file gets."""
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    state = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    resnet = torchvision.models.resnet18()
    resnet.load_state_dict(state["trunk"], strict=False)
    resnet.fc = torch.nn.Identity()
    images, labels, search, query = labelled_of(tiny)
    with torch.no_grad():
        features = resnet.eval()(normalised(images))
    expected = neighbour_accuracy(features[search], labels[search], features[query], labels[query])
    assert state["rows"][-1]["knn_acc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.full_trunk
def test_exported_statistics_are_those_of_a_pass_over_whole_images(call, tiny, tmp_path):
    assert call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp").status == 0
    trunk = torch.load(tmp_path / "weights/exp.pt", weights_only=True)["trunk"]
    run = start_of(tiny)
    resnet = torchvision.models.resnet18()
    resnet.load_state_dict(trunk, strict=False)
    norms = {name: module for name, module in resnet.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    means, variances = ({name: [] for name in norms} for _ in range(2))

    def note(name, values):
        means[name].append(values.mean((0, 2, 3)))
        variances[name].append(values.var((0, 2, 3)))

    for name, norm in norms.items():
        norm.register_forward_hook(lambda module, inputs, output, name=name: note(name, inputs[0]))
    with torch.no_grad():
        resnet.train()
        for batch in run.images[:70].chunk(70 // 16):
            resnet(normalised(batch))
    assert len(norms) == 20
    for name in norms:
        expected = torch.stack(means[name]).mean(0), torch.stack(variances[name]).mean(0)
        torch.testing.assert_close(trunk[f"{name}.running_mean"], expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(trunk[f"{name}.running_var"], expected[1], rtol=1e-3, atol=1e-4)


def test_no_labelled_images_no_monitor(call, tiny, tmp_path, data_dir):
    own = tmp_path / "own"
    shutil.copytree(data_dir / "unlabelled", own / "unlabelled")
    outcome = call("pirl_stl_train_test", *tiny, "--data-dir", own, "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert "no nearest-neighbour accuracy" in outcome.out


def test_tensorboard(call, tiny, tmp_path, monkeypatch):
    """Its scalars if the package is there, one line if not."""
    flags = ("--tensorboard", "True", "--epochs", 1, "--experiment-name", "exp")
    plain = builtins.__import__

    def without(name, *a, **k):
        if "tensorboard" in name:
            raise ImportError(name)
        return plain(name, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert call("pirl_stl_train_test", *tiny, *flags).is_one_line_error("pip install tensorboard")
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder.name, purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            pass

    monkeypatch.setattr(pirl, "tensorboard_writer", lambda e, epoch: Writer(e.observations.with_name("tb"), epoch))
    assert call("pirl_stl_train_test", *tiny, *flags).status == 0
    assert written[0] == ("tb", 1)
    assert {"train_loss", "val_loss", "learning_rate", "knn_acc"} <= {entry[0] for entry in written[1:]}
