"""Vectors in blocks, the lists that a search makes of them, and what share of the truth these hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from retro_data.errors import RetroDataError

Metric = Literal["l2", "ip"]

_DTYPES = ("float16", "float32")


class Neighbors(NamedTuple):
    """The k nearest rows of each query, nearest first.

    ids: (Q, k) int64 database rows; -1 where there is no further neighbor, at the end of a row.
    distances: (Q, k) float32; squared L2 (+inf beside -1), or the inner product (-inf beside -1).
    """

    ids: np.ndarray
    distances: np.ndarray


class Vectors:
    """A matrix kept as row blocks (arrays or memory maps); row i is row i of the concatenation.

    blocks: (rows, d) arrays, all float16 or all float32, in order; blocks without rows are fine.
    Raises RetroDataError for no block at all, or blocks that differ in width or dtype.
    """

    def __init__(self, blocks: Sequence[np.ndarray]) -> None:
        kinds = {(block.dtype.name, block.shape[1:]) for block in blocks}
        if len(kinds) != 1 or blocks[0].ndim != 2 or blocks[0].dtype.name not in _DTYPES:
            found = ", ".join(f"{name} {('rows', *shape)}" for name, shape in sorted(kinds))
            raise RetroDataError(
                f"vectors need at least one block, all (rows, d) of one width d and one dtype, "
                f"float16 or float32; found {found or 'no block'}. Give the blocks of one encoder."
            )
        self._blocks = list(blocks)
        self._starts = np.concatenate([[0], np.cumsum([len(block) for block in blocks])])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, d)."""
        return int(self._starts[-1]), int(self._blocks[0].shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """float16 or float32."""
        return np.dtype(self._blocks[0].dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), 0 <= start <= stop <= N: a view where one block holds them."""
        block = int(np.searchsorted(self._starts[1:-1], start, side="right"))
        begin = int(self._starts[block])
        if stop <= self._starts[block + 1]:
            return self._blocks[block][start - begin : stop - begin]
        return self.take(np.arange(start, stop))

    def take(self, ids: np.ndarray) -> np.ndarray:
        """A copy of the rows `ids`, (n,) int64 ascending; visits only blocks that hold some.

        Raises IndexError for an id below 0 or beyond the last row.
        """
        if len(ids) and (ids[0] < 0 or ids[-1] >= self._starts[-1]):
            raise IndexError(f"rows {ids[0]} to {ids[-1]} of {self._starts[-1]}")
        out = np.empty((len(ids), self.shape[1]), self.dtype)
        cuts = np.searchsorted(ids, self._starts)
        for block in np.flatnonzero(np.diff(cuts)):
            part = slice(cuts[block], cuts[block + 1])
            out[part] = np.take(self._blocks[block], ids[part] - self._starts[block], axis=0)
        return out


def recall(ids: np.ndarray, truth: np.ndarray) -> float:
    """recall@k: the share of the true neighbors that were found, in any order.

    ids: (Q, k) and truth: (Q, k'), int64 rows of the database; -1 is no neighbor in either.
    1.0 where `truth` holds none. Raises RetroDataError for another number of queries.
    """
    if len(ids) != len(truth):
        raise RetroDataError(f"recall of {len(ids)} queries against truth for {len(truth)}")
    true_row, true_column = np.nonzero(truth >= 0)
    if not len(true_row):
        return 1.0
    found_row, found_column = np.nonzero(ids >= 0)
    span = int(max(ids.max(initial=0), truth.max(initial=0))) + 1
    return float(
        np.isin(
            true_row * span + truth[true_row, true_column],
            found_row * span + ids[found_row, found_column],
        ).mean()
    )
