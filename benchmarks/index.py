"""Indexes of one database: ours by each planner, and autofaiss' own, in one run.

    python benchmarks/index.py --rows 20000 --dim 384     # synthetic vectors
    python benchmarks/index.py --root data                # the database of a prepared root
    python benchmarks/index.py --shards 4 --workers 2 --rows 400000 --embeddings vectors.npy

With `--shards`, one file against several of the same trained index instead: built by workers, told how
much the largest of them held, and whether both find the same. `--embeddings` repeats vectors of a file,
with a little noise, up to `--rows`, 20 chunks a document.

Every index answers the same queries, database rows whose own document does not count, one at a time
on one thread; recall is against exact search. Building takes all threads and includes the choice of
the search parameter.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from exact_search import embeddings_of

from retro_data import artifact, store
from retro_data.codebook import CodebookStage
from retro_data.database import Database, DatabasePlace
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.errors import RetroDataError
from retro_data.exact import nearest
from retro_data.index import IndexStage
from retro_data.index_search import load_index
from retro_data.index_settings import IndexSettings
from retro_data.stage import Block, Engine, Receipt, Stage, complete, stage_key
from retro_data.vectors import recall

Array = np.ndarray[Any, Any]
Search = Callable[[Array, int], tuple[Array, Array]]  # queries, k -> distances, ids

K = 10


# ---- data ----------------------------------------------------------------------------------------


def write_artifact(folder: Path, arrays: dict[str, Array], **manifest: Any) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for name, array in arrays.items():
        artifact.save_array(folder / name, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    artifact.write_record(folder / artifact.MANIFEST, {"arrays": entries, **manifest})


def synthetic_vectors(rows: int, dim: int, chunks_per_document: int) -> Array:
    """Unit vectors: a topic, within it a document, within it a chunk, each step as far as the last."""
    rng = np.random.default_rng(0)
    of_chunk = np.arange(rows) // chunks_per_document
    documents = int(of_chunk[-1]) + 1
    topics = rng.standard_normal((max(1, documents // 20), dim))
    centers = topics[rng.integers(0, len(topics), documents)]
    centers += rng.standard_normal(centers.shape)
    vectors = centers[of_chunk] + rng.standard_normal((rows, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    narrow: Array = vectors.astype(np.float16)
    return narrow


def database_of(root: Path, vectors: Array, chunks_per_document: int) -> DatabasePlace:
    rows, dim = vectors.shape
    first = np.append(np.arange(0, rows, chunks_per_document), rows).astype(np.int64)
    documents = len(first) - 1
    of_chunk = np.arange(rows) // chunks_per_document
    chunks: dict[str, Array] = {
        store.TOKENS: np.zeros((rows, 1), np.uint16),
        store.LENGTHS: np.ones(rows, np.uint8),
        store.DOCUMENT_OF_CHUNK: of_chunk.astype(np.int32),
        store.DOCUMENT_KEYS: np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2),
        store.DOCUMENT_FIRST_CHUNK: first,
        store.DOCUMENT_TOKENS: np.diff(first),
        store.DOCUMENT_BYTES: np.diff(first),
        store.DOCUMENT_ID_BYTES: np.zeros(0, np.uint8),
        store.DOCUMENT_ID_OFFSETS: np.zeros(documents + 1, np.int64),
    }
    write_artifact(root / "chunks", chunks, fields={"name": "synthetic"}, key="chunks")
    write_artifact(root / "vectors", {store.block_name(0): vectors}, dim=dim)
    write_artifact(root / "database", {store.admitted_name(0): np.ones(documents, bool)}, rows=rows)
    return DatabasePlace(
        root / "database", "database", (root / "chunks",), ((root / "vectors", "vectors"),)
    )


def prepared_database(root: Path) -> DatabasePlace:
    """The newest database of a prepared root."""
    folder = max((root / "database").iterdir(), key=lambda path: path.stat().st_mtime)
    manifest = store.finished(folder)
    made = {path: store.finished(path) for path in (root / "embeddings").iterdir()}
    chunks, embeddings = [], []
    for part in manifest["stores"]:
        chunks.append(store.folder_of(root, "chunks", part["key"], part["name"]))
        embeddings += [
            (path, m["key"]) for path, m in made.items() if m["parents"]["chunks"] == part["key"]
        ]
    return DatabasePlace(folder, manifest["key"], tuple(chunks), tuple(embeddings))


# ---- measuring -----------------------------------------------------------------------------------


class Questions(NamedTuple):
    queries: Array  # (Q, d) float32
    own: Array  # (Q, 2) rows of each query's document
    truth: Array  # (Q, K)

    @classmethod
    def of(cls, database: Database, metric: str, count: int) -> Questions:
        usable = np.flatnonzero(database.admitted)
        rng = np.random.default_rng(7)  # not the queries by which the search parameter was chosen
        rows = np.sort(rng.choice(usable, min(count, len(usable)), replace=False))
        queries, own = database.vectors.take(rows), database.own_documents(rows)
        options: dict[str, Any] = {"excluded": own, "admitted": database.admitted}
        truth = nearest(queries, database.vectors, K, metric=metric, **options).ids  # type: ignore[arg-type]
        return cls(queries.astype(np.float32), own, truth)

    def ask(self, search: Search) -> tuple[float, float]:
        """recall@K, and milliseconds of a query for K rows by itself on one thread."""
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        began = time.perf_counter()
        for query in self.queries:
            search(query[None], K)
        milliseconds = 1000 * (time.perf_counter() - began) / len(self.queries)
        faiss.omp_set_num_threads(threads)
        widest = K + int((self.own[:, 1] - self.own[:, 0]).max())
        found = np.full_like(self.truth, -1)
        for i, (ids, (low, high)) in enumerate(
            zip(search(self.queries, widest)[1], self.own, strict=True)
        ):
            others = ids[(ids >= 0) & ~((ids >= low) & (ids < high))][:K]
            found[i, : len(others)] = others
        return recall(found, self.truth), milliseconds


class Weighing(LocalEngine):
    """Worker processes; `peak` is the most memory that any of them has held, in bytes."""

    peak = 0

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]:
        self.peak = 0
        for receipt in super().run(stage, folder, missing):  # whose worker waits for its next block
            self.peak = max([self.peak, *map(most_held, children())])
            yield receipt


def children() -> list[str]:
    return Path("/proc/thread-self/children").read_text("ascii").split()


def most_held(process: str) -> int:
    """Bytes in memory at the worst moment, mapped files and all."""
    for line in Path(f"/proc/{process}/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


class Row(NamedTuple):
    name: str
    choice: str
    seconds: float
    recall: float
    milliseconds: float
    size: int

    def __str__(self) -> str:
        return (
            f"{self.name:30}{self.choice:44}{self.seconds:9.1f}{self.recall:11.4f}"
            f"{self.milliseconds:10.3f}{self.size / 2**20:10.1f}"
        )


def ours(
    name: str, place: DatabasePlace, folder: Path, metric: str, questions: Questions, **changes: Any
) -> Row:
    began = time.perf_counter()
    settings, engine = IndexSettings(**changes), InlineEngine()
    trained = trained_index(settings, metric, place, folder.with_suffix(".trained"), engine)
    manifest = complete(IndexStage(settings, metric, place, trained), folder, engine)
    seconds = time.perf_counter() - began
    choice = ", ".join(
        [manifest["factory"], *(f"{n}={v}" for n, v in manifest["search_parameters"].items())]
    )
    found = questions.ask(load_index(folder).search)
    return Row(name, choice, seconds, *found, manifest["figures"]["bytes"])


def trained_index(
    settings: IndexSettings, metric: str, place: DatabasePlace, folder: Path, engine: Engine
) -> tuple[Path, str]:
    stage = CodebookStage(settings, metric, place)
    complete(stage, folder, engine)
    return folder, stage_key(stage)


def one_against_several(
    args: argparse.Namespace, place: DatabasePlace, questions: Questions, scratch: Path
) -> None:
    """Of each factory: one file by one worker with all threads, and several by several workers."""
    rows = place.rows
    print(f"{'':34}{'files':>7}{'workers':>9}{'build s':>9}{'MiB a worker':>14}", end="")
    print(f"{f'recall@{K}':>11}{'ms/query':>10}{'MiB':>8}")
    for number, factory in enumerate(args.factory or [None]):
        found = []
        trained = scratch / f"trained-{number}"
        for shards, workers in ((1, 1), (args.shards, args.workers)):
            settings = IndexSettings(
                planner="builtin",
                factory=factory,
                max_index_memory=args.memory,
                shard_rows=-(-rows // shards),
            )
            engine = Weighing(EngineSettings(devices=(), workers=workers))
            codebook = trained_index(settings, args.metric, place, trained, engine)
            folder, began = scratch / f"{number}-{shards}", time.perf_counter()
            stage = IndexStage(settings, args.metric, place, codebook)
            manifest = complete(stage, folder, engine)
            seconds = time.perf_counter() - began
            index = load_index(folder)
            accuracy, milliseconds = questions.ask(index.search)
            found.append(index.search(questions.queries, K))
            probes = ", ".join(f"{n}={v}" for n, v in manifest["search_parameters"].items())
            print(
                f"{manifest['factory'] + ', ' + probes:34}{shards:7}{workers:9}{seconds:9.1f}"
                f"{engine.peak / 2**20:14.0f}{accuracy:11.4f}{milliseconds:10.3f}"
                f"{manifest['figures']['bytes'] / 2**20:8.0f}",
                flush=True,
            )
        took = store.finished(trained)["figures"]["build_seconds"]
        same = (found[0][1] == found[1][1]).mean()
        print(f"  trained once, in {took:.1f} s; {same:.4f} of what both find are the same rows")


def classic(database: Database, folder: Path, metric: str, questions: Questions) -> Row:
    """The classic call: autofaiss chooses, trains, fills and tunes, all by its defaults."""
    from autofaiss import build_index

    folder.mkdir()
    np.save(folder / "0.npy", database.rows(0, database.shape[0]))
    began = time.perf_counter()
    index, facts = build_index(
        str(folder), save_on_disk=False, metric_type=metric, verbose=logging.ERROR
    )
    seconds = time.perf_counter() - began
    if index is None or facts is None:
        raise SystemExit("autofaiss refused, as it does: it returned None")
    choice = f"{facts['index_key']}, {facts['index_param']}"
    # It fills positions from 0 on, which are global rows while every row is admitted.
    found = questions.ask(index.search)
    return Row("autofaiss build_index", choice, seconds, *found, int(facts["size in bytes"]))


def run(args: argparse.Namespace, scratch: Path) -> None:
    if args.root:
        place = prepared_database(args.root)
    else:
        shape = args.rows, args.dim, args.chunks_per_document
        given = args.embeddings
        vectors = embeddings_of(given, args.rows) if given else synthetic_vectors(*shape)
        place = database_of(scratch, vectors, args.chunks_per_document)
    database = place.open()
    questions = Questions.of(database, args.metric, args.queries)
    rows, dim = database.shape
    print(f"{rows:,} vectors of {dim}, {args.metric}, {faiss.omp_get_max_threads()} threads")
    if args.shards:
        one_against_several(args, place, questions, scratch)
        return
    print(
        f"{'':30}{'index and search parameter':44}{'build s':>9}{f'recall@{K}':>11}{'ms/query':>10}"
        f"{'MiB':>10}"
    )
    candidates: list[tuple[str, dict[str, Any]]] = [
        ("ours, planner autofaiss", {"planner": "autofaiss"}),
        ("  memory_mapped=false", {"planner": "autofaiss", "memory_mapped": False}),
        ("ours, planner builtin", {"planner": "builtin"}),
        ("  memory_mapped=false", {"planner": "builtin", "memory_mapped": False}),
        ("exact (Flat)", {"factory": "Flat"}),
    ]
    for i, (name, changes) in enumerate(candidates):
        options = {"max_index_memory": args.memory, **changes}
        try:
            row = ours(name, place, scratch / f"index-{i}", args.metric, questions, **options)
        except RetroDataError as refusal:
            print(f"{name:30}{refusal}")
        else:
            print(row, flush=True)
    if not database.admitted.all():
        print("autofaiss build_index: left out, for it cannot leave rows out")
    else:
        print(classic(database, scratch / "classic", args.metric, questions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="of the synthetic database")
    parser.add_argument("--dim", type=int, default=384, help="of the synthetic database")
    parser.add_argument("--chunks-per-document", type=int, default=20)
    parser.add_argument("--root", type=Path, help="of prepared data, instead of synthetic vectors")
    parser.add_argument("--metric", choices=("l2", "ip"), default="l2")
    parser.add_argument("--memory", default="16G", help="index.max_index_memory of ours")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--embeddings", type=Path, help=".npy of vectors instead of synthetic ones")
    parser.add_argument("--shards", type=int, help="files of an index, against one file")
    parser.add_argument("--workers", type=int, default=2, help="that make them")
    parser.add_argument("--factory", nargs="+", help="with --shards: each of these")
    args = parser.parse_args()
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
