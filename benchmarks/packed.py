"""Packed files compared with torchvision's ImageFolder with Pillow: reading, starting, and workers' memory.

    python -m benchmarks.packed --data DIR [--images 1281167] [--files 100000] [--scratch DIR]

Four parts. Reading: ms per image from file to RGB pixels in one thread, alternating, median of the rounds, with files
in the page cache. What changes: how much the views of smaller images differ from those of the originals. Starting:
`--files` empty files in 1,000 folders listed by ImageFolder and by us; a packed
file of `--images` records opened. Memory: by how much one forked worker's private pages grow while it touches
the entry of each of `--images` images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader

from data.datasets import open_source
from data.packed import PackedSource
from data.packing import pack
from data.packing_part import Encoded, Recipe, UnfinishedPack
from data.sources import ImageSource, Names


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what the call returned."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def reading(data: str, scratch: Path, rounds: int) -> None:
    """File to pixels: the reference, the folder, and the three kinds of packed file."""
    source = open_source(data)
    paths = [source.location(i) for i in range(len(source))]
    ways = {"reference: ImageFolder's pil_loader": lambda i: np.asarray(pil_loader(paths[i])),
            "folder, pixels()": source.pixels}
    sizes = {}
    for recipe in (Recipe(), Recipe("jpeg", 256, 90), Recipe("raw", 256)):
        path = scratch / f"{recipe.mode}.pack"
        seconds, done = timed(lambda r=recipe, p=path: pack(source, p, r, len(os.sched_getaffinity(0))))
        name = f"pack, {recipe.mode}" + (f" {recipe.short_side}" if recipe.short_side else "")
        sizes[name] = f"{done.size / len(source) / 1e3:6.1f} kB an image, {len(source) / seconds:.0f} packed a second"
        ways[f"{name}, pixels()"] = PackedSource(path).pixels
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, read in ways.items():
            times[name].append(timed(lambda r=read: [r(i) for i in range(len(source))])[0] / len(source))
    print(f"\nReading {source.description}, {rounds} alternating rounds after one warm-up round")
    reference = statistics.median(times["reference: ImageFolder's pil_loader"][1:])
    for name, values in times.items():
        middle = statistics.median(values[1:])
        print(f"  {name:<40} {1e3 * middle:7.3f} ms   {reference / middle:6.1f} x   {sizes.get(name[:-10], '')}")


def changes(data: str, scratch: Path) -> None:
    """What another view of 224 pixels is seen where the packed images are smaller: the same random crops of both."""
    source, scale = open_source(data), (0.2, 1.0)
    print("\nWhat changes: random crops (scale 0.2 to 1) at 224 pixels, of the packed image and of the original")
    for mode in ("jpeg", "raw"):
        packed, rng, off, enlarged = PackedSource(scratch / f"{mode}.pack"), np.random.default_rng(0), [], []
        for i in range(len(source)):
            whole, small = source.open(i), packed.open(i)
            area, shape = rng.uniform(*scale), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            size = np.sqrt(area * np.prod(whole.size) * np.array([shape, 1 / shape])).clip(max=whole.size)
            start = rng.uniform(0, 1, 2) * (whole.size - size)
            box = np.concatenate([start, start + size])
            boxes = box, box * np.tile(np.array(small.size) / whole.size, 2)
            views = [np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR, tuple(place)), dtype=np.float64)
                     for image, place in zip((whole, small), boxes, strict=True)]
            off.append(np.abs(views[0] - views[1]).mean())
            enlarged.append([place[2] - place[0] < 224 for place in boxes])
        share = 100 * np.mean(enlarged, axis=0)
        print(f"  {mode} {packed.short_side}: mean difference {np.mean(off):.2f}/255; crops narrower than 224 pixels: "
              f"{share[0]:.0f} % of the originals', {share[1]:.0f} % of the packed ones'")


def synthetic_pack(path: Path, count: int) -> PackedSource:
    """A packed file of ImageNet's names and labels with one byte an image."""
    names = Names(f"n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300}.JPEG" for i in range(count))
    classes = sorted({f"n{i // 1300:08d}" for i in range(0, count, 1300)})
    part = UnfinishedPack(ImageSource(names, np.arange(count) // 1300, classes, "synthetic"), path, Recipe())
    for _ in range(count):
        part.add(Encoded(b"x", (500, 375), (500, 375), zlib.crc32(b"x")))
    part.finish(path)
    part.close()
    return PackedSource(path)


def starting(scratch: Path, files: int, images: int) -> None:
    """Time until the first image could be asked for."""
    root = scratch / "files"
    for folder in range(1000):
        (root / f"n{folder:08d}").mkdir(parents=True, exist_ok=True)
    for i in range(files):
        os.mknod(root / f"n{i % 1000:08d}" / f"n{i % 1000:08d}_{i // 1000}.JPEG")
    reference, expected = timed(lambda: ImageFolder(str(root)))
    ours, source = timed(lambda: open_source(str(root)))
    assert [name for name, _ in expected.samples] == [str(root / name) for name in source.names]
    opened, _ = timed(lambda: PackedSource(scratch / "synthetic.pack"))
    print(f"\nStarting: {files:,} files in 1,000 folders (entries in memory), and a packed file of {images:,} records")
    for name, seconds in (("reference: ImageFolder", reference), ("folder", ours)):
        print(f"  {name:<40} {seconds:7.2f} s   {reference / seconds:6.1f} x")
    print(f"  {'pack, index checked':<40} {opened:7.2f} s")


def own_megabytes() -> float:
    """Memory that only this process has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def epoch_in_worker(touch: Callable[[int], object], count: int, results: multiprocessing.Queue) -> None:
    """Touch every entry in random order, as an epoch does; report by how much the process has grown."""
    order = np.random.default_rng(0).permutation(count)
    before = own_megabytes()
    for i in order:
        touch(int(i))
    results.put(own_megabytes() - before)


def memory(scratch: Path, count: int) -> None:
    """Growth of one forked worker in one epoch."""
    packed = PackedSource(scratch / "synthetic.pack")
    samples = [(f"/data/imagenet/train/{name}", int(label)) for name, label in zip(packed.names, packed.labels,
                                                                                  strict=True)]

    def reference(i: int) -> object:
        path, label = samples[i]
        return path, label

    def ours(i: int) -> object:
        return packed.location(i), packed.labels[i], packed.encoded(i)

    print(f"\nMemory: growth of one forked worker over {count:,} entries")
    context = multiprocessing.get_context("fork")
    for name, touch in (("reference: list of (path, class)", reference), ("pack, names, labels and records", ours)):
        results = context.Queue()
        worker = context.Process(target=epoch_in_worker, args=(touch, count, results))
        worker.start()
        print(f"  {name:<40} {results.get():7.1f} MB")
        worker.join()


def main() -> None:
    """Parse and run the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder, small enough to be read a few times")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the first part; default 5")
    parser.add_argument("--images", type=int, default=1_281_167, help="records of the synthetic pack; default 1281167")
    parser.add_argument("--files", type=int, default=100_000, help="files of the second part; default 100000")
    parser.add_argument("--scratch", default=None, help="where files may be written; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        reading(args.data, scratch, args.rounds)
        changes(args.data, scratch)
        synthetic_pack(scratch / "synthetic.pack", args.images)
        starting(scratch, args.files, args.images)
        memory(scratch, args.images)


if __name__ == "__main__":
    main()
