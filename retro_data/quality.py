"""What can be said of stored neighbors without a model: distances, hubs, and what they foretell.

All of it is of samples drawn alike from the whole, of a size that no corpus changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.database import Database
from retro_data.row_readers import ChunkReader
from retro_data.store import ChunkStore

Array = np.ndarray[Any, Any]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DISTANCE_CHUNKS = 65_536  # whose distances are looked at
FORETOLD_CHUNKS = 4096  # whose successors are looked at
HUB_ROWS = 2**20  # database chunks whose hits are counted, at most
HUB_SHARE = 0.01  # of the chunks that may be neighbors: the most hit ones are called hubs
HUB_NEAREST = 10  # neighbors of each chunk that count as hits
READ_ROWS = 2**18  # rows of ids read at once
PAIRS_AT_ONCE = 256  # texts that are compared


def stored_quality(folder: Path, chunks: Path, database: Database) -> dict[str, Any]:
    """`neighbor_quality` of what an artifact stores.

    Args:
        folder: of ids and distances of neighbors.
        chunks: folder of the store whose neighbors they are.
    """
    ids, distances = (
        artifact.open_array(folder / name)
        for name in (store.NEIGHBOR_IDS, store.NEIGHBOR_DISTANCES)
    )
    queries = ChunkStore(chunks)
    reader = ChunkReader(database.stores, queries.chunk_size, prefetch=False)
    return neighbor_quality(queries, ids, distances, reader, database.admitted)


def neighbor_quality(
    chunks: ChunkStore, ids: Array, distances: Array, reader: ChunkReader, admitted: Array
) -> dict[str, Any]:
    """Figures of the neighbors of one store.

    Args:
        chunks: the store.
        ids: (N, K) database rows of its neighbors, nearest first, -1 for none.
        distances: (N, K) float32.
        reader: of the database, each chunk with the one that follows it.
        admitted: (M,) bool, which database rows may be neighbors.

    Returns:
        distances: quantiles of those of the nearest and of the last stored neighbor.
        hub_share: as `hub_share`.
        successor_bigrams: as `successor_bigrams`, of the nearest neighbor, and of a random chunk.
    """
    rng = np.random.default_rng(0)
    rows = sample_rows(rng, len(ids), DISTANCE_CHUNKS)
    foretold = rows[: 4 * FORETOLD_CHUNKS]
    foretold = foretold[_has_successor(chunks, foretold) & (ids[foretold, 0] >= 0)]
    foretold = foretold[:FORETOLD_CHUNKS]
    nearest = ids[foretold, 0].astype(np.int64)
    random = _random_rows(rng, admitted, len(foretold))
    return {
        "distances": {
            "nearest": _quantiles(distances[rows, 0], ids[rows, 0] >= 0),
            "last": _quantiles(distances[rows, -1], ids[rows, -1] >= 0),
        },
        "hub_share": hub_share(ids, admitted),
        "successor_bigrams": {
            "nearest": successor_bigrams(chunks, foretold, reader, nearest),
            "random": successor_bigrams(chunks, foretold, reader, random),
        },
    }


def hub_share(ids: Array, admitted: Array) -> float | None:
    """Share of hits that fall on the most hit hundredth of the chunks that may be neighbors.

    It is a hundredth where all are hit alike. Of a large database every so many-th chunk is counted.

    Args:
        ids: (N, K), of which the first HUB_NEAREST are hits.
        admitted: (M,) bool.

    Returns:
        None where nothing was hit.
    """
    stride = _stride(admitted)
    counted = admitted[::stride]
    hits = np.zeros(len(counted), np.int64)
    for start in range(0, len(ids), READ_ROWS):
        found = np.asarray(ids[start : start + READ_ROWS, :HUB_NEAREST]).ravel()
        found = found[found >= 0]
        if stride > 1:
            found = found[found % stride == 0] // stride
        hits += np.bincount(found, minlength=len(hits))
    hits = np.sort(hits[counted])[::-1]
    if not hits.any():
        return None
    return float(hits[: max(1, round(HUB_SHARE * len(hits)))].sum() / hits.sum())


def successor_bigrams(
    chunks: ChunkStore, rows: Array, reader: ChunkReader, neighbors: Array
) -> float | None:
    """Share of the bigrams of the successors of chunks that stand in a neighbor and its continuation.

    Args:
        rows: (n,) chunks that have a successor in their document.
        neighbors: (n,) int64 database rows.

    Returns:
        The mean over chunks whose successor has a bigram; None where there is none.
    """
    shares = []
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        successor = rows[part] + 1
        wanted = _bigrams(chunks.tokens[successor], chunks.lengths[successor, None])
        tokens, lengths, _ = reader(neighbors[part])
        # The continuation follows a chunk that is full: what is real lies side by side.
        found = _bigrams(tokens, lengths.sum(1, dtype=np.int64)[:, None])
        real = wanted >= 0
        hit = (wanted[:, :, None] == found[:, None, :]).any(2) & real
        count = real.sum(1)
        shares.append(hit.sum(1)[count > 0] / count[count > 0])
    mean = np.concatenate(shares) if shares else np.empty(0)
    return float(mean.mean()) if len(mean) else None


def _bigrams(tokens: Array, lengths: Array) -> Array:
    """(n, width - 1) int64: a number for each pair of real tokens, -1 beyond."""
    wide = tokens.astype(np.int64)
    pairs = (wide[:, :-1] << 32) | wide[:, 1:]
    return np.where(np.arange(1, tokens.shape[1]) < lengths, pairs, -1)


def _has_successor(chunks: ChunkStore, rows: Array) -> Array:
    after = np.minimum(rows + 1, len(chunks) - 1)
    document = chunks.document_of_chunk
    same: Array = (document[after] == document[rows]) & (after > rows)
    return same


def _random_rows(rng: np.random.Generator, admitted: Array, count: int) -> Array:
    """(count,) rows that may be neighbors, of every so many-th; none where none of them may."""
    stride = _stride(admitted)
    allowed = stride * np.flatnonzero(admitted[::stride])
    return rng.choice(allowed, count) if len(allowed) else np.empty(0, np.int64)


def _stride(admitted: Array) -> int:
    return max(1, -(-len(admitted) // HUB_ROWS))


def sample_rows(rng: np.random.Generator, rows: int, most: int) -> Array:
    """At most so many of `rows` rows, in random order."""
    if rows <= most:
        return rng.permutation(rows)
    return rng.permutation(np.unique(rng.integers(0, rows, most)))


def _quantiles(distances: Array, real: Array) -> dict[str, float] | None:
    if not real.any():
        return None
    found = np.quantile(distances[real], QUANTILES)
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}
