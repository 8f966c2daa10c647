"""Features of your own images by a trained network, and the classes that it predicts.

python extract_features.py --model exp --images my_pictures --out features.npz
python extract_features.py --model exp_labels --images cat.jpg --out predictions.csv
python extract_features.py --model exp --images my_pictures --neighbours nearest.png
"""

import contextlib
import csv
import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

import dataset_helpers
import models
from evaluation import EVALUATION_BATCH, nearest_neighbours, trunk_input
from pictures import neighbour_picture, save_picture
from runtime.arguments import (
    Parser,
    bounded,
    device_name,
    file_path,
    non_empty,
    output_file,
)
from runtime.bars import progress_bar
from runtime.devices import choose_device
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.script import run_script
from runtime.weights import architecture_of, choose_image_size, read_weights

BLOCK = 512  # images in memory at a time
SEARCHED_ROWS = 100_000  # features in memory at a time, in a search
SHOWN_QUERIES = 20  # rows of the picture of neighbours, at most
SHOWN_NEIGHBOURS = 8


def parse_args(argv=None):
    parser = Parser(
        "Compute features of any images by a trained network, and predictions.",
        example="python extract_features.py --model exp --images my_pictures "
        "--out features.npz",
    )
    add = parser.add_argument
    # fmt: off
    add("--model", type=non_empty, required=True, metavar="NAME",
        help="file of the training scripts or of another project's ResNet, or a name"
             " in the weights folder")
    add("--images", type=file_path, required=True, metavar="PATH",
        help="image, or folder of images with all its subfolders")
    add("--out", type=output_file, metavar="PATH",
        help="features.npz with names, features, classes and probabilities, or"
             " predictions.csv; by default features.npz, or none with --neighbours")
    add("--neighbours", type=output_file, metavar="PATH",
        help=f"PNG picture to write: up to {SHOWN_QUERIES} images and the most similar"
             " ones")
    add("--queries", type=file_path, metavar="PATH",
        help="with --neighbours: images whose neighbours are shown; by default some of"
             " --images")
    add("--weights-dir", type=file_path, default=Path("weights"), metavar="PATH",
        help="weights folder")
    add("--image-size", type=bounded(int, 36, 224), metavar="N",
        help="side in pixels to which images are resized and cropped, 36 to 224; by"
             " default the size of the training")
    add("--batch-size", type=bounded(int, 1, EVALUATION_BATCH),
        default=EVALUATION_BATCH, metavar="N",
        help=f"images at a time, 1 to {EVALUATION_BATCH}")
    add("--device", type=device_name, default="auto", metavar="auto|cpu|cuda|cuda:N",
        help="auto: a CUDA GPU if there is one")
    # fmt: on
    parser.set_defaults(deterministic=False)  # choose_device() asks for it
    args = parser.parse_args(argv)
    if args.out is None and args.neighbours is None:
        args.out = Path("features.npz")
    if args.out is not None and args.out.suffix not in (".npz", ".csv"):
        parser.error(f"--out {args.out} must end in .npz or .csv")
    if args.queries and not args.neighbours:
        parser.error("--queries needs --neighbours")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)

    # What the model cannot do is said before thousands of images are read.
    path, weights = read_weights(args.model, args.weights_dir)
    if args.out and args.out.suffix == ".csv" and "softmax_layer" not in weights:
        raise UserError(
            f"{path} has no softmax layer, so it predicts nothing",
            "use --out features.npz",
        )
    network = Network(args, device, path, weights)

    folder, names = find_names(args.images)
    with scratch_folder(args.out or args.neighbours) as scratch:
        extracted = extract(network, folder, names, scratch)
        if args.out and extracted.names:
            write_result(args.out, extracted, weights.get("classes"))
        if args.neighbours and extracted.names:
            draw_neighbours(args, network, extracted, scratch)

    problems = extracted.problems
    if problems:
        shown = "; ".join(problems[:10])
        if len(problems) > 10:
            shown += f"; and {len(problems) - 10} more"
        raise UserError(
            f"{len(problems)} files cannot be read and are left out ({shown})",
            "repair or remove them",
        )


# ---- Images to features --------------------------------------------------------------
class Network:
    """The trunk and, of a fine-tuned model, the softmax layer."""

    def __init__(self, args, device, path, weights):
        self.device = device
        self.batch_size = args.batch_size
        # A trunk is at its best with images of the size that it was trained on.
        architecture = architecture_of(path, weights)
        self.side = choose_image_size(args.image_size, path, architecture)

        trunk, softmax_layer = models.load_network(path, weights)
        models.speed_up_small_maps(trunk)
        self.trunk = trunk.to(device, memory_format=torch.channels_last).eval()
        self.softmax_layer = softmax_layer
        if softmax_layer is not None:
            softmax_layer.to(device)

    @torch.no_grad()
    def features(self, images):
        """uint8 [N, 3, S, S] on the host -> float32 [N, d]."""
        features = []
        for batch in images.split(self.batch_size):
            pixels = trunk_input(self.trunk, batch.to(self.device))
            features.append(self.trunk(pixels))
        return torch.cat(features)

    @torch.no_grad()
    def probabilities(self, features):
        """[N, d] -> [N, classes]."""
        return self.softmax_layer(features).softmax(1)


class RowsOnDisk:
    """Rows of float32 in a file: those of a million images would fill the memory."""

    def __init__(self, path):
        self.path = path
        self.shape = (0, 0)
        path.touch()

    def append(self, rows):
        """rows [n, d], on any device."""
        rows = rows.cpu().numpy()
        with open(self.path, "ab") as file:
            file.write(rows.tobytes())
        self.shape = (self.shape[0] + len(rows), rows.shape[1])

    def write_npy(self, file):
        """All rows as a file of numpy's format .npy."""
        header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        with open(self.path, "rb") as rows:
            shutil.copyfileobj(rows, file)

    def tensor(self):
        """All rows, float32 [N, d], mapped from the file."""
        count, dimension = self.shape
        rows = torch.from_file(str(self.path), size=count * dimension)
        return rows.view(self.shape)


@contextlib.contextmanager
def scratch_folder(path):
    """A temporary folder beside the file `path`, where there is room for the results.

    The system's own folder for temporary files is in memory on some systems.
    """
    parent = Path(os.path.realpath(path)).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".features_") as folder:
        yield Path(folder)


class Extracted:
    """What extraction has found: a row for each file that could be read."""

    def __init__(self, folder, scratch):
        self.folder = folder
        self.names = []  # of the files, relative to the folder
        self.problems = []  # texts, one for each file that could not be read
        self.features = RowsOnDisk(scratch / "features")
        self.probabilities = RowsOnDisk(scratch / "probabilities")
        self.predicted = []  # the most probable class of each image, an int,
        self.confidence = []  # and its probability, float32


def extract(network, folder, names, scratch):
    """Features of image files in blocks: of a million, only the names are in memory.

    names: of the files, relative to the folder. scratch: a folder for rows. A file that
    cannot be read is left out. Returns an Extracted.
    """
    extracted = Extracted(folder, scratch)
    with progress_bar(len(names), "features", " images") as bar:
        for start in range(0, len(names), BLOCK):
            block = names[start : start + BLOCK]
            files = [folder / name for name in block]
            images = np.empty((len(block), 3, network.side, network.side), np.uint8)
            problems = dataset_helpers.decode(files, images, bar)
            for row, problem in problems.items():
                extracted.problems.append(f"{files[row]}: {problem}")
            readable = [row for row in range(len(block)) if row not in problems]
            if not readable:
                continue

            features = network.features(torch.from_numpy(images[readable]))
            extracted.names += [block[row] for row in readable]
            extracted.features.append(features)
            if network.softmax_layer is not None:
                probabilities = network.probabilities(features)  # [n, classes]
                best = probabilities.max(1)
                extracted.probabilities.append(probabilities)
                extracted.predicted += best.indices.tolist()
                extracted.confidence += list(best.values.cpu().numpy())
    return extracted


def find_names(path):
    """(folder, names of the image files in it) of an image or a folder of images.

    A name is relative: "cat/1.jpg" and "dog/1.jpg" must not become one in the result.
    """
    if path.is_file():
        return path.parent, [path.name]
    return path, dataset_helpers.image_names(path)


# ---- Results -------------------------------------------------------------------------
def write_result(path, extracted, classes):
    """Write the .npz or .csv file. classes: names, None without a softmax layer."""
    with atomic_write(path, "wb" if path.suffix == ".npz" else "w") as file:
        if path.suffix == ".npz":
            write_npz(file, extracted, classes)
        else:
            write_predictions(file, extracted, classes)
    count, dimension = extracted.features.shape
    print(f"wrote {path}: {count} images, {dimension} features each")


def write_npz(file, extracted, classes):
    """names [N] and features [N, d]; classes [C] and probabilities [N, C].

    As numpy.savez() does, but without all rows in memory.
    """
    with zipfile.ZipFile(file, "w") as archive:

        def add(name):
            return archive.open(f"{name}.npy", "w", force_zip64=True)

        with add("names") as member:
            np.lib.format.write_array(member, np.array(extracted.names))
        with add("features") as member:
            extracted.features.write_npy(member)
        if classes is not None:
            with add("classes") as member:
                np.lib.format.write_array(member, np.array(classes))
            with add("probabilities") as member:
                extracted.probabilities.write_npy(member)


def write_predictions(file, extracted, classes):
    """The most probable class of every image, and its probability."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "class", "probability"])
    predicted = [classes[label] for label in extracted.predicted]
    rows = zip(extracted.names, predicted, extracted.confidence, strict=True)
    writer.writerows(rows)


def most_similar(searched, queries, count):
    """nearest_neighbours(), with only a part of the searched features in memory."""
    cosines = torch.empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(searched), SEARCHED_ROWS):
        block = searched[start : start + SEARCHED_ROWS]
        block_cosines, block_indices = nearest_neighbours(block, queries, count)
        cosines = torch.cat([cosines, block_cosines], 1)
        indices = torch.cat([indices, block_indices + start], 1)

        best = cosines.topk(min(count, cosines.shape[1]))
        cosines = best.values
        indices = indices.gather(1, best.indices)
    return cosines, indices


def draw_neighbours(args, network, extracted, scratch):
    """A picture of some images and the most similar ones; print their cosines."""
    searched = extracted.features.tensor()
    own = args.queries is None
    if own:
        # Some of the images, evenly spread.
        count = min(SHOWN_QUERIES, len(extracted.names))
        rows = np.linspace(0, len(extracted.names) - 1, count).round().astype(int)
        query_folder = extracted.folder
        query_names = [extracted.names[row] for row in rows]
        query_features = searched[torch.from_numpy(rows)]
    else:
        query_folder, names = find_names(args.queries)
        (scratch / "queries").mkdir()
        queries = extract(
            network, query_folder, names[:SHOWN_QUERIES], scratch / "queries"
        )
        extracted.problems += queries.problems
        if not queries.names:
            return
        query_names = queries.names
        query_features = queries.features.tensor()

    # An image of --images is its own nearest: one more is looked for, and it is left
    # out.
    wanted = SHOWN_NEIGHBOURS + 1 if own else SHOWN_NEIGHBOURS
    cosines, nearest = most_similar(searched, query_features, wanted)
    found = []  # a list of (cosine, row) per query
    for query, (values, indices) in enumerate(
        zip(cosines.tolist(), nearest.tolist(), strict=True)
    ):
        pairs = list(zip(values, indices, strict=True))
        if own:
            pairs = [pair for pair in pairs if pair[1] != rows[query]]
        found.append(pairs[:SHOWN_NEIGHBOURS])
    shown = min(len(pairs) for pairs in found)
    if shown == 0:
        raise UserError(f"{args.images} holds one readable image only", "give more")

    def load(file):
        return torch.from_numpy(dataset_helpers.read_image(file, network.side).copy())

    with warnings.catch_warnings(action="ignore"):  # of odd metadata
        queries = torch.stack([load(query_folder / name) for name in query_names])
        images = []
        for pairs in found:
            names = [extracted.names[row] for _, row in pairs[:shown]]
            images.append(torch.stack([load(extracted.folder / n) for n in names]))

    texts = []
    for name, pairs in zip(query_names, found, strict=True):
        texts.append([f"{cosine:.3f}" for cosine, _ in pairs[:shown]])
        similar = [f"{cosine:.3f} {extracted.names[row]}" for cosine, row in pairs]
        print(f"{name}: {', '.join(similar)}")
    picture = neighbour_picture(
        queries,
        torch.stack(images),
        query_texts=[Path(name).name for name in query_names],
        found_texts=texts,
    )
    save_picture(picture, args.neighbours)
    print(
        f"wrote {args.neighbours}: images, and the most similar ones with their cosines"
    )


if __name__ == "__main__":
    run_script(main)
