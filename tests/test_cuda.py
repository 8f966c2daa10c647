"""What needs a GPU to be seen. Skipped, and said so, where there is none.

torchrun starts this file as a script for the test of two processes on one card.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_helpers as rh
import pytest
import torch
from torch import distributed

import dataset_helpers as dh
import pirl_stl_train_test as pirl
import train_stl_after_ssl as fine

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
    pytest.mark.full_trunk,
]


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()


def run_on_gpu(precision, *flags):
    args = pirl.parse_args(["--batch-size", "32", "--device", DEVICE, "--precision", precision, *flags])
    device = rh.choose_device(args)
    pirl.settle(args, device, None)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 96, 96), dtype=torch.uint8, generator=draw)
    return pirl.Pretraining(args, device, images.to(device), 256)


def batches_of(run):
    return torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(run.device).split(32)


@pytest.mark.parametrize(
    ("precision", "flags"),
    [("fp32", ()), ("bf16", ()), ("bf16", ("--loss", "nce", "--batch-negatives", "no")), ("bf16", ("--compile",))],
)
def test_a_step_never_waits_for_the_device(precision, flags):
    run = run_on_gpu(precision, *flags)
    draws, batches = run.view_draws(1), batches_of(run)
    run.step(batches[0], draws, 1, 0)  # constants are sent to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, index in enumerate(batches[1:4], 1):
            run.step(index, draws, 1, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_fine_tuning_never_waits_for_the_device(tiny):
    args = fine.parse_args([str(flag) for flag in tiny[: tiny.index("--device")]])
    args.device, args.stem = DEVICE, "imagenet"
    device = rh.choose_device(args)
    args.precision = rh.choose_precision(args, device)
    run = fine.FineTuning(args, device, None, {})
    draws = torch.rand(len(run.images), dh.LABELLED_VIEW_DRAWS, device=device)
    batches = run.train.split(16)
    run.step(batches[0], draws)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in batches[1:]:
            run.step(index, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_are_those_of_eager_ones(precision):
    """The loss of every step, and where the weights have gone after four of full size and an odd one."""
    ends, sums = [], []
    for flags in ((), ("--compile",)):
        run = run_on_gpu(precision, "--lr", "0.05", "--warmup-steps", "0", *flags)
        start = torch.cat([value.detach().flatten() for value in run.model.parameters()])
        draws, batches = run.view_draws(1), batches_of(run)
        steps = enumerate([*batches[:4], batches[4][:20]])
        sums.append(torch.stack([run.step(index, draws, 1, step) for step, index in steps]).cpu())
        ends.append(torch.cat([value.detach().flatten() for value in run.model.parameters()]) - start)
    torch.testing.assert_close(sums[0][:, 0], sums[1][:, 0], rtol=0.01 if precision == "fp32" else 0.05, atol=0)
    assert torch.cosine_similarity(*ends, dim=0) > (0.99 if precision == "fp32" else 0.9)


def test_a_deterministic_run_resumes_bit_for_bit(call, data_dir, tmp_path, monkeypatch):
    """Interrupted after its second step and resumed, a run ends with the bits of one that was not."""
    flags = ["--data-dir", data_dir, "--weights-dir", tmp_path / "w", "--observations-dir", tmp_path / "o"]
    flags += ["--image-size", 64, "--batch-size", 16, "--epochs", 2, "--device", DEVICE, "--deterministic", "True"]
    flags += ["--checkpoint-minutes", 0]
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "whole").status == 0
    step = pirl.Pretraining.step

    def interrupted_step(run, index, draws, epoch, number):
        if number == 2:
            raise KeyboardInterrupt
        return step(run, index, draws, epoch, number)

    with monkeypatch.context() as patch:
        patch.setattr(pirl.Pretraining, "step", interrupted_step)
        assert call("pirl_stl_train_test", *flags, "--experiment-name", "parts").status == 130
    outcome = call("pirl_stl_train_test", *flags, "--experiment-name", "parts", "--resume", "True")
    assert outcome.status == 0, outcome.err
    assert "going on from" in outcome.out
    whole, parts = (torch.load(tmp_path / f"w/{name}.ckpt", weights_only=True)["run"] for name in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    assert all(value.equal(parts["model"][name]) for name, value in whole["model"].items())
    assert whole["bank"]["vectors"].equal(parts["bank"]["vectors"])


def test_two_processes_train_on_one_card(data_dir, tmp_path):
    """Over gloo, for NCCL wants a card for each. Both have the same weights and the same bank after every step."""
    flags = ["--data-dir", data_dir, "--weights-dir", tmp_path / "w", "--observations-dir", tmp_path / "o"]
    flags += ["--image-size", 64, "--batch-size", 16, "--epochs", 2, "--device", DEVICE, "--experiment-name", "exp"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    content = torch.load(tmp_path / "w/exp.pt", weights_only=True)
    assert [row["epoch"] for row in content["rows"]] == [1, 2]
    assert all(value.isfinite().all() for value in content["trunk"].values())


def test_bank_and_loss_stay_in_float32_under_bf16():
    run = run_on_gpu("bf16")
    _, losses, _ = run.losses(torch.arange(32, device=run.device), run.view_draws(1), 1, 0)
    assert losses.dtype == run.bank.vectors.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_views_equal_those_of_the_cpu():
    run = run_on_gpu("fp32")
    draws = torch.rand(32, dh.IMAGE_VIEW_DRAWS)
    images = run.images[:32].float()
    there, here = dh.image_view(images, draws.to(run.device)), dh.image_view(images.cpu(), draws)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-2)
    draws = torch.rand(32, pirl.JIGSAW_DRAWS)
    there, here = pirl.jigsaw_view(images, draws.to(run.device)), pirl.jigsaw_view(images.cpu(), draws)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-2)


def same_on_both(tensor):
    theirs = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(theirs, tensor)
    return theirs[0].equal(theirs[1])


def watched_step(run, *arguments):
    sums = step(run, *arguments)
    assert all(same_on_both(tensor.detach().cpu()) for tensor in (*run.model.parameters(), run.bank.vectors))
    return sums


if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"  # the card of both
    join, step, pirl.Pretraining.step = distributed.init_process_group, pirl.Pretraining.step, watched_step
    distributed.init_process_group = lambda backend, device_id=None: join("gloo")
    rh.run_script(pirl.main)
