"""The trunk by torch.hub, ready for use:

    trunk, prepare = torch.hub.load(".", "trunk", source="local", path="weights/exp.pt")
    with torch.no_grad():
        features = trunk(prepare(Image.open("cat.jpg").convert("RGB"))[None])

Without this repository, a file of weights can be used as well:

    saved = torch.load("weights/exp.pt", weights_only=True)
    settings = saved["settings"]
    name = settings["model_type"].replace("res", "resnet")
    resnet = getattr(torchvision.models, name)()
    if settings["stem"] == "small":
        resnet.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    resnet.fc = torch.nn.Identity()
    resnet.load_state_dict(saved["trunk"])
    resnet.eval()
    prepare = v2.Compose([
        v2.Resize(settings["image_size"], v2.InterpolationMode.BICUBIC),
        v2.CenterCrop(settings["image_size"]),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(saved["pixel_mean"], saved["pixel_std"]),
    ])
"""

from pathlib import Path

import torch
from torchvision.transforms import v2

from augmentations import PIXEL_MEAN, PIXEL_STD
from checkpoints import read_weights
from dataset_helpers import STL10_SIDE
from extract_features import make_network

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm", "filelock"]


def trunk(path):
    """(ResNet in eval mode, its preprocessing) of a file of weights.

    The network maps float32 [B, 3, S, S] to features [B, 512], or [B, 2048] of res50.
    The preprocessing maps a Pillow image in RGB to float32 [3, S, S].
    """
    path, weights = read_weights(str(path), Path("weights"))
    resnet, _ = make_network(path, weights)

    side = weights["settings"].get("image_size", STL10_SIDE)
    prepare = v2.Compose(
        [
            v2.Resize(side, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(side),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
    )
    return resnet.eval(), prepare
