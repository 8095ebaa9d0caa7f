"""Renaming is exact in both directions, for every tensor of a network."""

import pytest
import torchvision

from checkpoints.naming import SCHEMES, SIGNATURES, find_scheme, rename
from models.vit import build_vit

KEYS = {
    "timm ViT": lambda: build_vit("vit_ti_16", 32).state_dict(),
    "positional": lambda: trunk("resnet50"),
    "detectron2": lambda: torchvision.models.resnet50().state_dict(),
    "old DenseNet": lambda: torchvision.models.densenet121().state_dict(),
}


def trunk(arch):
    return {k: v for k, v in torchvision.models.get_model(arch).state_dict().items() if not k.startswith("fc.")}


def test_every_scheme_is_tried():
    assert set(KEYS) == set(SCHEMES) == set(SIGNATURES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_there_and_back(scheme):
    keys = list(KEYS[scheme]())
    assert find_scheme(keys) is None
    theirs = [rename(key, scheme, inverse=True) for key in keys]
    assert len(set(theirs)) == len(keys)
    assert find_scheme(theirs) == scheme
    assert [rename(key, scheme) for key in theirs] == keys
    changed = [key for key, other in zip(keys, theirs, strict=True) if key != other]
    assert len(changed) > len(keys) / 2
    assert not any(key in keys for key in theirs if key not in set(keys) - set(changed))


def test_names_that_no_rule_knows_stay():
    assert rename("something.else", "timm ViT") == "something.else"
    assert rename("conv1.weight", None) == "conv1.weight"


def test_anchored():
    assert rename("my.blocks.0.norm1.weight", "timm ViT") == "my.blocks.0.norm1.weight"


def test_timms_names():
    timm = pytest.importorskip("timm", reason="timm's own names are the oracle; pip install timm")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=1000).state_dict()
    ours = build_vit("vit_ti_16", 32).state_dict()
    assert {rename(k, "timm ViT"): v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
