"""Settings of the exact search: this package or faiss, numeric precision, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from runtime.settings import Setting
from search.exact import Block, search
from search.faiss_search import search_faiss
from search.products import PRODUCTS


@dataclass(frozen=True)
class Search:
    """Settings of an exact search; none of them changes the neighbours."""

    memory: Annotated[float | None, Setting(
        "GiB of GPU or main memory that the search of one process may use besides the features; less is a "
        "little slower; default: half of what is free", above=0, metavar="GB")] = None
    products: Annotated[str, Setting(
        "precision when finding candidates: float32 (default), or on a GPU, faster, tf32 or bf16, whose candidates "
        "are scored again in float32; the neighbours are the same", choices=PRODUCTS)] = "float32"
    backend: Annotated[str, Setting(
        "torch (default) or faiss's exact search on the CPU, if faiss-cpu is installed; --memory and --products are "
        "torch's", choices=("torch", "faiss"))] = "torch"

    def function(self) -> Callable[..., Iterator[Block]]:
        """:func:`search.exact.search`, or faiss's. Raises :class:`UserError` if that is not installed."""
        return search_faiss() if self.backend == "faiss" else functools.partial(search, products=self.products)

    @property
    def bytes(self) -> int | None:
        """--memory; None: the search looks at what is free."""
        return None if self.memory is None else int(self.memory * 2**30)
