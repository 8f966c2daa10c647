"""The machines that people have: several, old and small cards, fp16, no compiler."""

import os
import platform
import shutil
import sys
import sysconfig

import pytest
import torch
from conftest import ThinResNet
from records import TRAINED, checkpoint, interrupted, parts_of, same, table

import dataset_helpers
import models
import pirl_stl_train_test
from pirl_stl_train_test import PretrainingTrainer
from runtime import devices
from runtime.devices import (
    choose_device,
    choose_precision,
    make_optimizer,
    make_scaler,
    optimizer_step,
    restore_optimizer,
)
from runtime.errors import UserError
from train_stl_after_ssl import FineTuningTrainer

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
TRAINERS = {
    "pirl_stl_train_test": PretrainingTrainer,
    "train_stl_after_ssl": FineTuningTrainer,
}
both_scripts = pytest.mark.parametrize("script", TRAINERS)


def parse(*flags):
    return pirl_stl_train_test.make_parser().parse_args([str(flag) for flag in flags])


# ---- Cards and drivers ---------------------------------------------------------------
def test_a_driver_without_a_gpu_for_torch_is_a_note(tmp_path, monkeypatch, capsys):
    """Else somebody would wait for a CPU for days, and think it was the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_device(parse()) == CPU
    assert capsys.readouterr().out == "", "there is no driver"

    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert choose_device(parse()) == CPU
    [line] = capsys.readouterr().out.splitlines()
    for part in ("note: ", "the CPU is used", "driver is older", "README.md"):
        assert part in line
    assert choose_device(parse("--device", "cpu")) == CPU
    assert capsys.readouterr().out == "", "it was asked for"

    for name in ("cuda", "cuda:2"):
        with pytest.raises(
            UserError, match=f"^--device {name} was given, but torch se"
        ):
            choose_device(parse("--device", name))


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


@pytest.fixture
def four_cards(old_card, monkeypatch):
    """A list of what is done with the cards of a node that has four."""
    done = []

    def set_device(device):
        done.append(("set", device))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(devices, "try_kernel", lambda device: done.append(device))
    return done


def test_one_card_of_several(four_cards):
    for index in (0, 3):
        card = torch.device("cuda", index)
        assert choose_device(parse("--device", f"cuda:{index}")) == card
        assert four_cards == [("set", card), card], "the one that is used is tried"
        four_cards.clear()
    assert choose_device(parse("--device", "cuda")) == CUDA
    with pytest.raises(UserError, match=r"sees 4 GPUs: use --device cuda:3 or lower"):
        choose_device(parse("--device", "cuda:4"))


def test_each_rank_of_a_node_takes_its_own_card(four_cards, monkeypatch):
    monkeypatch.setattr(devices, "WORLD_SIZE", 8)
    monkeypatch.setattr(devices, "LOCAL_RANK", 3)
    for flags in ((), ("--device", "cuda")):
        assert choose_device(parse(*flags)) == torch.device("cuda", 3)
    with pytest.raises(UserError, match=r"^--device cuda:1 is one GPU for 8 ranks: "):
        choose_device(parse("--device", "cuda:1"))

    monkeypatch.setattr(devices, "LOCAL_RANK", 4)
    with pytest.raises(UserError, match="local rank 4: give torchrun a smaller"):
        choose_device(parse())


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
    for device in ("cuda", "auto", "cuda:0"):
        outcome = call(script, *tiny, "--device", device)
        assert outcome.is_one_line_error(
            f"torch {torch.__version__} has no kernels for this card",
            "Tesla V100, compute capability 7.0",
            'pip install "torch==2.6.*" "torchvision==0.21.*"',
        )

    fail_on_the_card(monkeypatch, "CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
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


def test_the_machine_is_described(old_card):
    versions = f"torch {torch.__version__}, torchvision "
    for device, name in ((CUDA, "Tesla V100"), (CPU, f"CPU ({platform.machine()}, ")):
        text = devices.describe_machine(device)
        assert text.startswith(name)
        assert versions in text
        assert text.endswith(f"Python {platform.python_version()}")


# ---- Precision -----------------------------------------------------------------------
def test_precision(old_card, capsys, monkeypatch):
    """torch would emulate bf16 on an old card, slower than float32."""
    with pytest.raises(UserError, match=r"no bf16 .*: use --precision fp16 or fp32"):
        choose_precision(parse("--precision", "bf16"), CUDA)
    for wish in ("fp32", "fp16"):
        assert choose_precision(parse("--precision", wish), CUDA) == wish
    for wish in ("fp32", "fp16", "bf16"):
        assert choose_precision(parse("--precision", wish), CPU) == wish
    assert choose_precision(parse(), CPU) == "fp32"
    assert capsys.readouterr().out == "", "there is nothing to gain"

    assert choose_precision(parse(), CUDA) == "fp32"
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("note: this card has no bf16, so float32 is used; --precis")

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    assert choose_precision(parse(), CUDA) == "bf16"
    assert choose_precision(parse("--precision", "bf16"), CUDA) == "bf16"
    assert choose_precision(parse("--precision", "fp16"), CUDA) == "fp16"
    assert capsys.readouterr().out == ""


def test_what_is_made_for_a_card_is_made_there(monkeypatch):
    class Noted:
        def __init__(self, device, *rest, **options):
            self.made = (device, *rest, options.get("enabled"))

    monkeypatch.setattr(torch, "autocast", Noted)
    monkeypatch.setattr(torch.amp, "GradScaler", Noted)
    for device in (CPU, CUDA):
        kind = device.type
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            context = devices.autocast(device, precision)
            assert context.made == (kind, dtype, True)
        assert devices.autocast(device, "fp32").made[2] is False
        assert make_scaler(device, "fp16").made == (kind, True)
        assert make_scaler(device, "bf16").made == (kind, False)


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


# ---- The optimiser's step ------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("max_norm", [None, 2.0, 100.0])
def test_steps_are_those_of_the_formula(max_norm, precision):
    """SGD with momentum 0.9: the gradient of the loss is `slope`, of norm 13.

    Clipping is of all parameters together, and of the gradient before it is scaled.
    """
    slopes = (torch.tensor([3.0, 4.0]), torch.tensor([[12.0]]))
    weights = [torch.nn.Parameter(torch.full_like(slope, 0.5)) for slope in slopes]
    optimizer = make_optimizer(iter(weights), lr=0.1, weight_decay=0.01)
    scaler = make_scaler(CPU, precision)
    assert scaler.get_scale() == (2**12 if precision == "fp16" else 1)

    expected = [weight.detach().double() for weight in weights]
    momentum = [torch.zeros_like(weight) for weight in expected]
    shorter = min(1, (max_norm or 100) / 13)
    for _ in range(3):
        products = [
            (slope * weight).sum()
            for slope, weight in zip(slopes, weights, strict=True)
        ]
        optimizer_step(sum(products), optimizer, scaler, max_norm)
        for row, slope in enumerate(slopes):
            gradient = shorter * slope + 0.01 * expected[row]
            momentum[row] = 0.9 * momentum[row] + gradient
            expected[row] = expected[row] - 0.1 * momentum[row]
            torch.testing.assert_close(weights[row].detach().double(), expected[row])


def test_a_step_that_overflows_changes_nothing_but_the_scale(monkeypatch):
    """The very first, too: torch's fused SGD would take memory that nobody has filled
    as its momentum. Here, torch fills such memory with NaN.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([weight], 0.1, 0.0)
    scaler = make_scaler(CPU, "fp16")
    for slope, moved in ((float("inf"), 0.0), (float("nan"), 0.0), (2.0, 0.2)):
        optimizer_step((slope * weight).sum(), optimizer, scaler, 100.0)
        torch.testing.assert_close(1 - weight.detach(), torch.full((4,), moved))
    assert scaler.get_scale() == 2.0**10


def trained(lr, weight_decay, momentum, steps, precision="fp16"):
    """(optimiser, scaler) after some steps on two weights, the second of 3 numbers."""
    weights = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3)]
    optimizer = make_optimizer(weights, lr, weight_decay)
    optimizer.param_groups[0]["momentum"] = momentum
    scaler = make_scaler(CPU, precision)
    for step in range(steps):
        optimizer_step(weights[0].sum() + step * weights[1].sum(), optimizer, scaler)
    return optimizer, scaler


def buffers(optimizer):
    [group] = optimizer.param_groups
    return [optimizer.state[weight]["momentum_buffer"] for weight in group["params"]]


def test_momentum_is_restored_and_settings_are_those_of_today():
    optimizer, scaler = trained(0.1, 0.01, 0.9, steps=3)
    scaler.update(2.0**7)
    saved = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}

    today, scaler_today = trained(0.5, 0.2, 0.8, steps=0)
    restore_optimizer(today, scaler_today, saved)
    assert same(buffers(today), buffers(optimizer))
    [group] = today.param_groups
    settings = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
    assert settings == {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8}
    assert group["fused"]
    assert scaler_today.get_scale() == 2.0**7

    # To another precision, whose scaler has no state, and back.
    _, scaler_off = trained(0.5, 0.2, 0.8, steps=0, precision="bf16")
    restore_optimizer(today, scaler_off, saved)
    assert scaler_off.state_dict() == {}
    _, fresh = trained(0.5, 0.2, 0.8, steps=0)
    restore_optimizer(today, fresh, saved | {"scaler": scaler_off.state_dict()})
    assert fresh.get_scale() == 2.0**12


# ---- fp16 in both scripts ------------------------------------------------------------
# So that a script trains the network, which is in half precision, and little else.
NETWORK = {
    "pirl_stl_train_test": ("--knn-every", 0),
    "train_stl_after_ssl": ("--full-fine-tune",),
}


@both_scripts
def test_a_run_in_fp16_is_nearly_that_in_float32(
    call, tiny, tmp_path, monkeypatch, script
):
    types = set()

    class NotedResNet(ThinResNet):
        def __init__(self, **options):
            super().__init__(**options)
            self.layer4.register_forward_hook(
                lambda *hooked: types.add(hooked[2].dtype)
            )

    monkeypatch.setitem(models.TRUNKS, "res18", NotedResNet)
    for precision in ("fp32", "fp16"):
        types.clear()
        flags = ("--precision", precision, "--experiment-name", precision)
        flags = (*flags, "--epochs", 1, *NETWORK[script])
        outcome = call(script, *tiny, *flags)
        assert outcome.status == 0, outcome.err
        assert (torch.float16 in types) == (precision == "fp16")

    # The last line is that of fine-tuning's full stage.
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


def watch_steps(patch, trainer_class, kill_after=None):
    """A list that gets, of every step to come, whether it left the weights alone.

    kill_after: the process is interrupted in the step after so many.
    """
    skipped = []
    train_step = trainer_class.train_step

    def flat_weights(trainer):
        values = [weight.detach().flatten() for weight in trainer.model.parameters()]
        return torch.cat(values)

    def watched(trainer, *arguments):
        if len(skipped) == kill_after:
            interrupted()
        before = flat_weights(trainer)
        totals = train_step(trainer, *arguments)
        skipped.append(before.equal(flat_weights(trainer)))
        return totals

    patch.setattr(trainer_class, "train_step", watched)
    return skipped


# Of a checkpoint, all that training changes.
CHANGED = {
    "pirl_stl_train_test": (*TRAINED, "scaler"),
    "train_stl_after_ssl": ("trunk", "softmax_layer", "optimizer", "scaler", "best"),
}


@both_scripts
def test_a_run_with_overflows_resumes_exactly(
    call, tiny, tmp_path, monkeypatch, script
):
    """Killed between two good steps, so the scaler counts on."""
    monkeypatch.setattr(sys.modules[script], "make_scaler", scaler_that_overflows)
    trainer_class = TRAINERS[script]
    run = (script, *tiny, "--precision", "fp16", "--checkpoint-minutes", 0)
    run = (*run, *NETWORK[script], "--experiment-name")

    with monkeypatch.context() as patch:
        whole = watch_steps(patch, trainer_class)
        assert call(*run, "whole").status == 0
    assert whole == [step % 3 == 0 for step in range(len(whole))]
    assert len(whole) >= 8

    with monkeypatch.context() as patch:
        parts = watch_steps(patch, trainer_class, kill_after=5)
        assert call(*run, "killed").status == 130
    with monkeypatch.context() as patch:
        rest = watch_steps(patch, trainer_class)
        outcome = call(*run, "killed", "--resume")
        assert outcome.status == 0, outcome.err
    assert len(parts) == 5
    assert parts + rest == whole

    names = CHANGED[script]
    expected = parts_of(checkpoint(tmp_path, "whole"), names)
    assert same(parts_of(checkpoint(tmp_path, "killed"), names), expected)
    assert table(tmp_path, "killed") == table(tmp_path, "whole")
