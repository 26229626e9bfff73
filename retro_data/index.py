"""The stage `index`: a faiss index of a database's vectors, in one file or several.

    trained.index ─┬► rows of shard 0: add, and the nearest to the recall queries ─► 00000.index ─┐
                   ├► rows of shard 1 …                                           ─► 00001.index ─┤
                   └► …                                 merge the nearest, search all, measure ◄─┘

A block is a *shard*: consecutive global rows, which one worker adds to a copy of the trained index,
batch by batch. So a worker holds its shard (whose lists double as they grow: up to twice its bytes)
and one batch, however large the whole is. While it has a batch in hand it also finds which of its
rows are nearest to some database rows, the recall queries, by exact search; those of all shards merge
into the truth that recall is measured against. The search parameter (nprobe, efSearch) is the smallest
power of two whose recall@k reaches a target: it depends on the data and the seed, not on how fast this
machine is.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.codebook import gpu_resources, has_gpu_wheel, shape_of
from retro_data.database import Database, DatabasePlace, draw_rows
from retro_data.errors import RetroDataError
from retro_data.index_factory import (
    choose_shard_rows,
    estimated_bytes,
    format_memory,
    import_faiss,
    parse_memory,
)
from retro_data.index_parts import (
    Array,
    Index,
    has_plain_centroids,
    innermost,
    inverted,
    metric_code,
    same_graph,
    threads,
    transform,
    write,
)
from retro_data.index_search import Measured, Shards, measure, merge
from retro_data.index_settings import IndexSettings, check_metric
from retro_data.stage import Block, BlockWriter, Receipt, Resources, lay_parts, tile
from retro_data.vectors import Vectors

log = logging.getLogger(__name__)

ADD_BYTES = 2**28  # float32 vectors handed to faiss at once
TRUTH_BYTES = 2**28  # that finding the nearest to the recall queries may take
SHARD_THREADS = 4  # of each worker, where there are several shards


# ---- the stage -----------------------------------------------------------------------------------


@dataclass
class Questions:
    """The database rows by which recall is measured.

    Attributes:
        queries: (Q, d) float16.
        own: (Q, 2) int64, global rows [lo, hi) of the document of each.
    """

    queries: Array
    own: Array

    @classmethod
    def draw(cls, settings: IndexSettings, database: Database) -> Questions:
        rows = draw_rows(database.admitted, settings.recall_queries, [settings.seed, 1])
        queries = database.vectors.take(rows)
        nonzero = queries.any(axis=1)
        return cls(queries[nonzero], database.own_documents(rows[nonzero]))


@dataclass
class IndexContext:
    database: Database
    questions: Questions
    adder: Adder
    codebook: str  # digest of the trained index


class IndexStage:
    """Adds all admitted rows of a database to the index that was trained for it.

    Args:
        settings: which index.
        metric: "l2" or "ip".
        database: whose vectors.
        codebook: folder and key of the trained index.
    """

    name = "index"
    version = 3
    unit = "chunks"
    tolerance = 0.0

    def __init__(
        self,
        settings: IndexSettings,
        metric: str,
        database: DatabasePlace,
        codebook: tuple[Path, str],
    ) -> None:
        check_metric(metric)
        self.settings = settings
        self.metric = metric
        self.database = database
        self.codebook = codebook
        self.resources = Resources()
        with contextlib.suppress(RetroDataError):  # unfinished or damaged: nothing can be made yet
            self.resources = self._resources()

    def _resources(self) -> Resources:
        blocks = self.blocks()
        rows, dim = shape_of(self.database)
        memory = worker_bytes(self._factory, max(b.stop - b.start for b in blocks), dim) + rows
        return Resources(
            gpu=has_gpu_wheel(),
            threads=SHARD_THREADS if len(blocks) > 1 else 0,
            memory=Resources.memory + memory,
        )

    @property
    def _factory(self) -> str:
        return str(store.finished(self.codebook[0])["factory"])

    def key_fields(self) -> dict[str, Any]:
        return {"metric": self.metric, **self.settings.filling_fields()}

    def parents(self) -> dict[str, str]:
        return {"codebook": self.codebook[1], **self.database.parents()}

    def blocks(self) -> list[Block]:
        return shards_of(self.settings, self._factory, *shape_of(self.database))

    @contextmanager
    def open(self, device: str) -> Iterator[IndexContext]:
        with threads(self.settings.threads):
            database = self.database.open()
            trained = self.codebook[0] / store.TRAINED_INDEX
            adder = Adder(trained, self.metric, device)
            questions = Questions.draw(self.settings, database)
            digest = store.finished(self.codebook[0])["files"][store.TRAINED_INDEX]["sha256"]
            yield IndexContext(database, questions, adder, digest)

    def make(self, context: IndexContext, block: Block, out: BlockWriter) -> None:
        index = context.adder.empty()
        truth = _Truth(context.questions, self.settings.recall_at, self.metric)
        seconds = 0.0
        for start, rows, admitted in _batches(context.database, block):
            began = time.monotonic()
            keep = admitted & rows.any(axis=1)
            context.adder.add(index, start + np.flatnonzero(keep), rows[keep].astype(np.float32))
            seconds += time.monotonic() - began
            truth.look_at(start, rows, admitted)
        out.rows = int(index.ntotal)
        with out.file(store.index_name(block.index)) as handle:
            write(index, handle)
        out.array(store.part_name(block.index, store.TRUTH_IDS), truth.ids)
        out.array(store.part_name(block.index, store.TRUTH_DISTANCES), truth.distances)
        out.note("build_seconds", seconds)
        out.note("codebook", context.codebook)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        if len({receipt.notes["codebook"] for receipt in receipts}) > 1:
            raise RetroDataError(
                f"the files in {folder} were filled from two trainings of {self.codebook[0]}, which "
                "was made anew meanwhile and has other bytes: what they hold cannot be compared. "
                f"Remove {folder} and run `retro-data prepare` again."
            )
        codebook = store.finished(self.codebook[0])
        files = {n: e for r in receipts for n, e in r.files.items() if store.is_index(n)}
        arrays = {
            n: lay_parts(folder, receipts, n) for n in (store.TRUTH_IDS, store.TRUTH_DISTANCES)
        }
        measured = self._measure(folder, list(files), list(arrays))
        rows, size = sum(r.rows for r in receipts), sum(e["bytes"] for e in files.values())
        seconds = sum(r.notes["build_seconds"] for r in receipts)
        figures = {
            "rows": rows,
            "rows_left_out": self.database.rows - rows,
            "training_rows": codebook["rows"],
            "build_seconds": round(codebook["figures"]["build_seconds"] + seconds, 3),
            "bytes": size,
            "shards": len(files),
            "recall": measured.recall,
            "recall_at": self.settings.recall_at,
            "recall_queries": measured.queries,
            "ms_per_query": measured.ms_per_query,
        }
        self._warn(codebook["factory"], measured, size)
        return {
            "arrays": arrays,
            "files": files,
            "rows": rows,
            "factory": codebook["factory"],
            "search_parameters": measured.parameters,
            "dim": codebook["dim"],
            "figures": figures,
        }

    def _measure(self, folder: Path, files: list[str], arrays: list[str]) -> Measured:
        questions = Questions.draw(self.settings, self.database.open())
        count, k = len(questions.queries), self.settings.recall_at
        ids, distances = (
            artifact.open_array(folder / name).reshape(len(files), count, k) for name in arrays
        )
        _, truth = merge(list(zip(distances, ids, strict=True)), k, self.metric)
        shards = Shards([folder / name for name in files], self.metric)
        target = self.settings.target_recall
        return measure(shards, questions.queries, questions.own, truth, target)

    def _warn(self, factory: str, measured: Measured, size: int) -> None:
        settings = self.settings
        if measured.recall is not None and measured.recall < settings.target_recall:
            log.warning(
                "%s reaches recall@%d %.4f with %s, not index.target_recall=%s. Raise "
                "index.max_index_memory, name a finer index.factory, or lower the target.",
                *(factory, settings.recall_at, measured.recall, measured.parameters),
                settings.target_recall,
            )
        if measured.ms_per_query > settings.max_query_ms:
            log.warning(
                "%s takes %.2f ms a query with %s, over index.max_query_ms=%s. Lower "
                "index.target_recall, or name a faster index.factory.",
                *(factory, measured.ms_per_query, measured.parameters, settings.max_query_ms),
            )
        if size > parse_memory(settings.max_index_memory):
            log.warning(
                "%s takes %s, over index.max_index_memory=%s",
                *(factory, format_memory(size), settings.max_index_memory),
            )


def shards_of(settings: IndexSettings, factory: str, rows: int, dim: int) -> list[Block]:
    """Consecutive rows of a database for each file of its index, nearly as many for each."""
    most = settings.shard_rows or choose_shard_rows(factory, rows, dim, settings.max_index_memory)
    shards = max(1, -(-rows // most))
    return tile(rows, -(-rows // shards))


def worker_bytes(factory: str, rows: int, dim: int) -> int:
    """Memory, about, of a worker that adds so many rows: its shard, and a batch of rows.

    Lists double as they grow, so that a shard takes up to twice its bytes in the making.
    """
    batch = min(ADD_BYTES, 4 * dim * rows)
    return (
        2 * estimated_bytes(factory, rows, dim) + 2 * batch + min(TRUTH_BYTES, 64 * 2**20 + batch)
    )


# ---- adding --------------------------------------------------------------------------------------


class Adder:
    """Adds rows to copies of a trained index.

    Attributes:
        assigner: its centroids on a GPU, where rows find their lists; None on a CPU.
    """

    def __init__(self, trained: Path, metric: str, device: str) -> None:
        self.trained = trained
        self.metric = metric
        self.gpu = gpu_resources(device)

    def empty(self) -> Index:
        """A copy of the trained index.

        Raises:
            RetroDataError: it cannot be read.
        """
        try:
            return import_faiss().read_index(str(self.trained))
        except RuntimeError as error:
            raise RetroDataError(
                f"{self.trained} cannot be read ({error}). {artifact.MEND}"
            ) from error

    @cached_property
    def assigner(self) -> Index:
        if self.gpu is None:
            return None
        index = self.empty()  # by name, or faiss frees the lists in it
        lists = inverted(index)
        faiss = import_faiss()
        blocked = getattr(faiss, "IndexIVFFastScan", ())  # codes in blocks of their own, not by row
        if lists is None or isinstance(lists, blocked) or not has_plain_centroids(lists):
            return None
        centroids = faiss.IndexFlat(lists.d, metric_code(self.metric))
        centroids.add(lists.quantizer.reconstruct_n(0, lists.nlist))
        return faiss.index_cpu_to_gpu(self.gpu, 0, centroids)

    def add(self, index: Index, ids: Array, vectors: Array) -> None:
        """Add (n, d) float32 vectors with their (n,) int64 global rows."""
        faiss = import_faiss()
        if not len(ids):
            return
        if self.assigner is not None:
            lists, vectors = inverted(index), transform(index, vectors)
            found = self.assigner.search(vectors, 1)[1]
            lists.add_core(len(ids), *map(faiss.swig_ptr, (vectors, ids, found)))
            index.ntotal = lists.ntotal
        elif isinstance(innermost(index), faiss.IndexHNSW):
            with same_graph():
                index.add_with_ids(vectors, ids)
        else:
            index.add_with_ids(vectors, ids)


def _batches(database: Database, block: Block) -> Iterator[tuple[int, Array, Array]]:
    """First row, (n, d) float16 vectors and (n,) bool admitted, in order, in bounded batches."""
    size = max(1, ADD_BYTES // (4 * database.shape[1]))
    for start in range(block.start, block.stop, size):
        stop = min(start + size, block.stop)
        admitted = database.admitted[start:stop]
        if admitted.any():
            yield start, database.rows(start, stop), admitted


class _Truth:
    """The rows nearest to each recall query among those looked at so far.

    Attributes:
        ids: (Q, k) int64 global rows, nearest first, -1 for none.
        distances: (Q, k) float32.
    """

    def __init__(self, questions: Questions, k: int, metric: str) -> None:
        self.questions = questions
        self.k = k
        self.metric = metric
        shape = len(questions.queries), k
        self.ids = np.full(shape, -1, np.int64)
        self.distances = np.full(shape, np.inf if metric == "l2" else -np.inf, np.float32)

    def look_at(self, start: int, rows: Array, admitted: Array) -> None:
        """At (n, d) float16 vectors of consecutive global rows."""
        if not len(self.ids):
            return
        from retro_data.exact import nearest

        found = nearest(
            self.questions.queries,
            Vectors([rows]),
            self.k,
            metric=self.metric,  # type: ignore[arg-type]
            excluded=np.clip(self.questions.own - start, 0, len(rows)),
            admitted=admitted,
            memory_bytes=TRUTH_BYTES,
        )
        ids = np.where(found.ids >= 0, found.ids + start, -1)
        lists = [(self.distances, self.ids), (found.distances, ids)]
        self.distances, self.ids = merge(lists, self.k, self.metric)
