"""The stage `neighbors`: for every chunk of a corpus, its nearest chunks of other documents.

Neighbors belong to corpus chunks, not to an order of samples (Borgeaud et al. 2021, section 2.2): they
are computed once, `num_stored` of them, and read with any `num_neighbors` up to that.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import free, keyed
from retro_data.database import Database, DatabasePlace
from retro_data.errors import RetroDataError
from retro_data.index_search import SearchIndex, load_index
from retro_data.quality import sample_rows, stored_quality
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    lay_parts,
    tile,
    total_counts,
)
from retro_data.store import ChunkStore, Embeddings
from retro_data.vectors import Neighbors, Vectors, recall

if TYPE_CHECKING:
    from retro_data.exact import Search, SelfSearch

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

COMPLETED_EXACTLY = 2**20  # database rows, up to which lists that an index left short are searched
RECALL_QUERIES = 256  # chunks whose neighbors found by index are held against exact ones, at most
RECALL_PAIRS = 2**35  # of such a chunk and a database row: fewer chunks of a huge database
RECALL_AT = 10


@dataclass(frozen=True)
class NeighborSettings:
    """How neighbors are found.

    Attributes:
        search: "exact", "index", or "auto": exact up to `exact_rows` database rows.
        exact_rows: see `search`.
        metric: "l2" (squared distance) or "ip" (inner product).
        num_stored: candidates kept for each chunk, K.
        block_rows: query chunks of one block of work; 0 chooses by the number of chunks.
        memory: of an exact search's working set, in bytes.
    """

    search: str = keyed("auto")
    exact_rows: int = keyed(1_000_000)
    metric: str = keyed("l2")
    num_stored: int = keyed(32)
    block_rows: int = free(0)
    memory: int = free(2**30)

    def __post_init__(self) -> None:
        if self.search not in ("auto", "exact", "index"):
            raise RetroDataError(
                f"neighbors.search={self.search!r}: expected auto, exact or index."
            )
        if self.metric not in ("l2", "ip"):
            raise RetroDataError(f"neighbors.metric={self.metric!r}: expected l2 or ip.")
        if self.num_stored < 1:
            raise RetroDataError(f"neighbors.num_stored={self.num_stored}: expected at least 1.")

    def resolve(self, database_rows: int) -> str:
        """ "exact" or "index", by the number of database rows alone."""
        if self.search != "auto":
            return self.search
        return "exact" if database_rows <= self.exact_rows else "index"


@dataclass
class NeighborContext:
    queries: ChunkStore
    vectors: Vectors
    database: Database
    num_admitted: int
    index: SearchIndex | None
    exact: Search
    itself: SelfSearch | None  # where the queries are rows of a database that a GPU holds
    first_row: int  # of the query store in the database, if it is there


class NeighborStage:
    """Finds the neighbors of every chunk of one store.

    Args:
        settings: how.
        corpus: name of the query corpus.
        chunks: folder and key of its chunk store.
        embeddings: folder and key of its vectors.
        database: what is searched.
        search: "exact" or "index".
        index: folder and key of the index, where it is used.
    """

    name = "neighbors"
    version = 3
    unit = "chunks"
    tolerance = 0.0

    def __init__(
        self,
        settings: NeighborSettings,
        corpus: str,
        chunks: tuple[Path, str],
        embeddings: tuple[Path, str],
        database: DatabasePlace,
        search: str,
        index: tuple[Path, str] | None,
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.chunks = chunks
        self.embeddings = embeddings
        self.database = database
        self.search = search
        self.index = index
        exact = search == "exact"
        # By index, too, lists that it leaves short are found exactly.
        memory = Resources.memory + settings.memory + database.mask_bytes
        self.resources = Resources(
            gpu=exact, threads=0, in_runs=exact, together=exact, memory=memory
        )

    def key_fields(self) -> dict[str, Any]:
        return {
            "name": self.corpus,
            "search": self.search,
            "metric": self.settings.metric,
            "num_stored": self.settings.num_stored,
        }

    def parents(self) -> dict[str, str]:
        found = {"embeddings": self.embeddings[1], **self.database.parents()}
        if self.index is not None:
            found["index"] = self.index[1]
        return found

    def blocks(self) -> list[Block]:
        rows = len(ChunkStore(self.chunks[0]))
        return tile(rows, self.settings.block_rows or min(max(rows // 64, 1024), 65_536))

    def open(self, device: str) -> AbstractContextManager[NeighborContext]:
        from retro_data.exact import Search

        vectors = Vectors(list(Embeddings(self.embeddings[0]).blocks()))
        index = load_index(self.index[0]) if self.index is not None else None
        database = self.database.open()
        exact = Search(
            database.vectors,
            metric=self.settings.metric,  # type: ignore[arg-type]
            admitted=database.admitted,
            device=device if index is None else "cpu",
            memory_bytes=self.settings.memory,
        )
        itself, first_row = None, 0
        stores = list(zip(self.database.chunks, self.database.embeddings, strict=True))
        queries = (self.chunks[0], self.embeddings)
        # Elsewhere nothing is gained by it, and the table of documents would grow with the database.
        if index is None and exact.on_gpu_whole and queries in stores:
            place = stores.index(queries)
            first_row, stop = database.first_rows[place : place + 2]
            own = database.own_documents(np.arange(database.first_rows[-1]))
            itself = exact.of_itself(self.settings.num_stored, own, first_row, stop)
        return contextlib.nullcontext(
            NeighborContext(
                queries=ChunkStore(self.chunks[0]),
                vectors=vectors,
                database=database,
                num_admitted=int(np.count_nonzero(database.admitted)),
                index=index,
                exact=exact,
                itself=itself,
                first_row=first_row,
            )
        )

    def make(self, context: NeighborContext, block: Block, out: BlockWriter) -> None:
        chunks, database = context.queries, context.database
        document = chunks.document_of_chunk[block.start : block.stop]
        own = database.rows_of_documents(chunks.documents.keys[document])
        if context.itself is not None:
            first = context.first_row
            found = context.itself.rows(first + block.start, first + block.stop)
        else:
            queries = context.vectors.rows(block.start, block.stop)
            if context.index is not None:
                found = self._by_index(context, context.index, queries, own, out)
            else:
                found = context.exact(queries, self.settings.num_stored, own)
        self._count(found, own, is_last_of_document(chunks, document, block), out)
        wide = database.shape[0] >= 2**31
        ids = found.ids.astype(np.int64 if wide else np.int32)
        out.array(store.part_name(block.index, store.NEIGHBOR_IDS), ids)
        out.array(store.part_name(block.index, store.NEIGHBOR_DISTANCES), found.distances)
        out.rows = len(ids)

    def _by_index(
        self,
        context: NeighborContext,
        index: SearchIndex,
        queries: Array,
        own: Array,
        out: BlockWriter,
    ) -> Neighbors:
        """Search wide and drop the own document, wider where that left too few, then without it.

        What is short then is found exactly, or in a database too large for that by looking further
        into the index, and stays short where even that finds no more.
        """
        from retro_data.exact import rank

        k, admitted = self.settings.num_stored, context.database.admitted
        total = context.num_admitted
        inside = own[:, 1] - own[:, 0]  # a document is admitted as a whole
        inside *= admitted[np.minimum(own[:, 0], len(admitted) - 1)]
        want = np.where(queries.any(1), np.minimum(k, total - inside), 0)
        ids = np.full((len(queries), k), -1, np.int64)
        todo = np.flatnonzero(want)

        def short() -> Array:
            found: Array = (ids[todo] >= 0).sum(1)
            return np.asarray(todo[found < want[todo]])

        for width in (2 * k, 16 * k):
            if len(todo):
                _, hits = index.search(queries[todo], min(width, total))
                ids[todo] = _others(hits, own[todo], k)
                todo = short()
                out.count(f"rows_short_after_{width}", len(todo))
        if total > COMPLETED_EXACTLY:
            for parameters in index.wider():
                for alike in np.split(todo, 1 + np.flatnonzero(np.diff(own[todo, 0]))):
                    if len(alike):  # chunks of one document
                        found = index.search(queries[alike], k, own[alike[0]], parameters)
                        ids[alike] = found[1]
                todo = short()
            out.count("rows_left_short", len(todo))
            todo = todo[:0]
        out.count("rows_searched_exactly", len(todo))
        ranked = rank(queries, context.database.vectors, ids, metric=self.settings.metric)  # type: ignore[arg-type]
        if len(todo):
            ranked.ids[todo], ranked.distances[todo] = context.exact(queries[todo], k, own[todo])
        return ranked

    def _count(self, found: Neighbors, own: Array, last: Array, out: BlockWriter) -> None:
        real = found.ids >= 0
        inside = (found.ids >= own[:, :1]) & (found.ids < own[:, 1:])
        out.count("candidates", found.ids.size)
        out.count("candidates_found", int(real.sum()))
        out.count("used_candidates", int(real[~last].size))
        out.count("used_candidates_found", int(real[~last].sum()))
        out.count("same_document", int((inside & real).sum()))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        names = (store.NEIGHBOR_IDS, store.NEIGHBOR_DISTANCES)
        arrays = {name: lay_parts(folder, receipts, name) for name in names}
        counts = total_counts(receipts)
        used = max(1, counts["used_candidates"])
        quality = stored_quality(folder, self.chunks[0], self.database.open())
        if self.index is not None:
            quality |= self._recall(folder)
        log.info("neighbors %s: %s", self.corpus, quality)
        return {
            "arrays": arrays,
            "rows": sum(r.rows for r in receipts),
            "figures": {
                **counts,
                **quality,
                "fill_rate": counts["candidates_found"] / max(1, counts["candidates"]),
                "fill_rate_used": counts["used_candidates_found"] / used,
                "same_document_rate": counts["same_document"] / max(1, counts["candidates_found"]),
            },
        }

    def _recall(self, folder: Path) -> dict[str, Any]:
        """Of what came of the index, for this corpus' own chunks; None where nothing can be found."""
        from retro_data.exact import nearest

        database, chunks = self.database.open(), ChunkStore(self.chunks[0])
        ids = artifact.open_array(folder / store.NEIGHBOR_IDS)
        k = min(RECALL_AT, ids.shape[1])
        most = min(RECALL_QUERIES, max(16, RECALL_PAIRS // max(1, database.shape[0])))
        rows = np.sort(sample_rows(np.random.default_rng(0), len(ids), most))
        keys = chunks.documents.keys[chunks.document_of_chunk[rows]]
        truth = nearest(
            Vectors(list(Embeddings(self.embeddings[0]).blocks())).take(rows),
            database.vectors,
            k,
            metric=self.settings.metric,  # type: ignore[arg-type]
            excluded=database.rows_of_documents(keys),
            admitted=database.admitted,
            memory_bytes=self.settings.memory,
        )
        found = recall(ids[rows, :k].astype(np.int64), truth.ids)
        some = bool((truth.ids >= 0).any())
        return {"recall": found if some else None, "recall_at": k, "recall_queries": len(rows)}


def is_last_of_document(chunks: ChunkStore, document: Array, block: Block) -> Array:
    """Chunks whose neighbors reach no label but the document's end."""
    return np.asarray(
        chunks.documents.first_chunk[document + 1] - 1 == np.arange(block.start, block.stop)
    )


def _others(hits: Array, own: Array, k: int) -> Array:
    """The first k hits of each row outside the query's own document, -1 at the end."""
    keep = (hits >= 0) & ~((hits >= own[:, :1]) & (hits < own[:, 1:]))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(hits, order, 1), -1)
    return np.pad(kept, ((0, 0), (0, k - kept.shape[1])), constant_values=-1)
