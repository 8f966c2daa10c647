"""pirl_stl_train_test.py for test_ranks.py, which starts it by torchrun.

rank_worker.py <what,what> <arguments of the script>; what: functions below.
"""

import contextlib
import os
import signal
import sys
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


def before(owner, name, action):
    """owner.name(…) calls action(…) with the same arguments first."""
    function = getattr(owner, name)

    def changed(*arguments):
        action(*arguments)
        return function(*arguments)

    setattr(owner, name, changed)


def same_on_all(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    distributed.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(tensor, one) for one in everyone)


def compare_after_each_step():
    """All ranks must have the same weights and the same bank."""
    train_step = PretrainingTrainer.train_step

    def compared(trainer, *arguments):
        totals = train_step(trainer, *arguments)
        weights = [weight.detach() for weight in trainer.model.parameters()]
        # A list first: all ranks take part in each comparison.
        equal = [same_on_all(tensor) for tensor in (*weights, trainer.bank.vectors)]
        assert all(equal)
        return totals

    PretrainingTrainer.train_step = compared


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


def fail_in_step_2(action):
    def fail(trainer, index, uniforms, epoch, step):
        if RANK == 1 and step == 2:
            action()

    before(PretrainingTrainer, "train_step", fail)


def one_fails():
    def action():
        raise UserError("rank 1 has a problem of its own", "solve it")

    fail_in_step_2(action)


def one_is_killed():
    fail_in_step_2(lambda: os.kill(os.getpid(), signal.SIGKILL))


def other_images():
    load_unlabelled = dataset_helpers.load_unlabelled

    def load(*arguments):
        images, train_count, fingerprint = load_unlabelled(*arguments)
        fingerprint["checksum"] += RANK
        return images, train_count, fingerprint

    dataset_helpers.load_unlabelled = load


if __name__ == "__main__":
    what = sys.argv.pop(1)
    models.TRUNKS["res18"] = ThinResNet
    compare_after_each_step()
    for name in filter(None, what.split(",")):
        globals()[name]()
    run_script(pirl_stl_train_test.main)
