"""Where images are kept, and whether they fit."""

import contextlib
import math
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import torch
from torch import distributed

from runtime.errors import UserError
from runtime.ranks import LOCAL_RANK, LOCAL_WORLD_SIZE, RANK, WORLD_SIZE

# Bytes of a card that a step needs besides the images: weights and activations, and the
# second set of activations, in the private memory of a CUDA graph.
RESERVED_ON_CARD = 3e9
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


# ---- Where ---------------------------------------------------------------------------
def place_images(wish, count, side, device, bytes_beside):
    """The device on which a run keeps its images: the training device, or the CPU.

    wish: "device", "host" or "auto", which is the device if they fit there. side: in
    pixels. bytes_beside: on the card, per image, besides its pixels. All ranks
    call this, and all get the same answer.
    """
    host = torch.device("cpu")
    if device.type == "cpu" or wish == "host":
        return host
    if wish == "device":
        return device

    needed = count * (3 * side**2 + bytes_beside)
    free_bytes = free_memory(device) - RESERVED_ON_CARD
    if WORLD_SIZE > 1:
        # The fullest card decides for all.
        smallest = torch.tensor(free_bytes, dtype=torch.float64)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        free_bytes = smallest.item()
    if needed > free_bytes:
        print(
            f"note: the images stay on the host: they take {needed / 1e9:.3g} GB, and "
            f"a card has room for {max(free_bytes, 0) / 1e9:.3g} GB"
        )
        return host
    return device


def fill_images(shape, device, fill, all_ranks=False):
    """A uint8 tensor [N, 3, S, S] on `device`, filled on the host, and its CRC-32.

    fill(rows, array) writes the images `rows`, a slice of all N, to array, numpy uint8
    [n, 3, S, S]. all_ranks: whether every rank calls this. Three cases:

    - one rank calls this, or is alone on its node: it fills one tensor;
    - all ranks, and the images stay on the host: the ranks of a node share one tensor,
      and each fills a part of it;
    - all ranks, and the images are for cards: each rank fills a tensor of its own, and
      copies it to its card.
    """
    shares_tensor = all_ranks and device.type == "cpu" and LOCAL_WORLD_SIZE > 1
    tensors_on_node = 1
    if all_ranks and device.type == "cuda":
        tensors_on_node = LOCAL_WORLD_SIZE
    check_memory(shape, device, tensors_on_node)

    if shares_tensor:
        images = node_shared_tensor(shape)
        # All take part: if the others only waited, torch would give up after some
        # minutes.
        rows = slice(LOCAL_RANK, None, LOCAL_WORLD_SIZE)
        fill(rows, images.numpy()[rows])
        distributed.barrier()
    else:
        images = torch.empty(shape, dtype=torch.uint8)
        fill(slice(None), images.numpy())
    return images.to(device), zlib.crc32(images.numpy())


def node_shared_tensor(shape):
    """A uint8 tensor on the host that the ranks of a node share.

    It is mapped from a temporary file. Local rank 0 makes the file, all ranks map it,
    and then it is deleted: its content disappears with the last process that maps it.
    """
    size = math.prod(shape)
    path = None
    if LOCAL_RANK == 0:
        # Where the file system is full, writing to the tensor would crash.
        folder = tempfile.gettempdir()
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < size:
            raise UserError(
                f"{folder} has {free_bytes / 1e9:.3g} GB free, and the images "
                f"take {size / 1e9:.3g} GB",
                "let TMPDIR name a larger folder",
            )
        descriptor, path = tempfile.mkstemp(prefix="pirl_images_")
        os.close(descriptor)

    # Every rank gets the paths of all ranks. torchrun numbers the ranks of a node one
    # after another, so the path of local rank 0 is LOCAL_RANK places before our own.
    paths = [None] * WORLD_SIZE
    distributed.all_gather_object(paths, path)
    path = paths[RANK - LOCAL_RANK]
    images = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    distributed.barrier()
    if LOCAL_RANK == 0:
        os.remove(path)
    return images.view(shape)


# ---- Whether they fit ----------------------------------------------------------------
def check_memory(shape, device, tensors_on_node):
    """Refuse images that do not fit, before an hour is spent on decoding them.

    tensors_on_node: how many such tensors this node holds at the same time.
    """
    smaller = "use a smaller --image-size or fewer images"
    host_bytes = free_memory(torch.device("cpu")) / tensors_on_node
    refuse_above(host_bytes, shape, smaller)
    if device.type == "cuda":
        card_bytes = free_memory(device) - RESERVED_ON_CARD
        refuse_above(
            card_bytes, shape, f"in pretraining, use --images-on host; else {smaller}"
        )


def refuse_above(free_bytes, shape, advice):
    count, _, side, _ = shape
    needed = math.prod(shape)
    if needed > free_bytes:
        raise UserError(
            f"{count} images of {side} × {side} pixels take {needed / 1e9:.3g} GB "
            f"and there is room for {max(free_bytes, 0) / 1e9:.3g} GB",
            advice,
        )


def free_memory(device):
    """Free bytes on the host, or on the card."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes

    # Only Linux has these files; elsewhere the system itself will refuse.
    free_bytes = math.inf
    with contextlib.suppress(OSError, TypeError):
        meminfo = (PROC / "meminfo").read_text()
        kilobytes = re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]
        free_bytes = 1024 * int(kilobytes)
    return min(free_bytes, free_in_cgroups())


def free_in_cgroups():
    """Bytes that the limits of containers and of Slurm leave, math.inf without any.

    A process counts in its own control group and in all groups around it. Version 2 has
    one tree of groups, version 1 a tree for memory alone.
    """
    version_2 = (CGROUPS, "memory.max", "memory.current", "inactive_file")
    version_1 = (
        CGROUPS / "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    )
    groups = ["/"]
    with contextlib.suppress(OSError):
        # Lines such as "0::/user.slice/job_7" and "4:memory:/docker/0a1b".
        lines = (PROC / "self/cgroup").read_text().splitlines()
        groups += [line.split(":", 2)[2] for line in lines]

    free_bytes = math.inf
    for tree, limit_name, usage_name, cache_name in (version_2, version_1):
        folders = set()
        for group in groups:
            inside = tree / group.lstrip("/")
            folders |= {inside, *inside.parents}
        for folder in folders:
            # A group without a limit says "max", which is no number.
            with contextlib.suppress(OSError, ValueError, TypeError):
                limit = int((folder / limit_name).read_text())
                usage = int((folder / usage_name).read_text())
                # Files that were read count as usage, until something else needs room.
                statistics = (folder / "memory.stat").read_text()
                cache = int(re.search(rf"^{cache_name} (\d+)", statistics, re.M)[1])
                free_bytes = min(free_bytes, limit - usage + cache)
    return free_bytes
