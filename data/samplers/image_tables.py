"""The files that batch samplers read: tables with a row, or an entry, for each image of --data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.clusters import NO_CLUSTER, clusters_fingerprint, load_clusters
from data.neighbours import KeptNeighbours, left_out_rows, load_neighbours, neighbours_fingerprint
from runtime.settings import Declared, Setting


@dataclass(frozen=True)
class ImageTable:
    """A file that says something of each image of --data.

    ``declared``: its flag. ``what``: what it holds and how it is made, for the sentence that it is missing.
    ``load(path, fingerprint, images, teacher, flag, settings)`` reads and checks it, and returns it with
    warnings; ``fingerprint(table, settings)`` is that of what a sampler with these settings reads of it;
    ``left_out(table)`` are the images that it knows nothing of, int64 [m]; ``keep(table, kept)`` is the table of the
    images ``kept``, int64 [n], alone. ``required``: the sampler needs it.
    """

    declared: Declared
    what: str
    load: Callable[[str, str, int, Mapping[str, Any] | None, str, Mapping[str, Any]], tuple[Any, list[str]]]
    fingerprint: Callable[[Any, Mapping[str, Any]], str]
    left_out: Callable[[Any], np.ndarray]
    keep: Callable[[Any, np.ndarray], Any]
    required: bool = True

    @property
    def name(self) -> str:
        """Of its path among the settings: closek_info."""
        return self.declared.name

    @property
    def flag(self) -> str:
        """--closek-info."""
        return self.declared.flag


def _file(name: str, help: str, basic: bool = False) -> Declared:
    # Where the file lies says nothing of the run: what it holds is compared with the data.
    return Declared(name, Setting(help, metavar="FILE", resumable=True, basic=basic), str, None)


def _neighbours(path: str, fingerprint: str, images: int, teacher: Mapping[str, Any] | None, flag: str,
                settings: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    return load_neighbours(path, fingerprint, images, settings["total_k"], teacher, flag)


def _neighbours_fingerprint(ids: np.ndarray, settings: Mapping[str, Any]) -> str:
    return neighbours_fingerprint(ids, settings["total_k"])


def _clusters(path: str, fingerprint: str, images: int, teacher: Mapping[str, Any] | None, flag: str,
              settings: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    return load_clusters(path, fingerprint, images, teacher, flag)


NEAREST = ImageTable(
    _file("closek_info", "neighbour file of compute_knn.py mine (or of the original code), for --sampler cf and "
                         "cluster+cf; with --sampler cluster a cluster file, whose clusters are steps", basic=True),
    "the neighbours of --data in the teacher's space; make it with compute_knn.py mine",
    _neighbours, _neighbours_fingerprint, left_out_rows, KeptNeighbours)
FARTHEST = ImageTable(
    _file("fark_info", "file of the farthest images, of compute_knn.py mine --far: half of --nearest-k (rounded down) "
                       "are then far ones; default: none"),
    "the farthest images of --data in the teacher's space; make it with compute_knn.py mine --far",
    _neighbours, _neighbours_fingerprint, left_out_rows, KeptNeighbours, required=False)
CLUSTERS = ImageTable(
    _file("cluster_info", "cluster file of compute_knn.py cluster (or of the original code), for --sampler cluster and "
                          "cluster+cf"),
    "the clusters of --data in the teacher's space; make it with compute_knn.py cluster",
    _clusters, lambda labels, settings: clusters_fingerprint(labels),
    lambda labels: np.flatnonzero(labels == NO_CLUSTER), lambda labels, kept: labels[kept])
CLUSTERS_AS_NEAREST = dataclasses.replace(CLUSTERS, declared=NEAREST.declared)  # the original's command line
