"""pirl_stl_train_test.py for test_ranks.py, which starts it by torchrun: with eyes on every step, or with a flaw.

rank_worker.py <folder> <what> <arguments of the script>
"""

import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_helpers as rh
import torch
from conftest import ThinResNet18
from torch import distributed, nn

import models
import pirl_stl_train_test as pirl

step, validate, plain_trunk = pirl.Pretraining.step, pirl.validate, pirl.Pretraining.plain_trunk
load_unlabelled = pirl.dh.load_unlabelled
seen = {"steps": [], "buffers_equal": [], "features": 0}


def same_on_all(tensor):
    others = [torch.empty_like(tensor) for _ in range(rh.RANKS)]
    distributed.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def watched_step(run, index, draws, epoch, number):
    if what == "one-fails" and rh.RANK == 1 and number == 2:
        raise rh.UserError("rank 1 has a problem of its own: solve it")
    if what == "slow":
        time.sleep(0.2)
    sums = step(run, index, draws, epoch, number)
    if what == "watch":
        tensors = [tensor.detach() for tensor in (*run.model.parameters(), run.bank.vectors)]
        share = index.tensor_split(rh.RANKS)[rh.RANK].tolist()
        equal = [same_on_all(tensor) for tensor in tensors]  # all ranks take part in each comparison
        seen["steps"].append({"epoch": epoch, "images": share, "equal": all(equal)})
        seen["synchronised"] = any(isinstance(module, nn.SyncBatchNorm) for module in run.network.modules())
    return sums


def watched_validate(run, *rest):
    result = validate(run, *rest)
    seen["buffers_equal"] += [same_on_all(buffer) for buffer in run.model.buffers()]
    return result


def watched_plain_trunk(run):
    seen["features"] += 1
    return plain_trunk(run)


def freeze(patch):
    """Batch norm as in eval mode: then the batch that an image is in is of no account. patch: setattr, or alike."""

    def train(self, mode=True):
        nn.Module.train(self, mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    patch(models.PIRL, "batch_statistics", lambda self: contextlib.nullcontext())
    patch(models.PIRL, "train", train)


def other_images(*args):
    images, train_count, checksum = load_unlabelled(*args)
    return images, train_count, checksum + rh.RANK


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    models.TRUNKS["res18"] = ThinResNet18
    pirl.Pretraining.step = watched_step
    if what == "watch":
        pirl.validate, pirl.Pretraining.plain_trunk = watched_validate, watched_plain_trunk
    if what == "other-images":
        pirl.dh.load_unlabelled = other_images
    if what == "frozen":
        freeze(setattr)
    try:
        rh.run_script(pirl.main)
    finally:
        (folder / f"{what}_{rh.RANK}.json").write_text(json.dumps(seen))
