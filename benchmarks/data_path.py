#!/usr/bin/env python
"""Augmented views per second: a reference pipeline compared with the fast data path, on any images.

    python benchmarks/data_path.py --data DIR                 # one thread, stage by stage
    python benchmarks/data_path.py --data DIR -j 2            # also through loaders with two workers
    python benchmarks/data_path.py --data DIR train.pack      # several sources, compared with the folder's reference
    python benchmarks/data_path.py --device                   # colour and whole views on a GPU, if there is one

The reference is a folder opened with Pillow and torchvision's transforms in the original's order (crop, jitter, grey,
blur, flip, tensor, normalise), float32 out. Ours gives uint8; `host` is what workers do where a device applies colour,
`host + colour` without one. Measured alternately, medians; the ratio is the reference's time over ours. One-thread
figures are processor time, which other programs on the machine disturb less; those with workers are wall time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.augment import PRESETS, augmentation, view_keys
from data.colour import apply_colour, colour_batch
from data.datasets import open_source
from data.loader import build_loader
from data.resident import decode_all
from data.samplers import RandomSampler
from data.sources import ImageSource
from data.views import batched_crop, fast_crop
from runtime.errors import UserError, run_script

SIZE, BATCH = 224, 32


# ---- the reference


class Blur:
    """Pillow's blur with a uniform radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def reference_steps(name: str, size: int) -> dict[str, Callable]:
    """Stage -> transform, in order."""
    preset = PRESETS[name]
    jitter = transforms.RandomApply([transforms.ColorJitter(*preset.jitter)], p=preset.jitter_probability)
    colour = [("jitter", jitter), ("grey", transforms.RandomGrayscale(0.2))]
    steps = [("crop + resize", transforms.RandomResizedCrop(size, scale=preset.crop_scale)),
             *(reversed(colour) if preset.grayscale_first else colour)]
    if preset.blur_probability:
        steps.append(("blur", transforms.RandomApply([Blur()], p=preset.blur_probability)))
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return dict([*steps, ("flip", transforms.RandomHorizontalFlip()), ("tensor", transforms.ToTensor()),
                 ("normalise", normalise)])


def pil_loader(path: str) -> Image.Image:
    """torchvision's ImageFolder's."""
    with open(path, "rb") as file:  # noqa: PTH123
        return Image.open(file).convert("RGB")


class Reference(Dataset):
    """torchvision's ImageFolder without labels."""

    def __init__(self, paths: Sequence[str], name: str, size: int):
        self.paths, self.transform = paths, transforms.Compose(list(reference_steps(name, size).values()))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(pil_loader(self.paths[i]))


# ---- stage by stage, one image after the other


class Stages(dict):
    """Milliseconds of processor time by stage."""

    def measure(self, label: str, work: Callable, *arguments: object) -> object:
        """What work gives, its time added to the stage's."""
        start = time.process_time()
        result = work(*arguments)
        self[label] = self.get(label, 0.0) + 1e3 * (time.process_time() - start)
        return result

    def per_image(self, count: int) -> dict[str, float]:
        """The means."""
        return {label: total / count for label, total in self.items()}


def reference_stages(paths: list[str], name: str, size: int) -> dict[str, float]:
    """Milliseconds an image of each stage."""
    stages = Stages()
    for item in paths:
        for stage, step in {"decode": pil_loader, **reference_steps(name, size)}.items():
            item = stages.measure(stage, step, item)
    return stages.per_image(len(paths))


def our_stages(source: ImageSource, name: str, size: int, seed: int) -> dict[str, float]:
    """The same of the fast path on the host."""
    drawing, stages = augmentation(name, size), Stages()
    drawn = stages.measure("draw", lambda: drawing.draw(view_keys(seed, np.arange(len(source)), 0)))
    views = torch.zeros(len(source), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as a device gets them

    for i in range(len(source)):
        image, boxes = stages.measure("decode", source.crops, i, lambda *size, row=i: drawn.boxes(*size, [row]))
        stages.measure("crop + resize", fast_crop, image, boxes[0], drawn.flip[i], views[i])
    colour = torch.from_numpy(drawn.colour)
    stages.measure("colour", lambda: apply_colour(views.contiguous(), colour))  # as in a batch: after the crops
    return stages.per_image(len(source))


# ---- whole pipelines


def with_workers(loader: DataLoader) -> float:
    """Milliseconds an image, by the wall, of a pass after the workers have started."""
    for _ in loader:  # starts the workers, which live on
        pass
    images, start = 0, time.perf_counter()
    for _ in range(2):
        for batch in loader:
            images += len(batch) if isinstance(batch, torch.Tensor) else len(batch.indices)
    return 1e3 * (time.perf_counter() - start) / images


def our_loader(source: ImageSource, name: str, size: int, workers: int, colour: bool) -> DataLoader:
    """The training loader's workers, with colour left to a device or not."""
    sampler = RandomSampler(len(source), BATCH)
    loader = build_loader(source, [augmentation(name, size)], sampler, workers, 0, "cpu").loader
    loader.dataset.colour_later = not colour
    return loader


def show(label: str, ours: float, reference: float) -> None:
    print(f"  {label:<34} {ours:8.3f} ms {1e3 / ours:9.0f} images/s   {reference / ours:5.2f} x", flush=True)


def pace(work: Callable[[int], object], device: torch.device, rounds: int, images: int) -> float:
    """Milliseconds an image, by the wall, of work(step), which does so many; after one turn that is not counted."""
    times = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        for step in range(10):
            work(10 * turn + step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / (10 * images))
    return statistics.median(times[1:])


def resident(images: torch.Tensor, name: str, size: int, device: torch.device, rounds: int, batch: int,
             compiled: bool | None = None) -> float:
    """Milliseconds a view of crops and colour of uint8 [N, 3, H, W] on the device; compiled None: as in training."""
    drawing = augmentation(name, size)

    def work(step: int) -> None:
        rows = torch.randint(len(images), (batch,)).to(device)
        drawn = drawing.draw(view_keys(step, np.arange(batch), 0))
        view = batched_crop(images[rows], drawn.boxes(*images.shape[-2:]), drawn.flip, size)
        colour = torch.from_numpy(drawn.colour)
        apply_colour(view, colour) if compiled is None else colour_batch(view, colour, compiled)

    return pace(work, device, rounds, batch)


def device_work(name: str, device: torch.device, rounds: int, compilers: Sequence[bool]) -> dict[str, float]:
    """Of made-up pixels: colour at 224, and whole views of small images that lie on the device; eager and compiled.
    Gives images/s."""
    batch, many = (256, 4096) if device.type == "cuda" else (16, 256)
    print(f"on the device ({torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}), wall time")
    large = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    kept = 50_000 if device.type == "cuda" else 2_000
    small = torch.randint(0, 256, (kept, 3, 32, 32), dtype=torch.uint8, device=device)

    def colour(compiled: bool) -> Callable[[int], object]:
        drawing = augmentation(name, SIZE)
        return lambda step: colour_batch(
            large, torch.from_numpy(drawing.draw(view_keys(step, np.arange(batch), 0)).colour), compiled)

    found = {}
    for compiled in compilers:
        how = "compiled" if compiled else "eager"
        try:
            alone = pace(colour(compiled), device, rounds, batch)
            views = resident(small, name, 32, device, rounds, many, compiled)
        except Exception as error:  # torch.compile raises what its compilers raise
            print(f"  {how} was not possible: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        rates = {f"colour at {SIZE}, batch {batch}, {how}": 1e3 / alone,
                 f"--cache device, 32 x 32, batch {many}, {how}": 1e3 / views}
        for label, rate in rates.items():
            print(f"  {label:<46} {rate:9.0f} images/s", flush=True)
        found |= rates
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="image folder, then other sources of the same images")
    parser.add_argument("--aug", choices=sorted(PRESETS), default="moco_v2")
    parser.add_argument("--image-size", type=int, default=SIZE)
    parser.add_argument("--images", type=int, default=160, help="images used, spread evenly; default 160")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-j", "--workers", type=int, default=0, help="also through loaders with so many workers")
    parser.add_argument("--cache", action="store_true", help="also with all images on the device (images of one size)")
    parser.add_argument("--device", action="store_true",
                        help="what a device does, eager and compiled: colour, and all of 32 x 32 images on it")
    parser.add_argument("--eager", action="store_true", help="with --device: leave the compiled out")
    parser.add_argument("--json", metavar="FILE", help="with --device: its figures, in images/s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.device:
        rates = device_work(args.aug, device, args.rounds, [False] if args.eager else [False, True])
        if args.json:
            Path(args.json).write_text(json.dumps(rates, indent=1) + "\n")
    if args.data:
        from_files(args, device)
    elif not args.device:
        parser.error("give --data DIR, or --device")


def from_files(args: argparse.Namespace, device: torch.device) -> None:
    """Measure and print everything that takes images."""
    sources = {spec: open_source(spec) for spec in args.data}
    first = next(iter(sources.values()))
    if len(first) < BATCH or not Path(first.location(0)).is_file():
        raise UserError(f"--data {args.data[0]} is not a folder of {BATCH} or more image files, as the reference needs")
    for spec, source in sources.items():
        sources[spec] = source.take(np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(np.int64))
    first = next(iter(sources.values()))
    paths = [first.location(i) for i in range(len(first))]

    reference, ours = [], {spec: [] for spec in sources}
    for turn in range(args.rounds):
        reference.append(reference_stages(paths, args.aug, args.image_size))
        for spec, source in sources.items():
            ours[spec].append(our_stages(source, args.aug, args.image_size, turn))

    def median(rounds: list[dict[str, float]]) -> dict[str, float]:
        return {stage: statistics.median(times[stage] for times in rounds) for stage in rounds[0]}

    stages = median(reference)
    total = sum(stages.values())
    print(f"{len(first)} images of {args.data[0]}, {args.aug} at {args.image_size}; torch {torch.__version__}")
    print(f"one thread, {args.rounds} rounds, alternating\n  reference: "
          + "  ".join(f"{k} {v:.2f}" for k, v in stages.items()))
    show("reference", total, total)
    for spec in sources:
        stages = median(ours[spec])
        print(f"  {spec}: " + "  ".join(f"{k} {v:.3f}" for k, v in stages.items()))
        show("host", sum(stages.values()) - stages["colour"], total)
        show("host + colour", sum(stages.values()), total)

    if args.workers:
        options = {"batch_size": BATCH, "num_workers": args.workers, "persistent_workers": True}
        loaders = {"reference": DataLoader(Reference(paths, args.aug, args.image_size), **options)}
        for spec, source in sources.items():
            for label, colour in (("host", False), ("host + colour", True)):
                loaders[f"{spec}: {label}"] = our_loader(source, args.aug, args.image_size, args.workers, colour)
        rounds = [{label: with_workers(loader) for label, loader in loaders.items()} for _ in range(args.rounds)]
        times = median(rounds)
        print(f"{args.workers} workers, wall time")
        for label, value in times.items():
            show(label, value, times["reference"])

    if args.cache:
        print(f"images on the device ({device.type}), wall time")
        images, _ = decode_all(first, "device", device, 2)
        show("batched crop + colour", resident(images, args.aug, args.image_size, device, args.rounds, 512), total)


if __name__ == "__main__":
    run_script(main)
