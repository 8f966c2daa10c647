"""pirl_stl_train_test.py for test_ranks.py, which starts it by torchrun.

It runs with eyes on every step, or with a flaw:
rank_worker.py <folder> <what> <arguments of the script>
"""

import contextlib
import json
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

train_step = PretrainingTrainer.train_step
exported_trunk = PretrainingTrainer.exported_trunk
validate = pirl_stl_train_test.validate
load_unlabelled = dataset_helpers.load_unlabelled

# For the test, as JSON.
seen = {"steps": [], "buffers_equal": [], "features": 0}


def same_on_all(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(WORLD_SIZE)]
    distributed.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(tensor, one) for one in everyone)


def watched_step(trainer, index, uniforms, epoch, step):
    totals = train_step(trainer, index, uniforms, epoch, step)

    share = index.tensor_split(WORLD_SIZE)[RANK].tolist()
    tensors = [weight.detach() for weight in trainer.model.parameters()]
    tensors.append(trainer.bank.vectors)
    # A list first: all ranks take part in each comparison.
    equal = [same_on_all(tensor) for tensor in tensors]
    seen["steps"].append({"epoch": epoch, "images": share, "equal": all(equal)})

    kinds = {type(module) for module in trainer.network.modules()}
    seen["synchronised"] = nn.SyncBatchNorm in kinds
    return totals


def watched_validate(trainer, *rest):
    result = validate(trainer, *rest)
    for buffer in trainer.model.buffers():
        seen["buffers_equal"].append(same_on_all(buffer))
    return result


def watched_exported_trunk(trainer):
    seen["features"] += 1
    return exported_trunk(trainer)


def failing_step(trainer, index, uniforms, epoch, step):
    if RANK == 1 and step == 2:
        raise UserError("rank 1 has a problem of its own", "solve it")
    return train_step(trainer, index, uniforms, epoch, step)


def slow_step(*arguments):
    time.sleep(0.2)
    return train_step(*arguments)


def slow_validate(trainer, *rest):
    print("validating", flush=True)
    time.sleep(2)
    return validate(trainer, *rest)


def other_images(*arguments):
    images, train_count, checksum = load_unlabelled(*arguments)
    return images, train_count, checksum + RANK


def freeze(patch):
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


def put_in(what):
    if what == "watch":
        PretrainingTrainer.train_step = watched_step
        PretrainingTrainer.exported_trunk = watched_exported_trunk
        pirl_stl_train_test.validate = watched_validate
    elif what == "one-fails":
        PretrainingTrainer.train_step = failing_step
    elif what == "slow":
        PretrainingTrainer.train_step = slow_step
    elif what == "slow-validation":
        pirl_stl_train_test.validate = slow_validate
    elif what == "other-images":
        dataset_helpers.load_unlabelled = other_images
    elif what == "frozen":
        freeze(setattr)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    what = sys.argv[2]
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    models.TRUNKS["res18"] = ThinResNet
    put_in(what)
    try:
        run_script(pirl_stl_train_test.main)
    finally:
        (folder / f"{what}_{RANK}.json").write_text(json.dumps(seen))
