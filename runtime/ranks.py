"""Several processes of one job, started by torchrun."""

import os

import torch.nn.functional as F
from torch import distributed
from torch.distributed.nn.functional import all_reduce

from runtime.errors import UserError

# Clusters leave some of these variables behind; only all four together mean that
# torchrun, or another launcher, has started this process.
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
# The ranks of this node, which share its memory.
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if LAUNCHED else 0
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if LAUNCHED else 1


def init_distributed(device):
    """Connect to the other ranks. NCCL carries tensors on GPUs, gloo those on CPUs."""
    if WORLD_SIZE == 1:
        return
    if device.type == "cuda":
        distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")


def cleanup_distributed():
    """Wait for the other ranks and close the connections."""
    if distributed.is_initialized():
        # Without the barrier, the interpreter's end may hang in a closed connection.
        distributed.barrier()
        distributed.destroy_process_group()


def compare_ranks(settings, *facts):
    """Refuse to begin if the ranks, perhaps on several nodes, differ.

    settings: a dict of what the flags say. facts: about what was read from the disk.
    """
    if WORLD_SIZE == 1:
        return
    everyone = [None] * WORLD_SIZE
    distributed.all_gather_object(everyone, (settings, facts))

    flags = []
    for name, value in settings.items():
        if any(other[name] != value for other, _ in everyone):
            flags.append(f"--{name.replace('_', '-')}")
    if flags:
        raise UserError(
            f"the ranks have different flags ({', '.join(flags)})",
            "start all of them with the same",
        )
    if any(other != facts for _, other in everyone):
        raise UserError(
            "the ranks have read different files",
            "give a --data-dir and a --weights-dir that all of them see",
        )


def gather_rows(rows, counts):
    """The rows of all ranks, in the order of the ranks; gradients flow to their owners.

    rows [b, d]: those of this rank. counts: how many rows each rank contributes; if
    this rank has more than its count, the rest is dropped. Returns [sum(counts), d].
    """
    # Each rank fills in its own rows and zeros elsewhere; the sum has all of them.
    before = sum(counts[:RANK])
    after = sum(counts[RANK + 1 :])
    return all_reduce(F.pad(rows[: counts[RANK]], (0, 0, before, after)))
