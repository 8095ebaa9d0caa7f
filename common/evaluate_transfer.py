"""A linear classifier, and few-shot episodes, on the frozen network's features of other data sets."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import cli, evaluation
from data.augment import eval_transform
from data.datasets import datasets_root
from evals.fewshot import HEADS, episodes, few_shot
from evals.head_grid import split_validation
from evals.sets.landmarks import IMAGES_FROM
from evals.sets.transfer_layouts import LAYOUTS, TransferSet
from evals.sets.transfer_sets import open_transfer_folder, open_transfer_set, sets_in
from evals.transfer import NAMES, Transfer, logistic_regression, transfer
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError
from runtime.state import load_json, save_json

HELP = "logistic regression and few-shot episodes on other data sets (CIFAR, Pets, VOC 2007 …)"
VALIDATION_SHARE = 0.2  # for sets without validation images; Ericsson et al., CVPR 2021


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    group = evaluation.add_common_flags(parser, required=False, data=evaluation.LABELLED + ". With both val/ and "
                                        "test/ the first validates and the second tests")
    group.add_argument("--datasets", nargs="+", default=None, metavar="NAME",
                       help=f"instead of --data: any of {' '.join(LAYOUTS)}, in torchvision's layout in --root, or "
                            "the folders there that hold train/ and test/")
    group.add_argument("--root", metavar="DIR", default=None,
                       help="folder of the --datasets; default: $COSS_DATASETS, else ./datasets")
    group.add_argument("--download", action="store_true",
                       help="let torchvision download missing --datasets into --root, under each one's terms; "
                            "Stanford Cars and SUN397's split cannot be downloaded")
    group = parser.add_argument_group("logistic regression")
    group.add_argument("--iterations", type=cli.number(int, 1), default=100, metavar="N",
                       help="maximum L-BFGS iterations of one fit; default 100, scikit-learn's, as in Ericsson et al. "
                            "2021. The record counts the fits that stopped there")
    group.add_argument("--jobs", type=cli.number(int, 1), default=cli.default_workers(), metavar="N",
                       help="fits run in parallel, without effect on the result; default: the machine's cores, at "
                            "most 8")
    group.add_argument("--skip-linear", action="store_true", help="no logistic regression, only --few-shot")
    group = parser.add_argument_group("few-shot")
    group.add_argument("--few-shot", action="store_true",
                       help="also classify in episodes of --ways classes with --shots labelled images each")
    group.add_argument("--ways", type=cli.number(int, 2), default=5, metavar="N",
                       help="classes per episode; default 5")
    group.add_argument("--shots", type=cli.number(int, 1), nargs="+", default=[1, 5, 20], metavar="N",
                       help="labelled images per class, each number evaluated on its own; default 1 5 20")
    group.add_argument("--queries", type=cli.number(int, 1), default=15, metavar="N",
                       help="images per class to classify; default 15")
    group.add_argument("--episodes", type=cli.number(int, 2), default=600, metavar="N", help="default 600")
    group.add_argument("--few-shot-heads", choices=HEADS, nargs="+", default=["centroid"],
                       help="the nearest class mean (centroid, default, as in Ericsson et al. 2021) and logistic "
                            "regression on features of length 1")
    group.add_argument("--few-shot-from", choices=("all", "test"), default="all",
                       help="images that episodes draw from: the whole set (default, as in Ericsson et al. 2021), or "
                            "its test images only")
    cli.only(group, "--ways --shots --queries --episodes --few-shot-heads --few-shot-from", "with --few-shot",
             lambda args: args.few_shot)
    cli.only(group, "--iterations --jobs", "without --skip-linear", lambda args: not args.skip_linear)


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    if not args.root:
        return [("transfer", "it needs --root")]
    sets = [name for name in sets_in(evaluation.root_of(args)) if name not in IMAGES_FROM]
    return [("transfer", ["--root", args.root, "--datasets", *sets] if sets else
             f"--root {args.root} holds none of its sets")]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Multinomial logistic regression on frozen features (L-BFGS, scikit-learn), scored by each data set's own metric;
    the L2 penalty is chosen among 45 on validation images, as in Kornblith et al., CVPR 2019, and Ericsson et al., CVPR
    2021. Features are pooled, not normalised, and use k-NN's transform (shorter side to 1.05 x S, bicubic, centre crop
    S), so that one extraction serves both. Sets without validation images hold out a fifth of each class's training
    images. With --few-shot also the accuracy of few-shot episodes. Features and results are cached per set, so an
    interrupted run resumes with the next set. Under torchrun the processes share the images, and the first one fits."""
    with together(process):
        _check(args, process)
        folder = evaluation.open_output(args)
        sets = [each.subset(args.subset) for each in _open_sets(args)]
        if args.few_shot:  # refuse impossible episodes before the work
            for each in sets:
                if not each.marks:
                    labels = _few_shot_labels(each, args)
                    episodes(labels, args.ways, max(args.shots) + args.queries, 1, args.seed, f"{each.name}, few-shot")
        network = evaluation.open_network(args, process)
    transform = eval_transform(network.spec.image_size)
    opened = {each.name: {part: evaluation.features(network, source, args, process, f"{each.name} {part}", transform)
                          for part, source in each.parts().items()} for each in sets}
    features = {name: {part: rows for part, (rows, _) in parts.items()} for name, parts in opened.items()}
    sets = [each.with_parts({part: source for part, (_, source) in opened[each.name].items()}) for each in sets]
    if not process.is_main:
        return {}

    found, rows = {}, []
    for each in sets:
        print(each.description)
        numbers: dict[str, Any] = {}
        row: dict[str, Any] = {"data": each.name}
        if not args.skip_linear:
            identity = _identity(network, each, args, str(transform))
            result = _remembered(folder / "transfer" / f"{each.name}-{identity}.json",
                                 lambda each=each: _linear(features[each.name], each, args))
            numbers |= asdict(result)
            row |= {"metric": NAMES[result.metric], "score": result.score, "validation": result.validation,
                    "l2": result.l2, "stopped fits": result.unconverged}
        if args.few_shot:
            shots = _few_shot(features[each.name], each, args, process)
            numbers["few_shot"] = shots
            row |= {f"{shot['ways']}-way {shot['shots']}-shot {shot['head']}":
                    f"{shot['accuracy']:.2f} ± {shot['interval']:.2f}" for shot in shots}
        found[each.name] = numbers
        rows.append(row)
    metrics: dict[str, Any] = {"datasets": found}
    if not args.skip_linear:
        metrics = {"mean": float(np.mean([numbers["score"] for numbers in found.values()])), **metrics}
        if len(rows) > 1:
            rows.append({"data": "mean", "score": metrics["mean"]})
    data = {f"{each.name} {part}": source for each in sets for part, source in each.parts().items()}
    return evaluation.finish("transfer", args, process, [network], data, metrics, rows, "transfer")


def _check(args: argparse.Namespace, process: Process) -> None:
    if bool(args.data) == bool(args.datasets):
        raise UserError("transfer takes either --data ROOT or --datasets NAME …; give one of them")
    if args.data and (args.root or args.download):
        raise UserError("--root and --download belong to --datasets; leave them out with --data")
    if args.download and process.world_size > 1:
        raise UserError("--download works in one process; run the command once without torchrun, then with it")
    if args.skip_linear and not args.few_shot:
        raise UserError("--skip-linear leaves nothing to do; add --few-shot")
    if args.datasets and len(set(args.datasets)) < len(args.datasets):
        raise UserError("--datasets names a set twice; give each once")
    logistic_regression()  # fail before reading images if scikit-learn is not installed


def _open_sets(args: argparse.Namespace) -> list[TransferSet]:
    if args.data:
        return [open_transfer_folder(args.data)]
    root = Path(args.root) if args.root else datasets_root()
    return [open_transfer_set(name, root, args.download, args.seed) for name in args.datasets]


def _linear(features: dict[str, torch.Tensor], each: TransferSet, args: argparse.Namespace) -> Transfer:
    fit = [part for part in features if part != "test"]
    labels = np.concatenate([each.labels(part) for part in fit])
    rows = np.concatenate([features[part].float().numpy() for part in fit])
    validation = (np.arange(len(features["train"]), len(rows)) if len(fit) == 2 else
                  split_validation(labels, VALIDATION_SHARE, args.seed)[1])
    if not len(validation):
        raise UserError(f"{each.name}: no class has enough images to hold some out for validation; give more, or a "
                        "val/ folder beside train/ and test/")
    return transfer(rows, labels, validation, features["test"].float().numpy(), each.labels("test"), each.metric,
                    jobs=args.jobs, iterations=args.iterations, label=each.name, progress=True)


def _few_shot(features: dict[str, torch.Tensor], each: TransferSet, args: argparse.Namespace, process: Process,
              ) -> list[dict[str, Any]]:
    if each.marks:
        print(f"{each.name}: its images have several labels, so few-shot episodes are skipped")
        return []
    rows, labels = torch.cat([features[part] for part in _few_shot_parts(each, args)]), _few_shot_labels(each, args)
    return [asdict(few_shot(rows, labels, head, args.ways, shots, args.queries, args.episodes, args.seed,
                            process.device, f"{each.name} {shots}-shot {head}", progress=True))
            for head in args.few_shot_heads for shots in args.shots]


def _few_shot_parts(each: TransferSet, args: argparse.Namespace) -> list[str]:
    return ["test"] if args.few_shot_from == "test" else list(each.parts())


def _few_shot_labels(each: TransferSet, args: argparse.Namespace) -> np.ndarray:
    return np.concatenate([each.labels(part) for part in _few_shot_parts(each, args)])


def _identity(network: evaluation.Network, each: TransferSet, args: argparse.Namespace, transform: str) -> str:
    """A hash of everything that affects a set's result, as 16 hexadecimal digits."""
    import sklearn

    labels = hashlib.sha256(b"".join(np.ascontiguousarray(each.labels(part)).tobytes() for part in each.parts()))
    what = [network.identity, network.spec.record(), transform, labels.hexdigest(), each.metric, args.seed,
            args.iterations, args.dtype, args.on_bad_image, sklearn.__version__,
            {part: [source.identity(), source.location(0)] for part, source in each.parts().items()}]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _remembered(path: Path, compute: Callable[[], Transfer]) -> Transfer:
    """The result that an earlier run saved in ``path``, or a new one, which is saved there."""
    try:
        return Transfer.of(load_json(path))
    except (OSError, ValueError):  # missing or damaged
        result = compute()
        save_json(asdict(result), path)
        return result
