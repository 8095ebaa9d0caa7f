"""Batch samplers by name: they decide which images make up each step on each rank, and handle only indices.

A batch is a list of keys (index, stamp). The stamp, epoch * 2**40 + position of the image in the epoch's
global sequence, is unique in a run and does not depend on the number of ranks; the loader derives an
image's augmentation from it. Random numbers depend only on (seed, epoch, step), so a step has the same
images on one rank or on eight, and after a resume. Every rank composes the whole step and takes its part of it, so
ranks never overlap, have the same number of steps, and all know which images the epoch has shown.

To add a sampler: a file with a subclass of :class:`RandomSampler`, and a line in ``SAMPLERS``. The class lists in
``tables`` the files that it reads, and describes itself in ``about`` for --help; arguments of its constructor with
a :class:`runtime.settings.Setting` become flags.
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
    """All settings that samplers declare: {setting: {sampler: its declaration}}."""
    return declared_among(SAMPLERS)


def tables() -> dict[str, ImageTable]:
    """All files that samplers read, by the name of the setting that gives the path."""
    found: dict[str, ImageTable] = {}
    for table in (table for kind in SAMPLERS.values() for table in kind.tables.values()):
        found.setdefault(table.name, table)
    return found


def sampler_of(name: str, paths: Mapping[str, str | None]) -> type[RandomSampler]:
    """The sampler called ``name``; or its stand-in, if ``paths`` {name of a table: its path} has the files that the
    stand-in needs and lacks those of the sampler itself."""
    kind = SAMPLERS[name]
    return kind.stand_in if kind.stand_in and missing(kind, paths) and not missing(kind.stand_in, paths) else kind


def missing(kind: type[RandomSampler], paths: Mapping[str, str | None]) -> list[ImageTable]:
    """The files that a sampler needs but ``paths`` does not give."""
    return [table for table in kind.tables.values() if table.required and not paths.get(table.name)]


def used_by(name: str) -> str:
    """For example ``with --sampler cf and cluster+cf``: the samplers that use the setting or file called ``name``."""
    takes = [sampler for sampler, kind in SAMPLERS.items() if kind.takes(name)]
    words = f"with --sampler {' and '.join(takes)}"
    for sampler, kind in SAMPLERS.items():
        if kind.stand_in and kind.stand_in.takes(name) and sampler not in takes:
            words += f", and with {sampler} {kind.stand_in.where}"
    return words


def build_sampler(kind: type[RandomSampler], source: ImageSource, paths: Mapping[str, str | None],
                  teacher: Mapping[str, Any] | None = None, **options: Any,
                  ) -> tuple[RandomSampler, ImageSource, list[str]]:
    """Build a sampler over ``source``. Returns the sampler, the images that it draws from, and notes about its files.

    ``teacher``: the teacher that its files should come from (see data.neighbours.load_neighbours); None: any.
    ``options``: batch_size, rank, world_size, seed and the settings of all samplers; the constructor gets those that it
    names. Images that could not be opened when the sampler's files were made are left out. Raises :class:`UserError` if
    a file does not belong to the images.
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
