"""Batch samplers by name: which images make up each step on each rank. Index arithmetic only.

A batch is a list of keys (index, stamp). The stamp, epoch * 2**40 + position of the image in the epoch's
global sequence, is unique over a run and does not depend on the number of ranks; the loader derives an
image's augmentation from it. Every draw depends on (seed, epoch, step) alone, so that a step holds the same
images on one rank or on eight, and after a resume. Every rank composes the whole step and takes its part, so
that ranks never overlap, have equally many steps, and all know what the epoch has shown.

To add one: a file with a subclass of :class:`RandomSampler`, and a line in ``SAMPLERS``. The class says in ``tables``
which files it reads, in ``about`` what --help says of it; arguments of its constructor that carry a
:class:`runtime.settings.Setting` become flags.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from data.neighbours import same_left_out
from data.samplers.cluster_batches import ClusterSampler, shuffled_clusters
from data.samplers.clusters_in_turn import ClusterNeighbourSampler
from data.samplers.image_tables import ImageTable
from data.samplers.neighbour_batches import NeighbourSampler
from data.samplers.random_order import STAMPS_PER_EPOCH, Key, RandomSampler, Statistics
from data.samplers.whole_clusters import WholeClusterSampler
from data.sources import ImageSource
from runtime.settings import Declared, declared_among

__all__ = ["SAMPLERS", "STAMPS_PER_EPOCH", "ClusterNeighbourSampler", "ClusterSampler", "Key", "NeighbourSampler",
           "RandomSampler", "Statistics", "WholeClusterSampler", "build_sampler", "missing", "sampler_of", "settings",
           "shuffled_clusters", "tables", "used_by"]

SAMPLERS: dict[str, type[RandomSampler]] = {
    "cf": NeighbourSampler, "random": RandomSampler, "cluster": ClusterSampler, "cluster+cf": ClusterNeighbourSampler,
}


def settings() -> dict[str, dict[str, Declared]]:
    """The settings that samplers declare: {setting: {sampler: its declaration}}."""
    return declared_among(SAMPLERS)


def tables() -> dict[str, ImageTable]:
    """The files that samplers read, by the name of the setting that holds the path."""
    found: dict[str, ImageTable] = {}
    for table in (table for kind in SAMPLERS.values() for table in kind.tables.values()):
        found.setdefault(table.name, table)
    return found


def sampler_of(name: str, paths: Mapping[str, str | None]) -> type[RandomSampler]:
    """The sampler called ``name``; the one that stands in for it where ``paths`` {name of a table: its path} hold the
    files of that one and not its own."""
    kind = SAMPLERS[name]
    return kind.stand_in if kind.stand_in and missing(kind, paths) and not missing(kind.stand_in, paths) else kind


def missing(kind: type[RandomSampler], paths: Mapping[str, str | None]) -> list[ImageTable]:
    """The files that a sampler needs and that are not among ``paths``."""
    return [table for table in kind.tables.values() if table.required and not paths.get(table.name)]


def used_by(name: str) -> str:
    """``with --sampler cf and cluster+cf``: where the setting or file called ``name`` has an effect."""
    takes = [sampler for sampler, kind in SAMPLERS.items() if kind.takes(name)]
    words = f"with --sampler {' and '.join(takes)}"
    for sampler, kind in SAMPLERS.items():
        if kind.stand_in and kind.stand_in.takes(name) and sampler not in takes:
            words += f", and with {sampler} {kind.stand_in.where}"
    return words


def build_sampler(kind: type[RandomSampler], source: ImageSource, paths: Mapping[str, str | None],
                  teacher: Mapping[str, Any] | None = None, **options: Any,
                  ) -> tuple[RandomSampler, ImageSource, list[str]]:
    """A sampler over ``source``, its images, and what is to be said about its files.

    ``teacher``: what these should say of it (data.neighbours.load_neighbours); None: nothing.
    ``options``: batch_size, rank, world_size, seed and the settings of all samplers, of which it takes those that its
    constructor names. Images that could not be opened when its files were made are left out of the images. Raises
    :class:`UserError` where a file does not belong to them.
    """
    found: dict[str, Any] = {}
    notes, gone, fingerprints = [], {}, {}
    for argument, table in kind.tables.items():
        if path := paths.get(table.name):
            found[argument], more = table.load(path, source.fingerprint(), len(source), teacher, table.flag,
                                               options)
            notes += more
            fingerprints[table.name] = table.fingerprint(found[argument], options)
            gone[table.flag] = table.left_out(found[argument])
    notes += [kind.remark] * bool(kind.remark)
    if gone and len(images := same_left_out(gone)):
        notes.append(f"{len(images):,} images that could not be opened when {' and '.join(gone)} was made are left out")
        source = source.without(images)
        found = {argument: kind.tables[argument].keep(table, source.kept) for argument, table in found.items()}
    taken = inspect.signature(kind).parameters
    own = {"num_images": len(source), **options}
    sampler = kind(**found, **{name: value for name, value in own.items() if name in taken})
    sampler.table_fingerprints = fingerprints
    return sampler, source, notes
