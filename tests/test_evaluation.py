"""kNN, and the batch-norm statistics that features are computed with."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import evaluation
from augmentations import PIXEL_MEAN, PIXEL_STD, normalize
from evaluation import knn_accuracy
from models import make_trunk, use_pixels_of


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


def test_features_are_of_plain_images_unless_mirrored():
    """In the order of the images, and in eval mode."""
    trunk, _ = make_trunk("res18", zero_init=False)
    trunk.train()
    images = torch.randint(0, 256, (5, 3, 36, 36), dtype=torch.uint8)
    plain = evaluation.trunk_features(trunk, images, 2)
    mirrored = evaluation.trunk_features(trunk, images, 2, flip=True)

    assert not trunk.training
    with torch.no_grad():
        torch.testing.assert_close(
            plain, trunk(normalize(images, PIXEL_MEAN, PIXEL_STD))
        )
        torch.testing.assert_close(
            mirrored, trunk(normalize(images.flip(3), PIXEL_MEAN, PIXEL_STD))
        )
    assert (plain - mirrored).abs().max() > 0.01


def test_knn_counts_its_votes_where_the_features_are():
    """On the default device they would be on another: here on one without numbers."""
    features = torch.eye(6)
    labels = torch.arange(6)
    with torch.device("meta"):
        assert knn_accuracy(features, labels, features, labels) == 1


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (300, 4096, [100, 100, 100]),
        (420, 32, [30] * 14),
        (33, 32, [17, 16]),
        (5, 128, [5]),
    ],
)
def test_all_images_count_nearly_alike_in_the_plain_statistics(
    monkeypatch, images, batch_size, sizes
):
    """update_bn() takes the mean over batches: a small last one would count more.

    And batches are small whatever the batch size: a GPU that trains on a share of a
    batch need not hold all of it.
    """
    seen = []

    def note_sizes(batches, trunk):
        seen.extend(len(batch) for batch in batches)

    monkeypatch.setattr(evaluation, "update_bn", note_sizes)
    pixels = torch.zeros(images, 3, 4, 4, dtype=torch.uint8)
    trunk = torch.nn.Identity()
    use_pixels_of(trunk, {})
    evaluation.with_plain_bn_statistics(trunk, pixels, batch_size)
    assert seen == sizes


def test_batches_of_features_are_small_whatever_the_batch_size():
    seen = []
    trunk = torch.nn.Flatten()
    use_pixels_of(trunk, {})
    trunk.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    images = torch.zeros(300, 3, 4, 4, dtype=torch.uint8)
    assert len(evaluation.trunk_features(trunk, images, 4096)) == 300
    assert seen == [128, 128, 44]


# ---- The monitor of pretraining ------------------------------------------------------
@pytest.mark.parametrize("classes", [0, 1])
def test_labels_that_pretraining_cannot_use_are_a_note(tmp_path, classes, capsys):
    (tmp_path / "train").mkdir()
    if classes:
        (tmp_path / "train/1").mkdir()
        Image.new("RGB", (40, 50)).save(tmp_path / "train/1/1.png")
    args = SimpleNamespace(data_dir=tmp_path, image_size=36, seed=0, batch_size=7)
    assert evaluation.make_monitor(args, torch.device("cpu")) is None
    assert "note: kNN accuracy will not be measured" in capsys.readouterr().out
