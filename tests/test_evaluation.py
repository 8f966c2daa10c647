"""kNN, and the batch-norm statistics that features are computed with."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import ThinResNet, make_trainer
from records import weights

import evaluation
from augmentations import normalize
from evaluation import knn_accuracy
from models import make_trunk


def test_neighbours_of_more_queries_than_are_compared_at_a_time():
    queries = 5 * torch.eye(3).repeat(700, 1)
    cosines, indices = evaluation.nearest_neighbours(2 * torch.eye(3), queries, 1)
    assert indices.flatten().equal(torch.arange(3).repeat(700))
    torch.testing.assert_close(cosines, torch.ones(2100, 1))


def test_twenty_neighbours_vote():
    """Almost equally near, so that their number decides."""
    angles = 0.001 * torch.arange(1, 41)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    for labels, answer in (
        ([0] * 10 + [1] * 30, 0),  # by 21, it would be 1
        ([0] * 9 + [1] * 9 + [2] + [1] * 21, 1),  # by 19, it would be 0
    ):
        answer = torch.tensor([answer])
        assert knn_accuracy(features, torch.tensor(labels), query, answer) == 1


def test_knn_accuracy_against_loops():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 16, generator=generator, dtype=torch.float64)
    queries = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (90,), generator=generator)
    query_labels = torch.randint(0, 5, (40,), generator=generator)

    correct = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = []
        for feature in features:
            cosines.append((query @ feature / query.norm() / feature.norm()).item())
        by_similarity = sorted(range(90), key=lambda row: -cosines[row])
        votes = [0.0] * 5
        for row in by_similarity[:20]:
            exponent = torch.tensor(cosines[row] / 0.07, dtype=torch.float64)
            votes[labels[row]] += exponent.exp().item()
        correct += votes.index(max(votes)) == label

    accuracy = knn_accuracy(features.float(), labels, queries.float(), query_labels)
    assert accuracy == pytest.approx(correct / 40)

    # Fewer than 20 to search, and each is its own nearest neighbour.
    few = features[:3].float()
    assert knn_accuracy(few, labels[:3], few, labels[:3]) == 1.0


def test_exported_statistics_are_those_of_a_pass_over_whole_images(
    call, tiny, tmp_path
):
    run = call("pirl_stl_train_test", *tiny, "--epochs", 1, "--experiment-name", "exp")
    assert run.status == 0, run.err
    trunk = weights(tmp_path, "exp")["trunk"]
    training_images = make_trainer(tiny).images[:70]

    resnet = ThinResNet()
    resnet.load_state_dict(trunk, strict=False)
    means = {}
    variances = {}

    def note_statistics(name):
        means[name] = []
        variances[name] = []

        def hook(module, inputs, output):
            (values,) = inputs
            means[name].append(values.mean((0, 2, 3)))
            variances[name].append(values.var((0, 2, 3)))

        return hook

    for name, module in resnet.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(note_statistics(name))
    with torch.no_grad():
        resnet.train()
        for batch in training_images.split(14):
            resnet(normalize(batch))

    assert len(means) == 13
    for name in means:
        mean = torch.stack(means[name]).mean(0)
        variance = torch.stack(variances[name]).mean(0)
        found_mean = trunk[f"{name}.running_mean"]
        found_variance = trunk[f"{name}.running_var"]
        torch.testing.assert_close(found_mean, mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found_variance, variance, rtol=1e-3, atol=1e-4)


def test_features_are_of_plain_images_unless_mirrored(monkeypatch):
    """In the order of the images, in eval mode, with a bar over all of them."""
    trunk, _ = make_trunk("res18", zero_init=False)
    trunk.train()
    images = torch.randint(0, 256, (5, 3, 36, 36), dtype=torch.uint8)
    bars = []
    updates = []

    @contextlib.contextmanager
    def note_bar(*arguments):
        bars.append(arguments)
        yield SimpleNamespace(update=updates.append)

    monkeypatch.setattr(evaluation, "progress_bar", note_bar)
    plain = evaluation.trunk_features(trunk, images, 2)
    mirrored = evaluation.trunk_features(trunk, images, 2, flip=True)

    assert not trunk.training
    with torch.no_grad():
        torch.testing.assert_close(plain, trunk(normalize(images)))
        torch.testing.assert_close(mirrored, trunk(normalize(images.flip(3))))
    assert (plain - mirrored).abs().max() > 0.01
    assert bars == [(5, "features", " images")] * 2
    assert updates == [2, 2, 1] * 2


def test_knn_counts_its_votes_where_the_features_are():
    """On the default device they would be on another: here on one without numbers."""
    features = torch.eye(6)
    labels = torch.arange(6)
    with torch.device("meta"):
        assert knn_accuracy(features, labels, features, labels) == 1


def test_batches_without_training_are_small_whatever_the_batch_size(monkeypatch):
    """A GPU that trains on a share of a batch need not hold all of it for features."""
    trunk, _ = make_trunk("res18")
    seen = []
    trunk.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images = torch.randint(0, 256, (300, 3, 36, 36), dtype=torch.uint8)

    features = evaluation.trunk_features(trunk, images, 4096)
    assert len(features) == 300
    assert max(seen) <= 128

    for batch_size in (4096, 16):
        sizes = []

        def note_sizes(batches, trunk, sizes=sizes):
            sizes.extend(len(batch) for batch in batches)

        monkeypatch.setattr(evaluation, "update_bn", note_sizes)
        evaluation.with_plain_bn_statistics(trunk, images, batch_size)
        assert sum(sizes) == 300
        assert max(sizes) < 2 * min(batch_size, 128)


def test_all_images_count_nearly_alike_in_the_plain_statistics(monkeypatch):
    """update_bn() takes the mean over batches: a small last one would count more."""
    sizes = []

    def note_sizes(batches, trunk):
        sizes.extend(len(batch) for batch in batches)

    monkeypatch.setattr(evaluation, "update_bn", note_sizes)
    images = torch.zeros(420, 3, 4, 4, dtype=torch.uint8)
    evaluation.with_plain_bn_statistics(torch.nn.Identity(), images, 32)
    assert sum(sizes) == 420
    assert set(sizes) == {30}

    sizes.clear()
    evaluation.with_plain_bn_statistics(torch.nn.Identity(), images[:33], 32)
    assert sizes == [17, 16]
