#!/usr/bin/env python
"""The theoretical cost of a training step: operations, bytes and host time per image, and each machine's bottleneck.

    python benchmarks/floor.py                                  # the paper's recipe on H100s: ResNet-50 -> ResNet-18
    python benchmarks/floor.py --peak 0.312 --bandwidth 2.0     # an A100
    python benchmarks/floor.py --host "my disk" 0.8             # a source of your own, ms an image on one core

Nothing is timed, all of it is arithmetic. Operations are counted by torch (a product with its sum is two). Bytes are
what memory sees if each convolution, linear layer, batch norm and pooling reads its input and writes its output in half
precision: once forward, twice more backward where it trains. The teacher's batch norms are folded, and element-wise
layers count as nothing, as if each were fused into what is before it. A GPU needs max(operations / peak, bytes /
bandwidth) an image, a host ms / cores, and the slower of both bounds the machine:

    images/s = min(GPUs / max(FLOP / peak, bytes / bandwidth), cores / host seconds, GPUs * link / (3 * size^2))
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import build_backbone
from models.heads import build_head

HALF = 2  # bytes
COUNTED = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
SOURCES = {"folder of JPEGs": 1.33, "pack, original bytes": 1.27, "pack, JPEG at short side 256": 0.55,
           "pack, raw at short side 256": 0.24}  # ms an image on one core, docs/results/SPEED.md, "The data path"
MACHINES = ((8, 1), (16, 1), (64, 4), (128, 8))  # cores, GPUs


def flop(network: nn.Module, size: int, trains: bool) -> float:
    """Of one image, with the gradient's where it ``trains``."""
    images = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trains):
        output = network(images)
        if trains:
            output.sum().backward()
    return float(counter.get_total_flops())


def activations(network: nn.Module, size: int, norms: bool) -> float:
    """Bytes of one image that COUNTED layers read and write in one forward pass; ``norms``: batch norms among them."""
    kinds = COUNTED if norms else tuple(kind for kind in COUNTED if kind is not nn.modules.batchnorm._BatchNorm)
    total = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        total += HALF * (inputs[0].numel() + output.numel())

    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return float(total)


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    """Count, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet50", help="default resnet50")
    parser.add_argument("--student", default="resnet18", help="default resnet18")
    parser.add_argument("--image-size", type=int, default=224, help="default 224")
    parser.add_argument("--batch", type=int, default=256, help="images of a GPU and step; default 256, the paper's")
    parser.add_argument("--images", type=float, default=400 * 1281167,
                        help="of a training; default 400 times ImageNet")
    parser.add_argument("--peak", type=float, default=989.4, help="TFLOP/s of a GPU, dense fp16 or bf16; "
                        "default 989.4, H100 SXM (NVIDIA's H100 data sheet: 1,979 with sparsity, which is twice that)")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s of its memory; default 3.35, H100 SXM's")
    parser.add_argument("--link", type=float, default=64.0, help="GB/s from the host to a GPU; default 64, PCIe 5 x16")
    parser.add_argument("--host", nargs=2, action="append", default=[], metavar=("NAME", "MS"),
                        help="a further source: ms an image on one core")
    args = parser.parse_args()
    with torch.device("meta"):
        teacher = build_backbone(args.teacher, image_size=args.image_size).eval()
        student = build_backbone(args.student, image_size=args.image_size)
        head = build_head("projection", student.spec.feature_dim, teacher.spec.feature_dim)
        student = nn.Sequential(student, head).eval()  # one image has no batch statistics; the operations are the same
    size = args.image_size
    rows = [("teacher, forward", flop(teacher, size, False), activations(teacher, size, norms=False),
             HALF * weights(teacher))]
    forward = flop(student, size, False), activations(student, size, norms=True)
    rows += [("student, forward", *forward, HALF * weights(student)),
             ("student, backward", flop(student, size, True) - forward[0], 2 * forward[1], 2 * HALF * weights(student)),
             ("optimizer", 0.0, 0.0, 20 * weights(student)),   # reads weight, momentum, gradient; writes the first two
             ("upload and colour, uint8", 0.0, 6.0 * size**2, 0)]
    print(f"{args.teacher} -> {args.student} at {size}, {args.batch} images a GPU and step; arithmetic, not measured\n")
    print("| of one image | GFLOP | MB of activations | MB of weights / batch |\n|---|---|---|---|")
    for name, operations, moved, held in rows:
        print(f"| {name} | {operations / 1e9:.2f} | {moved / 1e6:.1f} | {held / args.batch / 1e6:.2f} |")
    operations = sum(row[1] for row in rows)
    moved = sum(row[2] + row[3] / args.batch for row in rows)
    print(f"| **all** | **{operations / 1e9:.2f}** | **{moved / 1e6:.1f}**, weights included | |\n")
    compute, memory = operations / args.peak / 1e12, moved / args.bandwidth / 1e12
    print(f"A GPU: {1e6 * compute:.1f} us of operations at {args.peak:,.0f} TFLOP/s, {1e6 * memory:.1f} us of memory "
          f"at {args.bandwidth:.2f} TB/s: at most {1 / max(compute, memory):,.0f} images/s.\n")
    print("| source | ms, one core | cores for one GPU | " + " | ".join(
        f"{cores} cores, {gpus} GPU: images/s, bound by, hours" for cores, gpus in MACHINES) + " |")
    print("|---" * (3 + len(MACHINES)) + "|")
    for name, ms in {**SOURCES, **{name: float(ms) for name, ms in args.host}}.items():
        cells = []
        for cores, gpus in MACHINES:
            rates = {"operations": gpus / compute, "GPU memory": gpus / memory, "host": 1e3 * cores / ms,
                     "link": gpus * args.link * 1e9 / (3 * size**2)}
            bound = min(rates, key=rates.__getitem__)
            cells.append(f"{rates[bound]:,.0f}, {bound}, {args.images / rates[bound] / 3600:,.1f}")
        print(f"| {name} | {ms:g} | {ms / 1e3 / max(compute, memory):.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
