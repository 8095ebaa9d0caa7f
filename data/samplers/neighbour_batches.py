"""The paper's batches: anchors, each with some of its nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from data.neighbours import row_reader
from data.samplers.image_tables import FARTHEST, NEAREST
from data.samplers.random_order import RandomSampler
from runtime.errors import UserError
from runtime.settings import Setting

Reader = Callable[[np.ndarray, np.ndarray], np.ndarray]
NearestK = Annotated[int, Setting("neighbours of each anchor in a batch; default {default}, as in the paper", least=0,
                                  metavar="N", basic=True)]
TotalK = Annotated[int, Setting("number of nearest images they are drawn from; default {default}, as in the paper",
                                least=0, metavar="N", basic=True)]


class NeighbourSampler(RandomSampler):
    """The paper's `cf`: each anchor is followed by nearest_k of its total_k nearest images.

    neighbours: integer [N, >= total_k], nearest first; may be a memory map, since only the drawn entries are read.
    Neighbours are drawn uniformly without replacement; if nearest_k equals total_k, they are the nearest in order.
    far: an optional table of the same form, farthest first; half of the nearest_k (rounded down) are then drawn from
    its first total_k in the same way, and follow the near ones. With nearest_k 0 this equals RandomSampler. An image
    can occur twice in a step, as in the paper.
    """

    about = "each anchor with its neighbours from --closek-info"
    tables = {"neighbours": NEAREST, "far": FARTHEST}

    def __init__(self, neighbours: np.ndarray, batch_size: int, nearest_k: NearestK = 15, total_k: TotalK = 31,
                 rank: int = 0, world_size: int = 1, seed: int = 0, far: np.ndarray | None = None):
        super().__init__(len(neighbours), batch_size, rank, world_size, seed)
        self.check(nearest_k=nearest_k, total_k=total_k)
        for table, flag in ((neighbours, "--closek-info"), (far, "--fark-info")):
            if table is not None and table.shape[1] < total_k:
                raise UserError(
                    f"--total-k {total_k} is more than the {table.shape[1]} neighbours per image in "
                    f"{flag}; lower it, or mine more with compute_knn.py"
                )
        if far is not None and len(far) != len(neighbours):
            raise UserError(f"--fark-info holds {len(far):,} images and --closek-info {len(neighbours):,}; give two "
                            "files that compute_knn.py mine wrote together")
        self.nearest_k, self.total_k = nearest_k, total_k
        self.read_near, self.read_far = row_reader(neighbours), None if far is None else row_reader(far)
        self.far_k = 0 if far is None else nearest_k // 2
        self.group_size = 1 + nearest_k

    @classmethod
    def check(cls, *, nearest_k: int, total_k: int, **_: Any) -> None:
        if nearest_k < 0:
            raise UserError(f"--nearest-k {nearest_k} is negative; give 0 (no neighbours) or more")
        if nearest_k > total_k:
            raise UserError(f"--nearest-k {nearest_k} is more than --total-k {total_k}, from which neighbours are "
                            "drawn; lower the first or raise the second")

    def _groups(self, anchors: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        parts = [anchors[:, None], self._draw(self.read_near, anchors, self.nearest_k - self.far_k, generator)]
        if self.far_k:
            parts.append(self._draw(self.read_far, anchors, self.far_k, generator))
        return np.concatenate(parts, axis=1)

    def _draw(self, read: Reader, anchors: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """count of the first total_k entries of each anchor's row, int64 [b, count]."""
        if count == 0 or self.nearest_k == self.total_k:
            columns = np.broadcast_to(np.arange(count), (len(anchors), count))
        else:  # the positions of the smallest of total_k random numbers: a uniform draw without replacement
            columns = generator.random((len(anchors), self.total_k)).argpartition(count, axis=1)[:, :count]
        return read(anchors, columns)
