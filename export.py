#!/usr/bin/env python
"""Export a checkpoint's network to another program's format, and check the result before writing it.

    python export.py --weights run/student.pth --to torchvision --output resnet18.pth
    python export.py --weights moco_v2.pth.tar --to detectron2 --output resnet50.pkl
    python export.py --weights run/student.pth --to onnx --output student.onnx --with-projector
    python export.py --weights run/student.pth --to onnx --output student.onnx --precision int8 --data photos

Takes any file that the other scripts read. The result is loaded again as the target program would and its features are
compared with the source's, on random and on real images; if they differ, nothing is written.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import trange

from checkpoints.by_name import folder_beside, look_at_weights
from checkpoints.conversion import TARGETS, Exported, check_output, check_target, export
from checkpoints.frozen import load_frozen
from checkpoints.targets import Network
from common import cli
from common.hub import check_push, push, write_card
from common.low_precision import FLOAT, LowPrecision, converted_summary
from data.augment import eval_transform
from data.datasets import check_there, open_source
from data.demo import CLASSES, render
from data.images import BadImage, limit_pixels
from models.backbones import ARCH_HELP, check_arch
from models.teachers import FrozenEncoder
from runtime.errors import UserError, run_script
from runtime.settings import add_settings

TARGET_HELP = (
    "torchvision: a state dict with torchvision's names; timm: one with timm's, for the networks that timm has "
    "too (ViTs, ResNets, DenseNets, ConvNeXts, EfficientNets, MobileNets, MnasNets, RegNets, VGGs, Swins); "
    "safetensors: torchvision's names, with a description of the network; onnx: the graph, "
    "normalised images [batch, 3, S, S] to features [batch, d]; detectron2: its pickle, for ResNets; "
    "moco: MoCo's layout, for linear-evaluation scripts like MoCo's; state_dict: under the network's own names, for "
    "networks of any library and of your own")

STEM_NOTES = {"cifar": "the 3x3 stem with stride 1 and no max-pool behind it",
              "cifar_pad2": "the 3x3 stem padded by 2, with stride 1 and no max-pool behind it"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    group = parser.add_argument_group("network")
    group.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of the network, a student's or a "
                       "teacher's")
    cli.check_by(group, "--weights", look_at_weights)
    group.add_argument("-a", "--arch", default=None, metavar="ARCH",
                       help=f"{ARCH_HELP}; default: found from the checkpoint")
    cli.check_by(group, "--arch", check_arch)
    group.add_argument("--image-size", "--image_size", type=cli.number(int, 8), default=None, metavar="S",
                       help="side of the images in pixels, fixed in ViTs and ONNX graphs; default: what the "
                            "checkpoint records or its tensors show, else 224 (32 with a cifar stem)")
    cli.add_network_flags(group)
    group = parser.add_argument_group("export")
    group.add_argument("--to", required=True, choices=TARGETS, help=TARGET_HELP)
    group.add_argument("--output", required=True, metavar="FILE",
                       help="file to write, in an existing folder; must end in .safetensors, .onnx or .pkl "
                            "(detectron2) for these formats")
    group.add_argument("--with-projector", action="store_true",
                       help="export the network's own head too (a student's projection head, a teacher's MLP): in a "
                            "second file, FILE.projector, for torchvision and safetensors, as a second output for "
                            "onnx, as fc for moco; default: only the trunk")
    add_settings(group, LowPrecision)
    group.add_argument("--push-to-hub", default=None, metavar="OWNER/NAME",
                       help="with --to safetensors: also upload it to the Hugging Face hub, where hf:OWNER/NAME reads "
                            "it, with a model card (FILE.md) from the run's config.json and evaluation/results.jsonl")
    group.add_argument("--force", action="store_true", help="replace FILE if it exists; default: refuse")
    group = parser.add_argument_group("check")
    group.add_argument("--data", default=None, metavar="DIR",
                       help="real images to compare features on, anything that train_distill.py takes; default: "
                            "built-in rendered images")
    cli.check_by(group, "--data", check_there)
    group.add_argument("--images", type=cli.number(int, 1, 4096), default=None, metavar="N",
                       help="use N of them, evenly spread; default 8, besides 4 of random noise, and 1000 with "
                            "--precision fp16 and int8")
    cli.add_opening_flags(group, workers=False)
    group.add_argument("--json", action="store_true", help="print only one JSON object")
    return parser.parse_args(argv)


def check_flags(args: cli.Arguments) -> None:
    """What can be said of the command line alone, before anything is read."""
    cli.check_files(args)
    cli.take(LowPrecision, args).check(args.to, args.data)
    check_target(args.to, args.with_projector)
    if args.push_to_hub:
        check_push(args.push_to_hub, args.to, Path(args.output), args.force)
    check_output(args.to, Path(args.output), args.force, args.with_projector, Path(args.weights))


def real_images(data: str | None, count: int, size: int) -> torch.Tensor:
    """Images of ``data``, evenly spread over it, or rendered ones: uint8 [count, 3, size, size], fewer if there are no
    more."""
    if data is None:
        pictures = (Image.fromarray(render(i % len(CLASSES), np.random.default_rng(i))) for i in range(count))
        return torch.stack([eval_transform(size)(picture) for picture in pictures])
    source = open_source(data)
    count = min(count, len(source))
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for place in trange(count, desc="images", leave=False, disable=None):
        i = place * len(source) // count
        try:
            images[place] = eval_transform(size)(source.open(i))
        except BadImage as error:
            raise UserError(f"--data {data}: {source.location(i)} is unreadable ({error}); remove it") from None
    return images


def images_for(encoder: FrozenEncoder, data: str | None, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Normalised images [b, 3, S, S] to compare features on, by kind; ``real``: uint8 ones."""
    size = encoder.backbone.spec.image_size
    noise = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"random": encoder.normalise(noise), "real" if data else "rendered": encoder.normalise(real)}


def summary(done: Exported, stem: str) -> str:
    """What was written, how it was checked, and the code that loads it."""
    images = " and ".join(f"{count} {what}" for what, count in done.images.items())
    beside = f", and the projector {done.projector}" if done.projector not in (None, done.path) else ""
    needs = f"; the network needs {STEM_NOTES[stem]}" if stem in STEM_NOTES and done.target != "onnx" else ""
    return "\n".join(filter(None, (
        f"{done.path}{beside}: {TARGETS[done.target].what}, loaded again and compared on {images} images: largest "
        f"difference {done.difference:.2g} of the largest feature (allowed {done.tolerance:g}); "
        f"{done.bytes / 1e6:.1f} MB, sha256 {done.sha256}{needs}",
        done.converted and converted_summary(done.converted, done.bytes),
        done.code, done.projector_code)))


def main() -> None:
    """Refuse early, read, write, check."""
    args = parse_args()
    limit_pixels(args.max_pixels)
    check_flags(args)
    encoder, report = load_frozen(args.weights, args.arch, args.stem, args.image_size, with_head=args.with_projector,
                                  **cli.checkpoint_options(args))
    for sentence in cli.unused(args):
        print(sentence, file=sys.stderr)
    if not args.json:
        print(report.short())
    lower = cli.take(LowPrecision, args)
    wanted = args.images or (8 if lower.precision == FLOAT else 1000)
    real = real_images(args.data, wanted, encoder.backbone.spec.image_size)
    convert = None if lower.precision == FLOAT else lower.converter(real, encoder.normalise, args.output)
    done = export(Network.of(encoder, report), args.to, Path(args.output), images_for(
        encoder, args.data, real if convert is None else real[:8]), convert)
    print(json.dumps({**done.record(), "source": report.record()}) if args.json else
          summary(done, encoder.backbone.spec.stem))
    if args.push_to_hub:
        card = write_card(Path(args.output), args.push_to_hub, encoder, report, folder_beside(args.weights))
        url = push(args.push_to_hub, Path(args.output), card)
        print(f"{url}: {args.output} and its card {card}", file=sys.stderr if args.json else sys.stdout)



if __name__ == "__main__":
    run_script(main)
