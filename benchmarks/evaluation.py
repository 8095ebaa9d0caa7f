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


def main() -> None:
    """Measure, and multiply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="photographs, as train_distill.py takes them")
    parser.add_argument("--arch", nargs="+", default=["resnet18", "resnet50"], help="default resnet18 resnet50")
    parser.add_argument("--images", type=int, default=64, help="images a measurement; default 64")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a forward pass; default 32")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts; default 3")
    parser.add_argument("--cores", type=int, default=2, help="of the machine in the estimate; default 2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="of the network; default off")
    args = parser.parse_args()
    device, source = torch.device(args.device), open_source(args.data)
    on_cpu = device.type == "cpu"

    def clock() -> float:
        if not on_cpu:
            torch.cuda.synchronize()
        return time.process_time() if on_cpu else time.perf_counter()

    def a_pass(reading: float, computing: float) -> float:
        """Seconds an image of a pass."""
        return (reading + computing) / args.cores if on_cpu else max(reading / args.cores, computing)

    def seconds(work: Callable[[], object], each: int) -> float:
        """Seconds an image, of ``each`` images a call."""
        times = []
        for _ in range(args.repeats + 1):
            start = clock()
            work()
            times.append((clock() - start) / each)
        return statistics.median(times[1:])

    rows = [i % len(source) for i in range(args.images)]
    test = seconds(lambda: EvaluationDataset(source, linear_transform(224)).__getitems__(rows), args.images)
    views = ViewDataset(source, [Augmentation(LINEAR, 224)], 0, "fast")
    train = seconds(lambda: views.__getitems__([(i, n) for n, i in enumerate(rows)]), args.images)
    print(f"{device}, {torch.get_num_threads()} threads, amp {args.amp}; one core: test images {1e3 * test:.2f} ms "
          f"each, training views {1e3 * train:.2f} ms each")
    measured, paper = [], []
    for arch in args.arch:
        encoder = Encoder(build_backbone(arch)).to(device)
        model = Classifier(encoder, CLASSES).to(device)
        images = torch.randint(0, 256, (args.batch_size, 3, 224, 224), dtype=torch.uint8, device=device)
        labels = torch.randint(0, CLASSES, (args.batch_size,), device=device)
        cast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")

        def forward(encoder: Encoder = encoder, images: torch.Tensor = images, cast: torch.autocast = cast) -> None:
            with torch.no_grad(), cast:
                encoder(images)

        def backward(model: Classifier = model, images: torch.Tensor = images, labels: torch.Tensor = labels,
                     cast: torch.autocast = cast) -> None:
            with cast:
                classification_parts(model(images), labels)["loss"].backward()
            model.zero_grad()

        ahead, both = seconds(forward, args.batch_size), seconds(backward, args.batch_size)
        width = encoder.backbone.spec.feature_dim
        grid = heads_second(width, device, clock)
        measured.append({"arch": arch, "forward ms": 1e3 * ahead, "forward, backward ms": 1e3 * both,
                         "13 heads of 1000 classes, ms an image and iteration": 1e3 * grid})
        extract = (TRAIN + TEST) * a_pass(test, ahead)
        solve = TRAIN * ITERATIONS * a_pass(0, grid) * (0.9 + 1 / HEADS)  # nine tenths for the choice, all for the best
        paper += [
            {"arch": arch, "job": "features of one transform", "hours": extract / HOUR,
             "disk GB": (TRAIN + TEST) * width * 4 / 1e9, "memory GB": TRAIN * width * 4 / 1e9},
            {"arch": arch, "job": f"linear --cached, L-BFGS, {ITERATIONS} iterations", "hours": solve / HOUR,
             "disk GB": 0.0, "memory GB": 23 * HEADS * CLASSES * (width + 1) * 4 / 1e9},
            {"arch": arch, "job": f"linear, {EPOCHS} epochs", "hours": EPOCHS * TRAIN * a_pass(train, ahead) / HOUR,
             "disk GB": TEST * width * 4 / 1e9, "memory GB": None},
            *({"arch": arch, "job": f"finetune {name}, 20 epochs, a test after each",
               "hours": 20 * (share * TRAIN * a_pass(train, both) + TEST * a_pass(test, ahead)) / HOUR}
              for name, share in (("1 %", 0.01), ("10 %", 0.1)))]
    print(table(measured), f"\nFor ImageNet, {args.cores} cores" + ("" if on_cpu else ", one GPU"), table(paper),
          sep="\n")


def heads_second(width: int, device: torch.device, clock: Callable[[], float]) -> float:
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
