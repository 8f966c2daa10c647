"""Features of plain images, their batch-norm statistics, and k nearest neighbours."""

import copy
import math

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from augmentations import normalize
from progress import progress_bar

EVALUATION_BATCH = 128  # images at a time, at most, where nothing is trained

# Of the kNN classifier (Wu et al., arXiv:1805.01978, section 3.4).
NEIGHBOURS = 20
KNN_TEMPERATURE = 0.07


def with_plain_bn_statistics(trunk, images, batch_size):
    """A copy of the trunk with the batch-norm statistics of plain images, in eval mode.

    images: uint8 [N, 3, S, S], whole and unaugmented, as evaluation feeds them.
    """
    trunk = copy.deepcopy(trunk)
    # All batches count alike in the mean, so they are of equal size, or one more.
    count = math.ceil(len(images) / min(batch_size, EVALUATION_BATCH))
    batches = images.tensor_split(count)
    update_bn((normalize(batch) for batch in batches), trunk)
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
            features.append(trunk(normalize(batch)))
            bar.update(len(batch))
    return torch.cat(features)


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
    """Accuracy of weighted k-nearest-neighbour classification, a float.

    features [N, d] and labels [N] int64 are searched; queries [Q, d] with query_labels
    [Q] are classified by their NEIGHBOURS nearest (or all), each with the
    weight exp(cosine / KNN_TEMPERATURE).
    """
    cosines, indices = nearest_neighbours(features, queries, NEIGHBOURS)
    weights = (cosines / KNN_TEMPERATURE).exp()

    classes = int(labels.max()) + 1
    votes = queries.new_zeros(len(queries), classes)
    votes.scatter_add_(1, labels[indices], weights)
    return (votes.argmax(1) == query_labels).float().mean().item()
