#!/usr/bin/env python
"""Identify a checkpoint file: layout, architecture, branches, and which of its tensors match.

    python inspect_checkpoint.py weights/*.pth
    python inspect_checkpoint.py teacher.pth --data DIR      # also checks whether it has learnt anything
    python inspect_checkpoint.py --layouts                   # the table of docs/CHECKPOINTS.md

No code in a file is run. Exit code 0 if the backbone of every file is complete, otherwise 2.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.by_name import NAME_HELP, look_at_weights
from checkpoints.layouts import LAYOUTS
from checkpoints.match import Checkpoint
from checkpoints.reader import read_checkpoint
from checkpoints.report import Report, colours, few
from checkpoints.safe_load import file_sha256, published_as
from checkpoints.values import Unsound
from common import cli
from data.augment import Augmentation, augmentation
from data.datasets import open_source
from data.images import limit_pixels
from data.loader import BadImageLog, evaluation_loader
from data.sources import ImageSource
from evals.sanity import K, effective_rank, leave_one_out, mean_cosine, same_image, verdict
from models.backbones import ARCH_HELP, build_backbone, check_arch
from models.heads import describe
from models.teachers import FrozenEncoder
from runtime.device import Process, seed_everything, start_process
from runtime.errors import EXIT_BAD_INPUT, UserError, printable, run_script
from search.features import extract


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("files", metavar="FILE", nargs="*", help="checkpoints, folders with config.json and "
                        f"model.safetensors, {NAME_HELP}")
    parser.add_argument("--layouts", action="store_true", help="print the table of supported layouts and exit")
    parser.add_argument("--json", action="store_true", help="print only one JSON object per file")
    group = parser.add_argument_group("network")
    group.add_argument("-a", "--arch", default=None, metavar="ARCH",
                       help=f"expected architecture, {ARCH_HELP}; default: found")
    cli.check_by(group, "--arch", check_arch)
    cli.add_network_flags(group)
    group = cli.add_data_flags(
        parser, required=False, what="images to check the features on, anything that train_distill.py takes: 10-NN if "
        "they have labels, with ten images of a class or more, else how often two views of an image find each other, "
        "compared with fresh weights of that network; default: no check")
    group.add_argument("--images", type=cli.number(int, 20), default=2000, metavar="N",
                       help="images of that check, spread evenly over the data; default 2000")
    group.add_argument("--batch-size", type=cli.number(int, 1), default=64, metavar="N",
                       help="images per forward pass; default 64")
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)
    if not args.files and not args.layouts:
        parser.error("give at least one FILE, or --layouts")
    return args


def check_flags(args: cli.Arguments) -> None:
    """Refuse a --data or, of a single one, a FILE that is not there."""
    cli.check_files(args)
    if len(args.files) == 1 and not args.json:
        look_at_weights(args.files[0], "")


def examine(path: str, args: argparse.Namespace) -> tuple[Report, FrozenEncoder | None]:
    """The report on one file, and its trunk if that is complete."""
    report, encoder = Report(file=path), None
    try:
        checkpoint = read_checkpoint(path, args.checkpoint_key, "", branch=args.branch, trust=args.trust_checkpoint)
        report.sha256 = checkpoint.sha256
        report.layout, report.container = checkpoint.layout.name, checkpoint.container
        report.branch, report.epoch = checkpoint.prefix.rstrip("."), checkpoint.meta.get("epoch")
        report.branches = [p.rstrip(".") for p in checkpoint.branches() if p != checkpoint.prefix]
        found = checkpoint.identify(args.arch, args.stem, args.image_size)
        backbone = build_backbone(found.arch, found.stem, found.image_size, checkpoint.feature(args.feature))
        checkpoint = checkpoint.over(backbone)
        report, _ = checkpoint.match(backbone)
        report.mean, report.std = list(args.mean or report.mean), list(args.std or report.std)
        report.head = head_of(checkpoint)
        if report.ok:
            checkpoint.load_into(backbone)
            encoder = FrozenEncoder(backbone, report.mean, report.std)
    except UserError as error:
        report.error = str(error).strip()
        if Path(path).is_file():
            report.sha256 = report.sha256 or file_sha256(path)
    return report, encoder


def head_of(checkpoint: Checkpoint) -> str | None:
    """The head in words; None without a head of a known kind."""
    try:
        return describe(checkpoint.head())
    except Unsound as error:
        return f"refused: {error}"
    except UserError:
        return None


def check_features(encoder: FrozenEncoder, source: ImageSource, args: argparse.Namespace,
                   process: Process) -> dict[str, Any]:
    """Numbers that compare the features of a few images with those of fresh weights, and a ``verdict`` in words."""
    if len(source) > args.images:
        source = source.take(np.linspace(0, len(source) - 1, args.images).round().astype(np.int64))
    spec = encoder.backbone.spec
    seed_everything(args.seed)
    networks = encoder, FrozenEncoder(build_backbone(**spec.record()), encoder.mean, encoder.std)
    augment = augmentation("moco_v2", spec.image_size)

    def features(network: FrozenEncoder, augment: Augmentation | None = None, view: int = 0) -> torch.Tensor:
        def loader_of(indices: range) -> Any:
            return evaluation_loader(source, spec.image_size, args.batch_size, args.workers, indices,
                                     process.device.type, augment, view)
        return extract(network.to(process.device), loader_of, len(source), process, "features",
                       BadImageLog(source, args.on_bad_image).check)

    if len(source.classes) > 1 and len(source) >= K * len(source.classes):  # else few have K of their class
        labels = torch.from_numpy(source.labels)
        what, right = "10-NN", [leave_one_out(features(network), labels) for network in networks]
    else:
        what, right = "views of one image found", [
            same_image(features(network, augment, 1), features(network, augment, 2)) for network in networks]
    own = features(encoder)
    cosine = mean_cosine(own)
    percent, percent_fresh = (100 * float(x.double().mean()) for x in right)
    return {"images": len(source), "what": what, "percent": percent, "percent_fresh": percent_fresh,
            "effective_rank": effective_rank(own), "mean_cosine": cosine,
            "verdict": verdict(*right, cosine)}


def as_text(report: Report, published: str | None, sanity: dict[str, Any] | None) -> str:
    """The report for a person."""
    inside = f" in {report.container}" if report.container else ""
    branch = f", branch {report.branch}" if report.branch else ""
    rows = [("layout", report.layout and f"{report.layout}{inside}{branch}"),
            ("other branches", ", ".join(report.branches)),
            ("architecture", report.arch and f"{report.arch}, stem {report.stem}, {report.image_size} px"
             + f", feature {report.feature}" * (report.feature != "pool")),
            ("backbone", f"complete: {report.matched} tensors, 0 missing, 0 unexpected" if report.ok else "refused"),
            ("why", report.error), ("missing", few(report.missing, 8)), ("unexpected", few(report.unexpected, 8)),
            ("other shape", few(report.reshaped, 8)), ("head", report.head),
            *(("dropped", f"{count} under {prefix} ({report.reasons[prefix]})")
              for prefix, count in report.dropped.items()),
            ("normalisation", report.mean and f"mean {colours(report.mean)}, std {colours(report.std)}"),
            ("epoch", report.epoch), ("SHA-256", report.sha256), ("published", published),
            *(("note", note) for note in report.notes)]
    if sanity:
        rows += [("features", "{what} {percent:.1f} % of {images:,}, with fresh weights {percent_fresh:.1f} %; "
                              "effective rank {effective_rank:.1f}".format(**sanity)), ("verdict", sanity["verdict"])]
    lines = [report.file, *(f"  {name:<15} {value}" for name, value in rows if value not in (None, ""))]
    return "\n".join(map(printable, lines))  # names in files may hold escape codes


def layout_table() -> str:
    """The layouts as a Markdown table, in the order in which they are tried."""
    def code(items: tuple[str, ...]) -> str:
        return " ".join(f"`{item}`" for item in items).replace("|", "\\|") or "–"

    lines = ["| layout | files | trunk prefix | recognised by | other branches | its head | dropped | mean / std |",
             "|---|---|---|---|---|---|---|---|"]
    for x in LAYOUTS:
        lines.append(f"| {x.name} | {x.reads} | {code((x.prefix,)) if x.prefix else '–'} | {code(x.signs)} | "
                     f"{code(x.branches)} | {code(x.head)} | {code(x.dropped)} | "
                     f"{colours(x.mean)} / {colours(x.std)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, examine and report each file."""
    args = parse_args()
    limit_pixels(args.max_pixels)
    if args.layouts:
        print(layout_table())
        return
    check_flags(args)
    complete = True
    with start_process(args.device) as process:
        source = open_source(args.data).subset(args.subset) if args.data else None
        for path in args.files:
            report, encoder = examine(path, args)
            published = published_as(report.file, report.sha256) if report.sha256 and Path(
                report.file).is_file() else None
            sanity = check_features(encoder, source, args, process) if encoder and source else None
            complete = complete and report.ok
            print(json.dumps({**report.record(), "published": published, "sanity": sanity}) if args.json else
                  as_text(report, published, sanity), flush=True)
    sys.exit(0 if complete else EXIT_BAD_INPUT)


if __name__ == "__main__":
    run_script(main)
