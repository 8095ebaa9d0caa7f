"""Retrieval with frozen features."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from common import cli, evaluation
from data.splits import open_queries
from evals.retrieval import PRECISION_AT, RECALL_AT, Describe, class_retrieval, revisited
from evals.sets.landmarks import IMAGES_FROM, open_landmarks
from models.anysize import AnySize
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError

HELP = "finding images: revisited Oxford and Paris, and images of a query's class in any labelled folder"
DATA = ("labelled images: a folder that holds query/ and database/ (or gallery/), each with a folder per class; or "
        "an image folder, a packed file or a name, whose test images are queries, each searched among the others")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser, data=DATA, required=False,
                            share_of="each class's queries, with --data; default 1")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--root", default=None, metavar="DIR",
                       help="folder that holds --datasets: NAME/gnd_NAME.pkl and NAME/jpg/*.jpg")
    group.add_argument("--datasets", nargs="+", choices=sorted(IMAGES_FROM), default=None, metavar="NAME",
                       help="roxford5k, rparis6k, or both, in --root")
    group.add_argument("--scales", type=cli.number(float, above=0), nargs="+", default=[1.0], metavar="X",
                       help="with --datasets: scales of each image, whose features are averaged; default "
                            "1; the literature's multi-scale rows use 1 0.7071 0.5")
    group.add_argument("--long-side", type=cli.number(int, 32), default=1024, metavar="S",
                       help="with --datasets: maximum pixels of an image's longer side; default 1024, the benchmark's "
                            "usual one (DINO: 512)")
    group.add_argument("--recall-at", type=cli.number(int, 1), nargs="+", default=list(RECALL_AT), metavar="K",
                       help="with --data: K of recall@K; default " + " ".join(map(str, RECALL_AT)))
    cli.only(group, "--root --scales --long-side", "with --datasets", lambda args: bool(args.datasets))
    cli.only(group, "--recall-at", "with --data", lambda args: bool(args.data))


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    root = evaluation.root_of(args) if args.root else None
    sets = [name for name in sorted(IMAGES_FROM) if root and (root / name / f"gnd_{name}.pkl").is_file()]
    return [("retrieval", evaluation.on_data(args, *evaluation.WHOLE)),
            ("retrieval, landmarks", [  # all of their images are needed
                "--root", args.root, "--datasets", *sets, *evaluation.WHOLE, "--on-bad-image", "error"] if sets else
                "it needs --root with roxford5k or rparis6k")]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Revisited Oxford and Paris (Radenovic et al., CVPR 2018): mAP and mP@1, 5, 10 of the easy, medium and hard
    protocols, with queries cropped to their boxes and uncropped images of any aspect ratio. With --data instead:
    recall@K and mAP of retrieving images of the query's class (instance retrieval, copies). Similarity is the cosine of
    pooled features, without whitening or re-ranking."""
    if (args.data is None) == (args.datasets is None) or (args.datasets and args.root is None):
        raise UserError("retrieval needs --data DIR, or --root DIR with --datasets roxford5k rparis6k; give one of the "
                        "two")
    if args.datasets and (args.subset != 1 or args.on_bad_image == "skip"):
        raise UserError("--datasets needs all images of a benchmark, as its ground truth numbers them; leave --subset "
                        "and --on-bad-image skip out")
    evaluation.open_output(args)
    return _landmarks(args, process) if args.datasets else _classes(args, process)


def _landmarks(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    with together(process):
        sets = {name: open_landmarks(args.root, name, args.long_side) for name in args.datasets}
        network = evaluation.open_network(args, process)
    encoder = network.encoder
    describe = Describe(encoder.normalise, AnySize(encoder.backbone), args.scales, encoder.backbone).eval()
    whole = replace(network, encoder=describe,
                    identity={**network.identity, "scales": list(args.scales), "long_side": args.long_side})
    singly = argparse.Namespace(**{**vars(args), "feature_batch": 1})  # images of different proportions
    found, rows, sources = {}, [], {}
    for name, landmarks in sets.items():
        queries, database = (evaluation.features(whole, source, singly, process, f"{name} {role}", WholeImage())[0]
                             for role, source in (("queries", landmarks.queries), ("database", landmarks.database)))
        scores = queries.float() @ database.float().T                  # of descriptors of length 1: 70 x 5,000
        found[name] = revisited(scores, landmarks.truth, PRECISION_AT)
        rows += [{"data": name, "protocol": protocol, **values} for protocol, values in found[name].items()]
        sources |= {f"{name} queries": landmarks.queries, f"{name} database": landmarks.database}
    return evaluation.finish("retrieval", args, process, [network], sources, found, rows)


def _classes(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    with together(process):
        queries, database = open_queries(args.data)
        queries = queries.subset(args.subset)
        network = evaluation.open_network(args, process)
    sources = {"queries": queries} | ({} if database is None else {"database": database})
    given = []
    for role, source in sources.items():
        features, sources[role] = evaluation.features(network, source, args, process, role)
        given += [features, torch.from_numpy(sources[role].labels)]
    given += [None, None] if database is None else []
    found = class_retrieval(*given, process, sorted(set(args.recall_at)), process.is_main)
    if not found["queries"]:
        raise UserError(f"--data {args.data}: no query's class has another image to be found; give classes of at least "
                        "two images, or query/ and database/ folders that share classes")
    return evaluation.finish("retrieval", args, process, [network], sources, found)


class WholeImage:
    """PIL RGB -> uint8 [3, H, W] as it is; evals.sets.landmarks has made it no larger than wanted."""

    def __call__(self, image: Any) -> torch.Tensor:
        return pil_to_tensor(image)

    def __str__(self) -> str:
        return "whole image"
