"""Both training scripts on a CUDA device that is not there: where would the host wait for it, where would devices mix?

fake_cuda.py check      # run both; status 1 and a line per wait if a training step waits for the device
fake_cuda.py defects    # plant defects one by one; status 1 unless each is found

Tensors say cuda:0 and hold CPU memory (class Pretend); every operator comes by run(), which refuses a mixture of
devices as CUDA does, notes each wait, and computes on the CPU. So data, loss, checkpoints, resuming and tables are
real. Autocast is CUDA's own, autograd too. Not seen: what is inside CUDA's kernels, streams, graphs, torch.compile,
cuDNN, NCCL. Needs torch's CUDA build without a GPU; written for torch 2.11 (no_driver() depends on it).
"""

import contextlib
import ctypes
import functools
import gc
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_helpers as rh
import torch
from conftest import ThinResNet18, write_raw
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map, tree_map_only

import dataset_helpers as dh
import memory_bank
import models
import pirl_stl_train_test as pirl
import stl10_data_load
import train_stl_after_ssl as fine

ROOT = Path(__file__).parent.parent
aten, Generator, save = torch.ops.aten, torch.Generator, torch.save
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
watch = None

# What reads the device's memory back to decide something on the host.
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
READS |= {aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor}
SCALARS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}  # give no tensor
COPIES = {aten.copy_.default, aten._to_copy.default}  # alone may have tensors of both devices
INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
STRICT = {aten.index_select.default, aten.gather.default, aten.cat.default, aten.stack.default}  # no CPU scalar either


class Pretend(torch.Tensor):
    """A tensor on cuda:0 whose memory is `held`, a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CUDA, **layout)

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretend({self.held})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Pretend(self.held.detach().clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]

    def tolist(self):
        watch.note("reads back", "tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """events: Counter of (phase, what waits, operator, line of the project, its text)."""

    def __init__(self):
        super().__init__()
        self.phase, self.events = "before", Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def note(self, kind, func):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        where = (f"{Path(frames[-1].filename).name}:{frames[-1].lineno}", frames[-1].line) if frames else ("torch", "")
        self.events[(self.phase, kind, str(func), *where)] += 1


def run(func, args, kwargs):
    tensors = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    on_cuda, on_cpu = [t for t in tensors if isinstance(t, Pretend)], [t for t in tensors if not isinstance(t, Pretend)]
    device = kwargs.get("device")
    to_cuda = torch.device(device).type == "cuda" if device is not None else bool(on_cuda)
    if on_cuda or to_cuda:
        look(func, args, on_cuda, on_cpu, to_cuda)
    outputs = call(func, args, kwargs)
    if not to_cuda or func in SCALARS:
        return outputs
    outputs = tree_map(lambda o: Pretend(o) if isinstance(o, torch.Tensor) else o, outputs)
    return return_and_correct_aliasing(func, args, kwargs, outputs) if on_cuda else outputs


def look(func, args, on_cuda, on_cpu, to_cuda):
    """Note the waits of one operator; raise what CUDA would raise."""
    if on_cuda and func in READS:
        watch.note("reads back", func)
    if func is aten._to_copy.default and bool(on_cuda) != to_cuda:
        watch.note("copies from pageable memory" if to_cuda else "copies to the CPU", func)
    if func is aten.copy_.default and on_cuda and on_cpu:
        watch.note("copies to the CPU" if isinstance(args[1], Pretend) else "copies from pageable memory", func)
    indices = [i for i in args[1] if isinstance(i, torch.Tensor)] if func in INDEX and on_cuda else []
    for index in indices:
        if not isinstance(index, Pretend):
            watch.note("copies an index from the CPU", func)
        if index.dtype in (torch.bool, torch.uint8):
            watch.note("boolean index", func)
    wrong = [t for t in on_cpu if (t.dim() or func in STRICT) and not any(t is index for index in indices)]
    if on_cuda and wrong and func not in COPIES:
        shapes = [tuple(t.shape) for t in wrong]
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu, {shapes}")
    if func is aten._fused_sgd_.default:
        for parameter, *others in zip(*(given for given in args[:3] if given), strict=True):
            for other in others:
                pairs = zip(parameter.shape, parameter.stride(), other.stride(), strict=True)
                if other.dtype != parameter.dtype or any(size > 1 and a != b for size, a, b in pairs):
                    raise RuntimeError("fused SGD on CUDA wants equal types and strides (check_fast_path_restrictions)")


def call(func, args, kwargs):
    """The operator on the CPU."""
    args, kwargs = tree_map_only(Pretend, lambda t: t.held, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": CPU}
    if func is aten.cudnn_batch_norm.default:
        return *aten.native_batch_norm(*args), torch.empty(0, dtype=torch.uint8)
    if func is aten.cudnn_batch_norm_backward.default:
        x, grad, weight, mean, var, save_mean, save_invstd, eps, _ = args
        given = (grad, x, weight, mean, var, save_mean, save_invstd, True, eps, [True] * 3)
        return aten.native_batch_norm_backward(*given)
    return func(*args, **kwargs)


@contextlib.contextmanager
def no_driver():
    """Autograd asks CUDA's hooks whether a device has a context, an error without a driver. Here the answer is no.

    The hooks get a copy of their table of virtual functions in which hasPrimaryContext() is isAvailable().
    """
    torch._C._ensureCUDADeviceGuardSet()
    get = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = get()
    table = ctypes.c_void_p.from_address(hooks).value
    entries = [ctypes.c_void_p.from_address(table + 8 * i).value for i in range(-2, 98)]
    ask = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    built, available, context = 4, 5, 6  # behind two words before the table and two destructors
    if not ask(entries[built])(hooks) or ask(entries[available])(hooks):
        raise RuntimeError("this needs torch's CUDA build on a machine without a GPU")
    entries[context] = entries[available]
    copy = (ctypes.c_void_p * len(entries))(*entries)
    ctypes.c_void_p.from_address(hooks).value = ctypes.addressof(copy) + 16
    try:
        yield
    finally:
        ctypes.c_void_p.from_address(hooks).value = table


@contextlib.contextmanager
def pretend_cuda():
    """Inside, torch sees one GPU with bf16. Yields the Watch."""
    global watch
    watch = Watch()
    to_cpu = functools.partial(tree_map_only, Pretend, lambda t: t.detach().held.clone())
    replaced = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_device_name": lambda device=None: "pretended",
        "torch.cuda.synchronize": lambda device=None: None,
        "torch.cuda.mem_get_info": lambda device=None: (2**33, 2**33),
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.Generator": lambda device="cpu": Generator(),
        "torch.save": lambda state, file: save(to_cpu(state), file),
        "torch.utils._foreach_utils._foreach_supported_types": [torch.Tensor, torch.nn.Parameter, Pretend],
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_driver())
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU, then moved
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # else Module.to() loses the class
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(watch)
        yield watch


# ---- The two scripts -------------------------------------------------------------------------------------------------

STEPS = {"Pretraining.step", "FineTuning.step"}
UNLABELLED, LABELLED, TEST = 45, 60, 20


def write_data(folder):
    raw = write_raw(folder, {"train": LABELLED, "test": TEST, "unlabelled": UNLABELLED})
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw, folder / "data", split)
    (folder / "data/fold_indices.txt").write_text(" ".join(map(str, range(40))) + "\n")


def label(owner, name):
    """Calls of owner.name are a phase of the watch, "Pretraining.step" for instance."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def labelled(*args, **kwargs):
        before, watch.phase = watch.phase, f"{owner.__name__}.{name}"
        try:
            return function(*args, **kwargs)
        finally:
            watch.phase = before

    return mock.patch.object(owner, name, labelled)


@contextlib.contextmanager
def scripts():
    """Yields (the Watch, call(module, *flags), which runs a script on the pretended device, its files' folder)."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_data(folder)
        stack.enter_context(mock.patch.dict(models.TRUNKS, res18=ThinResNet18))
        for owner in (pirl.Pretraining, fine.FineTuning):
            stack.enter_context(label(owner, "step"))
        seen = stack.enter_context(pretend_cuda())
        dh.colour_constants(CUDA)  # sent to the device once, else in the first step
        paths = ["--data-dir", folder / "data", "--weights-dir", folder / "w", "--observations-dir", folder / "o"]
        common = [*paths, "--image-size", 36, "--batch-size", 16, "--device", "cuda"]

        def call(module, *flags):
            seen.phase = module.__name__
            with mock.patch("sys.argv", [f"{module.__name__}.py", *map(str, [*common, *flags])]):
                rh.run_script(module.main)
            gc.collect()  # lets go of the experiment's name, as the end of a process does

        yield seen, call, folder


def check():
    """Run both scripts with many of their flags. Returns the waits within steps."""
    with scripts() as (seen, call, folder):
        call(pirl, "--epochs", 1, "--knn-every", 1, "--checkpoint-minutes", 0)
        call(pirl, "--epochs", 2, "--knn-every", 1, "--resume", "True")
        for i, flags in enumerate(
            [
                ["--loss", "nce", "--batch-negatives", "False", "--precision", "fp32", "--count-negatives", 20],
                ["--loss", "nce", "--positive", "pair", "--non-linear-head", "True", "--only-train", "True"],
                ["--zero-init", "False", "--beta", 0, "--colour-strength", 0, "--deterministic"],
            ]
        ):
            call(pirl, "--epochs", 1, "--experiment-name", f"x{i}", *flags)
        torch.use_deterministic_algorithms(False)
        call(fine, "--epochs", 1, "--full-fine-tune", "True", "--folds", "True", "--neighbours", folder / "n.png")
        call(fine, "--epochs", 1, "--experiment-name", "b", "--pirl-model-name", "e1_resnet18_")
    return waits(seen)


def waits(seen):
    """The waits within steps, a line each."""
    events = sorted(seen.events.items())
    return [f"{phase}: {kind} at {where}: {line}" for (phase, kind, _, where, line), _ in events if phase in STEPS]


# ---- Planted defects -------------------------------------------------------------------------------------------------

draw_negatives, clip = memory_bank.MemoryBank.draw_negatives, torch.nn.utils.clip_grad_norm_


def cpu_index(self, index, count, generator):
    return draw_negatives(self, index.cpu(), count, generator)


def cpu_rows(self, index, image_vectors):
    self.vectors.index_copy_(0, index.cpu(), image_vectors.float())


def cpu_lookup(self, index, count, generator):
    rows = torch.randperm(self.train_count)[: count + 1]
    return self.vectors[rows], (rows.to(index.device) == index[:, None])


def reads_back(parameters, most):
    return clip(parameters, most).item()


def boolean_index(logits):
    finite = logits[..., 0].isfinite()
    return -logits.log_softmax(-1)[..., 0][finite].view(finite.shape)


DEFECTS = {
    "an index on the CPU, compared with one on the GPU": (memory_bank.MemoryBank, "draw_negatives", cpu_index),
    "an index on the CPU for index_copy_": (memory_bank.MemoryBank, "update", cpu_rows),
    "rows looked up by an index on the CPU": (memory_bank.MemoryBank, "draw_negatives", cpu_lookup),
    "an item()": (torch.nn.utils, "clip_grad_norm_", reads_back),
    "a boolean index": (pirl, "modified_nce", boolean_index),
}


def found(owner, name, flaw):
    """What is seen of a defect: an error, or waits within steps."""
    try:
        with mock.patch.object(owner, name, flaw), scripts() as (seen, call, _):
            call(pirl, "--epochs", 1, "--knn-every", 0)
            return waits(seen)
    except RuntimeError as error:
        return [str(error)]


def main():
    if sys.argv[1:] == ["check"]:
        lines = check()
        print("\n".join(lines) or "no step waits for the device, and no operator met tensors of two devices")
        sys.exit(bool(lines))
    results = {what: found(*planted) for what, planted in DEFECTS.items()}
    for what, lines in results.items():
        print(f"{what}: {lines[0] if lines else 'NOT FOUND'}")
    sys.exit(not all(results.values()))


if __name__ == "__main__":
    main()
