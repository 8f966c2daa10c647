"""Features of your own images by a trained network, and the classes that it predicts.

python extract_features.py --model exp --images my_pictures --out features.npz
python extract_features.py --model exp --images cat.jpg --out predictions.csv
"""

import csv
from pathlib import Path

import numpy as np
import torch

from checkpoints import (
    atomic_write,
    load_weights,
    model_type_of,
    read_weights,
    stem_of,
)
from dataset_helpers import STL10_SIDE, list_images, load_images
from evaluation import EVALUATION_BATCH, trunk_features
from models import make_trunk
from run_helpers import (
    Parser,
    UserError,
    bounded,
    choose_device,
    file_path,
    non_empty,
    run_script,
)


def parse_args(argv=None):
    parser = Parser("Features of any images by a trained network, and predictions.")
    add = parser.add_argument
    # fmt: off
    add("--model", type=non_empty, required=True,
        help="a .pt or .ckpt file of the training scripts, the state dict of a "
             "torchvision ResNet, or a name in the weights folder")
    add("--images", type=file_path, required=True,
        help="an image, or a folder of images; its folders are searched too")
    add("--out", type=file_path, default=Path("features.npz"),
        help="features.npz with names, features, classes and probabilities, "
             "or predictions.csv")
    add("--weights-dir", type=file_path, default=Path("weights"),
        help="the weights folder")
    add("--image-size", type=bounded(int, 36, 224),
        help="images are resized and cropped to this side length; "
             "defaults to that of the training")
    add("--batch-size", type=bounded(int, 1, EVALUATION_BATCH),
        default=EVALUATION_BATCH,
        help="images at a time")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto takes a CUDA GPU if there is one")
    # fmt: on
    parser.set_defaults(deterministic=False)  # choose_device() asks for it
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npz", ".csv"):
        parser.error(f"--out {args.out} must end in .npz or .csv")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)

    # What the model cannot do is said before thousands of images are read.
    path, weights = read_weights(args.model, args.weights_dir)
    predicts = "softmax_layer" in weights
    if args.out.suffix == ".csv" and not predicts:
        raise UserError(
            f"{path} has no softmax layer, so it predicts nothing",
            "use --out features.npz",
        )
    trunk, softmax_layer = make_network(path, weights)
    trunk.to(device, memory_format=torch.channels_last)

    # A trunk is at its best with images of the size that it was trained on.
    files, names = find_files(args.images)
    side = args.image_size or weights["settings"].get("image_size", STL10_SIDE)
    images, _ = load_images(files, side, device, str(args.images))

    features = trunk_features(trunk, images, args.batch_size)  # [N, d]
    result = {"names": np.array(names), "features": features.cpu().numpy()}
    if predicts:
        softmax_layer.to(device)
        with torch.no_grad():
            probabilities = softmax_layer(features).softmax(1)  # [N, classes]
        result["classes"] = np.array(weights["classes"])
        result["probabilities"] = probabilities.cpu().numpy()

    if args.out.suffix == ".npz":
        with atomic_write(args.out) as file:
            np.savez(file, **result)
    else:
        write_predictions(args.out, result)
    dimension = features.shape[1]
    print(f"wrote {args.out}: {len(files)} images, {dimension} features each")


def make_network(path, weights):
    """(trunk, softmax layer or None) with what read_weights() found in `path`."""
    settings = weights["settings"]
    # Other projects' files have no settings, but their weights show what they are of.
    model_type = settings.get("model_type") or model_type_of(weights["trunk"])
    stem = settings.get("stem") or stem_of(weights["trunk"])
    trunk, dimension = make_trunk(model_type, stem)
    modules = {"trunk": trunk}
    if weights["from_checkpoint"]:
        print(
            f"note: {path} is a checkpoint: the finished model, a .pt file, has the "
            "batch-norm statistics of whole images, which give better features"
        )

    softmax_layer = None
    if "softmax_layer" in weights:
        classes = len(weights["classes"])
        softmax_layer = torch.nn.Linear(dimension, classes)
        modules["softmax_layer"] = softmax_layer
    load_weights(modules, weights, path)
    return trunk, softmax_layer


def find_files(path):
    """(image files, their names in the result) of an image or a folder of images."""
    if path.is_file():
        return [path], [path.name]
    # Relative to the folder: "cat/1.jpg" and "dog/1.jpg" must not become one name.
    files = list_images(path)
    names = [file.relative_to(path).as_posix() for file in files]
    return files, names


def write_predictions(path, result):
    """A CSV file with the most probable class of every image and its probability."""
    predicted = result["probabilities"].argmax(1)
    classes = result["classes"][predicted]
    probabilities = result["probabilities"].max(1)
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "class", "probability"])
        writer.writerows(zip(result["names"], classes, probabilities, strict=True))


if __name__ == "__main__":
    run_script(main)
