"""Translating the names and shapes in a file to those of a network, with a record of what each tensor became."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from checkpoints.authors import Trace, to_authors
from checkpoints.naming import find_scheme, rename
from checkpoints.timm_names import PATCHES, POSITIONS, to_timm


@dataclass(frozen=True)
class Translation:
    """The tensors of a branch under a network's names; for each, the names of the tensors that it was made from
    (``sources``); and the names of tensors that were not used (``left_out``)."""

    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    left_out: list[str]

    @functools.cached_property
    def shapes(self) -> dict[str, Size]:
        """{name: shape} of the tensors."""
        return {name: value.shape for name, value in self.tensors.items()}

    def notes(self, given: Mapping[str, Tensor]) -> list[str]:
        """What was done in addition to renaming, for the report."""
        joined = [made for made in self.sources.values() if len(made) > 1]
        said = [f"{sum(map(len, joined))} tensors joined into {len(joined)}"] if joined else []
        for name, value in self.tensors.items():
            if name.endswith("pos_embed") and (old := self._table(name, given)) is not None:
                sides = [math.isqrt(table.shape[-2]) for table in (old, value)]  # the class token does not change it
                if sides[0] != sides[1]:
                    said.append(f"positions resampled from {sides[0]}x{sides[0]} to {sides[1]}x{sides[1]}")
        tables = [name for name in self.resized(given) if name.endswith(POSITIONS[-1])]
        return said + ([f"{len(tables)} tables of relative positions resampled"] if tables else [])

    def resized(self, given: Mapping[str, Tensor]) -> list[str]:
        """Tensors whose number of elements differs from that of the only tensor they were made from."""
        uses = collections.Counter(name for made in self.sources.values() for name in made)
        return [name for name, value in self.tensors.items() if len(made := self.sources[name]) == 1
                and uses[made[0]] == 1 and value.numel() != given[made[0]].numel()]

    def _table(self, name: str, given: Mapping[str, Tensor]) -> Tensor | None:
        return next((given[x] for x in self.sources[name] if given[x].ndim in (2, 3)), None)


def translate(given: Mapping[str, Tensor], authors: str, model: nn.Module | None) -> Translation:
    """``given``, a branch without its prefix, for timm's network ``model`` or, with None, for those of torchvision and
    ours. ``authors`` is a prefix that timm's converter knows the branch by."""
    with Trace(given) as trace:
        named = to_authors(given)
        if model is None:
            scheme = find_scheme(named)
            named = {rename(name, scheme): value for name, value in named.items()}
        else:
            named = to_timm({authors + name: value for name, value in named.items()}, model)
    sources = {name: trace.sources(value) for name, value in named.items()}
    used = {name for made in sources.values() for name in made}
    return Translation(named, sources, [name for name in given if name not in used])


def without_numbers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the same names and shapes on the meta device."""
    return {name: torch.empty(value.shape, device="meta") for name, value in tensors.items()}


def image_size(shapes: Mapping[str, Size]) -> int | None:
    """The side of the images, in pixels, that the position embeddings (under the authors' names) are for; None if there
    are none or they are not for a square of patches."""
    table = next((shape for name, shape in shapes.items() if re.search(r"(^|\.)(pos_embed|positional_embedding)$", name)
                  and len(shape) in (2, 3)), None)
    patch = next((shapes[name][-1] for name in PATCHES if len(shapes.get(name, ())) == 4), None)
    if table is None or patch is None:
        return None
    side = math.isqrt(table[-2])
    return side * patch if table[-2] - side ** 2 in (0, 1) else None
