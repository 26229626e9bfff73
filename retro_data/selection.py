"""The stage `selection`: stored neighbors filtered and ranked again, without searching again.

What it writes has the form of `neighbors`: rows of the same width, what was dropped missing at the end.
Readers open it instead, at no cost. Each candidate passes, in this order,

    min_distance, max_distance ─► max_overlap ─► rerank ─► one_per_document, distinct

so that what stays of one document, or of equal chunks, is what the re-ranking puts first.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import keyed
from retro_data.database import DatabasePlace
from retro_data.errors import RetroDataError
from retro_data.leakage import longest_common_substrings, query_text, retrieved_mask
from retro_data.lexical import TermStatistics, bm25_scores, overlap_scores, term_statistics
from retro_data.neighbors import is_last_of_document
from retro_data.quality import stored_quality
from retro_data.row_readers import ChunkReader
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    lay_parts,
    tile,
    total_counts,
)
from retro_data.store import ChunkStore, NeighborLists
from retro_data.tokenizer import LmTokenizer

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

NUMBERS = ("min_distance", "max_distance", "max_overlap")  # filters by a bound, in their order
SWITCHES = ("one_per_document", "distinct")  # filters that are on or off
RERANK = ("bm25", "overlap")
BATCH_CANDIDATES = 2**15  # whose tokens are read at once


@dataclass(frozen=True)
class SelectionSettings:
    """Which stored candidates stay, and in which order.

    Attributes:
        min_distance, max_distance: a candidate below or above is dropped; in the unit of the stored
            distances: squared L2, or with `neighbors.metric=ip` the inner product, of which the
            nearest has the largest.
        max_overlap: a candidate is dropped whose longest common token substring with the chunk, over
            the tokens of the chunk, is above it: measured as leakage is, with the continuation.
        one_per_document: a candidate is dropped whose document has one kept before it.
        distinct: a candidate is dropped whose chunk has the very tokens of one kept before it.
        rerank: "bm25" or "overlap": candidates in the order of that score with the chunk, of
            `retro_data.lexical`, equal ones as they were; None: in the order of distance.
    """

    min_distance: float | None = keyed(None)
    max_distance: float | None = keyed(None)
    max_overlap: float | None = keyed(None)
    one_per_document: bool = keyed(False)
    distinct: bool = keyed(False)
    rerank: str | None = keyed(None)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value)):
                raise RetroDataError(f"selection.{name}={value!r}: expected null or a number.")
        for name in SWITCHES:
            if not isinstance(value := getattr(self, name), bool):
                raise RetroDataError(f"selection.{name}={value!r}: expected true or false.")
        low, high = self.min_distance, self.max_distance
        if low is not None and high is not None and low > high:
            raise RetroDataError(
                f"selection.min_distance={low} is above selection.max_distance={high}: nothing would "
                "be left."
            )
        if self.max_overlap is not None and not 0 <= self.max_overlap < 1:
            raise RetroDataError(
                f"selection.max_overlap={self.max_overlap}: expected a share from 0 to below 1, or "
                "null to drop nothing."
            )
        if self.rerank not in (None, *RERANK):
            raise RetroDataError(
                f"selection.rerank={self.rerank!r}: expected null, {' or '.join(RERANK)}."
            )

    @property
    def filters(self) -> list[str]:
        """Names of the filters that are on, in the order in which they apply."""
        bounds = [name for name in NUMBERS if getattr(self, name) is not None]
        return bounds + [name for name in SWITCHES if getattr(self, name)]

    @property
    def is_on(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.filters) or self.rerank is not None


# ---- selecting -----------------------------------------------------------------------------------


@dataclass
class Candidates:
    """Those of some chunks, in order; every step changes `keep`, or the order of all.

    Attributes:
        ids, distances: (R, K) as they are stored; of dropped ones meaningless.
        documents: (R, K) int64, global, meaningless where there is none.
        texts: (R, K) opaque items of a chunk's tokens, equal where these are.
        keep: (R, K) bool.
        dropped: by each filter that was applied, how many.
    """

    ids: Array
    distances: Array
    documents: Array
    texts: Array
    keep: Array
    dropped: dict[str, int]

    def drop(self, name: str, which: Array) -> None:
        """Drop the candidates `which` (R, K), as far as they were kept."""
        self.dropped[name] = int((self.keep & which).sum())
        self.keep &= ~which

    def sort(self, keys: Array) -> None:
        """Put those of the lowest keys (R, K) first, equal ones as they were, dropped ones last."""
        order = np.argsort(np.where(self.keep, keys, np.inf), axis=1, kind="stable")
        for name in ("ids", "distances", "documents", "texts", "keep"):
            setattr(self, name, np.take_along_axis(getattr(self, name), order, 1))

    def drop_repeated(self, one_per_document: bool, distinct: bool) -> None:
        """Drop each candidate whose document, or whose text, is that of one kept before it."""
        unique = {"one_per_document": self.documents} if one_per_document else {}
        unique |= {"distinct": self.texts} if distinct else {}
        self.dropped |= dict.fromkeys(unique, 0)
        for j in range(1, self.keep.shape[1]):
            before, now = self.keep[:, :j], self.keep[:, j]
            for name, values in unique.items():
                repeats = now & (before & (values[:, :j] == values[:, j : j + 1])).any(1)
                self.dropped[name] += int(repeats.sum())
                now &= ~repeats


@dataclass
class SelectionContext:
    queries: ChunkStore
    neighbors: NeighborLists
    reader: ChunkReader  # of the database, with continuations where they are looked at
    bos_id: int | None
    statistics: TermStatistics | None  # for BM25 alone


def select(
    settings: SelectionSettings, context: SelectionContext, rows: Array
) -> tuple[Candidates, int]:
    """The candidates of some chunks, filtered and in their new order, and what that changed.

    Args:
        rows: (R,) int64, chunks of the query store.

    Returns:
        The candidates, kept ones first, and how many chunks have another first neighbor by the
        re-ranking.
    """
    ids = np.asarray(context.neighbors.ids[rows])
    distances = np.asarray(context.neighbors.distances[rows])
    size = context.queries.chunk_size
    tokens, lengths, documents = context.reader(ids.ravel().astype(np.int64))
    mask = retrieved_mask(tokens, lengths, size, context.bos_id)
    chunk = np.ascontiguousarray(tokens[:, :size])
    found = Candidates(
        ids,
        distances,
        documents.reshape(ids.shape),
        chunk.view(f"V{size * chunk.itemsize}").reshape(ids.shape),
        ids >= 0,
        {},
    )
    if settings.min_distance is not None:
        found.drop("min_distance", distances < settings.min_distance)
    if settings.max_distance is not None:
        found.drop("max_distance", distances > settings.max_distance)
    queries, query_mask = query_text(context.queries, rows, context.bos_id)
    if settings.max_overlap is not None:
        of = np.repeat(np.arange(len(rows)), ids.shape[1])
        longest = longest_common_substrings(queries[of], tokens, query_mask[of], mask)
        shares = longest.reshape(ids.shape) / np.maximum(query_mask.sum(1), 1)[:, None]
        found.drop("max_overlap", shares > settings.max_overlap)
    changed = 0
    if settings.rerank is not None:
        texts = (*ids.shape, size)
        given = (queries, chunk.reshape(texts), query_mask, mask[:, :size].reshape(texts))
        if context.statistics is not None:
            scores = bm25_scores(*given, context.statistics)
        else:
            scores = overlap_scores(*given)
        first = _first(found)
        found.sort(-scores)
        changed = int((first != _first(found)).sum())
    found.drop_repeated(settings.one_per_document, settings.distinct)
    found.sort(np.zeros(ids.shape, np.float32))
    return found, changed


def _first(candidates: Candidates) -> Array:
    """(R,) ids of the first ones kept, -1 for none."""
    place = candidates.keep.argmax(1)[:, None]
    ids = np.where(candidates.keep, candidates.ids, -1)
    first: Array = np.take_along_axis(ids, place, 1)[:, 0]
    return first


# ---- the stage -----------------------------------------------------------------------------------


class SelectionStage:
    """Selects the neighbors of every chunk of one store.

    Args:
        settings: how.
        corpus: name of the query corpus.
        chunks, neighbors: folder and key of its chunk store and of its neighbors.
        database: what they are of.
        tokenizer: folder of the LM tokenizer.
    """

    name = "selection"
    version = 1
    unit = "chunks"
    tolerance = 0.0

    def __init__(
        self,
        settings: SelectionSettings,
        corpus: str,
        chunks: tuple[Path, str],
        neighbors: tuple[Path, str],
        database: DatabasePlace,
        tokenizer: Path,
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.resources = Resources(threads=1, memory=Resources.memory + database.mask_bytes)
        self.chunks, self.neighbors = chunks, neighbors
        self.database = database
        self.tokenizer = tokenizer

    def key_fields(self) -> dict[str, Any]:
        return {"name": self.corpus, **artifact.key_fields(self.settings)}

    def parents(self) -> dict[str, str]:
        own = {"chunks": self.chunks[1], "neighbors": self.neighbors[1]}
        return {**own, "database": self.database.key}

    def blocks(self) -> list[Block]:
        rows = len(ChunkStore(self.chunks[0]))
        return tile(rows, min(max(rows // 64, 1024), 65_536))

    def open(self, device: str) -> AbstractContextManager[SelectionContext]:
        queries, tokenizer = ChunkStore(self.chunks[0]), LmTokenizer(self.tokenizer)
        database = self.database.open()
        follow = queries.chunk_size if self.settings.max_overlap is not None else 0
        reader = ChunkReader(database.stores, follow, prefetch=False)
        statistics = None
        if self.settings.rerank == "bm25":
            statistics = term_statistics(
                reader, database.admitted, tokenizer.vocab_size, tokenizer.bos_id
            )
        return contextlib.nullcontext(
            SelectionContext(
                queries, NeighborLists(self.neighbors[0]), reader, tokenizer.bos_id, statistics
            )
        )

    def make(self, context: SelectionContext, block: Block, out: BlockWriter) -> None:
        lists = context.neighbors
        width = lists.ids.shape[1]
        ids = np.full((block.stop - block.start, width), -1, lists.ids.dtype)
        metric = lists.manifest["fields"]["metric"]
        distances = np.full(ids.shape, -np.inf if metric == "ip" else np.inf, np.float32)
        step = max(1, BATCH_CANDIDATES // width)
        for start in range(block.start, block.stop, step):
            rows = np.arange(start, min(start + step, block.stop))
            found, changed = select(self.settings, context, rows)
            at = rows - block.start
            ids[at] = np.where(found.keep, found.ids, ids[at])
            distances[at] = np.where(found.keep, found.distances, distances[at])
            for name, dropped in found.dropped.items():
                out.count(f"dropped_by_{name}", dropped)
            out.count("first_neighbors_changed", changed)
        chunks = context.queries
        document = chunks.document_of_chunk[block.start : block.stop]
        before = np.asarray(lists.ids[block.start : block.stop]) >= 0
        self._count(ids >= 0, before, is_last_of_document(chunks, document, block), out)
        out.array(store.part_name(block.index, store.NEIGHBOR_IDS), ids)
        out.array(store.part_name(block.index, store.NEIGHBOR_DISTANCES), distances)
        out.rows = len(ids)

    def _count(self, real: Array, before: Array, last: Array, out: BlockWriter) -> None:
        out.count("candidates", real.size)
        out.count("candidates_before", int(before.sum()))
        out.count("candidates_found", int(real.sum()))
        out.count("used_candidates", int(real[~last].size))
        out.count("used_candidates_found", int(real[~last].sum()))
        out.count("chunks_emptied", int((before.any(1) & ~real.any(1)).sum()))
        for k in _prefixes(real.shape[1]):
            out.count(f"found_in_first_{k}", int(real[:, :k].sum()))
            out.count(f"used_found_in_first_{k}", int(real[~last, :k].sum()))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        names = (store.NEIGHBOR_IDS, store.NEIGHBOR_DISTANCES)
        arrays = {name: lay_parts(folder, receipts, name) for name in names}
        counts = total_counts(receipts)
        width = arrays[store.NEIGHBOR_IDS]["shape"][1]
        fill, used = (_fill_rates(counts, width, prefix) for prefix in ("", "used_"))
        log.info(
            "selection %s: %d of %d candidates stay (%s); used neighbors found: %s; %d first neighbors "
            "changed by ranking again",
            self.corpus,
            counts["candidates_found"],
            counts["candidates_before"],
            ", ".join(f"{n} drops {counts[f'dropped_by_{n}']}" for n in self.settings.filters)
            or "nothing is dropped",
            ", ".join(f"{rate:.4f} of {k}" for k, rate in used.items()),
            counts["first_neighbors_changed"],
        )
        quality = stored_quality(folder, self.chunks[0], self.database.open())
        return {
            "arrays": arrays,
            "rows": sum(r.rows for r in receipts),
            "figures": {
                **{n: c for n, c in counts.items() if "found_in_first" not in n},
                **quality,
                "fill_rate": fill[str(width)],
                "fill_rate_used": used[str(width)],
                "fill_rate_of_first": fill,
                "fill_rate_used_of_first": used,
            },
        }


def _prefixes(width: int) -> list[int]:
    """How many first neighbors the fill is told of: what a model may read, and all."""
    return sorted({1, min(2, width), width})


def _fill_rates(counts: dict[str, int], width: int, prefix: str) -> dict[str, float]:
    chunks = counts[f"{prefix}candidates"] // width
    return {
        str(k): counts[f"{prefix}found_in_first_{k}"] / max(1, k * chunks) for k in _prefixes(width)
    }
