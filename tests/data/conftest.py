"""Fixtures that several files here share."""

from helpers.packs import packed, tree  # noqa: F401
from helpers.trees import root  # noqa: F401
