#!/usr/bin/env python
"""Embed a folder of images with a student, a teacher or any other checkpoint: one row of numbers for each image.

    python embed.py --data DIR --weights run/student.pth --output photos.npy        # and photos.json with the names
    python embed.py --data DIR --weights run/student.pth --output photos.csv        # path, then the numbers
    python embed.py --data DIR --weights run/student.pth --output photos.parquet    # columns path and embedding

Rows are in the order of the images' names. An interrupted run resumes, and torchrun shares the images between
processes; all of them must see the folder of --features.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from common import cli, networks
from data.augment import eval_transform_name
from data.checks import check_apart
from data.datasets import open_source
from data.sources import ImageSource
from runtime.agreement import on_first_rank, together
from runtime.device import Process
from runtime.errors import UserError, run_script
from runtime.outputs import check_output_file
from runtime.packages import need_package
from runtime.state import save_json, write_atomic

ENDINGS = (".npy", ".csv", ".parquet")
ROWS_AT_ONCE = 16_384
Blocks = Iterator[tuple[Sequence[str], Tensor]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    group = cli.add_data_flags(parser, what="the images: a folder and its sub-folders, a packed file, a list of paths "
                                            "(.txt), a .tar, or a name as for train_distill.py")
    group.add_argument("--batch-size", type=cli.number(int, 1), default=256, metavar="N",
                       help="images per forward pass; default 256")
    networks.add_weights_flags(parser)
    group = parser.add_argument_group("embeddings")
    group.add_argument("--output", required=True, metavar="FILE",
                       help="file to write, .npy, .csv or .parquet (which needs pyarrow); FILE's name with .json "
                            "records how it was made and, for .npy, each row's image")
    group.add_argument("--normalise", action="store_true",
                       help="L2-normalise the rows, so that products are cosines; default: the network's output")
    networks.add_features_flags(group)
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def check_flags(args: cli.Arguments) -> None:
    """What can be said of the command line alone, before anything is read."""
    cli.check_files(args)
    output = Path(args.output)
    check_output_file(output, "--output", ENDINGS, inputs=[args.data, args.weights])
    if output.suffix.lower() == ".npy" and args.dtype == "bfloat16":
        raise UserError("--dtype bfloat16 does not exist in numpy's .npy files; use float16 or float32, or another "
                        "ending")
    if output.suffix.lower() == ".parquet":
        pyarrow()


def embed(args: argparse.Namespace, process: Process) -> None:
    """Extract the features of all images and write the file."""
    output = Path(args.output)
    with together(process):
        check_flags(args)
        source = open_source(args.data).subset(args.subset)
        check_apart(output.parent, args.data)
        encoder, identity = networks.open_network(args, process)
    features, source = networks.features_of(encoder, source, args, process, "embeddings", identity)

    def leave() -> None:
        write(output, features, source, getattr(torch, args.dtype), args.normalise)
        names = {"names": list(source.names)} if output.suffix.lower() == ".npy" else {}
        save_json({**identity, "data": source.title, "fingerprint": source.fingerprint(), "images": len(source),
                   "transform": eval_transform_name(encoder.backbone.spec.image_size), "dtype": args.dtype,
                   "normalised": args.normalise, **names}, output.with_suffix(".json"))
        print(f"{output}: {len(source):,} images of {source.title}, {features.shape[1]:,} numbers each")

    on_first_rank(leave, process)


def write(output: Path, features: Tensor, source: ImageSource, dtype: torch.dtype, normalise: bool) -> None:
    """Write ``output`` in the format of its ending. ``features`` [n, d] belong to the n images of ``source``. Raises
    UserError."""
    writer = {".npy": _npy, ".csv": _csv, ".parquet": _parquet}[output.suffix.lower()]
    write_atomic(output, lambda file: writer(file, features.shape, dtype, blocks(features, source, dtype, normalise)))


def blocks(features: Tensor, source: ImageSource, dtype: torch.dtype, normalise: bool) -> Blocks:
    """(names, rows [m, d] of ``dtype``) of all images in order. ``normalise``: to length 1; zero rows stay zero."""
    for first in range(0, len(features), ROWS_AT_ONCE):
        rows = features[first:first + ROWS_AT_ONCE]
        rows = torch.nn.functional.normalize(rows.float(), dim=1) if normalise else rows
        yield source.names[first:first + len(rows)], rows.to(dtype)


def _npy(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, rows_of: Blocks) -> None:
    described = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": described, "fortran_order": False, "shape": tuple(shape)})
    for _, rows in rows_of:
        file.write(rows.contiguous().numpy().tobytes())


def _csv(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, rows_of: Blocks) -> None:
    digits = 9 if dtype == torch.float32 else 5  # so that reading gives back the same number
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    lines = csv.writer(text)
    lines.writerow(["path", *range(shape[1])])
    for names, rows in rows_of:
        lines.writerows([name, *(format(x, f".{digits}g") for x in row)]
                        for name, row in zip(names, rows.tolist(), strict=True))
    text.flush()
    text.detach()


def _parquet(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, rows_of: Blocks) -> None:
    arrow, parquet = pyarrow()
    kind = arrow.float16() if dtype == torch.float16 else arrow.float32()
    columns = arrow.schema([("path", arrow.string()), ("embedding", arrow.list_(kind, shape[1]))])
    with parquet.ParquetWriter(file, columns) as writer:
        for names, rows in rows_of:
            readable = [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in names]
            rows = rows.float() if dtype == torch.bfloat16 else rows
            numbers = arrow.FixedSizeListArray.from_arrays(arrow.array(rows.flatten().numpy(), kind), shape[1])
            writer.write_table(arrow.table([arrow.array(readable, arrow.string()), numbers], schema=columns))


def pyarrow() -> tuple[Any, Any]:
    """The library and its parquet module."""
    return tuple(need_package("pyarrow", "--output *.parquet", module=module, otherwise="write .npy or .csv")
                 for module in ("pyarrow", "pyarrow.parquet"))


def main() -> None:
    """Parse, join the job, embed."""
    args = parse_args()
    with cli.joined(args) as process:
        cli.say_unused(args, process)
        embed(args, process)


if __name__ == "__main__":
    run_script(main)
