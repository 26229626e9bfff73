"""Rows of memory-mapped arrays, many at once: chunks by their global row, and their stored neighbors."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retro_data.errors import RetroDataError
from retro_data.store import ChunkStore, DatabaseStores

Array = np.ndarray[Any, Any]


class ChunkReader:
    """Reads chunks by global row, each with the start of the chunk that follows it in its store.

    A chunk and the next one lie side by side, so both come by one read of a longer item, out of a
    view whose items overlap. Opaque items (`V…`) are what numpy moves fastest.

    Args:
        stores: the stores, in the order of global rows.
        follow: tokens to take of the chunk that follows.
        prefetch: see `_Rows`.
    """

    def __init__(self, stores: DatabaseStores, follow: int, prefetch: bool) -> None:
        self.first_rows = np.asarray(stores.first_rows, np.int64)
        self.num_rows = len(stores)
        self.chunk_size = stores.stores[0].chunk_size
        self.stores = [_StoreReader(store, follow, prefetch) for store in stores.stores]
        self.dtype = np.result_type(*[store.tokens.dtype for store in stores.stores])
        documents = [len(store.documents) for store in stores.stores]
        self.first_documents = np.cumsum([0, *documents])

    def __call__(self, rows: Array) -> tuple[Array, Array, Array]:
        """What lies at rows (R,) int64; -1 stands for no chunk.

        Returns:
            tokens (R, chunk_size + follow), as stored, meaningless where a length is 0; lengths
            (R, 2) of the chunk and of the one that follows, 0 for no chunk and where that is of
            another document; documents (R,), global, meaningless for no chunk.

        Raises:
            RetroDataError: a row beyond the last.
        """
        top = rows.max(initial=-1)
        if top >= self.num_rows:
            raise RetroDataError(
                f"chunk {top} was asked for, a neighbor perhaps, where there are {self.num_rows}. "
                "`retro-data verify` lists damaged artifacts."
            )
        if len(self.stores) == 1:
            return self.stores[0](rows, top)
        parts = []
        for store, chosen, local in _by_store(rows, self.first_rows):
            tokens, lengths, documents = self.stores[store](local, local.max())
            parts.append((chosen, tokens, lengths, self.first_documents[store] + documents))
        columns = tuple(zip(*parts, strict=True))
        back = np.argsort(np.concatenate(columns[0]))
        return (
            np.concatenate(columns[1], dtype=self.dtype)[back],
            np.concatenate(columns[2])[back],
            np.concatenate(columns[3])[back],
        )


class _StoreReader:
    """`ChunkReader` of one store."""

    def __init__(self, store: ChunkStore, follow: int, prefetch: bool) -> None:
        self.store = store
        self.last = len(store) - 1
        self.tokens = _Rows(store.tokens, store.chunk_size + follow, prefetch)
        self.lengths = _Rows(store.lengths, 2, prefetch)
        self.documents = _Rows(store.document_of_chunk, 2, prefetch)
        self.no_lengths = opaque_item(self.lengths.dtype, store.lengths.dtype, 0)

    def __call__(self, rows: Array, top: int) -> tuple[Array, Array, Array]:
        start = np.maximum(rows, 0)
        ends_store = top == self.last >= 0  # nothing follows the last row: it is read by itself
        if ends_store:
            start = np.minimum(start, max(self.last - 1, 0))
        tokens, lengths, documents = self.tokens(start), self.lengths(start), self.documents(start)
        lengths[rows < 0] = self.no_lengths
        tokens = tokens.view(self.store.tokens.dtype).reshape(len(rows), -1)
        lengths = lengths.view(self.store.lengths.dtype).reshape(-1, 2)
        documents = documents.view(self.store.document_of_chunk.dtype).reshape(-1, 2)
        lengths[:, 1] *= documents[:, 0] == documents[:, 1]
        if ends_store:
            last = np.flatnonzero(rows == self.last)
            tokens[last, : self.store.chunk_size] = self.store.tokens[self.last]
            lengths[last] = self.store.lengths[self.last], 0
            documents[last, 0] = self.store.document_of_chunk[self.last]
        return tokens, lengths, documents[:, 0]


class NeighborReader:
    """Reads the first `num_neighbors` stored ids of chunks by global row.

    Args:
        ids: (N, K) of each store; None for one that is never asked.
        first_rows: global row of the first chunk of each store.
        prefetch: see `_Rows`.
    """

    def __init__(
        self,
        ids: Sequence[Array | None],
        first_rows: Sequence[int],
        num_neighbors: int,
        prefetch: bool,
    ) -> None:
        self.first_rows = np.asarray(first_rows, np.int64)
        self.num_neighbors = num_neighbors
        self.ids = [None if a is None else _Ids(a, num_neighbors, prefetch) for a in ids]

    def __call__(self, rows: Array) -> Array:
        """Neighbor ids (R, num_neighbors) int64 of rows (R,) int64; -1 for row -1."""
        if len(self.ids) == 1:
            return self._read(0, rows).astype(np.int64)
        found = np.empty((len(rows), self.num_neighbors), np.int64)
        for store, chosen, local in _by_store(rows, self.first_rows):
            found[chosen] = self._read(store, local)
        return found

    def _read(self, store: int, rows: Array) -> Array:
        ids = self.ids[store]
        if ids is None:  # only rows of padding are looked for here
            return np.full((len(rows), self.num_neighbors), -1)
        return ids(rows)


class _Ids:
    """`NeighborReader` of one store."""

    def __init__(self, ids: Array, num_neighbors: int, prefetch: bool) -> None:
        self.dtype: np.dtype[Any] = ids.dtype
        self.items = _Rows(ids, num_neighbors, prefetch)
        self.none = opaque_item(self.items.dtype, ids.dtype, -1)

    def __call__(self, rows: Array) -> Array:
        found = self.items(np.maximum(rows, 0))
        found[rows < 0] = self.none
        return found.view(self.dtype).reshape(len(rows), -1)


def _by_store(rows: Array, first_rows: Array) -> Iterator[tuple[int, Array, Array]]:
    """Each store that is asked: its number, the places of its rows in `rows`, its own rows."""
    stores = np.searchsorted(first_rows, rows, side="right") - 1
    stores = np.maximum(stores, 0)  # row -1, which is no chunk, is asked of the first
    for store in np.unique(stores):
        chosen = np.flatnonzero(stores == store)
        yield int(store), chosen, np.maximum(rows[chosen] - first_rows[store], -1)


class _Rows:
    """Gathers `width` items from the start of each row of an array on, as one opaque item.

    With `prefetch` the kernel is asked for all pages of a gather at once, and for nothing more: by
    itself it would read them one after the other, each with what lies around it.
    """

    def __init__(self, array: Array, width: int, prefetch: bool) -> None:
        self.items = _overlapping(array, width)
        self.dtype = self.items.dtype
        self.map: mmap.mmap | None = None
        if prefetch and isinstance(array, np.memmap) and hasattr(mmap, "MADV_WILLNEED"):
            self.map, self.start = array._mmap, array.offset  # type: ignore[attr-defined]
            self.map.madvise(mmap.MADV_RANDOM)

    def __call__(self, rows: Array) -> Array:
        """Items of rows (R,) that have so many."""
        if self.map is not None and len(rows):
            self._ask(self.map, rows)
        found: Array = self.items[rows]
        return found

    def _ask(self, stored: mmap.mmap, rows: Array) -> None:
        last_byte = self.items.itemsize - 1
        steps = np.array([*range(0, last_byte, mmap.PAGESIZE), last_byte])
        begin = self.start + rows * self.items.strides[0]
        pages = np.unique((begin[:, None] + steps) // mmap.PAGESIZE)
        breaks = np.flatnonzero(np.diff(pages) > 1)
        firsts, lasts = pages[[0, *(breaks + 1)]], pages[[*breaks, -1]]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            size = (last - first + 1) * mmap.PAGESIZE
            stored.madvise(mmap.MADV_WILLNEED, first * mmap.PAGESIZE, size)


def _overlapping(array: Array, width: int) -> Array:
    """`width` items from the start of each row on, as one opaque item; rows that have so many."""
    array = np.asarray(array)  # an ndarray is read faster than the memory map it views
    row_items = math.prod(array.shape[1:])
    while array.size < width:  # a view needs an item, if only one that is never looked at
        array = np.concatenate([array, np.zeros((1, *array.shape[1:]), array.dtype)])
    rows = (array.size - width) // row_items + 1
    size = array.dtype.itemsize
    return np.ndarray((rows,), f"V{width * size}", array, strides=(row_items * size,))


def opaque_item(opaque: np.dtype[Any], dtype: np.dtype[Any], value: int) -> Any:
    """An opaque item that holds `value` throughout."""
    return np.full(opaque.itemsize // dtype.itemsize, value, dtype).view(opaque)[0]
