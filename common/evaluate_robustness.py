"""A linear head trained on one data set and tested on images from elsewhere."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np

from common import cli, evaluation
from common.head_choice import add_grid_flags, choose_head, held_out
from data.augment import CentreCrop, linear_transform
from data.splits import open_labelled
from evals.robustness import ALEXNET, SEVERITIES, corruption_errors, head_scores
from evals.sets.ood import Elsewhere, open_elsewhere
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError

HELP = "accuracy and calibration of a linear head on ImageNet-v2, -Sketch, -R, -A, -C, or any such folders"
COLUMNS = ("top1", "top5", "ece", "nll")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    group = evaluation.add_common_flags(parser, "--train", data=evaluation.LABELLED + "; the head is trained on train/")
    group.add_argument("--ood", nargs="+", type=_named_folder, required=True, metavar="NAME=DIR",
                       help="images from elsewhere, with class folders named like the training classes or numbered "
                            "like them (ImageNet-v2). DIR may also hold the variants of ImageNet-v2 (imagenetv2-…), or "
                            "corruption/severity/class as ImageNet-C does")
    group = parser.add_argument_group("linear head")
    group.add_argument("--epochs", type=cli.number(int, 1), default=100, metavar="N",
                       help="for --solver sgd: passes over the cached training features; default 100, as linear "
                            "--cached")
    group.add_argument("-b", "--batch-size", type=cli.number(int, 1), default=256, metavar="N",
                       help="for --solver sgd: features of one step; default 256, as linear --cached")
    cli.only(group, "--epochs --batch-size", "with --solver sgd", lambda args: args.solver == "sgd")
    add_grid_flags(group)


def _named_folder(text: str) -> tuple[str, str]:
    name, found, folder = text.partition("=")
    if not (name and found and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, such as sketch=/data/imagenet-sketch")
    return name, folder


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    return [("robustness", evaluation.lacks(args, "data", "ood") or ["--train", args.data, "--ood", *args.ood])]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Top-1, top-5, expected calibration error (15 bins) and negative log likelihood of a linear head, on the test
    images of --train and on each set of --ood. The head is that of linear --cached: trained on centre-crop features
    (Resize(256), CenterCrop(224), scaled to the network's size), its rate and decay chosen on a share of the training
    images. Scores are among the classes that a set has folders of, as for the 200 classes of ImageNet-R and -A; the
    record has top-1 among all classes too (top1_all). Images in ImageNet-C's layout are cut from the centre without
    resizing, as they are 224 pixels already; each corruption gets its CE, and all fifteen together the mCE, in percent
    of AlexNet's errors."""
    with together(process):
        evaluation.open_output(args)
        train, test = open_labelled(args.data, "--train")
        train = train.subset(args.subset)
        held_out(args, train.labels)  # refuse too few images at once
        names = [name for name, _ in args.ood]
        if len(set(names)) < len(names):
            raise UserError("--ood gives two folders the same name; give each its own")
        if "test" in names:
            raise UserError("--ood test=DIR has the name of the test images of --train; give it another")
        sets = [each for name, folder in args.ood for each in open_elsewhere(name, folder, train.classes)]
        network = evaluation.open_network(args, process)
    size = network.spec.image_size

    features, train = evaluation.features(network, train, args, process, "train", linear_transform(size))
    head, chosen = choose_head(features, train.labels, len(train.classes), args, process)
    sets = [Elsewhere("test", test, np.arange(len(train.classes))), *sets]
    scores = {}
    for i, each in enumerate(sets):
        transform = CentreCrop(size, size, "bilinear") if each.corruption else linear_transform(size)
        features, source = evaluation.features(network, each.source, args, process, each.name, transform)
        sets[i] = each = replace(each, source=source)
        if process.is_main:
            scores[each.name] = {"images": len(each.source), "classes": len(each.columns), **head_scores(
                lambda rows: head.logits(rows)[:, 0], features, each.labels, each.columns, process.device)}
    if not process.is_main:
        return {}
    rows = [{"data": each.name, **_row(scores[each.name])} for each in sets if not each.corruption]
    metrics: dict[str, Any] = {**chosen, "sets": scores}
    for name in names:
        corrupted = [each for each in sets if each.corruption and each.name.startswith(f"{name}/")]
        if corrupted:
            more, metrics.setdefault("corruptions", {})[name] = _corruptions(name, corrupted, scores)
            rows += more
    data = {"training": train, "test": sets[0].source}
    return evaluation.finish("robustness", args, process, [network], data, metrics, rows)


def _row(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: numbers[key] for key in ("images", "classes", *COLUMNS)}


def _corruptions(name: str, sets: list[Elsewhere], scores: dict[str, dict[str, float]],
                 ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each corruption, averaged over severities, one for all of them, and the errors behind them."""
    errors: dict[str, dict[int, float]] = {}
    for each in sets:
        errors.setdefault(each.corruption, {})[each.severity] = 100 - scores[each.name]["top1"]
    ce, mce = corruption_errors(errors)
    rows = []
    for corruption, by_severity in errors.items():
        numbers = [scores[f"{name}/{corruption}/{severity}"] for severity in by_severity]
        lacking = [str(severity) for severity in SEVERITIES if severity not in by_severity]
        rows.append({"data": f"{name}/{corruption}" + f" (without {', '.join(lacking)})" * bool(lacking),
                     "images": sum(each["images"] for each in numbers), "classes": numbers[0]["classes"],
                     **{key: float(np.mean([each[key] for each in numbers])) for key in COLUMNS},
                     "CE": ce.get(corruption)})
    whole = f"{name} (all {len(rows)})" if mce is not None else f"{name} ({len(ce)} of {len(ALEXNET)} corruptions)"
    rows.append({"data": whole, "images": sum(row["images"] for row in rows),
                 **{key: float(np.mean([row[key] for row in rows])) for key in COLUMNS}, "CE": mce})
    return rows, {"errors": errors, "ce": ce, "mce": mce}
