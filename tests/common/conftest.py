"""A tiny labelled tree and a checkpoint, for the sub-commands."""

import pytest
import torch
from helpers.experiment import tree  # noqa: F401

from models.backbones import build_backbone

ARCH = "shufflenet_small"


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
