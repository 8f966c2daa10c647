"""Features of plain images, their batch-norm statistics, and k nearest neighbours.

Plain: whole and unaugmented, as evaluation feeds them to the trunk.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import dataset_helpers
from augmentations import normalize
from runtime.bars import progress_bar
from runtime.errors import UserError

EVALUATION_BATCH = 128  # images at a time, at most, where nothing is trained
# How many training images the exported batch-norm statistics are computed on, at most.
STATISTICS_IMAGES = 4096

# The kNN classifier of Wu et al. (arXiv:1805.01978, section 3.4), with their
# temperature.
NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07


def with_plain_bn_statistics(trunk, images, batch_size):
    """A copy of the trunk with the batch-norm statistics of plain images, in eval mode.

    images: uint8 [N, 3, S, S].
    """
    trunk = copy.deepcopy(trunk)
    # update_bn averages over batches, so a small last batch would weigh too much:
    # tensor_split makes batches whose sizes differ by one at most.
    count = math.ceil(len(images) / min(batch_size, EVALUATION_BATCH))
    batches = images.tensor_split(count)
    update_bn((trunk_input(trunk, batch) for batch in batches), trunk)
    return trunk.eval()


@torch.no_grad()
def trunk_features(trunk, images, batch_size, flip=False):
    """Features in eval mode: uint8 [N, 3, S, S] -> float32 [N, d]; flip: mirrored.

    No autocast: the features of a random trunk nearly coincide, and bf16 would merge
    them.
    """
    trunk.eval()
    features = []
    with progress_bar(len(images), "features", " images") as bar:
        for batch in images.split(min(batch_size, EVALUATION_BATCH)):
            if flip:
                batch = batch.flip(3)
            features.append(trunk(trunk_input(trunk, batch)))
            bar.update(len(batch))
    return torch.cat(features)


def trunk_input(trunk, images):
    """uint8 [B, 3, S, S] -> float32, normalised as this trunk expects it."""
    return normalize(images, trunk.pixel_mean, trunk.pixel_std)


def nearest_neighbours(features, queries, count):
    """The most similar rows of features [N, d] to each row of queries [Q, d].

    Returns (cosines, indices), each [Q, min(count, N)], the most similar first.
    """
    features = F.normalize(features, dim=1)
    count = min(count, len(features))
    cosines = []
    indices = []
    # In blocks: the similarities of all queries to all features may not fit in memory.
    for block in queries.split(1024):
        similarities = F.normalize(block, dim=1) @ features.T
        best = similarities.topk(count)
        cosines.append(best.values)
        indices.append(best.indices)
    return torch.cat(cosines), torch.cat(indices)


def knn_accuracy(features, labels, queries, query_labels):
    """Accuracy of weighted k-nearest-neighbour classification, None without queries.

    features [N, d] and labels [N] int64 are searched; queries [Q, d] with query_labels
    [Q] are classified by their NEIGHBOURS nearest (or all), each with the
    weight exp(cosine / KNN_TEMPERATURE).
    """
    if len(queries) == 0:
        return None
    cosines, indices = nearest_neighbours(features, queries, NEIGHBOURS)
    weights = (cosines / KNN_TEMPERATURE).exp()

    classes = int(labels.max()) + 1
    votes = queries.new_zeros(len(queries), classes)
    votes.scatter_add_(1, labels[indices], weights)
    return (votes.argmax(1) == query_labels).float().mean().item()


class KNNMonitor:
    """kNN accuracy during pretraining, on the labelled images.

    They are split as for fine-tuning: the validation images are classified by their
    nearest training images. No test image is read.
    """

    def __init__(self, args, device):
        self.batch_size = args.batch_size
        self.data = dataset_helpers.load_labelled(
            args.data_dir, args.image_size, device, args.seed
        )

    def accuracy(self, trunk):
        """kNN accuracy by a trunk in eval mode, a float."""
        images, labels, train, val, *_ = self.data
        features = trunk_features(trunk, images, self.batch_size)
        return knn_accuracy(features[train], labels[train], features[val], labels[val])


def make_monitor(args, device):
    """A KNNMonitor; a note and None where there are no labelled images."""
    try:
        return KNNMonitor(args, device)
    except UserError as error:
        print(f"note: kNN accuracy will not be measured: {error}")
        return None
