"""The networks: trunk φ, heads f and g, and the classifier of the labelled stages."""

import contextlib

import torch
import torchvision
from torch import nn

from dataset_helpers import normalised

TRUNKS = {
    "res18": torchvision.models.resnet18,
    "res34": torchvision.models.resnet34,
    "res50": torchvision.models.resnet50,
}
VECTOR_SIZE = 128  # of what the heads put out and the memory bank holds (paper, section 3.2)
PATCHES = 9


def make_trunk(model_type):
    """(torchvision's ResNet without its last layer, its output dimension d: 512, or 2048 for res50).

    The state dict has torchvision's own names. Input [B, 3, H, W] float, output [B, d].
    """
    trunk = TRUNKS[model_type](weights=None)
    dimension = trunk.fc.in_features
    trunk.fc = nn.Identity()
    return trunk, dimension


def head_output(in_features, non_linear):
    """The linear layer that ends a head, with a ReLU and a further linear layer if `non_linear`."""
    layers = [nn.Linear(in_features, VECTOR_SIZE)]
    if non_linear:
        layers += [nn.ReLU(inplace=True), nn.Linear(VECTOR_SIZE, VECTOR_SIZE)]
    return nn.Sequential(*layers)


class JigsawHead(nn.Module):
    """Head g: each patch to 128 numbers, the nine side by side in presentation order, to 128 (paper, section 3.2)."""

    def __init__(self, dimension, non_linear):
        super().__init__()
        self.patch = nn.Linear(dimension, VECTOR_SIZE)
        self.together = head_output(PATCHES * VECTOR_SIZE, non_linear)

    def forward(self, features):  # [B, 9, d] -> [B, 128]
        return self.together(self.patch(features).flatten(1))


class PIRL(nn.Module):
    """The trunk φ with head f for whole images and head g for their nine shuffled patches (paper, figure 3)."""

    def __init__(self, model_type, non_linear_head=False):
        super().__init__()
        self.trunk, dimension = make_trunk(model_type)
        self.head_f = head_output(dimension, non_linear_head)
        self.head_g = JigsawHead(dimension, non_linear_head)

    def forward(self, images, patches):
        """images [B, 3, S, S], patches [B·9, 3, P, P] -> f(φ(I)) and g(φ(I_t)), each [B, 128], not normalised."""
        image_vectors = self.head_f(self.trunk(images))
        with batch_statistics(self.trunk):
            patch_features = self.trunk(patches)
        return image_vectors, self.head_g(patch_features.unflatten(0, (-1, PATCHES)))


@contextlib.contextmanager
def batch_statistics(trunk):
    """Inside, batch norm uses the batch's own statistics in train and eval mode, and leaves the running ones alone.

    Patches and whole images differ in their statistics. The running ones are those of whole images, which is what
    evaluation feeds the trunk: mixing the two costs it several points of accuracy.
    """
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    training = trunk.training
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = training, True


@torch.no_grad()
def estimate_statistics(trunk, images, batch_size):
    """Set batch norm's running statistics to those of images uint8 [N, 3, S, S] as they are: the mean over batches."""
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momentum, training = norms[0].momentum, trunk.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    trunk.train()
    for batch in images.chunk(max(1, len(images) // batch_size)):
        trunk(normalised(batch))
    trunk.train(training)
    for norm in norms:
        norm.momentum = momentum


class Classifier(nn.Module):
    """The trunk with one linear (softmax) layer on top."""

    def __init__(self, trunk, dimension, classes):
        super().__init__()
        self.trunk = trunk
        self.softmax_layer = nn.Linear(dimension, classes)

    def forward(self, images):  # [B, 3, S, S] -> logits [B, classes]
        return self.softmax_layer(self.trunk(images))
