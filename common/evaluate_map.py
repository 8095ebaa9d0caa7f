"""evaluate.py map: the feature spaces of teacher and students in two dimensions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from common import cli, evaluate_overlap, evaluation
from data.datasets import open_source
from evals.plane import METHODS, library, plane, turned
from evals.plane_picture import save_html, save_png
from runtime.agreement import together
from runtime.device import Process
from runtime.errors import UserError
from runtime.outputs import check_output_file

HELP = "feature spaces of teacher and students in 2-D: a picture, and a page that shows the image under the mouse"
ENDINGS = {"picture": ".png", "page": ".html"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    evaluation.add_common_flags(parser, data=evaluate_overlap.DATA, several=True,
                                share_of="each class's images (of all, where they have no labels); default 1")
    group = parser.add_argument_group("map")
    evaluation.add_teacher_flags(group, required=False)
    group.add_argument("--method", choices=METHODS, default="pca",
                       help="pca (default, the two directions in which features differ most), umap (needs umap-learn) "
                            "or tsne (needs scikit-learn)")
    group.add_argument("--images", type=cli.number(int, 3), default=2000, metavar="N",
                       help="images shown, evenly over the data; default 2000. The page holds a thumbnail of each")
    group.add_argument("--picture", default=None, metavar="PNG",
                       help="where the picture goes; default: map.png in --output if matplotlib is installed; 'none' "
                            "for no picture")
    group.add_argument("--page", default=None, metavar="HTML",
                       help="where the page goes; default: map.html in --output; 'none' for no page")


def run(args: argparse.Namespace, process: Process) -> dict[str, Any]:
    """Draw each network's L2-normalised trunk features in two dimensions, coloured by class if there are labels:
    map.png, and map.html, a single file that shows the image under the mouse and highlights it in every panel. The
    students' maps are rotated onto the teacher's, or onto the first map; "agreement" is the share of the teacher map's
    variance that they then explain, and "explained" the share of a space's variance on its first two principal axes."""
    with together(process):
        library(args.method)
        folder = evaluation.open_output(args)
        given = {"picture": args.picture, "page": args.page}
        paths = {name: Path(path or folder / f"map{ENDINGS[name]}") for name, path in given.items() if path != "none"}
        for name, path in paths.items():
            check_output_file(path, f"--{name}", [ENDINGS[name]], [*args.weights, *filter(None, [args.teacher])])
        source = open_source(args.data, "test").subset(args.subset)
        if len(source) > args.images:
            source = source.take(np.linspace(0, len(source) - 1, args.images).round().astype(np.int64))
        opened = {name: (args, file, "--weights")
                  for name, file in zip(evaluation.student_names(args.weights, args.names), args.weights, strict=True)}
        if args.teacher:
            opened = {"teacher": (evaluation.teacher_args(args), args.teacher, "--teacher"), **opened}
        nets = {name: evaluation.open_network(own, process, *which) for name, (own, *which) in opened.items()}
    spaces, kept = {}, source
    for name, (own, *_) in opened.items():
        spaces[name], kept = evaluation.features(nets[name], source, own, process, f"features of {name}")
    maps, metrics = {}, {}
    for name, features in spaces.items():
        points, explained = plane(features, args.method, args.seed)
        maps[name], agreement = turned(points, next(iter(maps.values()))) if maps else (points, None)
        metrics[name] = {"explained": explained, "agreement": agreement}
    title = f"{len(kept):,} images of {kept.title}, {args.method}"
    record = evaluation.finish("map", args, process, list(nets.values()), {"held-out": kept}, metrics,
                               [{"network": name, **values} for name, values in metrics.items()], f"map: {title}")
    for name, path in paths.items() if process.is_main else ():
        try:
            print(f"{name}: {(save_png if name == 'picture' else save_html)(path, maps, kept, title)}")
        except UserError as error:
            if given[name]:
                raise
            print(f"no {name}: {error}")
    return record
