"""Networks that are not ours, and files of them as the public projects write them: oracles for the reader's tests."""

import contextlib
import functools
import io
import pickle
import struct
import sys
import tarfile
import types

import pytest
import torch
import torchvision
from torch import nn

from models import vit

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SWAV = ([0.485, 0.456, 0.406], [0.228, 0.224, 0.225])
UNIT = ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


@pytest.fixture(scope="module", autouse=True)
def _no_initialisation():
    """Trunks are filled from files, all of them: what they are made with does not matter, and takes most of the time.
    Import it into a test file to use it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "xavier_uniform_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield


@pytest.fixture
def smallest(monkeypatch):
    """An architecture of 2 layers, 64 wide, beside those that are known; its name."""
    options = vit.vit_options
    monkeypatch.setitem(vit.VITS, "vit_smallest_16", (16, 64, 2))
    monkeypatch.setattr(vit, "vit_options", lambda arch, size: {
        **options(arch, size), **({"num_layers": 2} if arch == "vit_smallest_16" else {})})
    return "vit_smallest_16"


def randomise(model, seed=1):
    """Weights, and statistics that no fresh network has, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:  # so that the images still matter behind many layers
                parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            else:
                parameter.data.uniform_(*((0.7, 1.3) if name == "weight" else (-0.2, 0.2)), generator=generator)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            module.num_batches_tracked.fill_(17)
    return model.eval()


@functools.cache
def source(arch="resnet18", seed=1, **options):
    """torchvision's own network. Another seed gives another network: what siblings in a file hold."""
    return randomise(torchvision.models.get_model(arch, num_classes=5, **options), seed)


def state(arch="resnet18", seed=1, head=False, **options):
    """Its tensors under torchvision's names, with or without the classifier."""
    tensors = source(arch, seed, **options).state_dict()
    return {k: v for k, v in tensors.items() if head or not k.startswith(("fc.", "classifier.", "head"))}


def images(size=48):
    """Floats [2, 3, size, size]."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def classifier_input(model, batch, head="fc"):
    """What goes into the classifier: the pooled features, without our code."""
    entered = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return entered[0].flatten(1)


@functools.cache
def features(arch="resnet18", seed=1, size=48, head="fc"):
    """Pooled features of :func:`images`, by the source network."""
    return classifier_input(source(arch, seed), images(size), head)


def under(prefix, tensors):
    """Every key with ``prefix`` before it."""
    return {prefix + key: value for key, value in tensors.items()}


def head(*layers):
    """A head's tensors as ``nn.Sequential`` names them: "0" a linear layer, "1b" batch norm, "7a" it without affine."""
    sequence = nn.ModuleDict()
    for layer in layers:
        number = layer.rstrip("ab")
        sequence[number] = nn.BatchNorm1d(6, affine="a" not in layer) if number != layer else nn.Linear(6, 6)
    return sequence.state_dict()


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(64, 3, 7, 7)}},  # a convolution that is no weight
             "param_groups": [{"lr": 0.03, "params": [0]}]}


def training(tensors, arch="resnet18", **more):
    """The dictionary of MoCo's training script, and of the many that began as copies of it."""
    return {"epoch": 200, "arch": arch, "state_dict": tensors, "optimizer": OPTIMIZER, **more}


@contextlib.contextmanager
def imaginary(name):
    """A class or function ``package.module.name`` that exists inside the block alone, for pickles that name it."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    paths = [".".join(parts[:n + 1]) for n in range(len(parts))]
    added = [path for path in paths if path not in sys.modules]
    for path in added:
        sys.modules[path] = types.ModuleType(path)
    made = type(leaf, (), {"__module__": module})
    setattr(sys.modules[module], leaf, made)
    try:
        yield made
    finally:
        delattr(sys.modules[module], leaf)
        for path in added:
            del sys.modules[path]


def old_tar(tensors, path, **more):
    """torch.save of 2016: a tar archive of three streams. Storages come first, each with its length; a tensor is a
    view of one; the object itself, with ``more`` in it, holds numbers in their places."""
    storages, views, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(tensors), storages, 2)
    pickle.dump(len(tensors), views, 2)
    kinds = {torch.float32: (torch.FloatStorage, torch.FloatTensor), torch.int64: (torch.LongStorage, torch.LongTensor)}
    for key, value in enumerate(tensors.values()):
        storage_kind, tensor_kind = kinds[value.dtype]
        pickle.dump((key, "cpu", storage_kind), storages, 2)
        storages.write(struct.pack("<q", value.numel()) + value.numpy().tobytes())
        pickle.dump((1000 + key, key, tensor_kind), views, 2)
        views.write(struct.pack(f"<ii{2 * value.ndim}qq", value.ndim, 0, *value.shape, *value.stride(), 0))
    pickle.dump([], storages, 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, found):
            return str(found.place) if isinstance(found, Place) else None

    class Place:
        def __init__(self, place):
            self.place = place

    Pickler(objects, 2).dump({**{name: Place(1000 + key) for key, name in enumerate(tensors)}, **more})
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("sys_info", pickle.dumps({"protocol_version": 1000}, 2)), ("pickle", objects.getvalue()),
                              ("tensors", views.getvalue()), ("storages", storages.getvalue())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
