"""pirl_stl_train_test.py for test_ranks.py, which starts it by torchrun.

It runs with eyes on every step, and with what the test puts in its way:
rank_worker.py <folder> <what,what> <arguments of the script>
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import ThinResNet
from torch import distributed, nn

import dataset_helpers
import models
import pirl_stl_train_test
from pirl_stl_train_test import PretrainingTrainer
from runtime.errors import UserError
from runtime.ranks import RANK, WORLD_SIZE
from runtime.script import run_script

# For the test, as JSON.
seen = {"steps": [], "buffers_equal": [], "features": 0, "decoded": 0}


def before(owner, name, action):
    """owner.name(…) calls action(…) with the same arguments first."""
    function = getattr(owner, name)

    def changed(*arguments):
        action(*arguments)
        return function(*arguments)

    setattr(owner, name, changed)


# ---- Eyes ----------------------------------------------------------------------------
def same_on_all(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    distributed.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(tensor, one) for one in everyone)


def watch_steps():
    """Note of each step what it did, and whether all ranks have the same after it."""
    train_step = PretrainingTrainer.train_step

    def watched(trainer, index, uniforms, epoch, step):
        totals = train_step(trainer, index, uniforms, epoch, step)

        weights = [weight.detach() for weight in trainer.model.parameters()]
        # A list first: all ranks take part in each comparison.
        equal = [same_on_all(tensor) for tensor in (*weights, trainer.bank.vectors)]
        seen["steps"].append(
            {
                "epoch": epoch,
                "images": index.tensor_split(WORLD_SIZE)[RANK].tolist(),
                "equal": all(equal),
            }
        )
        kinds = {type(module) for module in trainer.parallel_model.modules()}
        seen["synchronised"] = nn.SyncBatchNorm in kinds
        return totals

    PretrainingTrainer.train_step = watched


# ---- In the way ----------------------------------------------------------------------
def frozen(patch=setattr):
    """Batch norm as in eval mode: then the batch that an image is in is of no account.

    patch: setattr, or alike.
    """

    def train(self, mode=True):
        nn.Module.train(self, mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    patch(models.PIRL, "batch_statistics", lambda self: contextlib.nullcontext())
    patch(models.PIRL, "train", train)


def signal_in_epoch_2():
    """In its second step, and on rank 1 alone."""

    def send(trainer, index, uniforms, epoch, step):
        if (RANK, epoch, step) == (1, 2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    before(PretrainingTrainer, "train_step", send)


def one_fails():
    def fail(trainer, index, uniforms, epoch, step):
        if RANK == 1 and step == 2:
            raise UserError("rank 1 has a problem of its own", "solve it")

    before(PretrainingTrainer, "train_step", fail)


def slow():
    before(PretrainingTrainer, "train_step", lambda *arguments: time.sleep(0.2))


def other_images():
    load_unlabelled = dataset_helpers.load_unlabelled

    def load(*arguments):
        images, train_count, fingerprint = load_unlabelled(*arguments)
        fingerprint["checksum"] += RANK
        return images, train_count, fingerprint

    dataset_helpers.load_unlabelled = load


if __name__ == "__main__":
    folder, what = sys.argv[1:3]
    del sys.argv[1:3]
    models.TRUNKS["res18"] = ThinResNet
    watch_steps()
    watch_validation()
    before(PretrainingTrainer, "exported_trunk", count("features"))
    before(dataset_helpers, "read_image", count("decoded"))
    for name in filter(None, what.split(",")):
        globals()[name]()
    try:
        run_script(pirl_stl_train_test.main)
    finally:
        (Path(folder) / f"rank_{RANK}.json").write_text(json.dumps(seen))
