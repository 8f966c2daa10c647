"""Features of any folder of images by a trained network, and predictions where it has a softmax layer.

python extract_features.py --model exp --images my_pictures --out features.npz     # or --out predictions.csv
"""

import csv
from pathlib import Path

import run_helpers as rh
import numpy as np
import torch

import dataset_helpers as dh
import models


def parse_args(argv=None):
    parser = rh.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a .pt or .ckpt file of the training scripts, or a name in the weights folder")
    add("--images", type=Path, required=True, help="the folder of images; its folders are searched too")
    out = "features.npz with names, features, classes and probabilities, or predictions.csv"
    add("--out", type=Path, default=Path("features.npz"), help=out)
    add("--weights-dir", type=Path, default=Path("weights"), help="the weights folder")
    add("--image-size", type=rh.between(int, 36, 224), help="side of the images in pixels; None is that of training")
    add("--batch-size", type=rh.between(int, 1, models.EVALUATION_BATCH), default=128, help="images at a time")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a CUDA GPU if there is one")
    parser.set_defaults(deterministic=False)
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npz", ".csv"):
        parser.error(f"--out {args.out} must end in .npz or .csv")
    return args


def main():
    args = parse_args()
    device = rh.choose_device(args)
    path, weights = models.read_weights(args.model, args.weights_dir)
    settings = weights["settings"]
    if args.out.suffix == ".csv" and "softmax_layer" not in weights:
        raise rh.UserError(f"{path} has no softmax layer, so it predicts nothing: use --out features.npz")
    model_type = settings.get("model_type") or models.model_type_of(weights["trunk"])
    trunk, dimension = models.make_trunk(model_type, settings.get("stem") or "imagenet")
    network = models.classifier(trunk, dimension, len(weights.get("classes", ["one"])))
    models.load_weights(dict(network.named_children()), weights, path)
    network.to(device, memory_format=torch.channels_last)
    files = dh.image_files(args.images)
    images, _ = dh.load_images(files, args.image_size or settings.get("image_size", 96), device, str(args.images))
    features = models.trunk_features(network.trunk, images, args.batch_size)
    names = [file.relative_to(args.images).as_posix() for file in files]
    result = {"names": np.array(names), "features": features.cpu().numpy()}
    if "softmax_layer" in weights:
        with torch.no_grad():
            probabilities = network.softmax_layer(features).softmax(1).cpu().numpy()
        result |= {"classes": np.array(weights["classes"]), "probabilities": probabilities}
    if args.out.suffix == ".npz":
        with rh.whole_file(args.out) as file:
            np.savez(file, **result)
    else:
        with rh.whole_file(args.out, "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name", "class", "probability"])
            predicted = result["classes"][probabilities.argmax(1)]
            writer.writerows(zip(names, predicted, probabilities.max(1), strict=True))
    print(f"wrote {args.out}: {len(files)} images, {dimension} features each")


if __name__ == "__main__":
    rh.run_script(main)
