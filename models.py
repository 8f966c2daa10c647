"""The networks: trunk φ, the heads f and g, and the classifier."""

import contextlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50

from augmentations import PIXEL_MEAN, PIXEL_STD
from runtime.weights import IMAGENET_MEAN, architecture_of, load_weights

TRUNKS = {"res18": resnet18, "res34": resnet34, "res50": resnet50}
# Numbers in an embedding: in an output of the heads, and in a row of the memory bank
# (paper, section 2.3).
EMBEDDING_SIZE = 128


# ---- The trunk -----------------------------------------------------------------------
def make_trunk(model_type, stem="imagenet", zero_init=True):
    """torchvision's ResNet without its last layer: float [B, 3, H, W] -> [B, d].

    stem "small": the first convolution is 3 × 3 with stride 1, for small images, at
    four times the work. zero_init: every residual block starts as its shortcut (the
    identity in most blocks), with a zero-initialised last batch norm (Goyal et al.,
    arXiv:1706.02677, section 5.1). Returns (trunk, d), where d is 512, or 2048 for
    res50.
    """
    trunk = TRUNKS[model_type](weights=None, zero_init_residual=zero_init)
    dimension = trunk.fc.in_features
    trunk.fc = nn.Identity()

    # How its images are normalised. use_pixels_of() changes it for other weights.
    trunk.pixel_mean = PIXEL_MEAN
    trunk.pixel_std = PIXEL_STD

    if stem == "small":
        trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        # As torchvision initialises its convolutions.
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
    return trunk, dimension


def use_pixels_of(trunk, content):
    """Note in the trunk how its images are normalised: as in the run that made it.

    content: what read_weights() found, or a checkpoint; {} for a random trunk. Where it
    has no pixel_mean and pixel_std, as in checkpoints of pretraining, the trunk gets
    those of make_trunk().
    """
    trunk.pixel_mean = content.get("pixel_mean", PIXEL_MEAN)
    trunk.pixel_std = content.get("pixel_std", PIXEL_STD)
    if trunk.pixel_mean == IMAGENET_MEAN:
        print("note: images are normalised as for ImageNet")


# ---- PIRL ----------------------------------------------------------------------------
def linear_head(in_features, non_linear):
    """The linear layer that ends a head; non_linear: a ReLU and another one follow."""
    layers = [nn.Linear(in_features, EMBEDDING_SIZE)]
    if non_linear:
        layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE))
    return nn.Sequential(*layers)


class PatchHead(nn.Module):
    """Head g of the jigsaw: each of n patches to 128 numbers, all together to 128.

    The patches are in the order of presentation (paper, section 2.3).
    """

    def __init__(self, dimension, patches, non_linear):
        super().__init__()
        self.patch = nn.Linear(dimension, EMBEDDING_SIZE)
        self.together = linear_head(patches * EMBEDDING_SIZE, non_linear)

    def forward(self, features):  # [B, n, d] -> [B, 128]
        embeddings = self.patch(features)  # [B, n, 128]
        return self.together(embeddings.flatten(1))


class PIRL(nn.Module):
    """The trunk φ, head f for images and head g for pretext views (paper, figure 3)."""

    def __init__(self, trunk, head_f, head_g):
        super().__init__()
        self.trunk = trunk
        self.head_f = head_f
        self.head_g = head_g
        self.norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]

    def forward(self, images, pretext_inputs):
        """f(φ(I)) and g(φ(I_t)), each [B, 128], not normalised.

        images [B, 3, S, S]; pretext_inputs [B·n, 3, P, P]: the n network inputs of an
        image's pretext view one after another, nine patches for the jigsaw.
        """
        image_embeddings = self.head_f(self.trunk(images))  # [B, 128]
        with self.batch_statistics():
            features = self.trunk(pretext_inputs)  # [B·n, d]
        features = features.unflatten(0, (len(images), -1))  # [B, n, d]
        return image_embeddings, self.head_g(features)

    @contextlib.contextmanager
    def batch_statistics(self):
        """Inside, batch norm uses the batch's own statistics, and records nothing.

        The running statistics describe image views; those of patches are quite
        different. So the patches neither use nor change them, in validation either.
        """
        training = self.trunk.training
        for norm in self.norms:
            norm.training = True  # normalise by the batch's statistics …
            norm.track_running_stats = False  # … and do not update the running ones
        try:
            yield
        finally:
            for norm in self.norms:
                norm.training = training
                norm.track_running_stats = True


# ---- The classifier ------------------------------------------------------------------
def as_classifier(trunk, softmax_layer):
    """The trunk with a softmax layer on top: images [B, 3, S, S] -> [B, classes]."""
    return nn.Sequential(OrderedDict(trunk=trunk, softmax_layer=softmax_layer))


def load_network(path, weights):
    """(trunk, softmax layer or None) with what read_weights() found in `path`.

    The trunk is plain torchvision.
    """
    architecture = architecture_of(path, weights)
    trunk, dimension = make_trunk(architecture.model_type, architecture.stem)
    modules = {"trunk": trunk}
    if weights["from_checkpoint"]:
        print(
            f"note: {path} is a checkpoint: the finished model, a .pt file, gives "
            "better features (batch-norm statistics of whole images, the best epoch)"
        )

    softmax_layer = None
    if "softmax_layer" in weights:
        softmax_layer = nn.Linear(dimension, len(weights["classes"]))
        modules["softmax_layer"] = softmax_layer
    load_weights(modules, weights, path)
    use_pixels_of(trunk, weights)
    return trunk, softmax_layer


# ---- Faster training on CPUs ---------------------------------------------------------
def speed_up_small_maps(trunk):
    """Let a trunk's convolutions compute maps of 1 × 1 and 2 × 2 as linear layers.

    For training on CPUs; the parameters and the state dict stay as they are. Returns
    the trunk.
    """
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.kernel_size, module.padding)
            if shape in (((1, 1), (0, 0)), ((3, 3), (1, 1))):
                SmallMapConv2d.adopt(module)
    return trunk


class SmallMapConv2d(nn.Conv2d):
    """A convolution that, on CPUs, computes maps of 1 × 1 and 2 × 2 as a linear layer.

    Patches of 30 pixels are such maps in layer3 and layer4, where a padded convolution
    multiplies mostly zeros. Here only the weights that meet a pixel of the map count:
    the same function, up to 9 times less work. For kernels of 3 × 3 with padding 1 and
    of 1 × 1 without, and without a bias. On GPUs it is torch's own convolution: GPUs
    are bound by launch overhead there, and this launches more kernels.
    """

    @staticmethod
    def adopt(convolution):
        """Turn an nn.Conv2d into a SmallMapConv2d, in place.

        A new module would lose the weights' initialisation and its place in the trunk.
        """
        convolution.__class__ = SmallMapConv2d
        if convolution.kernel_size == (1, 1):
            return

        # Which of the nine weights of a 3 × 3 kernel ("taps", numbered 0 to 8 by rows)
        # an output multiplies with which pixel of a 2 × 2 map. The kernel's middle, tap
        # 4, lies on the output's own place (a, b), so the pixel (row, column) meets the
        # tap that is row − a rows and column − b columns from the middle. For example,
        # the output at (0, 0) meets the four pixels through the taps 4, 5, 7 and 8.
        taps = []
        outputs = range(0, 2, convolution.stride[0])
        for a in outputs:
            for b in outputs:
                for row in (0, 1):
                    for column in (0, 1):
                        taps.append(4 + 3 * (row - a) + (column - b))
        convolution.register_buffer("taps", torch.tensor(taps), persistent=False)

    def forward(self, x):  # [B, in, S, S] -> [B, out, S', S'], S' = ⌈S / stride⌉
        height, width = x.shape[2:]
        if x.is_cuda or width > 2 or height != width:
            return super().forward(x)

        # In the order in which both lie in memory: channels last.
        pixels = x.permute(0, 2, 3, 1)
        weight = self.weight.permute(0, 2, 3, 1)
        stride = self.stride[0]

        kernel = self.kernel_size[0]
        if kernel == 1 or width == 1:
            # Only the middle tap touches the map.
            middle = weight[:, kernel // 2, kernel // 2]
            y = F.linear(pixels[:, ::stride, ::stride], middle)
            return y.permute(0, 3, 1, 2)

        # A row per output (channel, a, b), a column per input (row, column, channel).
        matrix = weight.flatten(1, 2).index_select(1, self.taps)  # [out, S'·S'·4, in]
        matrix = matrix.view(-1, 4 * self.in_channels)  # [out·S'·S', 4·in]
        y = F.linear(pixels.flatten(1), matrix)  # [B, out·S'·S']
        y = y.view(len(x), self.out_channels, 2 // stride, 2 // stride)
        return y.contiguous(memory_format=torch.channels_last)
