"""The files that batch samplers read: tables with a row or an entry for each image of --data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data import clusters, neighbours
from data.clusters import NO_CLUSTER, clusters_fingerprint, load_clusters
from data.neighbours import KeptNeighbours, left_out_rows, load_neighbours, neighbours_fingerprint
from runtime.regular import expect_file
from runtime.settings import Declared, Setting


@dataclass(frozen=True)
class ImageTable:
    """A kind of file with information on each image of --data.

    ``declared``: its flag. ``what``: what it holds and how to make it, for the message that it is missing.
    ``load(path, fingerprint, images, teacher, flag, settings)`` reads and checks it, and returns it with
    warnings; ``fingerprint(table, settings)`` is the hash of the part that a sampler with these settings reads;
    ``left_out(table)`` gives the images that it has no information on, int64 [m]; ``keep(table, kept)`` is the table
    of only the images ``kept``, int64 [n]. ``required``: whether the sampler needs it.
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
        """The name of the setting that gives its path, such as closek_info."""
        return self.declared.name

    @property
    def flag(self) -> str:
        """The flag that gives its path, such as --closek-info."""
        return self.declared.flag


def _file(name: str, help: str, advice: str, basic: bool = False) -> Declared:
    # resumable: the path may change between resumes, because the content is compared with the data.
    return Declared(name, Setting(help, metavar="FILE", resumable=True, basic=basic, check=lambda path, flag: (
        expect_file(path, f"{flag} {path}", advice))), str, None)


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
                         "cluster+cf; with --sampler cluster, a cluster file, each cluster of which is a step",
          neighbours.GIVE, basic=True),
    "the neighbours of --data in the teacher's space; make it with compute_knn.py mine",
    _neighbours, _neighbours_fingerprint, left_out_rows, KeptNeighbours)
FARTHEST = ImageTable(
    _file("fark_info", "file of farthest images that compute_knn.py mine --far wrote; half of the --nearest-k images "
                       "(rounded down) are then drawn from it; default: none",
          neighbours.GIVE),
    "the farthest images of --data in the teacher's space; make it with compute_knn.py mine --far",
    _neighbours, _neighbours_fingerprint, left_out_rows, KeptNeighbours, required=False)
CLUSTERS = ImageTable(
    _file("cluster_info", "cluster file of compute_knn.py cluster (or of the original code), for --sampler cluster and "
                          "cluster+cf", clusters.GIVE),
    "the clusters of --data in the teacher's space; make it with compute_knn.py cluster",
    _clusters, lambda labels, settings: clusters_fingerprint(labels),
    lambda labels: np.flatnonzero(labels == NO_CLUSTER), lambda labels, kept: labels[kept])
CLUSTERS_AS_NEAREST = dataclasses.replace(CLUSTERS, declared=NEAREST.declared)  # as on the original's command line
