"""The stage `index`: a faiss index of the database, of a kind chosen by budgets.

What kind of index fits is asked of autofaiss; training and filling it is done here, because a trained
index must see a uniform sample of the whole database (autofaiss trains on the first rows), hold
global rows, leave out what is not admitted, and need no more memory than the index itself. The
search parameter is the smallest that reaches the wanted recall against exact search: the same on
every run, where a timed choice is not.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import store
from retro_data.artifact import free, key_fields, keyed
from retro_data.database import Database, DatabasePlace
from retro_data.errors import RetroDataError
from retro_data.exact import nearest, recall
from retro_data.stage import Block, BlockWriter, Receipt, Resources, block_files, total_counts

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

PLANNERS = ("autofaiss", "builtin")
ADD_ROWS = 65_536  # widened to float32 and added at once
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
HNSW_CONSTRUCTION = 200  # efConstruction; faiss' own 40 leaves recall behind
POINTS_PER_CENTROID = 64  # a training sample of this many rows for each k-means centroid


@dataclass(frozen=True)
class IndexSettings:
    """What the index may cost and must reach.

    Attributes:
        planner: who chooses its kind where `factory` is None: "autofaiss" (extra `autofaiss`), or
            "builtin", which needs faiss alone.
        factory: a faiss factory string, e.g. "Flat" or "IVF1024,Flat".
        max_memory: budget for the index in memory, e.g. "16G".
        max_query_ms: what a query may take; a slower one is reported, never silently cut short.
        target_recall: recall@`recall_at` to reach by the search parameter.
        recall_at: k of the recall that is measured.
        recall_queries: random database rows that recall is measured on.
        sample_rows: rows to train on at most, drawn uniformly over the whole database.
        seed: of the sample and the queries.
    """

    planner: str = keyed("autofaiss")
    factory: str | None = keyed(None)
    max_memory: str = keyed("4G")
    max_query_ms: float = keyed(10.0)
    target_recall: float = keyed(0.95)
    recall_at: int = keyed(10)
    recall_queries: int = keyed(1000)
    sample_rows: int = keyed(1_000_000)
    seed: int = keyed(0)

    def __post_init__(self) -> None:
        if self.planner not in PLANNERS:
            raise RetroDataError(f"index.planner={self.planner!r}: expected {' or '.join(PLANNERS)}.")
        if not 0 < self.target_recall <= 1:
            raise RetroDataError(f"index.target_recall={self.target_recall}: expected 0 to 1.")
        memory_bytes(self.max_memory)


def memory_bytes(text: str) -> int:
    """Bytes of a budget such as "16G"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise RetroDataError(f"index.max_memory={text!r}: expected a size such as 500M or 16G.")
    return int(float(match[1]) * UNITS[match[2].upper()])


# ---- faiss -----------------------------------------------------------------------------------------


def import_faiss() -> Any:
    """The faiss module, where exactly one of its wheels is installed."""
    wheels = []
    for name in ("faiss-cpu", "faiss-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            wheels.append(name)
    if len(wheels) > 1:
        raise RetroDataError(
            "both faiss-cpu and faiss-gpu are installed; they own the same folder and one has "
            "overwritten the other. `pip uninstall -y faiss-cpu faiss-gpu`, then install one of them."
        )
    try:
        import faiss
    except ImportError as error:
        raise RetroDataError(
            "searching by index needs faiss: `pip install 'retro_data[cpu]'`, or "
            "`'retro_data[gpu]'` on a machine with a GPU. Or set neighbors.search=exact."
        ) from error
    return faiss


def _gpu_resources(faiss: Any, device: str) -> Any:
    """faiss' handle on a GPU, None where it cannot use one."""
    usable = device.startswith("cuda") and hasattr(faiss, "StandardGpuResources")
    return faiss.StandardGpuResources() if usable and faiss.get_num_gpus() else None


# ---- choosing the kind -----------------------------------------------------------------------------


def choose_factory(settings: IndexSettings, rows: int, dim: int) -> str:
    """The faiss factory string for `rows` vectors of `dim` dimensions; the same on every machine.

    Raises:
        RetroDataError: no kind of index fits the budget, with what the smallest would need.
    """
    if settings.factory is not None:
        return settings.factory
    budget = memory_bytes(settings.max_memory)
    if settings.planner == "builtin":
        return builtin_factory(rows, dim, budget)
    if importlib.util.find_spec("autofaiss") is None:
        raise RetroDataError(
            "index.planner=autofaiss needs the package: `pip install 'retro_data[autofaiss]'` "
            "(Python 3.11 or 3.12). Or set index.planner=builtin."
        )
    from autofaiss.external.optimize import get_optimal_index_keys_v2

    try:
        factories = get_optimal_index_keys_v2(rows, dim, f"{max(1, budget // 2**10)}K")
    except Exception as error:  # autofaiss raises whatever it meets
        raise RetroDataError(
            f"autofaiss failed to choose an index for {rows} vectors of {dim} dimensions in "
            f"{settings.max_memory} ({type(error).__name__}: {error}). Set index.factory, or "
            "index.planner=builtin."
        ) from error
    if not factories:
        raise _nothing_fits("autofaiss finds no index", rows, dim, budget)
    chosen = str(factories[0])
    if "PQ" not in chosen and _flat_bytes(rows, dim) > budget:
        raise _nothing_fits(f"autofaiss proposes {chosen}, which does not fit", rows, dim, budget)
    return chosen


def builtin_factory(rows: int, dim: int, budget: int) -> str:
    """Flat, HNSW, IVF or IVF with product quantization: the most exact one that fits the budget."""
    flat = _flat_bytes(rows, dim)
    lists = 2 ** max(0, round(math.log2(4 * math.sqrt(max(1, rows)))))
    if rows < 10_000 and flat <= budget:
        return "Flat"
    if flat + rows * 2 * 32 * 4 <= budget:
        return "HNSW32"
    if flat + rows * 8 <= budget:
        return f"IVF{lists},Flat"
    for size in (64, 48, 32, 24, 16, 8):
        if dim % size == 0 and rows * (size + 8) + 4 * dim * lists <= budget:
            return f"IVF{lists},PQ{size}x8"
    raise _nothing_fits("no index fits", rows, dim, budget)


def _flat_bytes(rows: int, dim: int) -> int:
    return 4 * rows * dim


def _nothing_fits(what: str, rows: int, dim: int, budget: int) -> RetroDataError:
    least = rows * (8 + 8)
    return RetroDataError(
        f"{what}: {rows} vectors of {dim} dimensions take {_flat_bytes(rows, dim) / 2**20:.0f} MiB "
        f"flat and about {least / 2**20:.0f} MiB at 8 bytes a vector; index.max_memory allows "
        f"{budget / 2**20:.0f} MiB. Raise index.max_memory, or set neighbors.search=exact."
    )


# ---- building --------------------------------------------------------------------------------------


def build(
    database: Database, factory: str, settings: IndexSettings, metric: str, device: str = "cpu"
) -> Any:
    """A filled faiss index over the admitted rows, with global rows as ids.

    Args:
        metric: "l2" or "ip".
        device: a "cuda" device trains and fills there, where faiss can; the result is on the CPU.
    """
    faiss = import_faiss()
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    try:
        index = faiss.index_factory(database.shape[1], factory, kind)
    except RuntimeError as error:
        raise RetroDataError(
            f"faiss makes no index of factory {factory!r} with metric {metric}: {error}. "
            "Set index.factory to a string that faiss knows, or null."
        ) from error
    if hasattr(index, "hnsw"):
        index.hnsw.efConstruction = HNSW_CONSTRUCTION
    resources = _gpu_resources(faiss, device)
    if resources is not None and "HNSW" not in factory:
        index = faiss.index_cpu_to_gpu(resources, 0, index)
    _train(index, database, factory, settings)
    if not _keeps_ids(index):
        index = faiss.IndexIDMap2(index)
    for rows, vectors in admitted_vectors(database):
        index.add_with_ids(vectors, rows)
    return faiss.index_gpu_to_cpu(index) if resources is not None else index


def _train(index: Any, database: Database, factory: str, settings: IndexSettings) -> None:
    if index.is_trained:
        return
    sample = training_sample(database, factory, settings)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise RetroDataError(
            f"faiss cannot train an index {factory!r} on {len(sample)} vectors: {error}. "
            "Set index.factory=Flat, or another kind."
        ) from error


def _keeps_ids(index: Any) -> bool:
    """Inverted lists store ids themselves; HNSW and Flat number their vectors."""
    faiss = import_faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return "IVF" in type(inner).__name__


def training_sample(database: Database, factory: str, settings: IndexSettings) -> Array:
    """(n, d) float32 rows drawn uniformly from all admitted rows."""
    lists = re.search(r"IVF(\d+)", factory)
    wanted = max(65_536, POINTS_PER_CENTROID * int(lists[1]) if lists else 0)
    candidates = np.flatnonzero(database.admitted)
    generator = np.random.default_rng(settings.seed)
    count = min(wanted, settings.sample_rows, len(candidates))
    rows = np.sort(generator.choice(candidates, count, replace=False, shuffle=False))
    vectors = database.vectors.take(rows).astype(np.float32)
    return vectors[vectors.any(1)]


def admitted_vectors(database: Database) -> Iterator[tuple[Array, Array]]:
    """Global rows (n,) int64 and float32 vectors (n, d) of what may be found, piece by piece."""
    for start in range(0, database.shape[0], ADD_ROWS):
        stop = min(start + ADD_ROWS, database.shape[0])
        vectors = database.rows(start, stop)
        keep = database.admitted[start:stop] & vectors.any(1)
        rows = start + np.flatnonzero(keep)
        if len(rows):
            yield rows.astype(np.int64), vectors[keep].astype(np.float32)


# ---- searching -------------------------------------------------------------------------------------


class SearchIndex:
    """A faiss index with its search parameters.

    Args:
        index: the faiss index, its ids global rows.
        parameters: e.g. "nprobe=32"; "" for none.
    """

    def __init__(self, index: Any, parameters: str) -> None:
        self.index = index
        self.parameters = parameters
        if parameters:
            import_faiss().ParameterSpace().set_index_parameters(index, parameters)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The k nearest found: distances (n, k) float32 (squared L2, or inner product) and ids."""
        distances, ids = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        return distances, ids


def load_index(folder: Path) -> SearchIndex:
    """A finished index, its lists memory-mapped where faiss can."""
    faiss = import_faiss()
    manifest = store.finished(folder)
    mapped = faiss.IO_FLAG_MMAP if "IVF" in manifest["factory"] else 0
    index = faiss.read_index(str(folder / store.index_name()), mapped)
    return SearchIndex(index, manifest["search_parameters"])


def _parameter_steps(factory: str, rows: int) -> list[str]:
    """Search parameters to try, cheapest first."""
    lists = re.search(r"IVF(\d+)(_HNSW\d+)?", factory)
    if lists:
        most = int(lists[1])
        steps = [2**i for i in range(int(math.log2(most)) + 1)]
        if steps[-1] != most:
            steps.append(most)
        coarse = lists[2] is not None
        return [f"nprobe={n}" + (f",quantizer_efSearch={2 * n}" if coarse else "") for n in steps]
    if "HNSW" in factory:
        return [f"efSearch={2**i}" for i in range(4, 13) if 2 ** (i - 1) <= max(16, rows)]
    return [""]


@dataclass(frozen=True)
class Measured:
    parameters: str
    recall: float
    query_ms: float


def measure(
    database: Database, index: Any, factory: str, settings: IndexSettings, metric: str
) -> Measured:
    """The cheapest search parameter that reaches the target recall, with what it reaches.

    Queries are random admitted rows, their own document left out of truth and result alike.
    """
    k = settings.recall_at
    candidates = np.flatnonzero(database.admitted)
    generator = np.random.default_rng(settings.seed + 1)
    count = min(settings.recall_queries, len(candidates))
    rows = np.sort(generator.choice(candidates, count, replace=False, shuffle=False))
    own = database.own_documents(rows)
    queries = database.vectors.take(rows)
    options = {"metric": metric, "admitted": database.admitted}
    truth = nearest(queries, database.vectors, k, excluded=own, **options).ids  # type: ignore[arg-type]
    widest = min(len(candidates), k + int((own[:, 1] - own[:, 0]).max(initial=0)))
    best = Measured("", 0.0, 0.0)
    for parameters in _parameter_steps(factory, len(candidates)):
        search = SearchIndex(index, parameters)
        began = time.perf_counter()
        _, hits = search.search(queries, widest)
        milliseconds = 1000 * (time.perf_counter() - began) / max(1, count)
        found = recall(others(hits, own, k), truth)
        if found > best.recall or best.recall == 0:
            best = Measured(parameters, found, milliseconds)
        if found >= settings.target_recall:
            break
    return best


def others(hits: Array, own: Array, k: int) -> Array:
    """The first k hits of each row outside the query's own document, -1 at the end.

    Args:
        hits: (Q, w) int64 rows, -1 for none.
        own: (Q, 2) rows [lo, hi) of the query's own document.
    """
    keep = (hits >= 0) & ~((hits >= own[:, :1]) & (hits < own[:, 1:]))
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.where(np.take_along_axis(keep, order, 1), np.take_along_axis(hits, order, 1), -1)
    return np.pad(kept, ((0, 0), (0, k - kept.shape[1])), constant_values=-1)


# ---- the stage -------------------------------------------------------------------------------------


class IndexStage:
    """Builds one index over the whole database.

    Args:
        settings: budgets, or the kind.
        metric: "l2" or "ip".
        database: what is indexed.
    """

    name = "index"
    version = 1
    resources = Resources(gpu=True, threads=0)
    unit = "chunks"

    def __init__(self, settings: IndexSettings, metric: str, database: DatabasePlace) -> None:
        self.settings = settings
        self.metric = metric
        self.database = database

    def key_fields(self) -> dict[str, Any]:
        return {**key_fields(self.settings), "metric": self.metric}

    def parents(self) -> dict[str, str]:
        return self.database.parents()

    def blocks(self) -> list[Block]:
        return [Block(0, 0, self.database.rows)]

    def open(self, device: str) -> AbstractContextManager[tuple[Database, str]]:
        return contextlib.nullcontext((self.database.open(), device))

    def make(self, context: tuple[Database, str], block: Block, out: BlockWriter) -> None:
        database, device = context
        faiss = import_faiss()
        rows = int(database.admitted.sum())
        factory = choose_factory(self.settings, rows, database.shape[1])
        log.info("index: %s for %d vectors of %d dimensions", factory, rows, database.shape[1])
        index = build(database, factory, self.settings, self.metric, device)
        measured = measure(database, index, factory, self.settings, self.metric)
        self._warn(measured)
        with out.file(store.index_name()) as handle:
            faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))
        out.rows = int(index.ntotal)
        out.note("factory", factory)
        out.note("search_parameters", measured.parameters)
        out.note(f"recall@{self.settings.recall_at}", round(measured.recall, 6))
        out.note("query_ms", round(measured.query_ms, 4))

    def _warn(self, measured: Measured) -> None:
        if measured.recall < self.settings.target_recall:
            log.warning(
                "index: recall@%d is %.4f at %s, index.target_recall asks for %.4f. Raise "
                "index.max_memory, set another index.factory, or neighbors.search=exact.",
                *(self.settings.recall_at, measured.recall, measured.parameters or "its best"),
                self.settings.target_recall,
            )
        if measured.query_ms > self.settings.max_query_ms:
            log.warning(
                "index: a query takes %.2f ms at %s, index.max_query_ms allows %.2f. Lower "
                "index.target_recall, or set another index.factory.",
                *(measured.query_ms, measured.parameters, self.settings.max_query_ms),
            )

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        notes = receipts[0].notes
        names = ("factory", "search_parameters")
        return {
            "arrays": {},
            "files": block_files(receipts),
            "rows": receipts[0].rows,
            **{name: notes[name] for name in names},
            "figures": {
                **total_counts(receipts),
                **{name: value for name, value in notes.items() if name not in names},
                "bytes": receipts[0].files[store.index_name()]["bytes"],
            },
        }
