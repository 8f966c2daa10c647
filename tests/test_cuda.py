"""What needs a GPU to be seen. Skipped, and said so, where there is none.

torchrun starts this file as a script for the test of two processes on one card.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":
    # A rank of the test of two processes. Both use the first card: runtime.ranks
    # reads this when it is imported.
    os.environ["LOCAL_RANK"] = "0"

import pytest
import torch
from torch import distributed

import pirl_stl_train_test
import train_stl_after_ssl
from augmentations import IMAGE_VIEW_UNIFORMS, ImageView
from dataset_helpers import load_labelled
from jigsaw import Jigsaw
from pirl_stl_train_test import PretrainingTrainer
from runtime.captured import EAGER_CALLS
from runtime.devices import choose_device, choose_precision
from runtime.script import run_script
from runtime.weights import choose_architecture

DEVICE = "cuda"
NO_GPU = not torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(NO_GPU, reason="torch sees no CUDA GPU on this machine"),
    pytest.mark.full_trunk,
]


@pytest.fixture(autouse=True)
def reset_compiler():
    torch.compiler.reset()


def make_gpu_trainer(precision, *flags):
    """A pretraining run on 256 images of noise, in batches of 32."""
    common = ["--batch-size", "32", "--device", DEVICE, "--precision", precision]
    args = pirl_stl_train_test.make_parser().parse_args([*common, *flags])
    device = choose_device(args)
    pirl_stl_train_test.resolve_defaults(args, device)
    generator = torch.Generator().manual_seed(0)
    size = (256, 3, 96, 96)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    if args.images_on != "host":
        images = images.to(device)
    return PretrainingTrainer(args, device, images, 256)


def random_batches():
    """The images in a random order: eight int64 [32] on the host, pinned."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    return order.pin_memory().split(32)


def run_flags(data_dir, folder):
    """Flags of a short run of the script."""
    # fmt: off
    return [
        "--data-dir", data_dir, "--weights-dir", folder / "weights",
        "--observations-dir", folder / "observations", "--image-size", 64,
        "--batch-size", 16, "--epochs", 2, "--device", DEVICE,
    ]
    # fmt: on


# ---- Waiting for the device ----------------------------------------------------------
@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", ()),
        ("bf16", ()),
        ("fp16", ()),
        ("bf16", ("--images-on", "host")),
        ("bf16", ("--loss", "nce", "--batch-negatives", "no")),
        ("bf16", ("--compile",)),
        ("bf16", ("--cuda-graph",)),
    ],
)
def test_a_step_never_waits_for_the_device(precision, flags):
    trainer = make_gpu_trainer(precision, *flags)
    uniforms = trainer.epoch_uniforms(1)
    batches = random_batches()
    # The first steps may wait: they compile or capture, and cuDNN tries algorithms.
    for step in range(EAGER_CALLS + 1):
        trainer.train_step(batches[step], uniforms, 1, step)

    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (4, 5, 6):
            trainer.train_step(batches[step], uniforms, 1, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_fine_tuning_never_waits_for_the_device(tiny):
    flags = [str(flag) for flag in (*tiny, "--device", DEVICE)]
    args = train_stl_after_ssl.make_parser().parse_args(flags)
    choose_architecture(args, None, {})
    device = choose_device(args)
    args.precision = choose_precision(args, device)
    data = load_labelled(args.data_dir, args.image_size, device, args.seed)
    trainer = train_stl_after_ssl.FineTuningTrainer(args, device, data, None, {}, None)
    uniforms = trainer.epoch_uniforms(1)
    batches = trainer.data.train.split(16)
    trainer.train_step(batches[0], uniforms)

    torch.cuda.set_sync_debug_mode("error")
    try:
        for index in batches[1:]:
            trainer.train_step(index, uniforms)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- What a step computes ------------------------------------------------------------
def flat_weights(trainer):
    weights = [weight.detach().flatten() for weight in trainer.model.parameters()]
    return torch.cat(weights)


def train_five_steps(precision, *flags):
    """Four steps of full size, and an odd one: (their losses, where weights went)."""
    rate = ["--lr", "0.05", "--warmup-steps", "0"]
    trainer = make_gpu_trainer(precision, *rate, *flags)
    weights_before = flat_weights(trainer)
    uniforms = trainer.epoch_uniforms(1)
    batches = random_batches()

    losses = []
    for step, index in enumerate([*batches[:4], batches[4][:20]]):
        sum_of_losses, _ = trainer.train_step(index, uniforms, 1, step)
        losses.append(sum_of_losses)
    return torch.stack(losses).cpu(), flat_weights(trainer) - weights_before


@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "least_cosine"),
    [("fp32", 0.01, 0.99), ("bf16", 0.05, 0.9)],
)
def test_compiled_steps_are_those_of_eager_ones(
    precision, loss_tolerance, least_cosine
):
    losses, change = train_five_steps(precision)
    compiled_losses, compiled_change = train_five_steps(precision, "--compile")
    torch.testing.assert_close(losses, compiled_losses, rtol=loss_tolerance, atol=0)
    assert torch.cosine_similarity(change, compiled_change, dim=0) > least_cosine


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", ()),
        ("bf16", ("--loss", "nce", "--images-on", "host")),
        ("fp16", ("--pretext", "rotation")),
    ],
)
def test_captured_steps_have_the_bits_of_eager_ones(precision, flags):
    """With full batches and a partial one between them, by deterministic kernels."""
    ends = []
    for graph in ("False", "True"):
        flags_of_run = (*flags, "--deterministic", "--cuda-graph", graph)
        trainer = make_gpu_trainer(precision, "--warmup-steps", "0", *flags_of_run)
        uniforms = trainer.epoch_uniforms(1)
        batches = list(random_batches())
        batches[5] = batches[5][:20]
        totals = []
        for step, index in enumerate(batches):
            totals.append(trainer.train_step(index, uniforms, 1, step))
        ends.append((torch.stack(totals), flat_weights(trainer), trainer.bank.vectors))

    assert trainer.captured_update.graph is not None
    for eager, captured in zip(*ends, strict=True):
        assert eager.isfinite().all()
        assert captured.equal(eager)


def test_bank_and_loss_stay_in_float32_under_bf16():
    trainer = make_gpu_trainer("bf16")
    batch = trainer.load_batch(random_batches()[0], trainer.epoch_uniforms(1), 1, 0)
    embeddings, loss, totals = trainer.forward_batch(batch)
    assert embeddings.dtype == loss.dtype == totals.dtype == torch.float32
    assert trainer.bank.vectors.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("view", "columns"),
    [(ImageView(), IMAGE_VIEW_UNIFORMS), (Jigsaw(), Jigsaw.uniforms)],
    ids=["image", "jigsaw"],
)
def test_views_equal_those_of_the_cpu(view, columns):
    trainer = make_gpu_trainer("fp32")
    images = trainer.images[:32].float()
    uniforms = torch.rand(32, columns)

    on_cpu = view.to("cpu")(images.cpu(), uniforms)
    on_gpu = view.to(trainer.device)(images, uniforms.to(trainer.device))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-2)


# ---- Whole runs ----------------------------------------------------------------------
@pytest.mark.parametrize("graph", ["False", "True"])
def test_a_deterministic_run_resumes_bit_for_bit(
    call, data_dir, tmp_path, monkeypatch, graph
):
    """A run that is interrupted after its second step and resumed has the bits of one
    that was not.
    """
    flags = run_flags(data_dir, tmp_path)
    flags += ["--deterministic", "True", "--checkpoint-minutes", 0]
    flags += ["--cuda-graph", graph]
    whole_name = ["--experiment-name", "whole"]
    parts_name = ["--experiment-name", "parts"]
    assert call("pirl_stl_train_test", *flags, *whole_name).status == 0

    train_step = PretrainingTrainer.train_step

    def interrupted_step(trainer, index, uniforms, epoch, step):
        if step == 2:
            raise KeyboardInterrupt
        return train_step(trainer, index, uniforms, epoch, step)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "train_step", interrupted_step)
        assert call("pirl_stl_train_test", *flags, *parts_name).status == 130
    outcome = call("pirl_stl_train_test", *flags, *parts_name, "--resume", "True")
    assert outcome.status == 0, outcome.err
    assert "continuing from" in outcome.out

    whole = torch.load(tmp_path / "weights/whole.ckpt", weights_only=True)
    parts = torch.load(tmp_path / "weights/parts.ckpt", weights_only=True)
    for module in ("trunk", "head_f", "head_g"):
        assert whole[module].keys() == parts[module].keys()
        for name, value in whole[module].items():
            assert value.equal(parts[module][name]), (module, name)
    assert whole["bank"]["vectors"].equal(parts["bank"]["vectors"])


def test_two_processes_train_on_one_card(data_dir, tmp_path):
    """Over gloo, for NCCL wants a card for each process.

    Both have the same weights and the same bank after every step.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [*run_flags(data_dir, tmp_path), "--experiment-name", "exp"]
    command = [*launcher, "--nproc-per-node", 2, __file__, *flags]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout

    content = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert [metrics["epoch"] for metrics in content["history"]] == [1, 2]
    assert all(value.isfinite().all() for value in content["trunk"].values())


# ---- A rank of that test -------------------------------------------------------------
train_step = PretrainingTrainer.train_step
init_process_group = distributed.init_process_group


def same_on_both(tensor):
    copies = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(copies, tensor)
    return copies[0].equal(copies[1])


def watched_step(trainer, *arguments):
    totals = train_step(trainer, *arguments)
    for tensor in (*trainer.model.parameters(), trainer.bank.vectors):
        assert same_on_both(tensor.detach().cpu())
    return totals


def join_over_gloo(backend, device_id=None):
    init_process_group("gloo")


if __name__ == "__main__":
    PretrainingTrainer.train_step = watched_step
    distributed.init_process_group = join_over_gloo
    run_script(pirl_stl_train_test.main)
