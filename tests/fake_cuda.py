"""The scripts, and the steps that are timed, on a CUDA device that is not there.

Where would the host wait for the device, where would devices mix?

fake_cuda.py check      # run them; status 1 and a line per wait of a training step
fake_cuda.py defects    # plant defects one by one; status 1 unless each is found

Tensors say cuda:0 and hold CPU memory (class Pretend). Every operator comes by run(),
which refuses a mixture of devices as CUDA does, notes each wait, and computes on the
CPU. So data, loss, checkpoints, resuming and tables are real; autocast is CUDA's own,
and autograd is too.

Graphs are imitated by fake_graph.py. Not seen: what is inside CUDA's kernels, streams,
torch.compile, cuDNN, NCCL.
Needs torch's CUDA build without a GPU; written for torch 2.11, on whose inside
no_driver() depends.
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

import torch
from conftest import ThinResNet, write_raw
from fake_graph import READS, fake_graphs
from records import parts_of, same, weights
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

import extract_features
import models
import pirl_stl_train_test
import stl10_data_load
import train_stl_after_ssl
from benchmarks import throughput
from memory_bank import MemoryBank
from pirl_stl_train_test import PretrainingTrainer
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
watch = None  # the Watch, inside pretend_cuda()
# Without a driver no memory can be pinned. Address -> storage that should be; its views
# are pinned with it.
pinned = {}

# Of what reads the device's memory back, what gives no tensor.
SCALARS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
# They alone may have tensors of both devices.
COPIES = {
    aten._to_copy.default,
    aten.copy_.default,
}
INDEX = {
    aten._index_put_impl_.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}
# Other operators take a CPU tensor without dimensions as a number; these do not.
STRICT = {
    aten.cat.default,
    aten.gather.default,
    aten.index_select.default,
    aten.stack.default,
}


# ---- Tensors that say cuda:0 ---------------------------------------------------------
class Pretend(torch.Tensor):
    """A tensor on cuda:0 whose memory is `held`, a CPU tensor."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            layout=held.layout,
            dtype=held.dtype,
            device=CUDA,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretend({self.held})"

    def __format__(self, specification):
        # torch formats a number on any device, but only of its own class.
        return format(self.item() if self.dim() == 0 else self.held, specification)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Pretend(self.held.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def tolist(self):
        watch.note("reads back", "tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Sees every operator, and counts the waits.

    events: Counter of (phase, what waits, operator, line of the project, its text).
    graphs: what has been captured.
    """

    def __init__(self):
        super().__init__()
        self.phase = "before"
        self.events = Counter()
        self.graphs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def note(self, kind, func):
        place = "torch"
        text = ""
        for frame in traceback.extract_stack():
            if Path(frame.filename).parent == ROOT:
                place = f"{Path(frame.filename).name}:{frame.lineno}"
                text = frame.line
        self.events[(self.phase, kind, str(func), place, text)] += 1


def run(func, args, kwargs):
    """One operator: on the pretended device if a tensor or the `device` asks for it."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    on_cuda = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]

    to_cuda = bool(on_cuda)
    if kwargs.get("device") is not None:
        to_cuda = torch.device(kwargs["device"]).type == "cuda"

    if on_cuda:
        refuse_two_devices(func, args, on_cpu)
    if on_cuda or to_cuda:
        note_waits(func, args, kwargs, on_cuda, on_cpu, to_cuda)
    if on_cuda and func in (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr):
        check_fused_sgd(args)
    if on_cuda and func is aten._fused_sgd_.tensor_lr:
        check_rate(kwargs["lr"])
    if on_cuda and func is aten._pin_memory.default:
        raise RuntimeError("only dense CPU tensors can be pinned")

    given = (args, kwargs)
    if on_cuda:
        given = tree_map_only(Pretend, lambda tensor: tensor.held, given)
    outputs = compute(func, *given)
    if not to_cuda or func in SCALARS:
        return outputs
    outputs = tree_map_only(torch.Tensor, Pretend, outputs)
    if on_cuda:
        # An operator in place, or a view, gives back the tensor that it was given.
        return return_and_correct_aliasing(func, args, kwargs, outputs)
    return outputs


def index_tensors(func, args):
    """The tensors by which an operator looks up rows."""
    if func not in INDEX:
        return []
    return [index for index in args[1] if isinstance(index, torch.Tensor)]


def note_waits(func, args, kwargs, on_cuda, on_cpu, to_cuda):
    """Note each reason why the host would wait for the device."""
    if on_cuda and func in READS:
        watch.note("reads back", func)

    if func is aten._to_copy.default and bool(on_cuda) != to_cuda:
        note_copy(func, args[0], kwargs.get("non_blocking"))
    if func is aten.copy_.default and on_cuda and on_cpu:
        non_blocking = len(args) > 2 and args[2]
        note_copy(func, args[1], non_blocking)

    if on_cuda:
        for index in index_tensors(func, args):
            if not isinstance(index, Pretend):
                watch.note("copies an index from the CPU", func)
            if index.dtype in (torch.bool, torch.uint8):
                watch.note("boolean index", func)


def note_copy(func, source, non_blocking):
    """Note a copy from one device to the other, unless it goes on by itself."""
    if isinstance(source, Pretend):
        watch.note("copies to the CPU", func)
    elif source.untyped_storage().data_ptr() not in pinned:
        watch.note("copies from pageable memory", func)
    elif not non_blocking:
        watch.note("copies from pinned memory and waits", func)


def refuse_two_devices(func, args, on_cpu):
    """Raise what CUDA raises where an operator gets tensors of both devices."""
    if func in COPIES:
        return
    indices = index_tensors(func, args)
    wrong = []
    for tensor in on_cpu:
        is_index = any(tensor is index for index in indices)
        is_number = tensor.dim() == 0 and func not in STRICT
        if not is_index and not is_number:
            wrong.append(tuple(tensor.shape))
    if wrong:
        expected = "expected all tensors to be on the same device"
        raise RuntimeError(f"{func}: {expected}, but found cuda:0 and cpu, {wrong}")


def check_fused_sgd(args):
    """A parameter, its gradient and its momentum need equal types and strides."""
    tensor_lists = [tensors for tensors in args[:3] if tensors]
    for parameter, *others in zip(*tensor_lists, strict=True):
        # The stride of a dimension of one element is of no account.
        matters = [size > 1 for size in parameter.shape]
        strides = [s for s, m in zip(parameter.stride(), matters, strict=True) if m]
        for other in others:
            other_strides = [
                s for s, m in zip(other.stride(), matters, strict=True) if m
            ]
            if other.dtype != parameter.dtype or other_strides != strides:
                wants = "fused SGD on CUDA wants equal types and strides"
                raise RuntimeError(f"{wants} (check_fast_path_restrictions)")


def check_rate(lr):
    """A rate on the CPU, or a number, would never change in a captured step."""
    if not isinstance(lr, Pretend) or lr.dtype != torch.float32:
        raise RuntimeError("fused SGD in a capture wants a float32 rate on the device")


def pin(tensor):
    storage = tensor.untyped_storage()
    pinned[storage.data_ptr()] = storage
    return tensor


def compute(func, args, kwargs):
    """The operator on CPU tensors."""
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": CPU}

    if func is aten._pin_memory.default:
        return pin(args[0].clone())
    if kwargs.get("pin_memory"):
        return pin(func(*args, **{**kwargs, "pin_memory": False}))

    # These two have no CPU version: another operator computes the same.
    if func is aten.cudnn_batch_norm.default:
        output, save_mean, save_invstd = aten.native_batch_norm(*args)
        reserve = torch.empty(0, dtype=torch.uint8)
        return output, save_mean, save_invstd, reserve
    if func is aten.cudnn_batch_norm_backward.default:
        x, grad, weight, mean, var, save_mean, save_invstd, eps, _ = args
        training = True
        wanted = [True] * 3  # the gradients of input, weight and bias
        return aten.native_batch_norm_backward(
            grad, x, weight, mean, var, save_mean, save_invstd, training, eps, wanted
        )

    # On CPUs, torch 2.11's own is wrong in bf16 for some maps of 1 × 1 (see
    # tests/test_models.py).
    if func is aten.convolution_backward.default and args[0].dtype == torch.bfloat16:
        args = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        gradients = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, gradients)

    return func(*args, **kwargs)


# ---- A torch that sees one GPU -------------------------------------------------------
@contextlib.contextmanager
def no_driver():
    """Inside, no device has a context.

    Autograd asks CUDA's hooks for it, which is an error without a driver. The hooks get
    a copy of their table of virtual functions in which hasPrimaryContext() is
    isAvailable().
    """
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = get_hooks()

    # Two words stand before the table. In it, two destructors come first.
    table = ctypes.c_void_p.from_address(hooks).value
    entries = []
    for position in range(-2, 98):
        entries.append(ctypes.c_void_p.from_address(table + 8 * position).value)
    is_built = 4
    is_available = 5
    has_primary_context = 6

    ask = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    built = ask(entries[is_built])(hooks)
    if not built or ask(entries[is_available])(hooks):
        raise RuntimeError("this needs torch's CUDA build on a machine without a GPU")

    entries[has_primary_context] = entries[is_available]
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
    torch_generator = torch.Generator
    torch_save = torch.save

    def save(content, file):
        # A real GPU's tensors are saved as they are; these hold memory of the CPU.
        content = tree_map_only(Pretend, lambda t: t.detach().held.clone(), content)
        torch_save(content, file)

    supported_types = [torch.Tensor, torch.nn.Parameter, Pretend]
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
        "torch.Generator": lambda device="cpu": torch_generator(),
        "torch.save": save,
        "torch.utils._foreach_utils._foreach_supported_types": supported_types,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_driver())
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))

        # torch.tensor(…, device="cuda") is made on the CPU, then moved.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        # Else Module.to() would lose the class.
        overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        overwrite(True)
        stack.callback(overwrite, False)

        watch.graphs = stack.enter_context(fake_graphs())
        stack.enter_context(watch)
        yield watch


# ---- The scripts ---------------------------------------------------------------------
LABELLED_STEPS = {"PretrainingTrainer.train_step", "FineTuningTrainer.train_step"}
COUNTS = {"train": 60, "test": 20, "unlabelled": 45}


def write_data(folder):
    """Image folders of noise, and a fold of 40 images."""
    raw = write_raw(folder, COUNTS)
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw, folder / "data", split)
    fold = " ".join(str(index) for index in range(40))
    (folder / "data/fold_indices.txt").write_text(f"{fold}\n")


def label(owner, name):
    """Calls of owner.name are a phase of the watch, "<its class>.train_step" say."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def labelled(*args, **kwargs):
        phase_before = watch.phase
        watch.phase = f"{owner.__name__}.{name}"
        try:
            return function(*args, **kwargs)
        finally:
            watch.phase = phase_before

    return mock.patch.object(owner, name, labelled)


@contextlib.contextmanager
def scripts():
    """Yields (the Watch, call, folder).

    call(module, *flags) runs a script on the pretended device; its files are in folder.
    """
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_data(folder)
        thin = mock.patch.dict(models.TRUNKS, res18=ThinResNet)
        stack.enter_context(thin)
        stack.enter_context(label(PretrainingTrainer, "train_step"))
        stack.enter_context(label(train_stl_after_ssl.FineTuningTrainer, "train_step"))
        seen = stack.enter_context(pretend_cuda())

        # fmt: off
        common = [
            "--data-dir", folder / "data", "--weights-dir", folder / "weights",
            "--observations-dir", folder / "observations", "--image-size", 36,
            "--batch-size", 16, "--device", "cuda",
        ]
        # fmt: on

        def call(module, *flags):
            seen.phase = module.__name__
            flags = [str(flag) for flag in (*common, *flags)]
            with mock.patch("sys.argv", [f"{module.__name__}.py", *flags]):
                run_script(module.main)
            # Lets go of the experiment's name, as the end of a process does.
            gc.collect()

        yield seen, call, folder


def check():
    """Run the scripts with many of their flags. Returns what is wrong, a line each."""
    pretraining = pirl_stl_train_test
    fine_tuning = train_stl_after_ssl
    # fmt: off
    variants = [
        ["--loss", "nce", "--batch-negatives", "False", "--precision", "fp32",
         "--count-negatives", 20],
        ["--loss", "nce", "--positive", "pair", "--non-linear-head", "True",
         "--only-train", "True", "--images-on", "host", "--pretext", "rotation"],
        ["--zero-init", "False", "--beta", 0, "--colour-strength", 0,
         "--deterministic", "--precision", "fp16", "--pretext", "jigsaw-rotation"],
    ]
    # fmt: on
    with scripts() as (seen, call, folder):
        often = ["--knn-every", 1, "--checkpoint-minutes", 0]
        call(pretraining, "--epochs", 1, *often)
        call(pretraining, "--epochs", 2, "--knn-every", 1, "--resume", "True")
        for number, flags in enumerate(variants):
            name = ["--experiment-name", f"x{number}"]
            call(pretraining, "--epochs", 1, *name, *flags)
        torch.use_deterministic_algorithms(False)

        wrong = compare_places(call, folder)
        wrong += compare_captured(seen, call, folder)

        both_stages = ["--epochs", 1, "--full-fine-tune", "True"]
        extras = ["--folds", "True", "--neighbours", folder / "neighbours.png"]
        call(fine_tuning, *both_stages, *extras)
        pretrained = ["--experiment-name", "b", "--pirl-model-name", "e1_pirl_"]
        call(fine_tuning, *both_stages, *pretrained, "--precision", "fp16")

        # fmt: off
        flags = [
            "--model", folder / "weights/b.pt", "--images", folder / "data/test",
            "--out", folder / "features.npz", "--device", "cuda",
        ]
        # fmt: on
        extract_features.main([str(flag) for flag in flags])
        measured_steps()
    return waits(seen) + wrong


def measured_steps():
    """A step of the bare network and one of training, as gpu_report.py times them."""
    flags = "--image-size 36 --batch-size 16 --device cuda --precision bf16"
    trainer = throughput.make_trainer(throughput.parse_args(flags.split()), 32)
    throughput.bare_network(trainer)()
    throughput.training_step(trainer, 16)()


def compare_places(call, folder):
    """Train with the images on the device, then on the host of a small card.

    Returns a line if the results are not the same bits.
    """
    short = ["--epochs", 1, "--knn-every", 0, "--experiment-name"]
    call(pirl_stl_train_test, *short, "device", "--images-on", "device")
    small_card = {"return_value": (1_500_000_000, 2_000_000_000)}
    with mock.patch("torch.cuda.mem_get_info", **small_card):
        call(pirl_stl_train_test, *short, "host", "--images-on", "auto")

    on_device = parts_of(weights(folder, "device"))
    on_host = parts_of(weights(folder, "host"))
    if same(on_device, on_host):
        return []
    return ["images on the host give other weights than images on the device"]


def compare_captured(seen, call, folder):
    """Train with captured steps, stopped and resumed, then with eager ones.

    Returns a line if the results are not the same bits.
    """
    short = ["--knn-every", 0, "--tmax-for-cos-decay", 3, "--batch-size", 8]
    graph = ["--experiment-name", "graph", "--cuda-graph", "True"]
    call(pirl_stl_train_test, *short, *graph, "--epochs", 2)
    call(pirl_stl_train_test, *short, *graph, "--epochs", 3, "--resume", "True")
    replays = [graph.replays for graph in seen.graphs]
    call(pirl_stl_train_test, *short, "--epochs", 3, "--experiment-name", "eager")

    wrong = []
    if replays != [2 * 3 - 3]:
        wrong.append(f"the captured run has made {replays} replays")
    if not same(parts_of(weights(folder, "graph")), parts_of(weights(folder, "eager"))):
        wrong.append("captured steps give other weights than eager ones")
    return wrong


def waits(seen):
    """The waits within steps, a line each."""
    lines = []
    for phase, kind, _, place, text in sorted(seen.events):
        if phase in LABELLED_STEPS:
            lines.append(f"{phase}: {kind} at {place}: {text}")
    return lines


# ---- Planted defects -----------------------------------------------------------------
negatives = MemoryBank.negatives
clip_grad_norm = torch.nn.utils.clip_grad_norm_
load_batch = PretrainingTrainer.load_batch
log_softmax = torch.nn.functional.log_softmax


def compared_on_the_cpu(self, rows, index):
    return negatives(self, rows, index.cpu())


def read_back(parameters, max_norm):
    return clip_grad_norm(parameters, max_norm).item()


def looked_up_by_a_mask(logits, dim):
    log_h = log_softmax(logits, dim)
    return log_h[~log_h.isnan()].view(log_h.shape)


def from_pinned_memory_that_is_waited_for(self, index, *rest):
    images = self.images.index_select(0, index).pin_memory().to(self.device)
    return load_batch(self, index, *rest)._replace(images=images)


DEFECTS = [  # where the images are, owner, name, flaw
    ("device", MemoryBank, "negatives", compared_on_the_cpu),
    ("device", torch.nn.utils, "clip_grad_norm_", read_back),
    ("device", torch.nn.functional, "log_softmax", looked_up_by_a_mask),
    ("host", PretrainingTrainer, "load_batch", from_pinned_memory_that_is_waited_for),
]


def find_defect(place, owner, name, flaw):
    """What is seen of a defect: an error, or waits within steps."""
    planted = mock.patch.object(owner, name, flaw)
    try:
        with planted, scripts() as (seen, call, _):
            flags = ["--epochs", 1, "--knn-every", 0, "--images-on", place]
            call(pirl_stl_train_test, *flags)
            return waits(seen)
    except RuntimeError as error:
        return [str(error)]


def main():
    if sys.argv[1:] == ["check"]:
        lines = check()
        for line in lines:
            print(line)
        if not lines:
            no_mixture = "no operator met tensors of two devices"
            print(f"no step waits for the device, and {no_mixture}")
        sys.exit(bool(lines))

    all_found = True
    for planted in DEFECTS:
        lines = find_defect(*planted)
        flaw = planted[-1].__name__
        print(f"{flaw}: {lines[0] if lines else 'NOT FOUND'}")
        all_found = all_found and bool(lines)
    sys.exit(not all_found)


if __name__ == "__main__":
    main()
