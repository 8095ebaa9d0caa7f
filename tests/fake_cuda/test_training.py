"""Whole trainings by the real scripts on a stand-in for a GPU: within a step the host waits for nothing but the loss of
the step before, and elsewhere only where docs/ARCHITECTURE.md says it does."""

import math
import warnings
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from helpers.stand_in import MEANT, StandIn
from PIL import Image
from torch import nn

import train_distill
import train_teacher
from losses.coss import CoSS
from models.backbones import build_backbone
from models.moco_pretraining import MoCoEncoders
from runtime import loop
from runtime.device import start_process
from runtime.run import Run

LATE = {("runtime/nonfinite.py:_read", "an event"): 1}  # the loss of the step before
COMMON = ["--device", "cuda", "--workers", "0", "--epochs", "1", "-p", "100"]
PAIRS = ["--sampler", "cf", "--nearest-k", "1", "--total-k", "5", "-b", "6"]
RANDOM = ["--sampler", "random", "-b", "9"]
RUNS = {  # the branches of the step, in as few trainings as hold them all
    "fp16": ["--loss", "coss", "--amp", "fp16", "--clip-grad", "1", "--ema", "0.9", "--save-every", "2", "--sampler",
             "random", "-b", "6"],
    "bf16 in micro-batches, cached on the device": [
        "--loss", "disco+coss", "--amp", "bf16", "--micro-batch", "5", "--cache", "device", "--optimizer", "lars",
        "--lr", "0.1", "--head-init", "random", *RANDOM],  # the other start is before the steps, in float32
    "pairs, cached on the host": ["--loss", "bingo", "--amp", "off", "--cache", "host", "--optimizer", "adamw", "--lr",
                                  "0.001", "--head-init", "teacher", *PAIRS],
    "Pillow, the teacher by its batches": ["--loss", "seed+compress", "--amp", "off", "--data-path", "pil",
                                           "--teacher-bn", "train", *RANDOM],
}


class Tiny(nn.Sequential):
    """A convolution, batch norm and what a classifier ends with: each operation of a fake network takes a while."""

    def __init__(self, num_classes=1000, **_):
        super().__init__(OrderedDict(conv1=nn.Conv2d(3, 16, 7, 4), bn1=nn.BatchNorm2d(16), relu=nn.ReLU(inplace=True),
                                     pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, num_classes)))


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """``tiny`` among torchvision's networks."""
    def build(*, weights=None, **options):
        return Tiny(**options)

    build.__module__ = "torchvision.models.tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torchvision.models._api.BUILTIN_MODELS, "tiny", build)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Eighteen images, their neighbours in some order, and an untrained teacher with its own head."""
    folder, rng = tmp_path_factory.mktemp("fake"), np.random.default_rng(0)
    (folder / "images" / "all").mkdir(parents=True)
    for i in range(18):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / "all" / f"{i:02}.png")
    near = [rng.permutation([j for j in range(18) if j != i])[:5] for i in range(18)]
    np.save(folder / "closek_info.npy", np.stack(near).astype(np.int64))
    torch.manual_seed(0)
    teacher = MoCoEncoders(build_backbone("tiny", image_size=32), moco_dim=16)
    torch.save({**teacher.record(), "state_dict": teacher.encoder_state()}, folder / "teacher.pth")
    return folder


@pytest.fixture
def train(work, tmp_path, monkeypatch):
    """Runs a script's training of two or three steps; the stand-in, and what the host waited for before each step."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # put back afterwards

    def run(script, main, *flags):
        args = script.parse_args(["--data", str(work / "images"), "--output", str(tmp_path), *COMMON, *flags])
        seen, decide = [], Run.between_steps
        with StandIn() as gpu, monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # to copy a network
            patch.setattr(Run, "between_steps", lambda *rest: seen.append(Counter(gpu.waits)) or decide(*rest))
            with start_process(args.device) as process:
                main(args, process)
        return gpu, [after - before for before, after in zip(seen, seen[1:], strict=False)]

    def distil(*flags):
        return run(train_distill, train_distill.distil, "--distill", str(work / "teacher.pth"), "-a", "tiny",
                   "--queue-size", "8", *(["--closek-info", str(work / "closek_info.npy")] if "cf" in flags else []),
                   *flags)

    distil.teacher = lambda *flags: run(train_teacher, train_teacher.pretrain, "-b", "6", "--image-size", "32", *flags)
    return distil


def outside(gpu):
    return {place for place, _ in gpu.waits} - MEANT


@pytest.mark.parametrize("name", RUNS)
def test_within_a_step_nothing_waits_but_for_the_loss_of_the_last(name, train):
    gpu, steps = train(*RUNS[name])
    assert steps
    assert all(waits == LATE for waits in steps), steps
    assert not outside(gpu)
    layers = {dtype for (op, dtype), _ in gpu.ops.items() if op == "aten.convolution.default"}
    assert layers == {{"fp16": torch.float16, "bf16": torch.bfloat16}.get(name[:4], torch.float32)}


def test_a_line_after_the_first_step_costs_one_wait(train, monkeypatch):
    monkeypatch.setattr(loop, "SILENCE", 60.0)
    _, steps = train("--loss", "coss", "--amp", "off", "--save-every", "2", "--sampler", "random", "-b", "6")
    assert [waits - Counter(LATE) for waits in steps] == [
        Counter({("runtime/log.py:so_far", "a copy to the host"): 1}), *[Counter()] * (len(steps) - 1)]


def test_the_teachers_training(train):
    gpu, steps = train.teacher("--arch", "tiny", "--moco-k", "8", "--bn-parts", "2")
    assert all(waits == LATE for waits in steps), steps
    assert not outside(gpu)


def test_leaving_steps_out_costs_two_waits_each(train):
    _, steps = train("--loss", "cosine", "--amp", "off", "--on-nonfinite", "skip", *RANDOM)
    assert all({place for place, _ in waits} == {"runtime/nonfinite.py:bad_step", "runtime/nonfinite.py:_read"}
               for waits in steps), steps
    assert all(waits.total() == 2 for waits in steps)


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """No line between the reports, which would wait for the means."""
    monkeypatch.setattr(loop, "SILENCE", math.inf)


def with_fault(monkeypatch, fault):
    forward = CoSS.forward

    def faulty(self, *, student, teacher):
        found = forward(self, student=student, teacher=teacher)
        return {**found, "loss": fault(found["loss"], student)}

    monkeypatch.setattr(CoSS, "forward", faulty)


@pytest.mark.parametrize("fault", [lambda loss, x: loss * max(1.0, loss.item()), lambda loss, x: x[x > 0].mean(),
                                   lambda loss, x: loss * torch.tensor(2.0, device=x.device)],
                         ids=["item", "mask", "new tensor"])
def test_a_loss_that_waits_is_found(fault, train, monkeypatch):
    with_fault(monkeypatch, fault)
    gpu, steps = train("--loss", "coss", *RANDOM)
    assert all(waits != LATE for waits in steps)
    assert outside(gpu) == {"tests/fake_cuda/test_training.py:<lambda>"}


def test_a_loss_that_leaves_a_tensor_on_the_host_is_found(train, monkeypatch):
    with_fault(monkeypatch, lambda loss, x: (x + torch.zeros(x.shape)).mean())
    with pytest.raises(RuntimeError, match="devices"):
        train("--loss", "coss", *RANDOM)
