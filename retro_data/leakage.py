"""The stage `leakage`: how much of an evaluation chunk stands word for word in what was retrieved.

r(C) is the length of the longest token substring that chunk C shares with one of its nearest
neighbors and its continuation, over the tokens of C (Borgeaud et al. 2021, section 2.6). Beside it
r_seen(C): C against the neighbors of the chunk before it in its document, which are what a model sees
while it predicts C. r is always of the unfiltered lists, so that no filter changes it; r_seen is of what
a model reads: where there is a selection, of the selected lists.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import store
from retro_data.chunks import masked, narrowest
from retro_data.row_readers import ChunkReader
from retro_data.splits import EVALUATION, SPLITS, SplitOfCorpus
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    lay_parts,
    tile,
    total_counts,
)
from retro_data.store import ChunkStore, DatabaseStores, NeighborLists
from retro_data.tokenizer import LmTokenizer

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

NEAREST = 10  # neighbors that a chunk is held against, as in the paper
ALPHAS = tuple(i / 8 for i in range(1, 9))  # r <= alpha, from 12.5% to 100%
BATCH_CHUNKS = 1024  # evaluation chunks whose neighbors are read at once
WORKING_BYTES = 2**20  # of one batch of pairs: what a core's cache holds


# ---- substrings ----------------------------------------------------------------------------------


def longest_common_substrings(
    queries: Array, retrieved: Array, query_mask: Array, retrieved_mask: Array
) -> Array:
    """Length of the longest common substring of each pair of token rows.

    The classic table of common suffixes, for many pairs at once. It is kept by diagonals, so that a
    common suffix grows where it lies: with one token of all queries after the other, the slice of
    diagonals that it crosses is counted up where it matches, and set to 0 where it does not.

    Args:
        queries: (P, m) tokens.
        retrieved: (P, r) tokens.
        query_mask, retrieved_mask: bool, of the same shapes; False matches nothing.

    Returns:
        (P,) uint8 if the shorter side is below 256 tokens, else uint16 or uint32.
    """
    pairs, width, length = len(queries), queries.shape[1], retrieved.shape[1]
    count = narrowest(min(width, length), (np.uint8, np.uint16, np.uint32))
    top = int(max(queries.max(initial=0), retrieved.max(initial=0)))
    dtype = narrowest(top + 2, (np.uint16, np.uint32, np.uint64))
    found = np.empty(pairs, count)
    row_bytes = (width + length) * (dtype.itemsize + 2 * count.itemsize) + length
    step = max(1, WORKING_BYTES // row_bytes)
    for start in range(0, pairs, step):
        part = slice(start, start + step)
        # Two values that no token has and that differ: what is masked matches nothing.
        one = masked(queries[part], query_mask[part], top + 1, dtype)
        other = masked(retrieved[part], retrieved_mask[part], top + 2, dtype)
        found[part] = _longest(np.ascontiguousarray(one.T), np.ascontiguousarray(other.T), count)
    return found


def _longest(queries: Array, retrieved: Array, count: np.dtype[Any]) -> Array:
    """`longest_common_substrings` of columns: (m, P) and (r, P)."""
    width, (length, pairs) = len(queries), retrieved.shape
    suffix = np.zeros((width + length - 1, pairs), count)  # common ones that end here, by diagonal
    longest = np.zeros_like(suffix)
    same = np.empty((length, pairs), bool)
    grow = same.view(np.uint8)
    for i, tokens in enumerate(queries):
        crossed = slice(width - 1 - i, width - 1 - i + length)
        np.equal(retrieved, tokens, out=same)
        now = suffix[crossed]
        now += grow
        now *= grow
        np.maximum(longest[crossed], now, out=longest[crossed])
    best: Array = longest.max(0, initial=0)
    return best


def leakage_bins(longest: Array, real_tokens: Array) -> Array:
    """Index of the first of ALPHAS that r = longest / real_tokens does not exceed.

    Args:
        longest: (E,) tokens.
        real_tokens: (E,) tokens; a chunk of none leaks nothing.
    """
    eighths = -(-len(ALPHAS) * longest.astype(np.int64) // np.maximum(real_tokens, 1))
    bins: Array = np.maximum(eighths, 1) - 1
    return bins


# ---- the stage -----------------------------------------------------------------------------------


@dataclass
class LeakageContext:
    queries: ChunkStore
    neighbors: NeighborLists
    seen: NeighborLists  # what a model reads: these, or a selection of them
    reader: ChunkReader  # of the database
    bos_id: int | None
    evaluated: Array  # (D,) bool


class LeakageStage:
    """Measures the leakage of the evaluation chunks of one corpus.

    Args:
        split: the corpus, and which of its documents are evaluated.
        chunks, neighbors: folder and key of its chunk store and of its neighbors.
        database: folders of the chunk stores that neighbors are of.
        tokenizer: folder of the LM tokenizer.
        covers_training: whether all training documents are in the database.
        selection: folder and key of the selection that a model reads instead of all neighbors.
    """

    name = "leakage"
    version = 1
    resources = Resources(threads=1)
    unit = "chunks"
    tolerance = 0.0

    def __init__(
        self,
        split: SplitOfCorpus,
        chunks: tuple[Path, str],
        neighbors: tuple[Path, str],
        database: Sequence[Path],
        tokenizer: Path,
        covers_training: bool,
        selection: tuple[Path, str] | None = None,
    ) -> None:
        self.split = split
        self.chunks, self.neighbors = chunks, neighbors
        self.database = tuple(database)
        self.tokenizer = tokenizer
        self.covers_training = covers_training
        self.selection = selection

    def key_fields(self) -> dict[str, Any]:
        fields = self.split.key_fields()
        return {**fields, "nearest": NEAREST, "covers_training": self.covers_training}

    def parents(self) -> dict[str, str]:
        own = {"chunks": self.chunks[1], "neighbors": self.neighbors[1]}
        if self.selection is not None:
            own["selection"] = self.selection[1]
        return {**own, **self.split.parents()}

    def blocks(self) -> list[Block]:
        rows = len(ChunkStore(self.chunks[0]))
        return tile(rows, min(max(rows // 64, 1024), 65_536))

    def open(self, device: str) -> AbstractContextManager[LeakageContext]:
        queries = ChunkStore(self.chunks[0])
        split = self.split.of(queries.documents)
        database = DatabaseStores.of(self.database)
        neighbors = NeighborLists(self.neighbors[0])
        seen = NeighborLists(self.selection[0]) if self.selection is not None else neighbors
        return contextlib.nullcontext(
            LeakageContext(
                queries,
                neighbors,
                seen,
                ChunkReader(database, queries.chunk_size, prefetch=False),
                LmTokenizer(self.tokenizer).bos_id,
                np.isin(split, [SPLITS.index(name) for name in EVALUATION]),
            )
        )

    def make(self, context: LeakageContext, block: Block, out: BlockWriter) -> None:
        chunks = context.queries
        document = chunks.document_of_chunk[block.start : block.stop]
        rows = block.start + np.flatnonzero(context.evaluated[document])
        width = min(NEAREST, context.neighbors.ids.shape[1])
        count = narrowest(chunks.chunk_size, (np.uint8, np.uint16))
        real_tokens = np.zeros(len(rows), count)
        own, seen = (np.zeros((len(rows), width), count) for _ in range(2))
        for start in range(0, len(rows), BATCH_CHUNKS):
            part = slice(start, start + BATCH_CHUNKS)
            real_tokens[part], own[part], seen[part] = _measure(context, rows[part], width)
        parts = {
            store.LEAKAGE_ROWS: rows.astype(np.int64),
            store.LEAKAGE_TOKENS: real_tokens,
            store.LEAKAGE_OWN: own,
            store.LEAKAGE_SEEN: seen,
        }
        for kind, array in parts.items():
            out.array(store.part_name(block.index, kind), array)
        out.rows = len(rows)
        for name, longest in (("r", own), ("r_seen", seen)):
            bins = leakage_bins(longest.max(1, initial=0), real_tokens)
            for i, chunks_of_bin in enumerate(np.bincount(bins, minlength=len(ALPHAS))):
                out.count(f"{name} {i}", int(chunks_of_bin))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        if not self.covers_training:
            log.warning(
                "leakage %s: training documents outside the database are not looked at, so that r "
                "covers what can be retrieved alone",
                self.split.name,
            )
        kinds = (store.LEAKAGE_ROWS, store.LEAKAGE_TOKENS, store.LEAKAGE_OWN, store.LEAKAGE_SEEN)
        counts, rows = total_counts(receipts), sum(r.rows for r in receipts)
        shares = {
            name: [
                round(sum(counts[f"{name} {j}"] for j in range(i + 1)) / max(1, rows), 6)
                for i in range(len(ALPHAS))
            ]
            for name in ("r", "r_seen")
        }
        return {
            "arrays": {kind: lay_parts(folder, receipts, kind) for kind in kinds},
            "rows": rows,
            "figures": {
                "alphas": list(ALPHAS),
                **{f"chunks_with_{name}_at_most": share for name, share in shares.items()},
                "covers_training": self.covers_training,
            },
        }


def _measure(context: LeakageContext, rows: Array, width: int) -> tuple[Array, Array, Array]:
    """Real tokens (E,) of chunks (E,), and what they share with their own and the seen (E, width)."""
    chunks, before = context.queries, np.maximum(rows - 1, 0)
    document = chunks.document_of_chunk
    follows = (rows > 0) & (document[rows] == document[before])
    queries, mask = query_text(chunks, rows, context.bos_id)
    if context.seen is context.neighbors:
        # Most chunks come after one that is asked for, too: its neighbors are read once.
        asked = np.union1d(rows, before[follows])
        own = seen = _Retrieved(context, context.neighbors, asked, width)
    else:
        own = _Retrieved(context, context.neighbors, rows, width)
        seen = _Retrieved(context, context.seen, np.unique(before[follows]), width)
    longest = own.shared(queries, mask, rows)
    longest_seen = np.zeros_like(longest)
    longest_seen[follows] = seen.shared(queries[follows], mask[follows], before[follows])
    return mask.sum(1), longest, longest_seen


class _Retrieved:
    """The text of the first `width` neighbors of chunks `asked` (A,), ascending."""

    def __init__(
        self, context: LeakageContext, lists: NeighborLists, asked: Array, width: int
    ) -> None:
        self.asked, self.width = asked, width
        ids = np.asarray(lists.ids[asked, :width], np.int64)
        self.tokens, lengths, _ = context.reader(ids.ravel())
        size = context.queries.chunk_size
        self.mask = retrieved_mask(self.tokens, lengths, size, context.bos_id)

    def shared(self, queries: Array, query_mask: Array, of: Array) -> Array:
        """What queries (Q, m) share with each neighbor of the chunks `of` (Q,): (Q, width)."""
        first = np.searchsorted(self.asked, of)[:, None] * self.width
        pairs = (first + np.arange(self.width)).ravel()
        query = np.repeat(np.arange(len(of)), self.width)
        longest: Array = longest_common_substrings(
            queries[query], self.tokens[pairs], query_mask[query], self.mask[pairs]
        ).reshape(-1, self.width)
        return longest


def query_text(chunks: ChunkStore, rows: Array, bos_id: int | None) -> tuple[Array, Array]:
    """Tokens (n, m) of chunks (n,), and which of them are compared: real ones but bos."""
    tokens = chunks.tokens[rows]
    mask = np.arange(chunks.chunk_size) < chunks.lengths[rows][:, None]
    return tokens, mask & (tokens != _no_token(bos_id))


def retrieved_mask(tokens: Array, lengths: Array, chunk_size: int, bos_id: int | None) -> Array:
    """The same of what a `ChunkReader` read: tokens (n, chunk_size + follow) and lengths (n, 2)."""
    read = -(-tokens.shape[1] // chunk_size)  # 1 for the chunk alone, 2 with what follows it
    real = (np.arange(chunk_size) < lengths[:, :read, None]).reshape(len(tokens), -1)
    mask: Array = real[:, : tokens.shape[1]] & (tokens != _no_token(bos_id))
    return mask


def _no_token(bos_id: int | None) -> int:
    return -1 if bos_id is None else bos_id
