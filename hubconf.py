"""The trunk by torch.hub, ready for use:

    trunk, prepare = torch.hub.load(".", "trunk", source="local", path="weights/exp.pt")
    with torch.no_grad():
        features = trunk(prepare(Image.open("cat.jpg"))[None])

Without this repository, a file of weights can be used as well. For pictures that are
transparent or have 16 bits, do what square() in dataset_helpers.py does:

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
    picture = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
    with torch.no_grad():
        features = resnet(prepare(picture)[None])
"""

import contextlib
import sys
from pathlib import Path

from torchvision.transforms.functional import pil_to_tensor

dependencies = ["torch", "torchvision", "numpy", "PIL", "tqdm", "filelock"]

ROOT = Path(__file__).resolve().parent


def trunk(path):
    """(ResNet in eval mode, its preprocessing) of a file of weights.

    The network is torchvision's; it maps float32 [B, 3, S, S] to features [B, 512], or
    [B, 2048] of res50. The preprocessing maps a Pillow image of any kind, as it was
    opened, to float32 [3, S, S]: what extract_features.py does to its images.
    """
    with own_modules():
        from dataset_helpers import square
        from evaluation import trunk_input
        from models import load_network
        from runtime.weights import architecture_of, choose_image_size, read_weights

    path, weights = read_weights(str(path), Path("weights"))
    resnet, _ = load_network(path, weights)
    side = choose_image_size(None, path, architecture_of(path, weights))

    def prepare(picture):
        pixels = pil_to_tensor(square(picture, side))
        return trunk_input(resnet, pixels[None])[0]

    return resnet.eval(), prepare


@contextlib.contextmanager
def own_modules():
    """Inside, imports find this repository's files, under names that are often taken.

    The program may have modules called models or evaluation of its own. Those that it
    has imported are put back afterwards, and those that it imports later are its own.
    """
    names = {"runtime", *(path.stem for path in ROOT.glob("*.py"))}

    def take_out():
        found = {}
        for name in list(sys.modules):
            if name.partition(".")[0] in names:
                found[name] = sys.modules.pop(name)
        return found

    theirs = take_out()
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        take_out()
        sys.path.remove(str(ROOT))
        sys.modules.update(theirs)
