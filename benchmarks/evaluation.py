#!/usr/bin/env python
"""Measures the parts of an evaluation on this machine, and estimates from them what ImageNet would take.

    python -m benchmarks.evaluation --data imagenet-sample --arch resnet18 resnet50
    python -m benchmarks.evaluation --data imagenet-sample --arch resnet18 resnet50 --device cuda --amp bf16

Measured: opening test images (resize 256, centre crop 224) and training views; the network's forward pass, and forward
with backward; an iteration of the 13 heads of `linear --cached` with 100 classes, a tenth of that of 1,000. On a CPU in
processor time, which other work on the machine changes little, so that a pass takes the sum of reading and computing,
shared among --cores; on a GPU the longer of reading, so shared, and the GPU's time. Nothing here was run on
ImageNet.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import torch

from data.augment import LINEAR, Augmentation, linear_transform
from data.datasets import open_source
from data.loader import EvaluationDataset, ViewDataset
from evals.classifier import Classifier, classification_parts
from evals.lbfgs import lbfgs_heads
from evals.results import table
from models.backbones import build_backbone
from models.teachers import Encoder
from runtime.errors import run_script

TRAIN, TEST, CLASSES, HEADS, ITERATIONS, EPOCHS = 1_281_167, 50_000, 1000, 13, 200, 100
HOUR = 3600


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photographs, as train_distill.py takes them")
    parser.add_argument("--arch", nargs="+", default=["resnet18", "resnet50"], help="default resnet18 resnet50")
    parser.add_argument("--images", type=int, default=64, help="images a measurement; default 64")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a forward pass; default 32")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts; default 3")
    parser.add_argument("--cores", type=int, default=2, help="of the machine in the estimate; default 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="of the network; default off")
    return parser.parse_args()


@dataclass(frozen=True)
class Clock:
    """Processor time on a CPU, the wall's on a GPU; ``repeats`` measurements, of which the median counts."""

    device: torch.device
    repeats: int

    def __call__(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object], each: int) -> float:
        """Seconds an image, of ``each`` images a call."""
        times = []
        for _ in range(self.repeats + 1):
            start = self()
            work()
            times.append((self() - start) / each)
        return statistics.median(times[1:])


def main() -> None:
    """Measure, and multiply."""
    args = parse_args()
    device, source = torch.device(args.device), open_source(args.data)
    on_cpu, clock = device.type == "cpu", Clock(device, args.repeats)
    rows = [i % len(source) for i in range(args.images)]
    test = clock.seconds(lambda: EvaluationDataset(source, linear_transform(224)).__getitems__(rows), args.images)
    views = ViewDataset(source, [Augmentation(LINEAR, 224)], 0, "fast")
    train = clock.seconds(lambda: views.__getitems__([(i, n) for n, i in enumerate(rows)]), args.images)
    print(f"{device}, {torch.get_num_threads()} threads, amp {args.amp}; one core: test images {1e3 * test:.2f} ms "
          f"each, training views {1e3 * train:.2f} ms each")
    measured, paper = [], []

    def a_pass(reading: float, computing: float) -> float:
        """Seconds an image of a pass."""
        return (reading + computing) / args.cores if on_cpu else max(reading / args.cores, computing)

    for arch in args.arch:
        width, ahead, both = network_seconds(arch, args.batch_size, args.amp, clock)
        grid = heads_second(width, device, clock)
        measured.append({"arch": arch, "forward ms": 1e3 * ahead, "forward, backward ms": 1e3 * both,
                         "13 heads of 1000 classes, ms an image and iteration": 1e3 * grid})
        paper += estimates(arch, width, test, train, ahead, both, grid, a_pass)
    print(table(measured), f"\nFor ImageNet, {args.cores} cores" + ("" if on_cpu else ", one GPU"), table(paper),
          sep="\n")


def network_seconds(arch: str, batch: int, amp: str, clock: Clock) -> tuple[int, float, float]:
    """Width of the features; seconds an image of a forward pass, and of one with its backward pass."""
    encoder = Encoder(build_backbone(arch)).to(clock.device)
    model = Classifier(encoder, CLASSES).to(clock.device)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=clock.device)
    labels = torch.randint(0, CLASSES, (batch,), device=clock.device)
    cast = torch.autocast(clock.device.type, torch.bfloat16, enabled=amp == "bf16")

    def forward() -> None:
        with torch.no_grad(), cast:
            encoder(images)

    def backward() -> None:
        with cast:
            classification_parts(model(images), labels)["loss"].backward()
        model.zero_grad()

    return encoder.backbone.spec.feature_dim, clock.seconds(forward, batch), clock.seconds(backward, batch)


def estimates(arch: str, width: int, test: float, train: float, ahead: float, both: float, grid: float,
              a_pass: Callable[[float, float], float]) -> list[dict]:
    """Rows of the table for ImageNet, from the seconds an image of each part."""
    extract = (TRAIN + TEST) * a_pass(test, ahead)
    solve = TRAIN * ITERATIONS * a_pass(0, grid) * (0.9 + 1 / HEADS)  # nine tenths for the choice, all for the best
    return [
        {"arch": arch, "job": "features of one transform", "hours": extract / HOUR,
         "disk GB": (TRAIN + TEST) * width * 4 / 1e9, "memory GB": TRAIN * width * 4 / 1e9},
        {"arch": arch, "job": f"linear --cached, L-BFGS, {ITERATIONS} iterations", "hours": solve / HOUR,
         "disk GB": 0.0, "memory GB": 23 * HEADS * CLASSES * (width + 1) * 4 / 1e9},
        {"arch": arch, "job": f"linear, {EPOCHS} epochs", "hours": EPOCHS * TRAIN * a_pass(train, ahead) / HOUR,
         "disk GB": TEST * width * 4 / 1e9, "memory GB": None},
        *({"arch": arch, "job": f"finetune {name}, 20 epochs, a test after each",
           "hours": 20 * (share * TRAIN * a_pass(train, both) + TEST * a_pass(test, ahead)) / HOUR}
          for name, share in (("1 %", 0.01), ("10 %", 0.1)))]


def heads_second(width: int, device: torch.device, clock: Clock) -> float:
    """Seconds of one iteration of all heads an image: loss and gradient by one product each."""
    count = 1024 if device.type == "cpu" else 65_536
    classes = CLASSES // 10  # so that the heads' own vectors, of which ImageNet has none to an image, weigh little
    features, labels = torch.randn(count, width), torch.arange(count) % classes
    times = []
    for iterations in (1, 3):  # the difference is two iterations, without what each call does once
        start = clock()
        lbfgs_heads(features, labels, classes, [10.0 ** -x for x in range(HEADS)], iterations=iterations, device=device)
        times.append(clock() - start)
    return 10 * max(times[1] - times[0], 1e-9) / 2 / count


if __name__ == "__main__":
    run_script(main)
