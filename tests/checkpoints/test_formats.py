"""The containers that public files come in: PyTorch's of all ages, plain pickles, safetensors; and old names."""

import argparse
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from helpers.sources import (
    IMAGENET,
    OPTIMIZER,
    _no_initialisation,  # noqa: F401
    classifier_input,
    features,
    images,
    old_tar,
    randomise,
    source,
    state,
    training,
    under,
)
from torch import nn

from checkpoints.frozen import load_frozen
from checkpoints.identify import Identity
from checkpoints.reader import read_checkpoint
from models.backbones import build_backbone


def assert_is_the_source(path, arch="resnet18", **expected):
    encoder, report = load_frozen(path)
    assert (report.arch, report.ok) == (arch, True)
    assert {key: getattr(report, key) for key in expected} == expected
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images()), features(arch))
    return report


def test_tar_of_before_pytorch_0_1_10(tmp_path):
    old_tar(state(head=True), tmp_path / "resnet18-5c106cde.pth")
    assert_is_the_source(tmp_path / "resnet18-5c106cde.pth", dropped={"fc.": 2})


def test_format_of_before_pytorch_1_6(tmp_path):
    torch.save(state(head=True), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_is_the_source(tmp_path / "old.pth", dropped={"fc.": 2})


def test_format_of_before_pytorch_1_6_with_arguments(tmp_path):
    torch.save(training(state(), args=argparse.Namespace(lr=np.float64(0.1))), tmp_path / "old.pth",
               _use_new_zipfile_serialization=False)
    assert_is_the_source(tmp_path / "old.pth", epoch=200)


def test_tensors_in_a_plain_pickle(tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(training(state())))
    assert_is_the_source(tmp_path / "file.pkl", epoch=200)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="reads .safetensors; pip install safetensors")
    safetensors.save_file(state(head=True), tmp_path / "model.safetensors", {"format": "pt", "epoch": "3", "a": "[x-]"})
    assert_is_the_source(tmp_path / "model.safetensors", dropped={"fc.": 2}, epoch=3)
    (tmp_path / "no_suffix").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert_is_the_source(tmp_path / "no_suffix", dropped={"fc.": 2})


def detectron2_names(tensors):
    """As MoCo's conversion script names them (resnet: conv1, bn1, layerN.M.convK, .bnK, .downsample.0/1)."""
    names = {}
    for key, value in tensors.items():
        if "num_batches_tracked" in key:
            continue
        new = key if key.startswith("layer") else f"stem.{key}"
        for n in (1, 2, 3, 4):
            new = new.replace(f"layer{n}", f"res{n + 1}")
        for n in "123":
            new = new.replace(f"bn{n}.", f"conv{n}.norm.")
        names[new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return names


@pytest.mark.parametrize("protocol", [2, 5])
def test_detectron2(tmp_path, protocol):
    model = detectron2_names(state("resnet50", head=True))
    model["stem.conv1.weight"] = model["stem.conv1.weight"].astype(">f4")  # written on another machine
    (tmp_path / "r50.pkl").write_bytes(pickle.dumps({"model": model, "__author__": "MOCO", "matching_heuristics": True},
                                                    protocol))
    report = assert_is_the_source(tmp_path / "r50.pkl", "resnet50", layout="detectron2", dropped={"stem.fc.": 2},
                                  mean=IMAGENET[0], std=IMAGENET[1])
    assert report.matched == len([k for k in state("resnet50") if "num_batches" not in k])


def test_numpy_counters_keep_their_shape(tmp_path):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in state().items()}}))
    report = assert_is_the_source(tmp_path / "file.pkl")
    assert report.matched == len(state())  # num_batches_tracked is an array of no dimension


def old_densenet_names(tensors):
    for n in "12":
        tensors = {re.sub(rf"(denselayer\d+\.\w+?){n}\.", rf"\1.{n}.", k): v for k, v in tensors.items()}
    return tensors


def test_densenet_under_its_old_names(tmp_path):
    model = source("densenet121")
    tensors = old_densenet_names(model.state_dict())
    assert "features.denseblock1.denselayer1.norm.1.weight" in tensors
    torch.save(tensors, tmp_path / "densenet121-a639ec97.pth")
    encoder, report = load_frozen(tmp_path / "densenet121-a639ec97.pth")
    assert (report.arch, report.matched) == ("densenet121", len(tensors) - 2)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images()), classifier_input(model, images(), "classifier"))


@pytest.mark.parametrize(("arch", "auxiliary", "size"), [("googlenet", {"aux1.", "aux2."}, 64),
                                                         ("inception_v3", {"AuxLogits."}, 96)])
def test_auxiliary_classifiers_are_dropped(tmp_path, arch, auxiliary, size):
    model = randomise(torchvision.models.get_model(arch, init_weights=False, aux_logits=True, transform_input=True))
    torch.save(model.state_dict(), tmp_path / "file.pth")
    encoder, report = load_frozen(tmp_path / "file.pth", image_size=size if arch == "googlenet" else None)
    assert (report.arch, set(report.dropped)) == (arch, {"fc.", *auxiliary})
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    # torchvision's file is of a network that changes ImageNet's normalisation to its own inside
    expected = classifier_input(model, (pixels / 255 - mean) / std)
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [1, 2])
def test_cifar_stems(tmp_path, padding):
    """solo-learn pads the 3x3 convolution by two, MoCo's and SimCLR's CIFAR networks by one: no shape shows it."""
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    model.maxpool = model.fc = nn.Identity()
    randomise(model)
    tensors = under("backbone.", model.state_dict())
    if padding == 2:
        tensors |= {"classifier.weight": torch.ones(10, 512), "classifier.bias": torch.ones(10)}
    torch.save({"epoch": 9, "state_dict": tensors, "optimizer_states": [OPTIMIZER]}, tmp_path / "file.ckpt")
    encoder, report = load_frozen(tmp_path / "file.ckpt")
    assert (report.arch, report.stem, report.image_size) == ("resnet18", ["cifar", "cifar_pad2"][padding - 1], 32)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images(32)), model(images(32)))


def test_another_container_by_key(tmp_path):
    torch.save(training(state(seed=2), state_dict_ema=state(), args=argparse.Namespace()), tmp_path / "last.pth")
    encoder, report = load_frozen(tmp_path / "last.pth", checkpoint_key="state_dict_ema")
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images()), features())
    assert report.container == "state_dict_ema"


def test_arguments_name_the_architecture(tmp_path):
    torch.save({"teacher": under("backbone.", state()), "student": under("module.backbone.", state(seed=2)),
                "args": argparse.Namespace(arch="resnet18")}, tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth")
    assert checkpoint.meta == {"arch": "resnet18"}
    assert checkpoint.identify() == Identity("resnet18", "imagenet", 224)
    _, report = load_frozen(tmp_path / "file.pth", "resnet18")
    assert report.recorded_arch == "resnet18"


def test_tensors_that_are_no_plain_weights(tmp_path):
    """Sparse ones and ones without content do not fill a trunk, and do not fail elsewhere."""
    tensors = {**state(), "conv1.weight": state()["conv1.weight"].to_sparse()}
    torch.save(tensors, tmp_path / "file.pth")
    report, _ = read_checkpoint(tmp_path / "file.pth").match(build_backbone("resnet18"))
    assert report.missing == ["conv1.weight"]
    torch.save({k: v.to("meta") for k, v in state().items()}, tmp_path / "file.pth")
    with pytest.raises(Exception, match="holds no tensors"):
        read_checkpoint(tmp_path / "file.pth")
