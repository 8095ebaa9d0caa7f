"""What is in a file does not run, whatever it names and in whatever format; the known harmless things are read."""

import argparse
import collections
import datetime
import enum
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from helpers.sources import features, images, imaginary, old_tar, source, state
from torch._tensor import _rebuild_from_type_v2
from torch.serialization import SourceChangeWarning
from torch.storage import _load_from_bytes

from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from checkpoints.safe_load import read_file
from runtime.errors import UserError
from runtime.store import load_checkpoint, save_checkpoint

TENSORS = {"conv1.weight": torch.arange(27.0).reshape(1, 3, 3, 3), "steps": torch.tensor(3)}


class Calls:
    """Unpickled by pickle.load it calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def torch_file(extra, path, **options):
    torch.save({**TENSORS, "extra": extra}, path, **options)


FORMATS = {
    "zip": torch_file,
    "zip, protocol 4": functools.partial(torch_file, pickle_protocol=4),
    "legacy": functools.partial(torch_file, _use_new_zipfile_serialization=False),
    "tar": lambda extra, path: old_tar(TENSORS, path, extra=extra),
    "pickle": lambda extra, path: path.write_bytes(pickle.dumps({**TENSORS, "extra": extra})),
    "pickle, protocol 0": lambda extra, path: path.write_bytes(pickle.dumps({**TENSORS, "extra": extra}, 0)),
}


def planted(trap, folder):
    """Things that write the file ``trap`` when they are unpickled, and the name that must be told."""
    write = f"open({str(trap)!r}, 'w').close()"
    (folder / "hubconf.py").write_text(f"def plant():\n    {write}\n")
    np.save(folder / "evil.npy", np.array([Calls(exec, write)], dtype=object), allow_pickle=True)
    torch.save(Calls(exec, write), folder / "evil.pth")
    return {
        "os.system": (Calls(os.system, f"touch {trap}"), "system"),
        "eval": (Calls(eval, f"__import__('builtins').{write}"), "eval"),
        "exec": (Calls(exec, write), "exec"),
        "open": (Calls(open, str(trap), "w"), "open"),
        "Popen": (Calls(subprocess.Popen, ["touch", str(trap)]), "Popen"),
        "a partial that is called": (Calls(functools.partial(open, str(trap), "w")), "open"),
        "torch.hub.load": (Calls(functools.partial(torch.hub.load, str(folder), "plant", source="local")),
                           "torch.hub.load"),
        "torch.load": (Calls(functools.partial(torch.load, str(folder / "evil.pth"), weights_only=False)),
                       "torch.serialization.load"),
        "numpy.load": (Calls(np.load, str(folder / "evil.npy"), None, True), "load"),
        "within a tensor's subclass": (Calls(_rebuild_from_type_v2, eval, torch.Tensor, (
            f"(__import__('builtins').{write}, __import__('torch').ones(1))[1]",), {}), "eval"),
        "within a dictionary's keys": ({(Calls(exec, write), 1): 2}, "exec"),
    }


PLANTS = ("os.system", "eval", "exec", "open", "Popen", "a partial that is called", "torch.hub.load", "torch.load",
          "numpy.load", "within a tensor's subclass", "within a dictionary's keys")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_call_does_not_run_and_is_named(tmp_path, kind, plant):
    trap, path = tmp_path / "trap", tmp_path / "file.pth"
    extra, name = planted(trap, tmp_path)[plant]
    FORMATS[kind](extra, path)
    with pytest.raises(UserError) as caught:
        read_file(path)
    assert not trap.exists()
    text = str(caught.value)
    assert name in text.partition("Python objects, not only tensors (")[2].partition(")")[0]
    assert "add --trust-checkpoint" in text
    raw = read_file(path, trust=True)  # the trap works
    if plant == "Popen":
        raw["extra"].wait()
    assert trap.exists()
    assert torch.equal(raw["conv1.weight"], TENSORS["conv1.weight"])


def test_a_function_of_the_main_script_is_not_called(tmp_path):
    """VICReg's files name one, so it is known; this one would do harm."""
    trap = tmp_path / "trap"

    def plant():
        trap.touch()
    plant.__module__, plant.__qualname__ = "__main__", "plant"
    sys.modules["__main__"].plant = plant
    try:
        for kind, save in FORMATS.items():
            path = tmp_path / f"{kind}.pth"
            save(Calls(plant), path)
            assert torch.equal(read_file(path)["conv1.weight"], TENSORS["conv1.weight"])
            assert not trap.exists()
        read_file(path, trust=True)
        assert trap.exists()
    finally:
        del sys.modules["__main__"].plant


def test_a_file_within_a_file_is_read_safely_too(tmp_path):
    trap, inner = tmp_path / "trap", tmp_path / "inner.pth"
    torch.save(Calls(exec, f"open({str(trap)!r}, 'w')"), inner)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"a": Calls(_load_from_bytes, inner.read_bytes())}))
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        read_file(tmp_path / "file.pkl")
    assert not trap.exists()


# ---- pickles that call nothing and change what is there

def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def name(module, leaf):
    return f"c{module}\n{leaf}\n".encode()


def legacy(pickled):
    return b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + pickled + pickle.dumps([], 2)


def test_no_patch_is_written(tmp_path):
    """torch.load compares the source of old files' modules, and writes what differs to a file, if a class says so."""
    says = b"N" + pickle.dumps({"dump_patches": True, "__name__": str(tmp_path / "planted")}, 2)[2:-1] + b"\x86b"
    attack = (b"\x80\x02(" + text("module") + name("collections", "Counter") + says + text("file.py") + text("rm -rf")
              + b"tQ.")
    (tmp_path / "file.pth").write_bytes(legacy(attack))
    with pytest.raises(UserError):
        read_file(tmp_path / "file.pth")
    assert not list(tmp_path.glob("*.patch"))
    assert collections.Counter.__name__ == "Counter"
    try:
        with pytest.warns(SourceChangeWarning):
            torch.load(tmp_path / "file.pth", weights_only=False)
        assert list(tmp_path.glob("*.patch"))  # the attack works on pickle
    finally:
        collections.Counter.__name__ = "Counter"
        del collections.Counter.dump_patches


def test_an_old_module_whose_source_has_changed(tmp_path):
    attack = (b"\x80\x02(" + text("module") + name("torchvision.models.resnet", "ResNet") + text("file.py")
              + text("class ResNet: pass") + b"tQ)\x81.")
    (tmp_path / "file.pth").write_bytes(legacy(attack))
    with pytest.raises(UserError, match="whole pickled object of class torchvision.models.resnet.ResNet"):
        read_file(tmp_path / "file.pth")


@pytest.mark.parametrize("target", [("torch.nn.parameter", "Parameter"), ("torch", "Tensor"), ("torch.storage",
                                    "TypedStorage"), ("torch._utils", "_rebuild_tensor_v2"), ("builtins", "dict")])
def test_no_attribute_of_a_class_or_function_is_set(tmp_path, target):
    state = b"N" + pickle.dumps({"planted": 3, "__doc__": "x"}, 2)[2:-1] + b"\x86b"
    (tmp_path / "file.pkl").write_bytes(b"\x80\x02" + name(*target) + state + b".")
    with pytest.raises(UserError):
        read_file(tmp_path / "file.pkl")
    owner = getattr(sys.modules[target[0]], target[1])
    assert not hasattr(owner, "planted")
    assert owner.__doc__ != "x"


def test_attributes_of_dictionaries_and_tensors_have_no_say(tmp_path):
    class Shadowed:
        def __reduce__(self):
            first = torch.nn.Parameter(state()["conv1.weight"])
            first.to = first.detach = 3
            tensors = {**state(), "conv1.weight": first}
            return collections.OrderedDict, (), {"items": 3, "get": 3, "keys": 3}, None, iter(tensors.items())

    for content in (Shadowed(), {"state_dict": Shadowed(), "args": argparse.Namespace()}):
        torch.save(content, tmp_path / "file.pth")
        encoder, _ = load_frozen(tmp_path / "file.pth")
        with torch.no_grad():
            assert torch.equal(encoder.backbone(images()), features())


def test_nor_when_the_file_says_what_its_checksum_is(tmp_path):
    class Shadowed:
        def __reduce__(self):
            first = torch.nn.Parameter(torch.ones(3))
            first.detach = 3
            shadows = {"items": 3, "get": 3, "keys": 3}
            return collections.OrderedDict, (), shadows, None, iter({"checksum": "0" * 64, "w": first}.items())

    torch.save(Shadowed(), tmp_path / "file.pth")
    with pytest.raises(UserError, match="does not have the checksum that it was written with"):
        load_frozen(tmp_path / "file.pth")
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("dtype", [np.dtype([("a", "O")]), np.dtype("V8"), np.dtype("M8[s]")])
def test_arrays_that_say_how_memory_is_read_are_not_made(tmp_path, dtype):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"a": np.zeros(2, dtype)}))
    with pytest.raises(UserError):
        read_file(tmp_path / "file.pkl")


def test_a_tar_with_links_is_not_unpacked(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(pickle.dumps(0, 2) + pickle.dumps([], 2))
    with tarfile.open(tmp_path / "file.pth", "w:") as archive:
        for entry in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(entry)
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            archive.addfile(info)
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        read_file(tmp_path / "file.pth")


# ---- harmless things

class Colour(enum.Enum):
    RED = 1


def test_harmless_objects_are_read(tmp_path):
    with imaginary("omegaconf.dictconfig.DictConfig") as config, imaginary("mmengine.logging.HistoryBuffer") as history:
        buffer = history()
        buffer.values = np.ones((3, 2))
        extra = {"args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/x")), "space": types.SimpleNamespace(
            a=1), "config": config(), "history": {"loss": buffer}, "day": datetime.date(2020, 1, 2),
            "numbers": [np.float32(2), np.int64(3), np.bool_(True), np.float64("nan")], "array": np.arange(6).reshape(
            2, 3)[:, ::-1], "words": np.array(["a", "bc"]), "objects": np.array([1, "x"], dtype=object), "ordered":
            collections.OrderedDict(a=1), "counts": collections.Counter("aab"), "many": collections.defaultdict(
            list, a=[1]), "last": collections.deque([1, 2], 2), "set": {1, 2}, "bytes": b"x", "complex": 1j,
            "parameter": torch.nn.Parameter(torch.ones(2)), "half": torch.ones(2).half(), "size": torch.Size([1, 2]),
            "partial": functools.partial(argparse.Namespace, a=1), "slice": slice(1, 2), "range": None}
        for kind, save in FORMATS.items():
            save(extra, tmp_path / f"{kind}.pth")
    for kind in FORMATS:
        raw = read_file(tmp_path / f"{kind}.pth")
        assert torch.equal(raw["conv1.weight"], TENSORS["conv1.weight"]), kind
        read = raw["extra"]
        assert read["args"].lr == 0.1
        assert read["numbers"][:3] == [2, 3, True]
        for array in ("array", "words", "objects"):
            assert np.array_equal(read[array], extra[array]), kind
        for plain in ("ordered", "counts", "many", "last", "set", "bytes", "complex", "size", "slice"):
            assert read[plain] == extra[plain], (kind, plain)
        assert torch.equal(read["parameter"], torch.ones(2))
        assert np.array_equal(read["history"]["loss"].values, np.ones((3, 2)))
        assert type(read["config"]).__name__ == "DictConfig"


def test_an_unknown_class_is_named(tmp_path):
    with imaginary("acme.models.Config") as config:
        torch.save({**TENSORS, "cfg": config()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"\(acme.models.Config\) and was not opened") as caught:
        read_file(tmp_path / "file.pth")
    assert "--trust-checkpoint" in str(caught.value)
    with pytest.raises(UserError, match="needs a class that is not installed"):
        read_file(tmp_path / "file.pth", trust=True)


@pytest.mark.parametrize("inside", [False, True])
def test_a_whole_pickled_network(tmp_path, inside):
    torch.save({"model": source(), "epoch": 3} if inside else source(), tmp_path / "file.pth")
    with pytest.raises(UserError) as caught:
        load_frozen(tmp_path / "file.pth")
    assert "torchvision.models.resnet.ResNet" in str(caught.value)
    assert "save its state_dict()" in str(caught.value)
    assert "--trust-checkpoint" in str(caught.value)
    encoder, report = load_frozen(tmp_path / "file.pth", trust_checkpoint=True)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images()), features())
    assert report.matched == len(state())


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_said_in_one_sentence(tmp_path, kind):
    """Bytes changed at random, most of them in the pickle: an answer or a sentence, and nothing else."""
    FORMATS[kind](argparse.Namespace(lr=np.float64(0.1)), tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    random, refused = np.random.default_rng(3), 0
    for _ in range(60):
        content = bytearray(good)
        for place in random.integers(0, min(len(good), 1500), 3):
            content[place] = random.integers(0, 256)
        (tmp_path / "file.pth").write_bytes(content)
        try:
            read_checkpoint(tmp_path / "file.pth")
        except UserError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 5


def test_a_changed_weight_is_found_by_the_zips_checksum(tmp_path):
    path = tmp_path / "file.pth"
    torch_file({}, path)
    content = path.read_bytes()
    place = content.index(TENSORS["conv1.weight"].numpy().tobytes()) + 7
    path.write_bytes(content[:place] + b"\x41" + content[place + 1:])
    assert torch.load(path, weights_only=True)["conv1.weight"].flatten()[1] != 1  # PyTorch reads it
    for trust in (False, True):
        with pytest.raises(UserError, match=r"\d+ does not have the CRC-32.*copy it again"):
            read_file(path, trust=trust)


def test_a_network_of_this_project_that_was_changed_and_saved_again_is_refused(tmp_path):
    path = save_checkpoint({"state_dict": dict(TENSORS)}, tmp_path / "student.pth")
    assert torch.equal(read_file(path)["state_dict"]["conv1.weight"], TENSORS["conv1.weight"])
    content = torch.load(path, weights_only=True)
    content["state_dict"]["conv1.weight"][0, 0, 0, 0] = 5
    torch.save(content, path)
    with pytest.raises(UserError, match="does not have the checksum that it was written with; download or copy it"):
        read_file(path)
    torch.save({**TENSORS, "checksum": "of another kind"}, path)
    read_file(path)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_names_that_are_not_utf8(tmp_path, kind, trust):
    path = tmp_path / os.fsdecode(b"caf\xe9.pth")
    FORMATS[kind](1, path)
    found = read_file(path, trust=trust)
    assert torch.equal(torch.as_tensor(found["conv1.weight"]), TENSORS["conv1.weight"])
