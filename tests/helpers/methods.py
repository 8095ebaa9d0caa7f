"""A training line for every method and for some sums, and the files that it names."""

import numpy as np
import pytest
import torch

from helpers.images import render
from losses import needs_of
from models.backbones import build_backbone
from models.moco_pretraining import MoCoEncoders

SUMS = {"coss+seed": ["--loss-weights", "1,0.5"], "disco+coss+moco": [], "seed+compress": []}


@pytest.fixture(scope="module")
def method_files(tmp_path_factory):
    """Twelve images, their neighbours in some order, and an untrained teacher with batch norm and its own head."""
    folder, rng = tmp_path_factory.mktemp("methods"), np.random.default_rng(0)
    for kind in range(4):
        for i in range(3):
            render(folder / "images" / f"class{kind}" / f"{i}.jpg", kind, rng)
    near = [rng.permutation([j for j in range(12) if j != i])[:5] for i in range(12)]
    np.save(folder / "closek_info.npy", np.stack(near).astype(np.int64))
    torch.manual_seed(0)
    teacher = MoCoEncoders(build_backbone("shufflenet_small", "cifar", 32), moco_dim=16)
    torch.save({**teacher.record(), "state_dict": teacher.encoder_state()}, folder / "teacher.pth")
    return folder


def flags(files, names, output, *more):
    needs = needs_of(names)
    pairs = ["--sampler", "cf", "--closek-info", files / "closek_info.npy", "--nearest-k", 1, "--total-k", 5, "-b", 3]
    return ["--data", files / "images", "-a", "squeezenet_small", "--loss", names, "--output", files / output,
            *(["--distill", files / "teacher.pth"] if needs.teacher else ["--moco-dim", 16, "--image-size", 32]),
            *(pairs if needs.pairs else ["--sampler", "random", "-b", 6]), "--queue-size", 8, "--epochs",
            2, "-p", 1, "--device", "cpu", "--workers", 0, *SUMS.get(names, []), *more]
