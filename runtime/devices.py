"""The device and its precision, the optimiser and its step."""

import os
import platform
import shutil
import sysconfig
from pathlib import Path

import torch
import torchvision
from torch import nn

from runtime.errors import UserError
from runtime.ranks import LOCAL_RANK, WORLD_SIZE


# ---- The device ----------------------------------------------------------------------
def choose_device(args):
    """args.device -> torch.device. Sets torch's global options for it."""
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before it is written, so it need not be filled.
        torch.utils.deterministic.fill_uninitialized_memory = False

    if args.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if args.device != "auto":
            raise UserError(
                f"--device {args.device} was given, but torch sees no CUDA GPU",
                "use --device cpu, or check the driver",
            )
        if shutil.which("nvidia-smi"):
            print(
                "note: there is an NVIDIA driver, but torch sees no GPU, so the CPU is "
                "used. Most often the driver is older than this torch needs (or, on "
                "Windows, torch is built for CPUs): see the install lines in README.md"
            )
        return torch.device("cpu")

    device = chosen_gpu(args.device)
    torch.cuda.set_device(device)
    try_kernel(device)
    torch.backends.cudnn.benchmark = not args.deterministic
    # Convolutions in float32 use TF32, which is torch's default; the matrix products of
    # the loss and the memory bank do not.
    return device


def chosen_gpu(name):
    """The GPU that --device names: cuda:N, or the one of this rank."""
    count = torch.cuda.device_count()
    if ":" not in name:
        if count <= LOCAL_RANK:
            raise UserError(
                f"this node has no GPU for its local rank {LOCAL_RANK}",
                "give torchrun a smaller --nproc-per-node",
            )
        return torch.device("cuda", LOCAL_RANK)

    if WORLD_SIZE > 1:
        raise UserError(
            f"--device {name} is one GPU for {WORLD_SIZE} ranks",
            "use --device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES",
        )
    index = int(name.partition(":")[2])
    if index >= count:
        raise UserError(
            f"--device {name} was given, but torch sees {count} GPUs",
            f"use --device cuda:{count - 1} or lower",
        )
    return torch.device("cuda", index)


def try_kernel(device):
    """Refuse a card that this torch has no kernels for, before images are decoded."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        card = (
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        )
        raise UserError(
            f"torch {torch.__version__} has no kernels for this card ({card})",
            'pip install "torch==2.6.*" "torchvision==0.21.*"',
        ) from None


def check_compiler():
    """Refuse --compile where torch.compile would fail, in the middle of a step."""
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(shutil.which(name) for name in compilers):
        raise UserError(
            "--compile needs a C++ compiler, and none was found",
            "install g++, or leave --compile out",
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        raise UserError(
            f"--compile needs Python's headers, and there is no {headers}",
            "install them (python3-dev), or leave --compile out",
        )


def describe_machine(device):
    """The device and the versions, as a line for the run's record."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        processor = f"CPU ({platform.machine()}, {instructions}, {threads} threads)"
    packages = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{processor}, {packages}, Python {platform.python_version()}"


# ---- Precision -----------------------------------------------------------------------
def choose_precision(args, device):
    """args.precision -> "fp32", "bf16" or "fp16"."""
    if device.type == "cpu":
        return "fp32" if args.precision == "auto" else args.precision

    # torch also emulates bf16 on older cards, which is slower than float32.
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not has_bf16:
        raise UserError(
            "this GPU has no bf16 arithmetic",
            "use --precision fp16 or fp32",
        )
    if args.precision != "auto":
        return args.precision
    if has_bf16:
        return "bf16"
    print(
        "note: this card has no bf16, so float32 is used; --precision fp16 is about "
        "twice as fast on cards with tensor cores (T4, V100, RTX 20xx)"
    )
    return "fp32"


def autocast(device, precision):
    """The context in which the network runs; memory bank and loss stay in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


# ---- The optimiser -------------------------------------------------------------------
def make_optimizer(parameters, lr, weight_decay):
    """SGD with momentum 0.9."""
    parameters = list(parameters)
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True
    )
    # If the scaler of fp16 skips the very first step, the fused optimiser leaves its
    # momentum as uninitialised memory. From zeros, a first step is the same.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(device, precision):
    """The gradient scaler of fp16, whose small gradients would be 0 without it.

    With another precision it does nothing.
    """
    # torch's own first scale, 2¹⁶, overflows in the first steps.
    return torch.amp.GradScaler(
        device.type, init_scale=2.0**12, enabled=precision == "fp16"
    )


def optimizer_step(loss, optimizer, scaler, max_norm=None):
    """One step down the gradient of `loss`, a scalar.

    max_norm: a gradient that is longer is rescaled to this norm; None: no clipping.
    """
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if max_norm is not None:
        # The norm to clip is that of the gradient itself, not of the scaled one.
        scaler.unscale_(optimizer)
        parameters = optimizer.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(parameters, max_norm)
    scaler.step(optimizer)
    scaler.update()


def restore_optimizer(optimizer, scaler, saved):
    """Bring back momentum and scale from a checkpoint, a dict that has both.

    load_state_dict() would also restore the hyperparameters (momentum, weight decay,
    …). Those come from this run's flags, so they are put back. Only the learning rate
    is kept from the checkpoint: a run that was stopped after the last step of an epoch
    still has to log it.
    """
    settings = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        for name, value in before.items():
            if name not in ("params", "lr"):
                group[name] = value
    # Only fp16's scaler has a state. A resumed run may have another precision; then
    # load_state_dict() does nothing.
    if saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
