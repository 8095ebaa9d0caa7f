"""A GPU where there is none: tensors on "cuda" have shapes and no numbers, and whatever makes the host wait is noted.

Under :class:`StandIn` tensors on the CPU are real, and those on cuda are torch's fake tensors. So a forward pass "on
cuda" runs on any machine, a tensor on the wrong device is an error, and each place is seen where the host waits for
the device: a number read, a shape that depends on numbers, a copy that is not asynchronous. Streams and events are
played: a tensor that is used on a stream which has not waited for the one that writes it, whose memory that stream
could lose to another tensor, or that the host reads before its copy has arrived, is an error.

What it cannot do: numbers, and the backward pass, which only finds out which parameters have a gradient.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.data.dataloader import _BaseDataLoaderIter

ROOT = Path(__file__).resolve().parents[2]
OURS = f"{ROOT}/"
TABLE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
MEANT = set(re.findall(r"^\| `([\w/]+\.py:\w+)` \|", TABLE, re.M))  # where the host is meant to wait, file:function
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor)
READS = {getattr(torch.Tensor, name) for name in ("numpy", "item", "__bool__", "__float__", "__int__")}
FREE_BYTES = 80 * 2**30


class Misuse(AssertionError):
    """What would be a race on a GPU."""


class Stream:
    """A queue of work, or the host. ``seen``: up to which moment of each other stream its work is certainly done."""

    def __init__(self, *_, **__):
        self.now, self.seen = 0, {}

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        for stream, moment in event.seen.items():
            self.seen[stream] = max(moment, self.seen.get(stream, 0))

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def knows(self, stream, moment):
        return stream is self or self.seen.get(stream, 0) >= moment


class Event:
    """A moment of a stream."""

    def __init__(self, *_, **__):
        self.seen = {}

    def record(self, stream=None):
        stream = stream or StandIn.on.stream
        self.seen = {**stream.seen, stream: stream.now}

    def wait(self, stream=None):
        (stream or StandIn.on.stream).wait_event(self)

    def synchronize(self):
        StandIn.on.wait("an event", self)


class StandIn(TorchDispatchMode):
    """``waits`` counts (file:function, what) of the host's waits; ``ops`` (operation, dtype of its first tensor)."""

    on = None  # the one that is entered

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.ops = Counter(), Counter()
        self.default, self.host = Stream(), Stream()
        self.stream = self.default
        self.written = {}  # storage -> (stream, moment) of the last operation that wrote it
        self.made = {}     # storage -> the streams that its memory is kept for
        self.pinned = {}   # storage -> a tensor, so that the number stays its own

    # ---- being there

    def __enter__(self):
        self.stack = ExitStack()
        for patch in _patches(self):
            self.stack.enter_context(patch)
        StandIn.on = self
        entered = super().__enter__()
        self.stack.enter_context(_HostReads(self))
        return entered

    def __exit__(self, *error):
        self.stack.close()
        StandIn.on = None
        return super().__exit__(*error)

    @contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream or self.stream
        yield
        self.stream = before

    @contextmanager
    def _on(self):
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    # ---- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func in (aten._pin_memory.default, aten.pin_memory.default):
            return self._pin(args[0])
        there = [x for x in tensors if isinstance(x, FakeTensor)]
        wanted = kwargs.get("device")
        if not there and (wanted is None or torch.device(wanted).type != "cuda"):
            for tensor in tensors:
                self.read(tensor)
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"):  # else .cpu() and its like hide their copy
            with self._on():
                return func.decompose(*args, **kwargs)
        self.ops[str(func), there[0].dtype if there else None] += 1
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags} and func not in INDEXING:
            self.wait(str(func))
            return self._answer(func, args)
        if func is aten._to_copy.default:
            return self._copied(args[0], kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, *kwargs.values())
        args = self._look_for_waits(func, args)
        return self._run(func, args, kwargs, there)

    def _run(self, func, args, kwargs, there):
        before = {_storage(x) for x in there}
        for tensor in there:
            self._use(tensor)
        if func.name().startswith(("aten::_fused_", "aten::_amp_")):  # kernels without a fake: they write in place
            strangers = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, torch.Tensor) and not x.is_cuda]
            assert not strangers, f"{func} has tensors on the host"
            found = args[0] if func._schema.returns else None
        else:
            with self.fake:
                found = func(*args, **kwargs)
        self.stream.now += 1
        written = [x for x, a in zip(args, func._schema.arguments, strict=False) if a.is_write]
        for tensor in _flat((found, written)):
            if isinstance(tensor, FakeTensor):
                if _storage(tensor) not in before:
                    self.made[_storage(tensor)] = {self.stream}
                    self.written[_storage(tensor)] = self.stream, self.stream.now
                elif func._schema.is_mutable:
                    self.written[_storage(tensor)] = self.stream, self.stream.now
        return found

    def _use(self, tensor):
        """Raises if the present stream may not use this tensor yet, or its memory may be given away."""
        stream, moment = self.written.get(_storage(tensor), (self.stream, 0))
        if not self.stream.knows(stream, moment):
            raise Misuse("a stream uses a tensor that another writes, without having waited for it")
        if self.stream not in self.made.get(_storage(tensor), {self.stream}):
            raise Misuse("a stream uses memory of another without record_stream")

    def _look_for_waits(self, func, args):
        """Operations that copy to the device, or count on it, behind the scenes; and what to go on with."""
        if func in INDEXING:
            indices = [x for x in args[1] if x is not None]
            single = func is not aten.index.Tensor and args[2].numel() == 1  # becomes masked_fill
            if any(not isinstance(x, FakeTensor) for x in indices):
                self.wait("indices on the host")
            elif any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not single:
                self.wait("indices by a mask")
                if func is aten.index.Tensor:
                    args = args[0], [y for x in args[1] for y in self._places_of(x)]
        if func is aten.where.self and any(not isinstance(x, FakeTensor) for x in args):
            self.wait("where() with a number on the host")
        return args

    def _places_of(self, index):
        return self._answer(aten.nonzero.default, [index]).unbind(1) if index is not None and (
            index.dtype == torch.bool) else [index]

    # ---- copies

    def _copied(self, source, kwargs):
        device, later = torch.device(kwargs.get("device") or source.device), kwargs.get("non_blocking", False)
        if device.type == source.device.type:
            return self._run(aten._to_copy.default, (source,), kwargs, [source])
        if device.type == "cuda":
            self._arrive(source, later)
            return self._run(aten._to_copy.default, (source,), kwargs, [])
        with self.fake:
            shape = aten._to_copy.default(source, **kwargs)
        target = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype).fill_(1)
        self._pinned(target)  # torch takes pinned memory where a copy to the host is asynchronous
        self._leave(source, target, later)
        return target

    def _copy(self, target, source, later=False):
        if target.device.type == source.device.type:
            return self._run(aten.copy_.default, (target, source), {}, [target, source])
        if target.device.type == "cuda":
            self._arrive(source, later)
            return self._run(aten.copy_.default, (target, source), {}, [target])
        self._leave(source, target, later)
        return target

    def _arrive(self, source, later):
        self.read(source)
        if not later or _storage(source) not in self.pinned:
            self.wait("a copy to the device " + ("from memory that is not pinned" if later else "that blocks"))

    def _leave(self, source, target, later):
        self._use(source)
        self.stream.now += 1
        if later and _storage(target) in self.pinned:
            self.written[_storage(target)] = self.stream, self.stream.now
        else:
            self.wait("a copy to the host")

    def _pin(self, tensor):
        self.read(tensor)
        return self._pinned(tensor.clone())

    def _pinned(self, tensor):
        self.pinned[_storage(tensor)] = tensor
        self.written.pop(_storage(tensor), None)
        return tensor

    # ---- the host

    def read(self, tensor):
        """Raises if a copy to this tensor on the host may still be under way."""
        on_host = not isinstance(tensor, FakeTensor) and _storage(tensor) in self.pinned
        if on_host and not self.host.knows(*self.written.get(_storage(tensor), (self.host, 0))):
            raise Misuse("the host reads a tensor before the copy to it has arrived")

    def wait(self, what, event=None):
        """The host waits for an event, or for all that the present stream has to do."""
        self.waits[_place(), what] += 1
        self.host.wait_event(event or self.stream.record_event())

    def _answer(self, func, args):
        """Something to go on with: a number is one, and of what is looked for there are up to three."""
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is aten.nonzero.default:
            with self.fake:
                found = torch.empty(min(3, args[0].numel()), args[0].ndim, dtype=torch.int64, device="cuda")
            self.made[_storage(found)], self.written[_storage(found)] = {self.stream}, (self.stream, self.stream.now)
            return found
        if func is aten.equal.default:
            return True
        raise NotImplementedError(f"no answer to {func}")


class _HostReads(TorchFunctionMode):
    """Reading a tensor on the host is no operation to a dispatch mode."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS and isinstance(args[0], torch.Tensor):
            self.device.read(args[0])
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])  # as torch does it, unseen
        return func(*args, **kwargs)


def _flat(values):
    """What is in tuples and lists; torch's own takes a tenth of the time of all operations."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _place():
    """Where in the project the work is asked for, as file:function."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        comprehension = frame.f_code.co_name.endswith(("comp>", "expr>"))  # a frame of its own until Python 3.12
        if name.startswith(OURS) and name != __file__ and "site-packages" not in name and not comprehension:
            return f"{name.removeprefix(OURS)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def _backward(tensor, gradient=None, **_):
    """Each parameter that ``tensor`` depends on gets a gradient without numbers."""
    assert tensor.numel() == 1 or gradient is not None
    assert tensor.grad_fn is not None
    waiting, met = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        waiting += [following for following, _ in node.next_functions]


def _backward_of_all(tensors, gradients=None, **_):
    for tensor, gradient in zip(tensors, gradients, strict=True):
        _backward(tensor, gradient)


def _with_pinning(begin):
    """A loader without workers pins its batches only where there is an accelerator."""
    def begin_and_pin(iterator, loader):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begin(iterator, loader)
        iterator._pin_memory = loader.pin_memory
    return begin_and_pin


def _patches(device):
    """What asks for a GPU by another way than a tensor."""
    cuda, state = torch.cuda, torch.zeros(16, dtype=torch.uint8)
    played = {"Stream": Stream, "Event": Event, "current_stream": lambda *_: device.stream,
              "default_stream": lambda *_: device.default, "stream": device.on_stream, "set_device": lambda *_: None,
              "device_count": lambda: 1, "mem_get_info": lambda *_: (FREE_BYTES, FREE_BYTES),
              "get_rng_state": lambda *_: state.clone(), "set_rng_state": lambda *_: None,
              "is_bf16_supported": lambda *_, **__: True, "get_device_name": lambda *_: "a stand-in"}
    yield from (mock.patch.object(cuda, name, value) for name, value in played.items())
    if not cuda.is_available():
        yield mock.patch.object(cuda, "_lazy_init", lambda: None)
    yield mock.patch.object(cuda.amp.common, "amp_definitely_not_available", lambda: False)
    tolist, save = torch.Tensor.tolist, torch.save
    yield mock.patch.object(torch.Tensor, "tolist", lambda x: device.read(x) or tolist(x))
    yield mock.patch.object(FakeTensor, "tolist", lambda x: tolist(x.cpu()))
    yield mock.patch.object(torch, "save", lambda state, *rest: save(
        tree_map(lambda x: x.cpu() if isinstance(x, FakeTensor) else x, state), *rest))
    yield mock.patch.object(torch.Tensor, "backward", _backward)
    yield mock.patch.object(torch.Tensor, "record_stream", lambda x, stream: device.made[_storage(x)].add(stream))
    yield mock.patch.object(_BaseDataLoaderIter, "__init__", _with_pinning(_BaseDataLoaderIter.__init__))
    yield mock.patch.object(torch.autograd, "backward", _backward_of_all)
    yield mock.patch.object(torch.autograd, "grad", lambda _, inputs, *__, **___: [*map(torch.empty_like, inputs)])
    yield mock.patch("torch.__future__.get_overwrite_module_params_on_conversion", lambda: True)  # else .to() fails
