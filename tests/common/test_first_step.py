"""What is said before the first step: of memory, of small images and of long queues."""

import numpy as np
import pytest
import torch
from helpers.images import render_classes
from helpers.scripts import assert_refused, in_this_process
from torch import nn

from common.first_step import MeasuredStep, check_step, long_queue, small_images
from data.augment import augmentation
from data.sources import ArraySource
from losses.queue import Queue
from runtime import device, memory
from runtime.optim import Updater


def images_of(side):
    return ArraySource(np.zeros((5, side, side, 3), np.uint8), np.zeros(5, np.int64), ["a"], "five")


@pytest.mark.parametrize(("side", "size", "flags"), [
    (32, 224, "--image-size 32 --stem cifar"), (96, 224, "--image-size 96"), (33, 224, "--image-size 64 --stem cifar"),
    (160, 224, ""), (32, 32, ""), (16, 32, "--image-size 32 --stem cifar")])
def test_images_far_smaller_than_the_networks_see(side, size, flags):
    said, found = small_images(images_of(side), size)
    assert found == flags
    begins = f"the images of --data are about {side} pixels wide and high and are enlarged to {size}"
    assert said == (begins if flags else "")


def test_queues_longer_than_the_data():
    loss = nn.ModuleList([Queue(64, 2), Queue(4096, 2)])
    assert long_queue(loss, 4096, "--moco-k") == ""
    said = long_queue(loss, 4095, "--moco-k")
    assert said.startswith("--moco-k 4,096 is more than the 4,095 images of --data, so that")
    assert said.endswith("; --moco-k 1024 would not do so")
    assert long_queue(nn.Identity(), 1, "--moco-k") == ""


@pytest.mark.parametrize(("parts", "world"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_is_its_images_the_optimizer_and_the_loaders_batches(parts, world, monkeypatch):
    """Of 10 images, in ``parts``: a pass over a part; the gradients that earlier parts or other ranks leave; and two
    workers' batches, two each, beside the current one. Of a pass most is there behind the layer, or at its end."""
    said = {}
    monkeypatch.setattr("common.first_step.check_memory", lambda needed, *_: said.update(needed) or "tight")
    network = nn.Linear(3 * 8 * 8, 4)
    updater = Updater(torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), torch.device("cpu"))
    process = device.Process(0, world, torch.device("cpu"))
    step = MeasuredStep(lambda views: network(views[0].flatten(1).float()), [network], [augmentation("moco_v2", 8)] * 2,
                        10, parts)
    assert check_step(step, updater, 2, process, "lower it") == ["tight"]
    images, weights = 10 // parts, 4 * 772
    views, pixels, outputs = images * 2 * 192, images * 4 * 192, images * 4 * 4
    most = max(views + pixels + outputs, pixels + 2 * outputs + weights)
    assert said == {f"{images} images of 8 pixels and the gradients": most + weights * (parts > 1 or world > 1),
                    "the optimizer": weights, "the loader's batches": 5 * 10 * 2 * 192}


@pytest.mark.parametrize(("script", "words", "advice"), [
    ("train_teacher.py", ["--arch", "shufflenet_v2_x0_5", "-b", "8"],
     "give --image-size 32 --stem cifar, since the images"),
    ("train_distill.py", ["--loss", "moco", "--sampler", "random", "-a", "shufflenet_v2_x0_5", "-b", "8"],
     "split the batch with --micro-batch")])
def test_a_step_that_does_not_fit_is_refused_before_anything_is_written(script, words, advice, tmp_path, monkeypatch):
    render_classes(tmp_path / "images", 4)
    monkeypatch.setattr(memory, "free_memory", lambda _: 10_000_000)
    done = in_this_process(script, "--data", tmp_path / "images", "--output", tmp_path / "run", "--workers", "0",
                           "--device", "cpu", "--image-size", "64", *words)
    assert_refused(done, ["a step needs at least", "8 images of 64 pixels", "10.0 MB are free on this machine; ",
                          advice])
    assert not (tmp_path / "run").exists()
