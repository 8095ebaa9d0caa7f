#!/usr/bin/env python
"""Mine each image's neighbours in a network's feature space (mine), cluster images there by k-means (cluster), check
and draw either file (check), and compute weighted k-NN accuracy (eval).

    python compute_knn.py mine --data DIR --arch resnet50 --weights moco.pth --output nn/ --k 384
    python compute_knn.py cluster --data DIR --arch resnet50 --weights moco.pth --output nn/ --num-clusters 1000
    python compute_knn.py check nn/closek_info.npy --data DIR                 # also draws a picture
    python compute_knn.py eval --data ROOT --weights run/student.pth          # ROOT holds train/ and val/ or test/

Each also runs under torchrun; the processes then share the images.
"""

from __future__ import annotations

if __name__ == "__main__":
    from runtime.start import begin
    begin(__file__)

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import cli, cli_original, networks
from data.augment import eval_transform_name
from data.checks import (
    check_apart,
    check_clusters,
    check_neighbours,
    cluster_rows,
    contact_sheet,
    images_called,
    neighbour_rows,
)
from data.clusters import NO_CLUSTER, save_clusters
from data.datasets import open_source
from data.neighbours import place_neighbours, read_twin, refuse_other_file
from data.reading import Reading
from data.sources import ImageSource
from data.splits import open_labelled
from evals.knn import PAPER_ROWS, knn_accuracy
from evals.metrics import of_one_class
from models.teachers import FrozenEncoder
from runtime.agreement import together
from runtime.device import UNEVEN_WORK, Process, gather_objects
from runtime.errors import UserError, run_script
from runtime.outputs import check_output_file
from runtime.regular import expect_file
from runtime.settings import add_settings, declared
from search.backend import Search
from search.kmeans import kmeans
from search.mining import write_neighbours
from search.products import METRICS
from search.rowfile import RowFile, one_writer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: a sub-command and its flags."""
    parser = cli.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{mine,cluster,check,eval}")

    mine = commands.add_parser("mine", help="teacher features -> closek_info.npy", description=mine_neighbours.__doc__)
    _add_batch_flag(cli.add_data_flags(mine, "--data_path"))
    networks.add_weights_flags(mine)
    group = mine.add_argument_group("neighbours")
    group.add_argument("--output", metavar="DIR", required=True, help="folder for closek_info.npy and its .json")
    group.add_argument("--k", type=cli.number(int, 1), default=384, metavar="K",
                       help="neighbours an image; default 384, the original's (training uses the first --total-k)")
    group.add_argument("--far", action="store_true",
                       help="also write the K farthest to fark_info.npy, at little extra cost")
    group.add_argument("--metric", choices=METRICS, default="cosine",
                       help="similarity: cosine (default, the paper's), the inner product of the features as they "
                            "are, or Euclidean distance (l2)")
    _add_search_flags(mine)
    cli.add_device_flags(mine)

    _add_cluster_flags(commands)
    _add_check_flags(commands)

    evaluate = commands.add_parser("eval", help="weighted k-NN accuracy", description=evaluate_knn.__doc__)
    group = cli.add_data_flags(evaluate, "--data_path",
                               what="labelled images: a folder that holds train/ and val/ or test/, or a name (demo, "
                                    "digits, cifar10, cifar100, stl10)")
    _add_batch_flag(group, "--batch_size_per_gpu")
    networks.add_weights_flags(evaluate)
    group = evaluate.add_argument_group("k-NN")
    group.add_argument("--k", type=cli.number(int, 1), nargs="+", default=None, metavar="K",
                       help="neighbours that vote, each with every --temp; default: the original's four rows, "
                            "k=10 T=.07, k=10 T=1, k=20 T=.07, k=50 T=.07")
    group.add_argument("--temp", "-T", type=cli.number(float, above=0), nargs="+", default=None, metavar="T",
                       help="temperatures of the vote exp(cosine / T); default 0.07 where --k is given")
    group.add_argument("--json", action="store_true", help="print only one JSON object")
    _add_search_flags(evaluate)
    cli.add_device_flags(evaluate)
    return parser.parse_args(cli_original.translate("compute_knn.py", argv))


check_flags = cli.check_files


def _add_cluster_flags(commands: argparse._SubParsersAction) -> None:
    cluster = commands.add_parser("cluster", help="teacher features -> clusters_K.pth",
                                  description=cluster_images.__doc__)
    _add_batch_flag(cli.add_data_flags(cluster, "--data_path"))
    networks.add_weights_flags(cluster)
    group = cluster.add_argument_group("k-means")
    group.add_argument("--output", metavar="DIR", required=True, help="folder for clusters_K.pth and its .json")
    group.add_argument("--num-clusters", type=cli.number(int, 1), required=True, metavar="K", help="clusters")
    add_settings(group, kmeans)
    networks.add_features_flags(cluster.add_argument_group("features"))
    cli.add_device_flags(cluster)


def _add_check_flags(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser("check", help="does a neighbour or cluster file belong to this data?",
                                description=check_file.__doc__)
    check.add_argument("file", metavar="FILE",
                       help="closek_info.npy, fark_info.npy or clusters_K.pth, the original's too"
                       ).check = lambda path, _: expect_file(path, path, "give a file that compute_knn.py writes")
    declared(Reading)["image_size"].add_to(cli.add_data_flags(check, "--data_path", opens_images=False))
    networks.add_weights_flags(check, required=False, why="; then the picture shows each image's cosine to its anchor")
    group = check.add_argument_group("picture")
    group.add_argument("--sheet", metavar="PNG", default=None,
                       help="where the picture goes; default: FILE's name with .png; 'none' for no picture")
    group.add_argument("--anchors", type=cli.number(int, 1, 1000), default=8, metavar="N",
                       help="rows of the picture, drawn by --seed; default 8")
    group.add_argument("--show", type=cli.number(int, 1, 100), default=8, metavar="N",
                       help="neighbours shown of each anchor; default 8")
    cli.add_device_flags(check)


def _add_batch_flag(group: cli.Group, *names: str) -> None:
    group.add_argument("--batch-size", *names, type=cli.number(int, 1), default=256, metavar="N",
                       help="images per forward pass; default 256, the original's")


def _add_search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("features and search")
    networks.add_features_flags(group)
    add_settings(group, Search)


def prepare(args: argparse.Namespace, process: Process, whole: ImageSource, names: Sequence[str], **settings: Any,
          ) -> tuple[FrozenEncoder, dict[str, Any], dict[str, Any], list[Path]]:
    """The network, its identity, the record of the output files (images, network, ``settings``) and their paths, for
    ``names`` in --output. Refuses a folder that cannot be written or that holds such files with another record."""
    encoder, identity = networks.open_network(args, process)
    check_apart(args.output, args.data)
    spec, paths = encoder.backbone.spec, [Path(args.output) / name for name in names]
    record = {"fingerprint": whole.fingerprint(), "metric": args.metric, "teacher_sha256": identity["sha256"],
              "teacher_arch": spec.arch, "stem": spec.stem, "image_size": spec.image_size, "feature": spec.feature,
              "transform": eval_transform_name(spec.image_size), **settings}
    for path in paths:
        check_output_file(path, "--output", inputs=[args.data, args.weights])
        refuse_other_file(path, record)
    return encoder, identity, record, paths


def mine_neighbours(args: argparse.Namespace, process: Process) -> None:
    """Write each image's K nearest others in the network's feature space: closek_info.npy, int64 [N, K], and
    closek_info.json, which records the images, the network and the settings. The paper's transform: the shorter side to
    1.05 x S, bicubic, centre crop S. An interrupted run resumes with the features and neighbours that are missing; with
    torchrun the processes share both, and --output and --features must be on a disk that all of them see. With
    --on-bad-image skip an unreadable image is nobody's neighbour, its row holds -1, and training leaves it out."""
    with together(process):
        whole = open_source(args.data).subset(args.subset)
        check_k(args.k, whole)
        how = cli.take(Search, args)
        backend = how.function()
        kinds = {"closek_info": "nearest"} | ({"fark_info": "farthest"} if args.far else {})
        encoder, identity, info, paths = prepare(args, process, whole, [f"{name}.npy" for name in kinds])
    features, source = networks.features_of(encoder, whole, args, process, "features", identity)
    check_k(args.k, source)
    networks.refuse_zero_rows(features, networks.share_of(len(source), process), source, process)

    said = {**info, "source": whole.title, "left_out": len(source.left_out)}
    what = {**said, **networks.features_identity(encoder, whole, args, identity), "opened": source.fingerprint(),
            "dtype": args.dtype, "products": args.products, "backend": args.backend}
    with one_writer(paths[0], process):  # the farthest are always written along with the nearest
        for path in paths:  # another job may have just written them
            refuse_other_file(path, info)
        files = [RowFile(path, what, len(whole), args.k, np.int64, process) for path in paths]
        with together(process):
            write_neighbours(files, networks.share_of(len(whole), process), source.kept, lambda rows: backend(
                None, features, args.k, rows=rows, far=args.far, metric=args.metric, memory=how.bytes,
                device=process.device, label="neighbours", progress=process.is_main))
        for file, (name, kind) in zip(files, kinds.items(), strict=True):
            file.finish(lambda rows, sums, name=name: place_neighbours(rows, Path(args.output), name, said, sums))
            if process.is_main:
                print(f"{file.path}: {args.k} {kind} of {len(source):,} images, {info['teacher_arch']}")


def check_k(k: int, source: ImageSource) -> None:
    """Refuse more neighbours than there are other images."""
    if k >= len(source):
        raise UserError(f"--k {k} is more neighbours than {len(source)} images have; give at most {len(source) - 1}")


def cluster_images(args: argparse.Namespace, process: Process) -> None:
    """Cluster the images by k-means of the network's L2-normalised features: clusters_K.pth, the original's
    {'batches': {cluster: [indices]}}, and clusters_K.json, which records the images, the network and the settings. With
    --on-bad-image skip an unreadable image is in no cluster, and training leaves it out."""
    with together(process):
        whole = open_source(args.data).subset(args.subset)
        check_number(args.num_clusters, whole)
        encoder, identity, info, _ = prepare(args, process, whole, [f"clusters_{args.num_clusters}.pth"],
                                             init=args.init, seed=args.seed, mini_batch=args.batch_rows)
    features, source = networks.features_of(encoder, whole, args, process, "features", identity)
    check_number(args.num_clusters, source)
    mine = networks.share_of(len(source), process)
    networks.refuse_zero_rows(features, mine, source, process)
    found = kmeans(features[mine.start:mine.stop], args.num_clusters, process, unit_rows=True, seed=args.seed,
                   progress=process.is_main, **cli.values(kmeans, args))
    labels = np.full(len(whole), NO_CLUSTER)
    labels[source.kept] = np.concatenate(gather_objects(found.labels.numpy()))
    if not process.is_main:
        return
    info |= {"source": whole.title, "passes": found.passes, "converged": found.converged, "objective": found.objective}
    path = save_clusters(Path(args.output), labels, args.num_clusters, info)
    print(f"{path}: {len(source):,} images in {args.num_clusters:,} clusters of {int(found.sizes.min()):,} to "
          f"{int(found.sizes.max()):,}, {info['teacher_arch']}; objective {found.objective:.6g} after {found.passes} "
          f"passes{'' if found.converged else ', not converged (--passes)'}")


def check_number(clusters: int, source: ImageSource) -> None:
    """Refuse more clusters than there are images."""
    if clusters > len(source):
        raise UserError(f"--num-clusters {clusters} is more than the {len(source)} images; give at most "
                        f"{len(source)}")


def check_file(args: argparse.Namespace, process: Process) -> None:
    """Check that a neighbour or cluster file is valid and belongs to a data set (exit code 0) or say what is wrong with
    it (exit code 2), and draw a few images with their neighbours, nearest first."""
    if not process.is_main:
        return
    path, source = Path(args.file), open_source(args.data).subset(args.subset)
    sheet = Path(args.sheet or path.with_suffix(".png"))
    if args.sheet != "none":
        check_output_file(sheet, "--sheet", [".png"], [path, *images_called(source, sheet.name)])
    is_clusters = path.suffix in (".pth", ".pt")
    for sentence in (check_clusters if is_clusters else check_neighbours)(path, source):
        print(sentence)
    if args.sheet == "none":
        return
    if is_clusters:
        rows, notes = cluster_rows(path, source, args.anchors, args.show, args.seed), []
    else:
        rows, notes = neighbour_rows(path, source, args.anchors, args.show, args.seed)
    cosines = None
    if args.weights:
        encoder, identity = networks.open_network(args, process)
        made_by = (read_twin(path) or {}).get("teacher_sha256", identity["sha256"])
        notes += [f"--weights {args.weights} is not the network whose features the file was made from"] * (
            made_by != identity["sha256"])
        cosines = [networks.cosines(encoder, source, [i for _, group in row for i in group]) for row in rows]
    contact_sheet(source, rows, sheet, cosines)
    print(*notes, f"Picture: {sheet}", sep="\n")


def evaluate_knn(args: argparse.Namespace, process: Process) -> None:
    """Top-1 and top-5 of weighted k-NN: training images vote on each test image. Only the network's trunk is scored,
    without projection or head."""
    with together(process):
        train, test = open_labelled(args.data)
        train = train.subset(args.subset)
        rows = [(k, t) for k in args.k for t in args.temp or [0.07]] if args.k else (
            [(k, t) for k in (10, 20, 50) for t in args.temp] if args.temp else PAPER_ROWS)
        widest = max(k for k, _ in rows)
        if widest > len(train):
            raise UserError(f"--k {widest} is more neighbours than the {len(train)} training images; "
                            f"give --k with at most {len(train)}")
        how = cli.take(Search, args)
        backend = how.function()
        encoder, identity = networks.open_network(args, process)
    (bank, train), (queries, test) = (
        networks.features_of(encoder, source, args, process, label, identity)
        for source, label in ((train, "train features"), (test, "test features")))
    labels = [torch.from_numpy(source.labels) for source in (train, test)]
    scores = knn_accuracy(bank, labels[0], queries, labels[1], len(train.classes), rows, process.device,
                          progress=process.is_main, process=process, backend=backend, memory=how.bytes)
    if not process.is_main:
        return
    if args.json:
        print(json.dumps({"weights": args.weights, **encoder.backbone.spec.record(), "sha256": identity["sha256"],
                          "data": args.data, "train_images": len(train), "test_images": len(test),
                          "classes": len(train.classes), "knn": scores}))
        return
    print(f"{len(train):,} training and {len(test):,} test images, {len(train.classes)} classes")
    for row in scores:
        print(f"k={row['k']:<4d} T={row['T']:<5g} top-1 {row['top1']:6.2f} %   top-5 {row['top5']:6.2f} %")
    if note := of_one_class(train.classes):
        print(note)


COMMANDS: dict[str, Callable[[argparse.Namespace, Process], None]] = {
    "mine": mine_neighbours, "cluster": cluster_images, "check": check_file, "eval": evaluate_knn}


def main() -> None:
    """Parse, join the job, run the sub-command."""
    args = parse_args()
    with cli.joined(args, patience=UNEVEN_WORK, float64=True) as process:
        cli.say_unused(args, process)
        COMMANDS[args.command](args, process)


if __name__ == "__main__":
    run_script(main, less_memory="lower --batch-size, or --memory if it is searching")
