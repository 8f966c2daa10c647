"""What needs a GPU to be seen. Skipped, and said so, where there is none."""

import pytest
import torch

import pirl_stl_train_test as pirl

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
    pytest.mark.full_trunk,
]


def run_on_gpu(precision, *flags):
    args = pirl.parse_args(["--batch-size", "32", "--device", "cuda", "--precision", precision, *flags])
    device = pirl.choose_device(args)
    images = torch.randint(0, 256, (256, 3, 96, 96), dtype=torch.uint8, device=device)
    return pirl.make_run(args, device, images, 256, checksum=0)


@pytest.mark.parametrize(
    ("precision", "flags"),
    [("fp32", ()), ("bf16", ()), ("bf16", ("--loss", "nce", "--batch-negatives", "no")), ("bf16", ("--compile",))],
)
def test_a_step_never_waits_for_the_device(precision, flags):
    run = run_on_gpu(precision, *flags)
    draws = pirl.view_draws(run, 1)
    batches = torch.randperm(256, device=run.device).split(32)
    pirl.training_step(run, batches[0], draws)  # constants are sent to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in batches[1:4]:
            pirl.training_step(run, index, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bank_and_loss_stay_in_float32_under_bf16():
    run = run_on_gpu("bf16")
    _, losses, _ = pirl.forward(run, torch.arange(32, device=run.device), pirl.view_draws(run, 1), (1, 0))
    assert losses.dtype == run.bank.vectors.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_views_equal_those_of_the_cpu():
    run = run_on_gpu("fp32")
    draws = torch.rand(32, pirl.IMAGE_VIEW_DRAWS)
    images = run.images[:32].float()
    there, here = pirl.image_view(images, draws.to(run.device)), pirl.image_view(images.cpu(), draws)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-2)
    draws = torch.rand(32, pirl.JIGSAW_DRAWS)
    there, here = pirl.jigsaw_view(images, draws.to(run.device)), pirl.jigsaw_view(images.cpu(), draws)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-2)
