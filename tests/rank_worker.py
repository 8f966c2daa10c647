"""pirl_stl_train_test.py for test_ranks.py, which starts it by torchrun: with eyes on every step, or with a flaw.

rank_worker.py <folder> <what> <arguments of the script>
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from run_helpers import UserError, rank, run_script, world_size
from conftest import ThinResNet18
from torch import distributed, nn

import models
import pirl_stl_train_test as pirl

folder, what = Path(sys.argv[1]), sys.argv[2]
sys.argv = [sys.argv[0], *sys.argv[3:]]
step, seen = pirl.training_step, []


def same_on_all(tensor):
    others = [torch.empty_like(tensor) for _ in range(world_size())]
    distributed.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def watched_step(run, index, draws):
    if what == "one-fails" and rank() == 1 and run.step == 2:
        raise UserError("rank 1 has a problem of its own: mend it")
    sums = step(run, index, draws)
    share = index.tensor_split(world_size())[rank()]
    equal = world_size() == 1 or all(
        same_on_all(tensor.detach()) for tensor in (*run.model.parameters(), run.bank.vectors)
    )
    seen.append({"epoch": run.epoch, "images": share.tolist(), "equal": equal})
    (folder / f"{what}_{rank()}.json").write_text(json.dumps(seen))
    return sums


class Frozen:
    """Batch norm as in eval mode: then the batch that an image is in is of no account."""

    def __init__(self, trunk):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def train_without_norms(self, mode=True):
    nn.Module.train(self, mode)
    for module in self.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False
    return self


def other_images(*args):
    images, train_count, checksum = load(*args)
    return images, train_count, checksum + rank()


models.TRUNKS["res18"] = ThinResNet18
pirl.training_step = watched_step
if what == "other-images":
    load, pirl.load_unlabelled = pirl.load_unlabelled, other_images
if what == "frozen":
    models.batch_statistics = pirl.batch_statistics = Frozen
    models.PIRL.train = train_without_norms
run_script(pirl.main)
