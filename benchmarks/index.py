"""Indexes of one database: ours by each planner, and autofaiss' own, in one run.

    python benchmarks/index.py --rows 20000 --dim 384     # synthetic vectors
    python benchmarks/index.py --root data                # the database of a prepared root

Every index answers the same queries, database rows whose own document does not count, one at a time
on one thread; recall is against exact search. Building takes all threads and includes the choice of
the search parameter.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from retro_data import artifact, store
from retro_data.database import Database, DatabasePlace
from retro_data.engines.inline import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.exact import nearest, recall
from retro_data.index import IndexSettings, IndexStage, load_index
from retro_data.stage import complete

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


def synthetic_database(root: Path, rows: int, dim: int, chunks_per_document: int) -> DatabasePlace:
    """Unit vectors: a topic, within it a document, within it a chunk, each step as far as the last."""
    rng = np.random.default_rng(0)
    first = np.append(np.arange(0, rows, chunks_per_document), rows).astype(np.int64)
    documents = len(first) - 1
    of_chunk = np.arange(rows) // chunks_per_document
    topics = rng.standard_normal((max(1, documents // 20), dim))
    centers = topics[rng.integers(0, len(topics), documents)]
    centers += rng.standard_normal(centers.shape)
    vectors = centers[of_chunk] + rng.standard_normal((rows, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
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
    write_artifact(root / "vectors", {store.block_name(0): vectors.astype(np.float16)}, dim=dim)
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
    stage = IndexStage(IndexSettings(**changes), metric, place)
    manifest = complete(stage, folder, InlineEngine())
    seconds = time.perf_counter() - began
    choice = ", ".join(
        [manifest["factory"], *(f"{n}={v}" for n, v in manifest["search_parameters"].items())]
    )
    found = questions.ask(load_index(folder).search)
    return Row(name, choice, seconds, *found, manifest["figures"]["bytes"])


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
        place = synthetic_database(scratch, args.rows, args.dim, args.chunks_per_document)
    database = place.open()
    questions = Questions.of(database, args.metric, args.queries)
    rows, dim = database.shape
    print(f"{rows:,} vectors of {dim}, {args.metric}, {faiss.omp_get_max_threads()} threads")
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
    args = parser.parse_args()
    logging.getLogger("autofaiss").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
