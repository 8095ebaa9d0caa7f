"""evaluate.py knn: weighted k-NN accuracy."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from common import cli, evaluation
from data.splits import open_labelled
from evals.knn import PAPER_ROWS, knn_accuracy
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError

HELP = "weighted k-NN accuracy, the paper's rows"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser)
    group = parser.add_argument_group("k-NN")
    group.add_argument("--k", type=cli.number(int, 1), nargs="+", default=None, metavar="K",
                       help="neighbours that vote, at temperature 0.07; default: the original's four rows, k=10 T=.07, "
                            "k=10 T=1, k=20 T=.07, k=50 T=.07. compute_knn.py eval has more options")


def in_all(args: argparse.Namespace) -> evaluation.Steps:
    """What `evaluate.py all` with ``args`` runs of it."""
    return [("knn", evaluation.on_data(args))]


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Top-1 and top-5 of weighted k-NN: training images vote on each test image, as in compute_knn.py eval. Features
    and results are kept in --output."""
    with together(process):
        evaluation.open_output(args)
        train, test = open_labelled(args.data)
        train = train.subset(args.subset)
        rows = [(k, 0.07) for k in args.k] if args.k else [row for row in PAPER_ROWS if row[0] <= len(train)]
        if not rows or max(k for k, _ in rows) > len(train):
            raise UserError("--k asks for more neighbours than there are among "
                            f"{len(train)} training images; give smaller --k")
        network = evaluation.open_network(args, process)
    (bank, train), (queries, test) = (evaluation.features(network, source, args, process, f"{role} features")
                                      for role, source in (("train", train), ("test", test)))
    labels = [torch.from_numpy(source.labels) for source in (train, test)]
    scores = knn_accuracy(bank, labels[0], queries, labels[1], len(train.classes), rows, process.device,
                          progress=process.is_main, process=process)
    metrics = {f"k={row['k']} T={row['T']:g}": {"top1": row["top1"], "top5": row["top5"]} for row in scores}
    table = [{"vote": name, **values} for name, values in metrics.items()]
    return evaluation.finish("knn", args, process, [network], {"train": train, "test": test}, metrics, table)
