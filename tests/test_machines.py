"""The machines that people have: old and small cards, fp16, several ranks on a node.

torchrun starts this file as a script, for the tests of two ranks:
test_machines.py <folder> <what> <arguments of the pretraining script>
"""

import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import rank_worker
import torch
from conftest import ThinResNet, make_trainer
from records import (
    TRAINED,
    checkpoint,
    interrupted,
    parts_of,
    same,
    table,
    weights,
)
from test_ranks import run
from torch import distributed

import dataset_helpers
import losses
import models
import pirl_stl_train_test
import train_stl_after_ssl
from dataset_helpers import check_memory, load_images, node_shared_tensor, place_images
from pirl_stl_train_test import PretrainingTrainer
from runtime import devices, randomness, ranks
from runtime.devices import choose_device, choose_precision
from runtime.errors import UserError
from runtime.ranks import LOCAL_RANK, RANK
from runtime.script import run_script
from train_stl_after_ssl import FineTuningTrainer

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
# Not equal to CPU, though its memory is the same: images on CPU are "on the host" then.
OTHER_CPU = torch.device("cpu", 0)


def parse(*flags):
    return pirl_stl_train_test.make_parser().parse_args([str(flag) for flag in flags])


# ---- fp16: what the tests need -------------------------------------------------------
SCRIPTS = {
    "pirl_stl_train_test": PretrainingTrainer,
    "train_stl_after_ssl": FineTuningTrainer,
}
# Of a checkpoint, all that training changes.
CHANGED = {
    "pirl_stl_train_test": (*TRAINED, "scaler"),
    "train_stl_after_ssl": ("trunk", "softmax_layer", "optimizer", "scaler", "best"),
}
both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def scaler_that_overflows(device, precision):
    """In the place of make_scaler(): steps 1, 4, 7, … of the run overflow.

    A skipped step divides the scale by 2¹⁶, two good ones multiply it by 2¹⁶.
    """
    return torch.amp.GradScaler(
        device.type,
        init_scale=2.0**28,
        growth_factor=2.0**16,
        backoff_factor=2.0**-16,
        growth_interval=2,
        enabled=precision == "fp16",
    )


def full(script):
    """The flags that make a script train the network, which is in half precision."""
    if script == "train_stl_after_ssl":
        return ("--full-fine-tune",)
    return ()


def flat_weights(trainer):
    values = [weight.detach().flatten() for weight in trainer.model.parameters()]
    return torch.cat(values)


def watch_steps(patch, trainer_class):
    """A list that gets, of every step to come, whether it left the weights alone."""
    skipped = []
    train_step = trainer_class.train_step

    def watched(trainer, *arguments):
        before = flat_weights(trainer)
        totals = train_step(trainer, *arguments)
        skipped.append(before.equal(flat_weights(trainer)))
        return totals

    patch.setattr(trainer_class, "train_step", watched)
    return skipped


def make_any_trainer(script, flags, precision):
    """A trainer of either script that has not begun."""
    flags = [*flags, "--precision", precision]
    if script == "pirl_stl_train_test":
        return make_trainer(flags)
    parser = train_stl_after_ssl.make_parser()
    args = parser.parse_args([str(flag) for flag in flags])
    args.stem = "imagenet"
    return FineTuningTrainer(args, CPU, None, {})


def train_steps(trainer, count):
    """The first steps of epoch 1. Returns the sums of their losses."""
    uniforms = trainer.epoch_uniforms(1)
    losses = []
    for step, index in enumerate(trainer.epoch_batches(1)[:count]):
        if isinstance(trainer, PretrainingTrainer):
            sum_of_losses, _ = trainer.train_step(index, uniforms, 1, step)
        else:
            sum_of_losses, _ = trainer.train_step(index, uniforms)
        losses.append(sum_of_losses)
    return torch.stack(losses)


def momentum_of(trainer):
    buffers = []
    for state in trainer.optimizer.state.values():
        buffers.append(state["momentum_buffer"].flatten())
    return torch.cat(buffers)


# ---- fp16: training and overflows ----------------------------------------------------
@both_scripts
def test_a_run_in_fp16_is_nearly_that_in_float32(call, tiny, tmp_path, script):
    for precision in ("fp32", "fp16"):
        flags = ("--precision", precision, "--experiment-name", precision)
        outcome = call(script, *tiny, *flags, "--checkpoint-minutes", 0, *full(script))
        assert outcome.status == 0, outcome.err

    # The last lines are the second epoch's, of fine-tuning's full stage.
    expected = table(tmp_path, "fp32")[-1]
    actual = table(tmp_path, "fp16")[-1]
    for column in ("train_loss", "val_loss"):
        loss = float(expected[column])
        assert float(actual[column]) == pytest.approx(loss, rel=0.02)
        assert float(actual[column]) != loss, "it was another precision"

    saved = checkpoint(tmp_path, "fp16")
    assert saved["settings"]["precision"] == "fp16"
    assert saved["scaler"]["scale"] == 2.0**12, "no step has overflowed"
    for name, value in saved["trunk"].items():
        assert value.dtype != torch.float16, name


@both_scripts
def test_the_network_is_in_half_precision_and_the_loss_is_not(tiny, script):
    trainer = make_any_trainer(script, tiny, "fp16")
    trunk = trainer.model.trunk
    types = set()
    trunk.layer4.register_forward_hook(lambda *hooked: types.add(hooked[2].dtype))
    losses = train_steps(trainer, 1)
    assert types == {torch.float16}
    assert losses.dtype == torch.float32


@both_scripts
def test_a_step_in_fp16_is_as_long_as_in_float32(tiny, script):
    """In pretraining, the norm is clipped: of the gradient itself, not of a scaled one.

    A scaled one would be 4,096 times as long, and the step as much too short.
    """
    changes = []
    for precision in ("fp32", "fp16"):
        trainer = make_any_trainer(script, tiny, precision)
        before = flat_weights(trainer)
        train_steps(trainer, 1)
        changes.append(flat_weights(trainer) - before)

    expected, actual = changes
    assert actual.norm().item() == pytest.approx(expected.norm().item(), rel=0.05)
    assert torch.cosine_similarity(expected, actual, dim=0) > 0.98


@both_scripts
def test_steps_that_overflow_change_no_weight(tiny, script):
    trainer = make_any_trainer(script, tiny, "fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = flat_weights(trainer)
    losses = train_steps(trainer, 4)
    assert losses.isfinite().all()
    assert flat_weights(trainer).equal(before)
    assert (momentum_of(trainer) == 0).all()
    assert trainer.scaler.get_scale() == 2.0**36


@both_scripts
def test_a_very_first_skipped_step_leaves_the_momentum_at_zero(
    tiny, monkeypatch, script
):
    """torch's fused SGD would make it of memory that nobody has filled.

    Here, torch fills such memory with NaN.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    trainer = make_any_trainer(script, tiny, "fp16")
    trainer.scaler = scaler_that_overflows(CPU, "fp16")
    before = flat_weights(trainer)
    train_steps(trainer, 1)
    assert flat_weights(trainer).equal(before), "the step was skipped"
    assert (momentum_of(trainer) == 0).all()

    train_steps(trainer, 2)
    assert not flat_weights(trainer).equal(before)
    assert flat_weights(trainer).isfinite().all()
    assert momentum_of(trainer).abs().max() < 100


@both_scripts
def test_a_run_with_overflows_resumes_exactly(
    call, tiny, tmp_path, monkeypatch, script
):
    """Killed right after a skipped step, and between two good ones."""
    monkeypatch.setattr(sys.modules[script], "make_scaler", scaler_that_overflows)
    trainer_class = SCRIPTS[script]
    run = (script, *tiny, "--precision", "fp16", "--checkpoint-minutes", 0)
    run = (*run, *full(script), "--experiment-name")

    with monkeypatch.context() as patch:
        whole = watch_steps(patch, trainer_class)
        assert call(*run, "whole").status == 0
    assert whole == [step % 3 == 0 for step in range(len(whole))]
    assert len(whole) >= 8

    for done in (1, 5):
        name = f"killed_after_{done}"
        with monkeypatch.context() as patch:
            parts = watch_steps(patch, trainer_class)
            kill_after(patch, trainer_class, done)
            assert call(*run, name).status == 130
        with monkeypatch.context() as patch:
            rest = watch_steps(patch, trainer_class)
            outcome = call(*run, name, "--resume")
            assert outcome.status == 0, outcome.err
        assert len(parts) == done
        assert parts + rest == whole

        names = CHANGED[script]
        expected = parts_of(checkpoint(tmp_path, "whole"), names)
        assert same(parts_of(checkpoint(tmp_path, name), names), expected)
        assert table(tmp_path, name) == table(tmp_path, "whole")


def kill_after(patch, trainer_class, done):
    """The process is interrupted in the step after so many."""
    train_step = trainer_class.train_step
    calls = []

    def killed(trainer, *arguments):
        if len(calls) == done:
            interrupted()
        calls.append(1)
        return train_step(trainer, *arguments)

    patch.setattr(trainer_class, "train_step", killed)


@both_scripts
def test_a_resumed_run_may_leave_fp16_and_come_back(
    call, tiny, tmp_path, monkeypatch, script
):
    run = (script, *tiny, "--checkpoint-minutes", 0, *full(script))
    run = (*run, "--experiment-name", "exp")
    for precision, resume in (("fp16", ()), ("fp32", ("--resume",))):
        with monkeypatch.context() as patch:
            kill_after(patch, SCRIPTS[script], 2)
            outcome = call(*run, "--precision", precision, *resume)
        assert outcome.status == 130, outcome.err
    assert "note: --precision was fp16, is fp32" in outcome.out
    assert checkpoint(tmp_path, "exp")["scaler"] == {}

    outcome = call(*run, "--precision", "fp16", "--resume")
    assert outcome.status == 0, outcome.err
    assert checkpoint(tmp_path, "exp")["scaler"]["scale"] == 2.0**12


@both_scripts
def test_nan_of_fp16_is_one_line_that_names_float32(
    call, tiny, tmp_path, monkeypatch, script
):
    """As cards of the series GTX 16xx make it: in every step, whatever the scale."""

    def broken(module, inputs, output):
        return output * float("nan") if output.dtype == torch.float16 else output

    class BrokenResNet18(ThinResNet):
        def __init__(self, **options):
            super().__init__(**options)
            self.layer4.register_forward_hook(broken)

    monkeypatch.setitem(models.TRUNKS, "res18", BrokenResNet18)
    flags = ("--precision", "fp16", "--experiment-name", "exp", *full(script))
    outcome = call(script, *tiny, *flags)
    parts = ("loss is not finite", "epoch 1", "--precision fp32")
    assert outcome.is_one_line_error(*parts)
    assert not (tmp_path / "weights/exp.pt").exists()


# ---- fp16: two ranks -----------------------------------------------------------------
def test_an_overflow_of_another_rank_skips_the_step_here_too(tiny):
    """It arrives with the mean of the ranks' gradients, before these are looked at."""
    trainer = make_any_trainer("pirl_stl_train_test", tiny, "fp16")
    before = flat_weights(trainer)
    weight = trainer.model.trunk.conv1.weight
    hook = weight.register_hook(lambda gradient: (gradient + float("inf")) / 2)
    train_steps(trainer, 1)
    assert flat_weights(trainer).equal(before)
    assert trainer.scaler.get_scale() == 2.0**11

    hook.remove()
    train_steps(trainer, 1)
    assert not flat_weights(trainer).equal(before)


@pytest.mark.slow
def test_two_ranks_skip_a_step_together(tiny, tmp_path):
    """The third step overflows on rank 1 alone."""
    run_two_ranks(tmp_path, "one-overflows", *tiny, "--precision", "fp16")
    for rank in (0, 1):
        seen = seen_by(rank, tmp_path)
        assert seen["skipped"] == [step == 2 for step in range(10)]
        assert seen["scales"] == [2.0**12] * 2 + [2.0**11] * 8
        assert [step["equal"] for step in seen["steps"]] == [True] * 10


# ---- Cards and drivers ---------------------------------------------------------------
@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def put_nvidia_smi_on_the_path(folder, monkeypatch):
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)


def test_a_driver_without_a_gpu_for_torch_is_a_note(
    no_gpu, tmp_path, monkeypatch, capsys
):
    """Else somebody would wait for a CPU for days, and think it was the GPU."""
    put_nvidia_smi_on_the_path(tmp_path / "bin", monkeypatch)
    assert choose_device(parse()) == CPU
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    for part in ("note: ", "the CPU is used", "driver is older", "README.md"):
        assert part in lines[0]

    assert choose_device(parse("--device", "cpu")) == CPU
    assert capsys.readouterr().out == "", "it was asked for"


def test_no_driver_is_no_note(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_device(parse()) == CPU
    assert capsys.readouterr().out == ""


@both_scripts
def test_the_note_on_the_driver_is_seen_in_both_scripts(
    no_gpu, call, tiny, tmp_path, monkeypatch, script
):
    put_nvidia_smi_on_the_path(tmp_path / "bin", monkeypatch)
    outcome = call(script, *tiny, "--device", "auto", "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("note: there is an NVIDIA driver") == 1


@pytest.fixture
def old_card(monkeypatch):
    """torch says that there is a card, a V100; nothing can be computed on it."""

    def has_bf16(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def fail_on_the_card(monkeypatch, message):
    """torch.ones() on the card raises a RuntimeError."""
    ones = torch.ones

    def failing_ones(*size, device=None, **options):
        if device == CUDA:
            raise RuntimeError(message)
        return ones(*size, device=device, **options)

    monkeypatch.setattr(torch, "ones", failing_ones)


@both_scripts
def test_a_card_without_kernels_is_one_line_before_images_are_read(
    old_card, call, tiny, monkeypatch, script
):
    message = (
        "CUDA error: no kernel image is available for execution on the device\n"
        "CUDA kernel errors might be asynchronously reported at some other API call"
    )
    fail_on_the_card(monkeypatch, message)
    monkeypatch.setattr(dataset_helpers, "read_image", interrupted)
    for device in ("cuda", "auto"):
        outcome = call(script, *tiny, "--device", device)
        assert outcome.is_one_line_error(
            f"torch {torch.__version__} has no kernels for this card",
            "Tesla V100, compute capability 7.0",
            'pip install "torch==2.6.*" "torchvision==0.21.*"',
        )


def test_another_error_of_the_card_keeps_its_traceback(old_card, monkeypatch):
    fail_on_the_card(monkeypatch, "CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose_device(parse())


def test_a_card_without_bf16(old_card, capsys):
    """torch would emulate it, slower than float32."""
    for script in (pirl_stl_train_test, train_stl_after_ssl):
        args = script.make_parser().parse_args(["--precision", "bf16"])
        with pytest.raises(UserError, match=r"no bf16 .*: use --precision fp16"):
            choose_precision(args, CUDA)

    assert capsys.readouterr().out == ""

    assert choose_precision(parse(), CUDA) == "fp32"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("note: this card has no bf16, so float32 is used")
    assert "--precision fp16" in lines[0]


def test_no_note_on_precision_where_there_is_nothing_to_gain(
    old_card, capsys, monkeypatch
):
    assert choose_precision(parse("--precision", "fp32"), CUDA) == "fp32"
    assert choose_precision(parse("--precision", "fp16"), CUDA) == "fp16"
    assert choose_precision(parse("--precision", "bf16"), CPU) == "bf16"
    assert choose_precision(parse(), CPU) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert choose_precision(parse(), CUDA) == "bf16"
    assert choose_precision(parse("--precision", "bf16"), CUDA) == "bf16"
    assert capsys.readouterr().out == ""


@both_scripts
def test_both_scripts_speak_of_precision(old_card, call, tiny, monkeypatch, script):
    """They end here for want of memory on the card."""
    monkeypatch.setattr(devices, "try_kernel", lambda device: None)
    monkeypatch.setattr(dataset_helpers, "free_memory", lambda device: 0)
    outcome = call(script, *tiny, "--device", "cuda")
    assert outcome.is_one_line_error("there is room for 0 GB")
    assert outcome.out.count("note: this card has no bf16") == 1

    outcome = call(script, *tiny, "--device", "cuda", "--precision", "bf16")
    assert outcome.is_one_line_error("no bf16", "--precision fp16 or fp32")


# ---- Images on the card or on the host -----------------------------------------------
RESERVED = 1_500_000_000  # bytes
HUNDRED_IMAGES = 100 * 3 * 36 * 36  # bytes of 100 images of 36 pixels
# Bytes on the card if they are there, too: with their rows of bank and random numbers.
HUNDRED_ON_CARD = HUNDRED_IMAGES + 100 * (128 + 2 * 96) * 4


@pytest.fixture
def memory(monkeypatch):
    """memory(card=…, host=…) says how many bytes are free from now on."""

    def set_free(card, host=10**12):
        free = {"cuda": card, "cpu": host}
        monkeypatch.setattr(
            dataset_helpers, "free_memory", lambda device: free[device.type]
        )

    return set_free


def test_auto_keeps_images_on_the_card_if_they_fit_beside_a_step(memory, capsys):
    memory(card=RESERVED + HUNDRED_ON_CARD)
    assert place_images("auto", 100, 36, CUDA) == CUDA
    assert capsys.readouterr().out == ""

    memory(card=RESERVED + HUNDRED_ON_CARD - 1)
    assert place_images("auto", 100, 36, CUDA) == CPU
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("note: the images stay on the host: they take 0.000517")


def test_all_ranks_keep_images_in_the_same_place(memory, monkeypatch, capsys):
    """If one card is too small: ranks that share images on the host meet for that."""
    meetings = []

    def reduce_with_a_small_card(free, operation):
        assert operation == distributed.ReduceOp.MIN
        meetings.append(free.item())
        free.fill_(1000)

    monkeypatch.setattr(dataset_helpers, "WORLD_SIZE", 2)
    monkeypatch.setattr(distributed, "all_reduce", reduce_with_a_small_card)
    memory(card=10**12)
    assert place_images("auto", 100, 36, CUDA) == CPU
    assert meetings == [10**12 - dataset_helpers.RESERVED_ON_CARD]
    assert "room for 1e-06 GB" in capsys.readouterr().out, "that of the small card"


def test_a_wish_is_followed(memory, capsys):
    for free in (0, 10**12):
        memory(card=free)
        assert place_images("device", 100, 36, CUDA) == CUDA
        assert place_images("host", 100, 36, CUDA) == CPU
    for wish in ("auto", "device", "host"):
        assert place_images(wish, 100, 36, CPU) == CPU
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_refused_with_the_advice_that_helps(memory):
    shape = (100, 3, 36, 36)
    on_card = RESERVED + HUNDRED_IMAGES + 100 * dataset_helpers.BYTES_BESIDE_PIXELS
    memory(card=on_card)
    check_memory(shape, CUDA, copies=1)

    memory(card=on_card - 1)
    with pytest.raises(UserError, match="in pretraining, use --images-on host; else"):
        check_memory(shape, CUDA, copies=1)
    check_memory(shape, CPU, copies=1)

    # They are decoded on the host before they go to the card.
    memory(card=10**12, host=HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match=r"there is room for .*: use a smaller"):
        check_memory(shape, CUDA, copies=1)
    memory(card=0, host=10**12)
    with pytest.raises(UserError, match="there is room for 0 GB: in pretraining"):
        check_memory(shape, CUDA, copies=1)


def test_each_rank_of_a_node_takes_its_own_card(old_card, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(devices, "try_kernel", lambda device: None)
    monkeypatch.setattr(ranks, "LOCAL_RANK", 3)
    assert choose_device(parse()) == torch.device("cuda", 3)
    assert current == [torch.device("cuda", 3)]

    monkeypatch.setattr(ranks, "LOCAL_RANK", 4)
    with pytest.raises(UserError, match="local rank 4: give torchrun a smaller"):
        choose_device(parse())


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switches_of_deterministic(old_card, monkeypatch, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(devices, "try_kernel", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", wanted)
    choose_device(parse("--deterministic", wanted))
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (":4096:8" if wanted else "")
    assert torch.backends.cudnn.benchmark != wanted
    assert torch.utils.deterministic.fill_uninitialized_memory != wanted


def test_what_is_made_for_a_card_is_made_there(monkeypatch):
    class Noted:
        def __init__(self, device, *rest, **options):
            self.device = str(device)

        def manual_seed(self, seed):
            return self

    monkeypatch.setattr(torch, "autocast", Noted)
    monkeypatch.setattr(torch, "Generator", Noted)
    monkeypatch.setattr(torch.amp, "GradScaler", Noted)
    assert devices.autocast(CUDA, "bf16").device == "cuda"
    assert devices.make_scaler(CUDA, "fp16").device == "cuda"
    assert randomness.make_generator(CUDA, 1).device == "cuda:0"


@pytest.mark.parametrize("wish", ["device", "auto"])
def test_memory_is_stated_and_checked_before_images_are_read(
    old_card, memory, call, tiny, monkeypatch, wish
):
    monkeypatch.setattr(devices, "try_kernel", lambda device: None)
    monkeypatch.setattr(dataset_helpers, "read_image", interrupted)
    memory(card=2**30, host=10**12 if wish == "device" else 1000)
    flags = ("--device", "cuda", "--images-on", wish)
    outcome = call("pirl_stl_train_test", *tiny, *flags)
    assert "100 images take 0.000389 GB" in outcome.out
    advice = {
        "device": "in pretraining, use --images-on host",
        "auto": "use a smaller --image-size or fewer images",
    }
    problem = "100 images of 36 × 36 pixels take"
    assert outcome.is_one_line_error(problem, advice[wish])
    assert ("note: the images stay on the host" in outcome.out) == (wish == "auto")


def train_an_epoch(trainer):
    """All that an epoch and its validation change."""
    train_steps(trainer, trainer.steps_per_epoch)
    result = pirl_stl_train_test.validate(trainer, trainer.epoch_uniforms(1), 1)
    trunk = trainer.exported_trunk().state_dict()
    return trainer.state_dict(), result, trunk


def test_images_on_the_host_give_the_same_bits(tiny, monkeypatch):
    """Each batch comes by way of pinned memory; nothing else is different."""
    on_device = make_trainer(tiny)
    args = on_device.args
    images = on_device.images
    on_host = PretrainingTrainer(args, OTHER_CPU, images.clone(), on_device.train_count)
    expected = train_an_epoch(on_device)

    empty = torch.empty
    pinned = []

    def note_pinned(*size, pin_memory=False, **options):
        buffer = empty(*size, **options)
        if pin_memory:
            pinned.append(buffer)
        return buffer

    monkeypatch.setattr(torch, "empty", note_pinned)
    assert same(train_an_epoch(on_host), expected)
    sizes = [len(buffer) for buffer in pinned]
    assert sizes == [16, 16, 16, 16, 6, 16, 14], "of training, then of validation"
    assert all(buffer.dtype == torch.uint8 for buffer in pinned)
    addresses = {buffer.data_ptr() for buffer in pinned}
    assert len(addresses) == 7, "a copy may still be under way when the next begins"


# ---- torch.compile -------------------------------------------------------------------
def test_compile_without_the_headers_of_python(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    outcome = call("pirl_stl_train_test", *tiny, "--compile")
    header = tmp_path / "Python.h"
    assert outcome.is_one_line_error(f"no {header}", "python3-dev", "leave --compile")

    header.touch()
    devices.check_compiler()


@pytest.mark.parametrize("compiler", ["c++", "g++", "clang++", "/opt/gcc/bin/g++-13"])
def test_any_of_these_compilers_will_do(tmp_path, monkeypatch, compiler):
    """torch takes the one that CXX names, or finds one of the three."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", {compiler: compiler}.get)
    monkeypatch.delenv("CXX", raising=False)
    if compiler.startswith("/"):
        with pytest.raises(UserError, match="--compile needs a C"):
            devices.check_compiler()
        monkeypatch.setenv("CXX", compiler)
    devices.check_compiler()


# ---- Several ranks on a node ---------------------------------------------------------
def test_free_memory_is_divided_by_the_ranks_of_a_node(data_dir, memory, monkeypatch):
    files = sorted((data_dir / "unlabelled").iterdir())
    monkeypatch.setattr(dataset_helpers, "LOCAL_WORLD_SIZE", 4)
    memory(card=10**12, host=HUNDRED_IMAGES)
    load_images(files, 36, CPU, "images")  # by this rank alone

    memory(card=10**12, host=4 * HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match=r"there is room for 0\.000389 GB"):
        load_images(files, 36, CUDA, "images", all_ranks=True)


@pytest.fixture
def first_rank_of_a_node(monkeypatch, tmp_path):
    """Rank 2 of four, alone on the second node as far as it can see. Its TMPDIR."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setattr(dataset_helpers, name, value)

    def gather(paths, path):
        paths[:] = ["that of another node", None, path, None]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    return folder


def test_ranks_of_a_node_need_memory_for_one_copy(
    data_dir, memory, first_rank_of_a_node
):
    files = sorted((data_dir / "unlabelled").iterdir())
    memory(card=0, host=HUNDRED_IMAGES)
    images, _ = load_images(files, 36, CPU, "images", all_ranks=True)
    memory(card=0, host=2 * HUNDRED_IMAGES)
    alone, _ = load_images(files, 36, CPU, "images")
    assert images[::2].equal(alone[::2])
    assert not images[1::2].any(), "these are for the other rank to decode"
    assert list(first_rank_of_a_node.iterdir()) == [], "the file is gone"

    memory(card=0, host=HUNDRED_IMAGES - 1)
    with pytest.raises(UserError, match="use a smaller --image-size"):
        load_images(files, 36, CPU, "images", all_ranks=True)


def test_ranks_of_a_node_share_the_unlabelled_images(
    tiny, memory, first_rank_of_a_node
):
    memory(card=0, host=HUNDRED_IMAGES)
    args = parse(*tiny, "--only-train")
    images, _, _ = dataset_helpers.load_unlabelled(args, CPU)
    assert images[::2].any()
    assert not images[1::2].any(), "these are for the other rank to decode"


def test_other_ranks_of_a_node_take_its_first_rank_s_file(
    first_rank_of_a_node, monkeypatch
):
    """They make no file, and leave the removal to the first."""
    path = first_rank_of_a_node / "images"
    path.write_bytes(bytes(range(12)))

    def gather(paths, own_path):
        assert own_path is None
        paths[:] = ["that of another node", None, str(path), None]

    monkeypatch.setattr(distributed, "all_gather_object", gather)
    monkeypatch.setattr(dataset_helpers, "RANK", 3)
    monkeypatch.setattr(dataset_helpers, "LOCAL_RANK", 1)
    images = node_shared_tensor((1, 3, 2, 2))
    assert images.flatten().tolist() == list(range(12))
    assert path.exists()

    images.fill_(7)
    assert path.read_bytes() == bytes([7] * 12), "the memory is that of all"


def test_a_full_file_system_is_refused_before_it_is_used(
    first_rank_of_a_node, monkeypatch
):
    """Writing to memory that has no room in the file would end the process."""
    usage = shutil.disk_usage(first_rank_of_a_node)._replace(free=11)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    problem = re.escape(f"{first_rank_of_a_node} has 1.1e-08 GB free")
    with pytest.raises(UserError, match=f"{problem}.*: let TMPDIR name"):
        node_shared_tensor((1, 3, 2, 2))


@pytest.mark.slow
def test_two_ranks_share_one_copy_that_disappears(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    run_two_ranks(tmp_path, "shared-images", *tiny)
    ranks = [seen_by(rank, tmp_path) for rank in (0, 1)]
    for one in ranks:
        assert one["pixel"] == 77, "which rank 1 has written"
        assert one["mapped"], "and the file has no name any more"
    labelled = 60  # which rank 0 alone reads, for kNN
    assert sum(one["decoded"] for one in ranks) == 100 + labelled, "each once"
    left = [path.name for path in folder.iterdir()]
    assert not any(name.startswith("pirl_images_") for name in left)
    history = weights(tmp_path, "exp")["history"]
    assert [metrics["epoch"] for metrics in history] == [1, 2]


def run_two_ranks(folder, what, *flags):
    return run(2, __file__, folder, what, *flags, "--experiment-name", "exp")


def seen_by(rank, folder):
    return json.loads((folder / f"machines_{rank}.json").read_text())


# ---- A rank of these tests -----------------------------------------------------------
seen = rank_worker.seen
pirl_loss = losses.pirl_loss
load_unlabelled = dataset_helpers.load_unlabelled
read_image = dataset_helpers.read_image


def noted_step(trainer, *arguments):
    before = flat_weights(trainer)
    totals = rank_worker.watched_step(trainer, *arguments)
    seen["skipped"].append(before.equal(flat_weights(trainer)))
    seen["scales"].append(trainer.scaler.get_scale())
    return totals


def overflowing_loss(*arguments):
    """Too large for fp16's gradients in the third step, on rank 1 alone."""
    losses = pirl_loss(*arguments)
    seen["losses"] += 1
    if RANK == 1 and seen["losses"] == 3:
        losses = losses * 2.0**40
    return losses


def counted_read_image(*arguments):
    seen["decoded"] += 1
    return read_image(*arguments)


def touched_images(*arguments):
    """The images as they are loaded, into one of which rank 1 writes."""
    images, train_count, checksum = load_unlabelled(*arguments)
    distributed.barrier()  # until both have taken the checksum
    if LOCAL_RANK == 1:
        images[5, 1, 7, 9] = 77
    distributed.barrier()
    seen["pixel"] = images[5, 1, 7, 9].item()
    mappings = Path("/proc/self/maps").read_text().splitlines()
    lines = [line for line in mappings if "pirl_images_" in line]
    seen["mapped"] = len(lines) == 1 and lines[0].endswith("(deleted)")
    return images, train_count, checksum


def put_in(what):
    if what == "one-overflows":
        seen.update(skipped=[], scales=[], losses=0)
        PretrainingTrainer.train_step = noted_step
        losses.pirl_loss = overflowing_loss
    elif what == "shared-images":
        seen.update(decoded=0)
        dataset_helpers.read_image = counted_read_image
        dataset_helpers.load_unlabelled = touched_images


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    put_in(sys.argv[2])
    del sys.argv[1:3]
    models.TRUNKS["res18"] = ThinResNet
    try:
        run_script(pirl_stl_train_test.main)
    finally:
        (folder / f"machines_{RANK}.json").write_text(json.dumps(seen))
