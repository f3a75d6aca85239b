"""Indexes that find the best keys of a query: exact, product keys, and by faiss."""

from __future__ import annotations

from typing import Any

from sapt_fast.checks import require_choice
from sapt_fast.pools.key_index.approximate import ApproximateIndex, HnswIndex, IvfIndex
from sapt_fast.pools.key_index.base import KeyIndex
from sapt_fast.pools.key_index.exact import ExactIndex
from sapt_fast.pools.key_index.product import ProductIndex

__all__ = [
    "KINDS",
    "ApproximateIndex",
    "ExactIndex",
    "HnswIndex",
    "IvfIndex",
    "KeyIndex",
    "ProductIndex",
    "key_index",
]

KINDS: dict[str, type[KeyIndex]] = {
    index.kind: index for index in (ExactIndex, ProductIndex, IvfIndex, HnswIndex)
}


def key_index(kind: str, num_keys: int, width: int, **options: Any) -> KeyIndex:
    """Makes an index by its kind.

    Args:
        kind: one of `KINDS`: "exact", "product", "ivf" or "hnsw".
        num_keys: N.
        width: D.
        options: further arguments of the kind's class.

    Raises:
        ValueError: if there is no such kind, or an argument does not fit.
        ImportError: if the kind needs faiss, and faiss is not installed.
    """
    require_choice("kind", kind, KINDS)
    make: Any = KINDS[kind]
    index: KeyIndex = make(num_keys, width, **options)
    return index
