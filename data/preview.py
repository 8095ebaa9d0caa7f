"""A contact sheet of augmented views: python -m data.preview --output OUT.png --data DIR."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.augment import PRESETS, Augmentation, augmentation, eval_transform
from data.checks import images_called
from data.datasets import SPEC_HELP, open_source
from data.images import limit_pixels
from data.loader import DATA_PATHS, BadImageLog, ViewDataset
from data.reading import Images
from data.sources import ImageSource
from runtime.errors import UserError, run_script
from runtime.numbers import number
from runtime.outputs import check_output_file
from runtime.settings import declared
from runtime.state import write_atomic

GAP, LABEL = 4, 14  # pixels between pictures, and height of a line of text


def main(argv: list[str] | None = None) -> None:
    """Write a contact sheet. Raises UserError if something cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m data.preview", allow_abbrev=False, description=__doc__)
    parser.add_argument("--output", required=True, metavar="OUT.png", help="PNG file to write")
    parser.add_argument("--data", required=True, help=SPEC_HELP)
    parser.add_argument("--aug", choices=sorted(PRESETS), default="moco_v2", help="augmentation; default moco_v2")
    parser.add_argument("--image-size", type=number(int), default=224, help="side of a view in pixels; default 224")
    parser.add_argument("--images", type=number(int), default=6, help="number of images, spread evenly; default 6")
    parser.add_argument("--views", type=number(int), default=6, help="views of each image; default 6")
    parser.add_argument("--seed", type=number(int), default=0, help="seed of the views, as in training; default 0")
    parser.add_argument("--data-path", choices=(*DATA_PATHS, "both"), default="fast",
                        help="how views are made: fast (default), pil, or both, one below the other")
    declared(Images)["max_pixels"].add_to(parser)
    chosen = parser.parse_args(argv)
    limit_pixels(chosen.max_pixels)
    if min(chosen.images, chosen.views) < 1 or chosen.image_size < 8 or chosen.seed < 0:
        raise UserError("--images and --views must be at least 1, --image-size at least 8 and --seed at least 0")
    source, path = open_source(chosen.data), Path(chosen.output)
    check_output_file(path, "--output", [".png"], images_called(source, path.name))
    rows = np.linspace(0, len(source) - 1, min(chosen.images, len(source))).round().astype(int).tolist()
    paths = DATA_PATHS if chosen.data_path == "both" else (chosen.data_path,)
    picture = sheet(source, rows, chosen.views, augmentation(chosen.aug, chosen.image_size), chosen.seed, paths)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    write_atomic(path, lambda file: file.write(encoded.getvalue()))
    print(f"{chosen.output}: {len(rows)} images, each as evaluation sees it and in {chosen.views} views of "
          f"{chosen.aug}, by {' and '.join(paths)}")


def sheet(source: ImageSource, rows: list[int], views: int, augment: Augmentation, seed: int,
          paths: tuple[str, ...] = ("fast",)) -> Image.Image:
    """A row for each image and data path: the image as evaluation sees it, then its views."""
    size = augment.image_size
    step = size + GAP
    canvas = Image.new("RGB", (GAP + (1 + views) * step, LABEL + len(rows) * (LABEL + len(paths) * step)), "white")
    draw, check = ImageDraw.Draw(canvas), BadImageLog(source, "error").check
    for left, header in ((GAP, "evaluation" if size >= 60 else "eval"), (GAP + step, "training views")):
        draw.text((left, 1), header, fill="black")
    top = LABEL
    for place, row in enumerate(rows):
        draw.text((GAP, top + 1), f"{source.names[row]}   {' / '.join(paths)}", fill="black")
        top += LABEL
        for path in paths:
            stamps = range(place * views, (place + 1) * views)
            batch = ViewDataset(source, [augment], seed, path).__getitems__([(row, stamp) for stamp in stamps])
            check(batch)
            plain = eval_transform(size)(source.open(row))[None]
            for column, view in enumerate(torch.cat([plain, batch.views[0]])):
                canvas.paste(Image.fromarray(view.permute(1, 2, 0).numpy()), (GAP + column * step, top))
            top += step
    return canvas


if __name__ == "__main__":
    run_script(main)
