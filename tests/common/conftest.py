"""A tiny labelled tree and a checkpoint, for the sub-commands."""

import numpy as np
import pytest
import torch
from test_end_to_end import render

from models.backbones import build_backbone

ARCH = "shufflenet_v2_x0_5"


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for kind, name in enumerate(("across", "down", "fall", "rise")):
            for i in range(count):
                render(root / split / name / f"{split}{i:02d}.jpg", kind, rng)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint of train_distill.py's layout, with batch norms whose statistics differ from fresh ones."""
    torch.manual_seed(0)
    backbone = build_backbone(ARCH, "cifar", 32).train()
    with torch.no_grad():
        backbone(torch.randn(8, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "student.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()},
                **backbone.spec.record()}, path)
    return path
