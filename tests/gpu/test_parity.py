"""A GPU computes what the CPU computes: features, views, neighbours, clusters, and each loss's first steps."""

import copy

import numpy as np
import pytest
import torch
from helpers.methods import flags
from helpers.runs import metrics
from helpers.scripts import in_this_process, well

from data.augment import augmentation
from data.loader import build_loader
from data.samplers import RandomSampler
from data.sources import ArraySource
from losses import LOSSES
from models.backbones import build_backbone
from models.teachers import FrozenEncoder
from runtime.device import Process
from runtime.optim import Updater
from search.exact import search
from search.kmeans import kmeans

IMAGES = torch.randint(0, 256, (24, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def rows():
    """Features float32 [3000, 64] in 20 groups."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(20, 64, generator=generator)
    return centres.repeat_interleave(150, 0) + 0.5 * torch.randn(3000, 64, generator=generator)


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "vit_ti_16"])
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-3), ("fp16", 2e-2), ("bf16", 6e-2)])
def test_features_are_the_cpus(arch, amp, tolerance, device):
    """Of a folded, channels-last teacher; the largest difference as a share of the features' length."""
    if amp == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    encoder = FrozenEncoder(build_backbone(arch, image_size=64))
    expected = copy.deepcopy(encoder)(IMAGES)
    encoder.fold()
    encoder = encoder.to(device, memory_format=torch.channels_last)
    updater = Updater(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), device, amp)
    with updater.autocast():
        found = encoder.targets(IMAGES.to(device), ("features",))[0].float().cpu()
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < tolerance


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_cpus(cache, workers, device):
    """Through the workers' pinned memory, the copy on its own stream and the colour there; or made there of images that
    lie there. A float32 that rounds another way turns a pixel by one, and a few by more where hue is concerned."""
    y, x = np.mgrid[:48, :40]
    waves = [127 + 120 * np.sin(x / (4 + i % 5) + i) * np.cos(y / (5 + i % 3)) for i in range(24)]
    images = np.stack([np.stack([s, 255 - s, np.roll(s, i)], -1) for i, s in enumerate(waves)]).astype(np.uint8)
    batches = {}
    for where in (torch.device("cpu"), device):
        source, sampler = ArraySource(images, None, [], "waves"), RandomSampler(24, 6, seed=1)
        batches[where] = list(build_loader(source, [augmentation("moco_v2", 32)] * 2, sampler, workers, 1, where,
                                           cache=cache))
    for one, other in zip(batches[torch.device("cpu")], batches[device], strict=True):
        assert torch.equal(one.indices, other.indices)
        for a, b in zip(one.views, other.views, strict=True):
            assert b.device.type == device.type
            assert (a.float() - b.cpu().float()).abs().mean((1, 2, 3)).max() < 0.1


@pytest.mark.parametrize("products", ["float32", "tf32", "bf16"])
def test_neighbours_are_the_cpus(products, rows, device):
    """The same sets but for scores that lie a rounding error apart, whatever numbers made the products."""
    expected = torch.cat([block.near.indices for block in search(None, rows, 20)])
    blocks = list(search(None, rows.to(device), 20, far=True, products=products, device=device))
    found = torch.cat([block.near.indices for block in blocks])
    scores = torch.cat([block.near.values for block in blocks])
    exact = rows.double() @ rows.double().T
    assert (found.sort(1).values == expected.sort(1).values).all(1).float().mean() > 0.99
    torch.testing.assert_close(scores.double(), exact.gather(1, found), rtol=1e-5, atol=1e-4)


def test_clusters_are_the_cpus(rows, device):
    found = [kmeans(rows, 20, Process(0, 1, where), passes=20) for where in (torch.device("cpu"), device)]
    assert (found[0].labels.cpu() == found[1].labels.cpu()).float().mean() > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_steps_of_every_loss_are_the_cpus(name, method_files, device, tmp_path):  # noqa: F811
    """Four steps or more by train_distill.py itself, float32: the first loss to 0.2 %, those after updates to 5 %."""
    lines = {}
    for where in ("cpu", str(device)):
        folder = tmp_path / where.replace(":", "")
        more = ["--device", where, "--amp", "off", "--tf32", "off"]
        well(in_this_process("train_distill.py", *flags(method_files, name, folder, *more)))
        lines[where] = [line["loss"] for line in metrics(folder)]
    expected, found = lines["cpu"], lines[str(device)]
    assert len(expected) >= 4
    assert found[0] == pytest.approx(expected[0], rel=2e-3, abs=1e-4)
    assert found == pytest.approx(expected, rel=5e-2, abs=1e-3)
