#!/usr/bin/env python
"""Pack a data set into one file, which opens at once, needs no file per image, and trains like the folder.

    python pack_dataset.py --data imagenet --output packs/train.pack -j 16
    python pack_dataset.py --data imagenet --split test --output packs/val.pack -j 16
    python pack_dataset.py --data imagenet --output small/train.pack --mode jpeg --short-side 256 --quality 90
    python pack_dataset.py --data shards/*.tar --output packs/train.pack      # a tar of a tree, or WebDataset shards
    python pack_dataset.py --verify packs/train.pack

Then give `--data packs/train.pack`, or `--data packs` for both splits. Names and order stay, so neighbour files fit
both. An interrupted pack resumes when you repeat the command.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from common import cli
from data.datasets import SPEC_HELP, check_there, open_source
from data.images import limit_pixels
from data.packed import PackedSource
from data.packing import pack
from data.packing_part import Encoded, Recipe
from data.sources import ImageSource
from data.tar import TarSource
from runtime.errors import UserError, run_script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--data", nargs="+", metavar="DIR", default=None,
                       help=f"{SPEC_HELP}; or one or more .tar files, of an image tree or in WebDataset's style "
                            "(KEY.jpg beside KEY.cls)")
    cli.check_by(group, "--data", check_there)
    group.add_argument("--split", choices=("train", "test"), default="train",
                       help="which split, if --data (or a tar) holds train/ and val/ or test/; default train")
    group.add_argument("--on-bad-image", choices=("error", "skip"), default="error",
                       help="an image that cannot be decoded stops the packing (error, default) or is left out and "
                            "named (skip); later images then move up and the fingerprint changes, so neighbours "
                            "mined from the folder no longer fit")
    group.add_argument("--verify", metavar="FILE", default=None,
                       help="only read this packed file to its end and name every damaged record")
    group = parser.add_argument_group("how")
    group.add_argument("--output", metavar="FILE", default=None,
                       help="the packed file; call it train.pack, val.pack or test.pack to give its folder as --data")
    group.add_argument("--mode", choices=("original", "jpeg", "raw"), default="original",
                       help="original (default): the files byte for byte, so training sees the same pixels. "
                            "jpeg: images larger than --short-side are shrunk and encoded again, which decodes faster; "
                            "training sees other pixels, see docs/DATA.md. raw: decoded pixels at "
                            "--short-side, about 9 times the bytes of jpeg, nothing to decode")
    group.add_argument("--short-side", type=cli.number(int, 8), default=None, metavar="S",
                       help="with jpeg and raw: pixels of the shorter side; smaller images are kept as they are; "
                            "default 256")
    group.add_argument("--quality", type=cli.number(int, 1, 100), default=None, metavar="Q",
                       help="with jpeg: JPEG quality; default 90")
    cli.add_opening_flags(group)
    args = parser.parse_args(argv)
    if not args.verify and not (args.data and args.output):
        parser.error("give --data and --output, or --verify FILE")
    if args.verify and (args.data or args.output):
        parser.error("--verify stands alone: give no --data and no --output with it")
    if args.mode == "original" and args.short_side:
        parser.error("--short-side goes with --mode jpeg or raw; original keeps the files as they are")
    if args.mode != "jpeg" and args.quality:
        parser.error("--quality goes with --mode jpeg")
    return args


def check_flags(args: cli.Arguments) -> None:
    """Refuse a file or folder that is not there."""
    cli.check_files(args)


def open_images(specs: list[str], split: str) -> ImageSource:
    """The source of one --data, or of several tars."""
    if all(Path(spec).suffix == ".tar" and Path(spec).is_file() for spec in specs):
        return TarSource(specs, split)
    if len(specs) > 1:
        odd = next(spec for spec in specs if Path(spec).suffix != ".tar" or not Path(spec).is_file())
        raise UserError(f"--data takes one source or several .tar files, and {odd} is not a .tar file")
    return open_source(specs[0], split)


def bar(images: Iterable[Encoded], done: int, total: int) -> Iterable[Encoded]:
    """A progress bar over the remaining images."""
    return tqdm(images, "packing", initial=done, total=total, unit="image", smoothing=0.05)


def write(args: argparse.Namespace) -> None:
    """Pack --data into --output and say what was done."""
    recipe = Recipe(args.mode, None if args.mode == "original" else args.short_side or 256,
                    (args.quality or 90) if args.mode == "jpeg" else None)
    source = open_images(args.data, args.split)
    print(source.description)
    done = pack(source, Path(args.output), recipe, args.workers, args.on_bad_image, bar)
    for location, reason in done.bad:
        print(f"left out: {location} ({reason})")
    if done.bad:
        print(f"images left out: {len(done.bad):,}, so the fingerprint is not that of --data: neighbour files must "
              "be mined from the packed file")
    before = f" ({done.resumed:,} of them before)" if done.resumed else ""
    print(f"{done.path}: {done.images:,} images{before}, {done.size / 1e9:,.3f} GB")


def verify(path: str) -> None:
    """Read every record; UserError if one is damaged."""
    source, damaged = PackedSource(path), []
    for i, problem in tqdm(source.damaged(), "verifying", total=len(source), unit="image"):
        if problem:
            damaged.append(source.names[i])
            print(f"damaged: {source.shown(i)} ({problem})")
    if damaged:
        raise UserError(f"--verify {path}: {len(damaged):,} of {len(source):,} are damaged, first {damaged[0]}; "
                        "copy the file again, or pack again")
    print(f"{path}: all {len(source):,} records are valid")


def main() -> None:
    """Parse, then pack or verify."""
    args = parse_args()
    limit_pixels(args.max_pixels)
    if args.verify:
        verify(args.verify)
    else:
        write(args)


if __name__ == "__main__":
    run_script(main)
