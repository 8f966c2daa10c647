"""The networks: trunk φ, heads f and g, and the classifier; files of weights; features and their neighbours."""

import contextlib
import copy
from collections import OrderedDict
from pathlib import Path

import run_helpers as rh
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18, resnet34, resnet50

import dataset_helpers as dh
from jigsaw import CELLS

TRUNKS = {"res18": resnet18, "res34": resnet34, "res50": resnet50}
PARTS = ("trunk", "head_f", "head_g", "softmax_layer")  # of a network, under these names in our files
VECTOR_SIZE = 128  # numbers in an output of the heads and in a row of the memory bank (paper, section 3.2)
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 20, 0.07  # of the k-nearest-neighbour classifier
SMALL_MAP_KERNELS = (((1, 1), (0, 0)), ((3, 3), (1, 1)))  # (kernel, padding) that SmallMapConv2d computes
EVALUATION_BATCH = 128  # at most so many images at a time when nothing is trained


class SmallMapConv2d(nn.Conv2d):
    """A 3 × 3 or 1 × 1 convolution which computes square maps of 1 × 1 and 2 × 2 pixels as one linear layer.

    Patches of 30 pixels are such maps in layer3 and layer4, where a padded convolution multiplies mostly zeros. Here
    only the taps that touch the map count: the same function of the weights, up to 9 times less work.
    """

    @staticmethod
    def adopt(convolution):
        """Give an nn.Conv2d this forward; its parameters and its state dict stay as they are."""
        convolution.__class__ = SmallMapConv2d
        # Of a 2 × 2 map, the output at (a, b) sees pixel (y, x) by the tap (y − a + 1, x − b + 1) of 3 × 3.
        places = range(0, 2, convolution.stride[0])
        taps = [3 * (y - a + 1) + x - b + 1 for a in places for b in places for y in (0, 1) for x in (0, 1)]
        convolution.register_buffer("taps", torch.tensor(taps), persistent=False)
        return convolution

    def forward(self, x):  # [B, in, S, S] -> [B, out, S', S'], S' = ⌈S / stride⌉
        side, kernel, stride = x.shape[3], self.kernel_size[0], self.stride[0]
        if side > 2 or x.shape[2] != side:
            return super().forward(x)
        pixels, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)  # as they lie in memory: channels last
        if kernel == 1 or side == 1:  # the middle tap alone
            return F.linear(pixels[:, ::stride, ::stride], weight[:, kernel // 2, kernel // 2]).permute(0, 3, 1, 2)
        matrix = weight.flatten(1, 2).index_select(1, self.taps).view(-1, 4 * self.in_channels)  # [out·S'·S', 4·in]
        y = F.linear(pixels.flatten(1), matrix).view(len(x), -1, 2 // stride, 2 // stride)
        return y.contiguous(memory_format=torch.channels_last)


def make_trunk(model_type, stem="imagenet", zero_init=True):
    """(torchvision's ResNet without its last layer: float [B, 3, H, W] -> [B, d], d: 512, or 2048 for res50).

    stem "small": the first convolution is 3 × 3 with stride 1, for small images, at four times the work. zero_init:
    every residual block starts as its shortcut (Goyal et al., arXiv:1706.02677, section 5.1).
    """
    trunk = TRUNKS[model_type](weights=None, zero_init_residual=zero_init)
    dimension = trunk.fc.in_features
    trunk.fc = nn.Identity()
    if stem == "small":
        trunk.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding) in SMALL_MAP_KERNELS:
            SmallMapConv2d.adopt(module)
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
        self.together = head_output(CELLS * VECTOR_SIZE, non_linear)

    def forward(self, features):  # [B, 9, d] -> [B, 128]
        return self.together(self.patch(features).flatten(1))


class PIRL(nn.Module):
    """The trunk φ with head f for whole images and head g for their nine shuffled patches (paper, figure 3)."""

    def __init__(self, model_type, non_linear_head=False, stem="imagenet", zero_init=True):
        super().__init__()
        self.trunk, dimension = make_trunk(model_type, stem, zero_init)
        self.head_f = head_output(dimension, non_linear_head)
        self.head_g = JigsawHead(dimension, non_linear_head)
        self.norms = [m for m in self.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def forward(self, images, patches):
        """images [B, 3, S, S], patches [B·9, 3, P, P] -> f(φ(I)) and g(φ(I_t)), each [B, 128], not normalised."""
        image_vectors = self.head_f(self.trunk(images))
        with self.batch_statistics():
            patch_features = self.trunk(patches)
        return image_vectors, self.head_g(patch_features.unflatten(0, (-1, CELLS)))

    @contextlib.contextmanager
    def batch_statistics(self):
        """Inside, batch norm uses the batch's own statistics, in eval mode too, and leaves the running ones alone.

        Those are of whole images, as evaluation needs: mixing in the patches' costs several points of accuracy.
        """
        training = self.trunk.training
        for norm in self.norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield
        finally:
            for norm in self.norms:
                norm.training, norm.track_running_stats = training, True


def classifier(trunk, dimension, classes):
    """The trunk with one linear (softmax) layer on top: images [B, 3, S, S] -> logits [B, classes]."""
    return nn.Sequential(OrderedDict(trunk=trunk, softmax_layer=nn.Linear(dimension, classes)))


# ---- Files of weights ------------------------------------------------------------------------------------------------
def read_weights(name, weights_dir):
    """(file, its content) by a path, or by a name under the weights folder: any of our files, or torchvision's.

    The content has the state dicts of PARTS that there are, "settings" ({} of torchvision's) and, if any, "classes".
    """
    tried = [Path(name), weights_dir / name, weights_dir / f"{name}.pt", weights_dir / f"{name}.ckpt"]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise rh.UserError(f"there is no model {name} (looked for {', '.join(map(str, tried))}): check the name")
    state = rh.read_torch_file(path)
    with rh.fitting(path, "give a file of these scripts, or the state dict of one of torchvision's ResNets"):
        if "conv1.weight" in state:
            return path, {"trunk": {k: v for k, v in state.items() if not k.startswith("fc.")}, "settings": {}}
        if "run" in state:  # a checkpoint: "trunk.conv1.weight" and so on
            for key, value in state["run"]["model"].items():
                part, rest = key.split(".", 1)
                state.setdefault(part, {})[rest] = value
        known = {key: state[key] for key in (*PARTS, "classes", "rows") if key in state}
        return path, known | {"trunk": state["trunk"], "settings": dict(state["settings"])}


def model_type_of(trunk):
    """Which of TRUNKS a state dict with torchvision's names is of."""
    return "res50" if "layer1.0.conv3.weight" in trunk else "res34" if "layer1.2.conv1.weight" in trunk else "res18"


def load_weights(modules, weights, path):
    """Give `modules`, a dict by the names in PARTS, their state dicts, where there are any; say which are used."""
    used = [name for name in modules if name in weights]
    with rh.fitting(path, "give the --model-type, --stem and, in pretraining, --non-linear-head that it was made with"):
        for name in used:
            modules[name].load_state_dict(weights[name])
    unused = [name for name in PARTS if name in weights and name not in used]
    print(f"using {', '.join(used)} of {path}{', not ' if unused else ''}{', '.join(unused)}")


# ---- Features --------------------------------------------------------------------------------------------------------
def plain_statistics(trunk, images, batch_size):
    """A copy of the trunk in eval mode, with batch norm's statistics of images uint8 [N, 3, S, S] as they are."""
    trunk = copy.deepcopy(trunk)
    count = max(1, len(images) // min(batch_size, EVALUATION_BATCH))
    update_bn((dh.normalised(batch) for batch in images.chunk(count)), trunk)
    return trunk.eval()


@torch.no_grad()
def trunk_features(trunk, images, batch_size, flip=False):
    """Features in eval mode: uint8 [N, 3, S, S] -> float32 [N, d], for those of a random trunk nearly coincide."""
    trunk.eval()
    features = []
    with rh.progress_bar(len(images), "features", " images") as bar:
        for batch in images.split(min(batch_size, EVALUATION_BATCH)):
            features.append(trunk(dh.normalised(batch.flip(3) if flip else batch)))
            bar.update(len(batch))
    return torch.cat(features)


def nearest(features, queries, count):
    """The k = min(count, N) most similar rows of features [N, d] to queries [Q, d]: (cosines, rows), each [Q, k]."""
    features, count = F.normalize(features, dim=1), min(count, len(features))
    blocks = [(F.normalize(block, dim=1) @ features.T).topk(count) for block in queries.split(1024)]
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])


def neighbour_accuracy(features, labels, queries, query_labels):
    """Accuracy of weighted k-nearest-neighbour classification (k = 20 or all, weights exp(cosine / 0.07)), a float.

    features [N, d] and labels [N] are searched, queries [Q, d] and query_labels [Q] are what is classified. (Wu et al.,
    arXiv:1805.01978, section 3.4.)
    """
    cosines, rows = nearest(features, queries, NEIGHBOURS)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, labels[rows], (cosines / NEIGHBOUR_TEMPERATURE).exp())
    return (votes.argmax(1) == query_labels).float().mean().item()
