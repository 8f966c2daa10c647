"""Where images are kept, whether they fit, and what the ranks of a node share."""

import math
import re
import shutil
import tempfile
import zlib

import numpy as np
import pytest
import torch
from conftest import make_trainer
from records import interrupted, same
from torch import distributed

import dataset_helpers
import pirl_stl_train_test
from dataset_helpers import load_images
from pirl_stl_train_test import PretrainingTrainer
from runtime import devices, memory
from runtime.errors import UserError
from runtime.memory import check_memory, fill_images, node_shared_tensor, place_images

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
# Not equal to CPU, though its memory is the same: images on CPU are "on the host" then.
OTHER_CPU = torch.device("cpu", 0)
RESERVED = 3_000_000_000  # bytes of a card
HUNDRED_IMAGES = 100 * 3 * 36 * 36  # bytes of 100 images of 36 pixels
SHAPE = (100, 3, 36, 36)


@pytest.fixture
def free(monkeypatch):
    """free(card=…, host=…) says how many bytes are free from now on."""

    def set_free(card=10**12, host=10**12):
        numbers = {"cuda": card, "cpu": host}
        monkeypatch.setattr(memory, "free_memory", lambda device: numbers[device.type])

    return set_free


# ---- The card or the host ------------------------------------------------------------
def test_auto_keeps_images_on_the_card_if_they_fit_beside_a_step(free, capsys):
    """20 bytes beside each image: rows of the memory bank and random numbers."""
    free(card=RESERVED + HUNDRED_IMAGES + 100 * 20)
    assert place_images("auto", 100, 36, CUDA, 20) == CUDA
    assert capsys.readouterr().out == ""

    free(card=RESERVED + HUNDRED_IMAGES + 100 * 20 - 1)
    assert place_images("auto", 100, 36, CUDA, 20) == CPU
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: the images stay on the host: they take 0.000391 GB")
    assert line.endswith("a card has room for 0.000391 GB")


@pytest.mark.parametrize("pretext", ["jigsaw", "rotation", "jigsaw-rotation"])
def test_bytes_beside_the_pixels_are_those_of_the_task(tiny, pretext):
    """A row of the bank, and those of the random numbers of two epochs."""
    trainer = make_trainer([*tiny, "--pretext", pretext])
    rows = (trainer.bank.vectors, trainer.epoch_uniforms(1), trainer.epoch_uniforms(2))
    expected = sum(row.nbytes for row in rows) / len(trainer.images)
    assert pirl_stl_train_test.bytes_beside_pixels(trainer.args) == expected


def test_all_ranks_keep_images_in_the_same_place(free, monkeypatch, capsys):
    """If one card is too small: ranks that share images on the host meet for that."""
    meetings = []

    def reduce_with_a_small_card(number, operation):
        assert operation == distributed.ReduceOp.MIN
        meetings.append(number.item())
        number.fill_(1000)

    monkeypatch.setattr(memory, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_reduce", reduce_with_a_small_card)
    free(card=10**12 + 1)
    assert place_images("auto", 100, 36, CUDA, 20) == CPU
    assert meetings == [10**12 + 1 - RESERVED]
    assert "room for 1e-06 GB" in capsys.readouterr().out, "that of the small card"


def test_a_wish_is_followed(free, capsys):
    for card in (0, 10**12):
        free(card=card)
        assert place_images("device", 100, 36, CUDA, 20) == CUDA
        assert place_images("host", 100, 36, CUDA, 20) == CPU
    for wish in ("auto", "device", "host"):
        assert place_images(wish, 100, 36, CPU, 20) == CPU
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_refused_with_the_advice_that_helps(free):
    free(card=RESERVED + HUNDRED_IMAGES, host=2 * HUNDRED_IMAGES)
    check_memory(SHAPE, CUDA, 2)
    check_memory(SHAPE, CPU, 2)
    with pytest.raises(UserError, match=r"^100 images of 36 × 36 .* 0\.000259 GB: use"):
        check_memory(SHAPE, CPU, 3)

    free(card=RESERVED + HUNDRED_IMAGES - 1)
    check_memory(SHAPE, CPU, 1)
    with pytest.raises(
        UserError, match="in pretraining, use --images-on host; else us"
    ):
        check_memory(SHAPE, CUDA, 1)
    free(card=0)
    with pytest.raises(UserError, match="there is room for 0 GB: in pretraining"):
        check_memory(SHAPE, CUDA, 1)
    # They are decoded on the host before they go to the card.
    free(host=HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match=r"there is room for .*: use a smaller"):
        check_memory(SHAPE, CUDA, 1)


@pytest.mark.parametrize("wish", ["device", "auto"])
def test_memory_is_stated_and_checked_before_images_are_read(
    free, call, tiny, monkeypatch, wish
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(devices, "try_kernel", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(dataset_helpers, "read_image", interrupted)
    # With a row of the bank and the random numbers of two epochs, one byte too few.
    card = RESERVED + HUNDRED_IMAGES + 100 * 4 * (128 + 2 * 96) - 1
    if wish == "auto":
        free(card=card, host=1000)
    else:
        free(card=2**30)
    flags = ("--device", "cuda", "--images-on", wish)
    outcome = call("pirl_stl_train_test", *tiny, *flags)
    assert "100 images take 0.000389 GB" in outcome.out
    advice = {
        "device": "in pretraining, use --images-on host",
        "auto": "use a smaller --image-size or fewer images",
    }
    problem = "100 images of 36 × 36 pixels take"
    assert outcome.is_one_line_error(problem, advice[wish])
    assert ("note: the images stay on the host" in outcome.out) == (wish == "auto")


def test_images_on_the_host_give_the_same_bits(tiny, monkeypatch):
    """Each batch comes by way of pinned memory; nothing else is different."""

    def epoch_of(trainer):
        """All that an epoch and its validation change."""
        uniforms = trainer.epoch_uniforms(1)
        for step, index in enumerate(trainer.epoch_batches(1)):
            trainer.train_step(index, uniforms, 1, step)
        result = pirl_stl_train_test.validate(trainer, uniforms, 1)
        return trainer.state_dict(), result, trainer.exported_trunk().state_dict()

    on_device = make_trainer(tiny)
    images = on_device.images.clone()
    on_host = PretrainingTrainer(
        on_device.args, OTHER_CPU, images, on_device.train_count
    )
    expected = epoch_of(on_device)

    empty = torch.empty
    pinned = []

    def note_pinned(*size, pin_memory=False, **options):
        buffer = empty(*size, **options)
        if pin_memory:
            pinned.append(buffer)
        return buffer

    monkeypatch.setattr(torch, "empty", note_pinned)
    assert same(epoch_of(on_host), expected)
    sizes = [len(buffer) for buffer in pinned]
    assert sizes == [16, 16, 16, 16, 6, 16, 14], "of training, then of validation"
    addresses = {buffer.data_ptr() for buffer in pinned}
    assert len(addresses) == 7, "a copy may still be under way when the next begins"


# ---- What is free --------------------------------------------------------------------
@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(files) lets the host have these files of /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def system(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return system


def version_2(folder, limit, usage, cache):
    """The files of a control group."""
    return {
        f"cgroup/{folder}/memory.max": limit,
        f"cgroup/{folder}/memory.current": usage,
        f"cgroup/{folder}/memory.stat": f"anon 5\ninactive_file {cache}\nslab 7",
    }


def version_1(folder, limit, usage, cache):
    statistics = f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_cache 9"
    return {
        f"cgroup/memory/{folder}/memory.limit_in_bytes": limit,
        f"cgroup/memory/{folder}/memory.usage_in_bytes": usage,
        f"cgroup/memory/{folder}/memory.stat": statistics,
    }


MEMINFO = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n"
}


def test_the_host_s_free_memory(system):
    assert memory.free_memory(CPU) == math.inf, "not Linux: the system will refuse"
    system(MEMINFO)
    assert memory.free_memory(CPU) == 5000 * 1024


def test_limits_of_version_2(system):
    """As Slurm makes them: the own group has none, those around it have."""
    system(MEMINFO | {"proc/self/cgroup": "0::/slurm/job_7/step_0"})
    system(version_2("slurm/job_7/step_0", "max", 40, 30))
    system(version_2("slurm/job_8", 100, 40, 30))
    assert memory.free_memory(CPU) == 5000 * 1024

    system(version_2("slurm", 9_000_000, 8_000_000, 2_000_000))
    assert memory.free_memory(CPU) == 3_000_000
    system(version_2("slurm/job_7", 2_500_000, 700_000, 50_000))
    assert memory.free_memory(CPU) == 1_850_000


def test_limits_of_version_1(system):
    system(MEMINFO | {"proc/self/cgroup": "5:cpu:/job\n4:memory:/docker/0a1b\n0::/"})
    system(version_1("", 9223372036854771712, 800, 100))  # which means none
    assert memory.free_memory(CPU) == 5000 * 1024
    system(version_1("docker/0a1b", 3_000_000, 2_000_000, 500_000))
    assert memory.free_memory(CPU) == 1_500_000


@pytest.mark.parametrize("group", [version_1, version_2])
def test_limits_as_seen_inside_a_container(system, group):
    """Its own group is the root there, whatever /proc calls it."""
    system({"proc/self/cgroup": "0::/../../pod/0a1b\n4:memory:/pod/0a1b"})
    system(group("", 3_000_000, 2_000_000, 500_000))
    assert memory.free_memory(CPU) == 1_500_000


def test_the_card_s_free_memory(monkeypatch):
    def mem_get_info(device):
        return 100 + device.index, 999

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert memory.free_memory(torch.device("cuda", 3)) == 103


# ---- Several ranks on a node ---------------------------------------------------------
def fill_by_number(rows, array):
    """Image number n is n throughout."""
    numbers = np.arange(SHAPE[0], dtype=np.uint8)[rows]
    assert len(array) == len(numbers)
    array[:] = numbers[:, None, None, None]


def test_images_are_filled_and_their_checksum_taken(free):
    free(host=HUNDRED_IMAGES)
    images, checksum = fill_images(SHAPE, CPU, fill_by_number)
    assert images[:, 2, 35, 1].tolist() == list(range(100))
    assert checksum == zlib.crc32(images.numpy().tobytes())


def test_free_memory_is_divided_by_the_ranks_of_a_node(free, monkeypatch):
    """Each decodes images for its own card. What one rank alone reads is there once."""
    monkeypatch.setattr(memory, "LOCAL_WORLD_SIZE", 4)
    monkeypatch.setattr(memory, "WORLD_SIZE", 8)
    free(host=HUNDRED_IMAGES)
    fill_images(SHAPE, CPU, fill_by_number)
    with pytest.raises(KeyboardInterrupt):
        fill_images(SHAPE, CUDA, interrupted)

    free(host=4 * HUNDRED_IMAGES)
    with pytest.raises(KeyboardInterrupt):
        fill_images(SHAPE, CUDA, interrupted, all_ranks=True)
    free(host=4 * HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match=r"there is room for 0\.000389 GB"):
        fill_images(SHAPE, CUDA, fill_by_number, all_ranks=True)


@pytest.fixture
def first_rank_of_a_node(monkeypatch, tmp_path):
    """Rank 3 of six, the first of three on the second node. Its TMPDIR."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name, value in {"RANK": 3, "WORLD_SIZE": 6, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setattr(memory, name, value)

    def gather(paths, path):
        paths[:] = ["that of another node", None, None, path, None, None]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    return folder


def test_ranks_of_a_node_share_one_tensor(free, data_dir, tiny, first_rank_of_a_node):
    """Of which each fills a part; so memory for one is enough."""
    free(card=0, host=HUNDRED_IMAGES)
    images, _ = fill_images(SHAPE, CPU, fill_by_number, all_ranks=True)
    expected = [row if row % 3 == 0 else 0 for row in range(100)]
    assert images[:, 1, 2, 3].tolist() == expected, "others are for other ranks to fill"
    assert list(first_rank_of_a_node.iterdir()) == [], "the file is gone"

    # The images of pretraining are such, those of fine-tuning and kNN are not.
    args = pirl_stl_train_test.make_parser().parse_args([*map(str, tiny)])
    images, _, _ = dataset_helpers.load_unlabelled(args, CPU, 0)
    filled = images.flatten(1).any(1)
    assert filled.tolist() == [row % 3 == 0 for row in range(100)]
    files = sorted((data_dir / "train").glob("*/*"))
    assert load_images(files, 36, CPU, "images")[0].flatten(1).any(1).all()

    free(card=0, host=HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match="use a smaller --image-size"):
        fill_images(SHAPE, CPU, fill_by_number, all_ranks=True)


def test_other_ranks_of_a_node_take_its_first_rank_s_file(
    first_rank_of_a_node, monkeypatch
):
    """They make no file, and leave the removal to the first."""
    path = first_rank_of_a_node / "images"
    path.write_bytes(bytes(range(12)))

    def gather(paths, own_path):
        assert own_path is None
        paths[:] = ["that of another node", None, None, str(path), None, None]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(memory, "RANK", 5)
    monkeypatch.setattr(memory, "LOCAL_RANK", 2)
    images = node_shared_tensor((1, 3, 2, 2))
    assert images.flatten().tolist() == list(range(12))
    assert path.exists()

    images.fill_(7)
    assert path.read_bytes() == bytes([7] * 12), "the memory is that of all"


def test_a_full_file_system_is_refused_before_it_is_used(
    first_rank_of_a_node, monkeypatch
):
    """Writing to memory that has no room in the file would end the process."""
    usage = shutil.disk_usage(first_rank_of_a_node)

    def disk_usage(folder):
        assert folder == str(first_rank_of_a_node)
        return usage._replace(free=11)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    problem = re.escape(
        f"{first_rank_of_a_node} has 1.1e-08 GB free, and the images ta"
    )
    with pytest.raises(UserError, match=f"{problem}.*: let TMPDIR name"):
        node_shared_tensor((1, 3, 2, 2))
