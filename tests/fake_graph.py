"""CUDA graphs on a machine without a GPU.

A capture is imitated on any device: it records the operators with their tensors and
numbers, and what they change is undone. A replay runs the same operators on the same
tensors, without Python. So a number that should change, an input that is not copied, a
result that is overwritten, or a read by the host shows on a CPU.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Generator = torch.Generator  # fake_cuda.py puts a function in its place

# What brings the device's memory back to the host, to decide something there.
READS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_dim.default,
}
graphs = []  # those that were made in fake_graphs()
NOT_PERMITTED = "operation not permitted when stream is capturing"


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor):
    """A tensor's storage; fake_cuda.py's tensors hold it in another one."""
    return getattr(tensor, "held", tensor).untyped_storage()


class FakeGraph(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph; inside its `with` block it records."""

    def __init__(self):
        super().__init__()
        # Of each operator: itself, args, kwargs, {which result is new: tensor}.
        self.tape = []
        self.own = {}  # address -> storage that an operator of the tape has made
        self.before = {}  # address -> (storage, its content) of what others have made
        self.replays = 0
        graphs.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        self.refuse(func, given, kwargs)

        addresses = set()
        for tensor in given:
            storage = memory_of(tensor)
            address = storage.data_ptr()
            addresses.add(address)
            if address not in self.own and address not in self.before:
                self.before[address] = (storage, storage.clone())

        results = func(*args, **kwargs)
        new = {}
        for number, tensor in enumerate(tensors_in(results)):
            storage = memory_of(tensor)
            if storage.data_ptr() not in addresses:
                new[number] = tensor
                # Kept, so that no other tensor gets this address.
                self.own[storage.data_ptr()] = storage
        self.tape.append((func, args, kwargs, new))
        return results

    def refuse(self, func, given, kwargs):
        """What CUDA does not capture, and what it would keep as it is for ever."""
        # A tensor without dimensions may be a plain number, on the host.
        devices = {tensor.device.type for tensor in given if tensor.dim() > 0}
        if kwargs.get("device") is not None and given:
            devices.add(torch.device(kwargs["device"]).type)
        if func in READS:
            raise RuntimeError(f"{func}: {NOT_PERMITTED}: the host would wait")
        if isinstance(kwargs.get("generator"), Generator):
            raise RuntimeError(f"{func}: {NOT_PERMITTED}: a generator")
        if len(devices) > 1:
            raise RuntimeError(f"{func}: {NOT_PERMITTED}: tensors of two devices")

    def undo(self):
        """Nothing has run: what was there is as before, what is new has no content."""
        for storage, content in self.before.values():
            storage.copy_(content)
        for _, _, _, new in self.tape:
            for tensor in new.values():
                if tensor.is_floating_point():
                    with torch.no_grad():
                        getattr(tensor, "held", tensor).detach().fill_(torch.nan)

    def replay(self):
        self.replays += 1
        # Autograd has been recorded too: its operators are on the tape.
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, new in self.tape:
                results = tensors_in(func(*args, **kwargs))
                for number, tensor in new.items():
                    tensor.copy_(results[number])


class FakeStream:
    """A queue of the device's work; here it only has an identity."""

    current = None  # the one that work goes to

    def __init__(self):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


@contextlib.contextmanager
def on_stream(stream):
    before = FakeStream.current
    FakeStream.current = stream
    try:
        yield
    finally:
        FakeStream.current = before


@contextlib.contextmanager
def capture(graph, stream):
    """In the place of torch.cuda.graph()."""
    try:
        with on_stream(stream), graph:
            yield
    except Exception:
        # As torch does: the end of a failed capture fails itself.
        raise RuntimeError("capturing has failed in an unknown way") from None
    finally:
        graph.undo()


@contextlib.contextmanager
def fake_graphs():
    """Inside, torch.cuda captures and replays without a GPU. Yields the graphs made."""
    graphs.clear()
    FakeStream.current = FakeStream()
    names = {
        "Stream": FakeStream,
        "current_stream": lambda: FakeStream.current,
        "stream": on_stream,
        "CUDAGraph": FakeGraph,
        "graph": capture,
    }
    with mock.patch.multiple(torch.cuda, **names):
        yield graphs
