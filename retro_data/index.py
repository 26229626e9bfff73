"""The stage `index`: a faiss index of a database's vectors, and the search in it.

    all rows ─► uniform sample ─► train ─┐
    all rows ─► admitted, not zero ──────┴► add with global ids ─► measure recall ─► 00000.index

What kind of index is chosen in `index_factory`; training and adding are faiss' own. The search
parameter (nprobe, efSearch) is the smallest power of two whose recall@k, measured against exact
search, reaches a target: it depends on the data and the seed, not on how fast this machine is.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import free, keyed
from retro_data.database import Database, DatabasePlace
from retro_data.errors import RetroDataError
from retro_data.exact import nearest, recall
from retro_data.index_factory import (
    FLAT,
    PLANNERS,
    choose_factory,
    format_memory,
    import_faiss,
    installed_faiss,
    parse_memory,
)
from retro_data.stage import Block, BlockWriter, Receipt, Resources

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Index = Any  # faiss.Index: faiss has no types, and is imported only where it is used

ADD_BYTES = 2**28  # float32 vectors handed to faiss at once
POINTS_PER_LIST = 100  # training vectors a list, between faiss' 39 and 256
POINTS_PER_CODEBOOK = 65_536  # training vectors of a product quantizer: 256 a centroid
WIDEST_STEP = 4096  # of nprobe and efSearch: beyond, exact search is the better choice
NARROWEST_GRAPH_STEP = 16
PLATEAU = 0.005  # recall within this of the best is not worth twice the time

METRICS = ("l2", "ip")


@dataclass(frozen=True)
class IndexSettings:
    """Which index, within which budgets, and how its recall is measured.

    Attributes:
        planner: who chooses the index where `factory` is None: "autofaiss", or "builtin", which
            needs no package beyond faiss.
        factory: a faiss factory string, e.g. "IVF4096,SQfp16"; None lets the planner choose.
        max_index_memory: largest size of the index, e.g. "16G"; also what building it takes.
        memory_mapped: choose only what can be searched from disk through a memory map, so no HNSW
            graph over all vectors, whose search jumps all over the file.
        max_query_ms: latency budget of one query on one thread. A slower index is told in a
            warning; time never decides, or no two machines would agree.
        target_recall: recall@`recall_at` that the search parameter must reach.
        recall_at: k of the measured recall@k.
        recall_queries: database rows drawn as queries to measure it.
        sample_size: most vectors to train on, drawn from all rows.
        seed: of the samples and of k-means.
        threads: of building; 0 leaves faiss its own number.
    """

    planner: str = keyed("autofaiss")
    factory: str | None = keyed(None)
    max_index_memory: str = keyed("16G")
    memory_mapped: bool = keyed(True)
    target_recall: float = keyed(0.95)
    recall_at: int = keyed(10)
    recall_queries: int = keyed(1000)
    sample_size: int = keyed(2_000_000)
    seed: int = keyed(0)
    max_query_ms: float = free(10.0)
    threads: int = free(0)

    def __post_init__(self) -> None:
        if self.planner not in PLANNERS:
            raise RetroDataError(
                f"index.planner={self.planner!r}: expected one of {', '.join(PLANNERS)}."
            )
        parse_memory(self.max_index_memory)
        if not 0 < self.target_recall <= 1:
            raise RetroDataError(
                f"index.target_recall={self.target_recall}: expected more than 0 and at most 1."
            )
        for name in ("recall_at", "recall_queries", "sample_size", "max_query_ms"):
            if getattr(self, name) <= 0:
                raise RetroDataError(f"index.{name}={getattr(self, name)}: expected more than 0.")


# ---- the stage -----------------------------------------------------------------------------------


@dataclass
class IndexContext:
    database: Database
    device: str


class IndexStage:
    """Builds one index of all admitted rows of a database.

    Args:
        settings: which index.
        metric: "l2" or "ip".
        database: whose vectors.
    """

    name = "index"
    version = 2
    unit = "chunks"
    tolerance = 0.0

    def __init__(self, settings: IndexSettings, metric: str, database: DatabasePlace) -> None:
        if metric not in METRICS:
            raise RetroDataError(f"metric {metric!r}: expected one of {', '.join(METRICS)}.")
        self.settings = settings
        self.metric = metric
        self.database = database
        has_gpu_wheel = any(name.startswith("faiss-gpu") for name in installed_faiss())
        self.resources = Resources(gpu=has_gpu_wheel, threads=0)

    def key_fields(self) -> dict[str, Any]:
        return {"metric": self.metric, **artifact.key_fields(self.settings)}

    def parents(self) -> dict[str, str]:
        return self.database.parents()

    def blocks(self) -> list[Block]:
        return [Block(0, 0, self.database.rows)]

    @contextmanager
    def open(self, device: str) -> Iterator[IndexContext]:
        faiss = import_faiss()
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(self.settings.threads or threads)
        try:
            yield IndexContext(self.database.open(), device)
        finally:
            faiss.omp_set_num_threads(threads)

    def make(self, context: IndexContext, block: Block, out: BlockWriter) -> None:
        database, settings = context.database, self.settings
        began = time.monotonic()
        builder = _Builder(settings, self.metric, database, context.device)
        added = builder.build()
        seconds = time.monotonic() - began
        measured = _measure(settings, self.metric, context, builder.index, added)

        faiss, name = import_faiss(), store.index_name(block.index)
        with out.file(name) as handle:
            faiss.write_index(builder.index, faiss.PyCallbackIOWriter(handle.write))
        out.rows = int(added.sum())
        figures = {
            "rows": out.rows,
            "rows_left_out": len(added) - out.rows,
            "training_rows": builder.training_rows,
            "build_seconds": round(seconds, 3),
            "bytes": out.files[name]["bytes"],
            "recall": measured.recall,
            "recall_at": settings.recall_at,
            "recall_queries": measured.queries,
            "ms_per_query": measured.ms_per_query,
        }
        out.note("factory", builder.factory)
        out.note("search_parameters", measured.parameters)
        out.note("dim", database.shape[1])
        out.note("figures", figures)
        self._warn(builder.factory, measured, out.files[name]["bytes"])

    def _warn(self, factory: str, measured: _Measured, size: int) -> None:
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

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        (receipt,) = receipts
        return {"arrays": {}, "files": receipt.files, "rows": receipt.rows, **receipt.notes}


# ---- building ------------------------------------------------------------------------------------


class _Builder:
    """Trains and fills an index.

    Attributes:
        factory: what was built, once `build` is done.
        index: the faiss index, on the CPU.
        training_rows: vectors that it was trained on.
    """

    def __init__(
        self, settings: IndexSettings, metric: str, database: Database, device: str
    ) -> None:
        self.settings = settings
        self.database = database
        self.faiss = import_faiss()
        self.metric = self.faiss.METRIC_L2 if metric == "l2" else self.faiss.METRIC_INNER_PRODUCT
        has_gpu = device.startswith("cuda") and hasattr(self.faiss, "StandardGpuResources")
        self.gpu = self.faiss.StandardGpuResources() if has_gpu else None
        self.assigner: Index | None = None  # the centroids on the GPU
        self.index: Index = None
        self.factory = FLAT
        self.training_rows = 0

    def build(self) -> Array:
        """Train, add every row that may be a neighbor, and tell which: (N,) bool."""
        self._train()
        added = np.zeros(self.database.shape[0], bool)
        for ids, vectors in self._addable():
            self._add(ids, vectors)
            added[ids] = True
        return added

    def _train(self) -> None:
        settings, dim = self.settings, self.database.shape[1]
        rows = int(np.count_nonzero(self.database.admitted))
        factory = settings.factory
        if factory is None:
            factory = choose_factory(
                *(settings.planner, rows, dim, settings.max_index_memory, settings.memory_mapped)
            )
        self.factory = factory
        self.index = _create(self.factory, dim, self.metric)
        least, wanted = _training_rows(self.index)
        if least <= rows and least > settings.sample_size:
            raise RetroDataError(
                f"{self.factory} needs at least {least} vectors to train on, "
                f"index.sample_size={settings.sample_size} allows fewer. Raise it, or name a "
                "smaller index.factory."
            )
        sample = self._sample(min(wanted, settings.sample_size))
        if len(sample) < least:
            log.info(
                "%s needs %d vectors to train on, found %d: %s is built instead",
                *(self.factory, least, len(sample), FLAT),
            )
            self.factory = FLAT
            self.index = _create(FLAT, dim, self.metric)
        elif not self.index.is_trained:
            self.training_rows = len(sample)
            try:
                self._train_on(sample)
            except RuntimeError as error:
                raise RetroDataError(
                    f"{self.factory} cannot be trained on {len(sample)} vectors of dimension "
                    f"{dim}: {_reason(error)}. Name another index.factory, or null to let "
                    "index.planner choose."
                ) from error

    def _sample(self, count: int) -> Array:
        """(<= count, d) float32: admitted rows, drawn from the whole database alike."""
        rows = _draw(self.database.admitted, count, np.random.default_rng([self.settings.seed, 0]))
        vectors: Array = self.database.vectors.take(rows).astype(np.float32)
        real: Array = vectors[vectors.any(axis=1)]
        return real

    def _train_on(self, sample: Array) -> None:
        inverted = _inverted(self.index)
        if inverted is not None:
            inverted.cp.seed = self.settings.seed
            inverted.cp.min_points_per_centroid = 1  # fewer are no news worth a warning
            if hasattr(inverted, "do_polysemous_training"):
                inverted.do_polysemous_training = False  # minutes, for a filter that is not used
            # Left to faiss, the graph of centroids would be linked outside `_same_graph`.
            if _quantizer_trains_alone(inverted) in (0, 2):
                self._train_centroids(inverted, self._transform(sample, train=True))
        self.index.train(sample)

    def _train_centroids(self, inverted: Index, sample: Array) -> None:
        faiss = self.faiss
        assigner = faiss.IndexFlat(inverted.d, self.metric)
        if self.gpu is not None:
            assigner = self.assigner = faiss.index_cpu_to_gpu(self.gpu, 0, assigner)
        clustering = faiss.Clustering(inverted.d, inverted.nlist, inverted.cp)
        clustering.train(sample, assigner)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(inverted.nlist, inverted.d)
        inverted.quantizer.reset()
        with _same_graph(faiss):
            inverted.quantizer.add(centroids)

    def _transform(self, vectors: Array, *, train: bool = False) -> Array:
        """Vectors as the inner index sees them: rotated, where there is a rotation."""
        faiss, index = self.faiss, self.faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexPreTransform):
            for place in range(index.chain.size()):
                step = faiss.downcast_VectorTransform(index.chain.at(place))
                if train and not step.is_trained:
                    step.train(vectors)
                vectors = step.apply(vectors)
        return vectors

    def _addable(self) -> Iterator[tuple[Array, Array]]:
        """(n,) int64 global rows and (n, d) float32 vectors, in order, in bounded batches."""
        rows, dim = self.database.shape
        batch = max(1, ADD_BYTES // (4 * dim))
        for start in range(0, rows, batch):
            admitted = self.database.admitted[start : start + batch]
            if not admitted.any():
                continue
            vectors = self.database.rows(start, start + len(admitted)).astype(np.float32)
            keep = admitted & vectors.any(axis=1)
            yield start + np.flatnonzero(keep), vectors[keep]

    def _add(self, ids: Array, vectors: Array) -> None:
        faiss = self.faiss
        if self.assigner is not None:
            inverted, vectors = _inverted(self.index), self._transform(vectors)
            lists = self.assigner.search(vectors, 1)[1]
            inverted.add_core(len(ids), *map(faiss.swig_ptr, (vectors, ids, lists)))
            self.index.ntotal = inverted.ntotal
        elif isinstance(_innermost(self.index), faiss.IndexHNSW):
            with _same_graph(faiss):
                self.index.add_with_ids(vectors, ids)
        else:
            self.index.add_with_ids(vectors, ids)


def _create(factory: str, dim: int, metric: int) -> Index:
    """An empty index that takes global ids."""
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dim, factory, metric)
        if _inverted(index) is None:
            index = faiss.IndexIDMap(index)
        _query_parameters(index, {})
    except RuntimeError as error:
        raise RetroDataError(
            f"faiss cannot make index.factory={factory!r} for dimension {dim}: {_reason(error)}. "
            'Expected e.g. "Flat", "HNSW32", "IVF4096,SQfp16" or "OPQ64_256,IVF4096,PQ64", or null '
            "to let index.planner choose."
        ) from error
    return index


def _reason(error: RuntimeError) -> str:
    """What faiss found, without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


def _inverted(index: Index) -> Index:
    """The inverted file within an index, None where there is none."""
    faiss = import_faiss()
    inverted = faiss.try_extract_index_ivf(index)
    return None if inverted is None else faiss.downcast_index(inverted)


def _quantizer_trains_alone(inverted: Index) -> int:
    """faiss's code for who trains the centroids; a C char, which some bindings give as text."""
    code = inverted.quantizer_trains_alone
    return ord(code) if isinstance(code, str) else int(code)


def _training_rows(index: Index) -> tuple[int, int]:
    """How many vectors an index needs to train at all, and how many to train well."""
    faiss = import_faiss()
    if index.is_trained:
        return 0, 0
    least, wanted = 1, POINTS_PER_CODEBOOK
    inverted, outer = _inverted(index), faiss.downcast_index(index)
    if inverted is not None:
        least, wanted = inverted.nlist, max(wanted, POINTS_PER_LIST * inverted.nlist)
    for part in (inverted, _innermost(index)):
        if hasattr(part, "pq"):
            least = max(least, part.pq.ksub)
    if isinstance(outer, faiss.IndexPreTransform):
        steps = [outer.chain.at(i) for i in range(outer.chain.size())]
        least = max(least, *(0 if step.is_trained else max(256, step.d_in) for step in steps))
    return least, max(least, wanted)


def _innermost(index: Index) -> Index:
    """What holds the codes: without maps of ids and transforms of vectors."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _draw(admitted: Array, count: int, rng: np.random.Generator) -> Array:
    """(<= count,) int64 admitted rows, each as likely as any other, ascending."""
    rows = np.flatnonzero(admitted)
    return np.sort(rng.choice(rows, min(count, len(rows)), replace=False, shuffle=False))


def _same_graph(faiss: Any) -> AbstractContextManager[None]:
    """Linking an HNSW graph within this makes the same graph each time.

    Threads of older versions race; newer ones link batches that do not depend on each other.
    """
    has_fixed_order = hasattr(faiss, "hnsw_add_vertices_deterministic")
    is_optional = hasattr(faiss.cvar, "hnsw_deterministic_build")
    return nullcontext() if has_fixed_order and not is_optional else _one_thread(faiss)


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


# ---- search parameters ---------------------------------------------------------------------------


def _query_parameters(index: Index, parameters: Mapping[str, int], selector: Any = None) -> Any:
    """faiss' search parameters for an index; `selector` says which ids may be found.

    Raises:
        RuntimeError: the kind of index takes no selector, so its recall cannot be measured.
    """
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIDMap):
        return _query_parameters(index.index, parameters, selector)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _query_parameters(index.index, parameters, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        if "quantizer_efSearch" in parameters:
            chosen["quantizer_params"] = faiss.SearchParametersHNSW(
                efSearch=parameters["quantizer_efSearch"]
            )
        return faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=parameters.get("efSearch", 16), **chosen)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexPQ):
        return faiss.SearchParameters(**chosen)
    raise RuntimeError(f"{type(index).__name__} is not of the families Flat, SQ, PQ, HNSW, IVF")


def _steps(index: Index) -> list[dict[str, int]]:
    """Search parameters to try, cheapest first: powers of two, and all lists where that is few."""
    faiss = import_faiss()
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        lists = min(inner.nlist, WIDEST_STEP)
        probes = [2**i for i in range(lists.bit_length()) if 2**i < lists] + [lists]
        if isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexHNSW):
            return [{"nprobe": n, "quantizer_efSearch": max(16, 2 * n)} for n in probes]
        return [{"nprobe": n} for n in probes]
    if isinstance(inner, faiss.IndexHNSW):
        last = max(NARROWEST_GRAPH_STEP, min(index.ntotal, WIDEST_STEP))
        powers = range(NARROWEST_GRAPH_STEP.bit_length() - 1, last.bit_length())
        return [{"efSearch": 2**i} for i in powers]
    return [{}]


class _Measured(NamedTuple):
    """One row of the trade of recall against time; recall is None where nothing can be found."""

    parameters: dict[str, int]
    recall: float | None
    ms_per_query: float
    queries: int


def _measure(
    settings: IndexSettings, metric: str, context: IndexContext, index: Index, added: Array
) -> _Measured:
    """The cheapest search parameter that reaches the target recall, else one as good as the best.

    Queries are database rows; rows of a query's own document are neither in the truth nor found.
    They are searched one at a time on one thread, as generation does.
    """
    database, steps = context.database, _steps(index)
    rows = _draw(added, settings.recall_queries, np.random.default_rng([settings.seed, 1]))
    if not len(rows):
        return _Measured(steps[-1], None, 0.0, 0)
    queries, own = database.vectors.take(rows), database.own_documents(rows)
    truth = nearest(
        queries,
        database.vectors,
        settings.recall_at,
        metric=metric,  # type: ignore[arg-type]
        excluded=own,
        admitted=added,
    )
    if not (truth.ids >= 0).any():  # a single document: any parameter would look perfect
        return _Measured(steps[-1], None, 0.0, 0)
    tried, wide = [], queries.astype(np.float32)
    for step in steps:
        began = time.perf_counter()
        ids = _search_others(index, step, wide, own, settings.recall_at)
        ms = 1000 * (time.perf_counter() - began) / len(rows)
        found = recall(ids, truth.ids)
        tried.append(_Measured(step, found, round(ms, 4), len(rows)))
        if found >= settings.target_recall:
            return tried[-1]
    return _first_of_the_best(tried)


def _first_of_the_best(tried: Sequence[_Measured]) -> _Measured:
    """The cheapest of those that find about as much as the one that finds most."""
    recalls = np.array([one.recall for one in tried])
    return tried[int(np.argmax(recalls >= recalls.max() - PLATEAU))]


def _search_others(
    index: Index, parameters: Mapping[str, int], queries: Array, own: Array, k: int
) -> Array:
    """(Q, k) int64 ids found for each query by itself, outside its own document."""
    faiss = import_faiss()
    ids = np.empty((len(queries), k), np.int64)
    with _one_thread(faiss):
        for i, (low, high) in enumerate(own.tolist()):
            inside = faiss.IDSelectorRange(low, high)
            chosen = _query_parameters(index, parameters, faiss.IDSelectorNot(inside))
            ids[i] = index.search(queries[i : i + 1], k, params=chosen)[1][0]
    return ids


# ---- searching -----------------------------------------------------------------------------------


class SearchIndex:
    """A finished index, read by memory map, with the search parameters it was measured with.

    Attributes:
        metric: "l2" or "ip".
        parameters: e.g. {"nprobe": 16}.
        dim: of the vectors.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        faiss, path = import_faiss(), Path(folder) / store.index_name()
        self.metric: str = manifest["fields"]["metric"]
        self.parameters: dict[str, int] = manifest["search_parameters"]
        self.dim: int = manifest["dim"]
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
        try:
            self._index = faiss.read_index(str(path), flags)
        except RuntimeError as error:
            raise RetroDataError(
                f"{path} cannot be read ({error}). Remove {folder} and run `retro-data prepare`."
            ) from error
        if (self._index.ntotal, self._index.d) != (manifest["rows"], self.dim):
            raise RetroDataError(
                f"{path} holds {self._index.ntotal} vectors of dimension {self._index.d}, its "
                f"manifest says {manifest['rows']} of {self.dim}. Remove {folder} and run "
                "`retro-data prepare`."
            )
        self._chosen = _query_parameters(self._index, self.parameters)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The k nearest rows that the index finds.

        Args:
            queries: (n, d) float16 or float32.

        Returns:
            (n, k) float32 distances, squared L2 or inner product, and (n, k) int64 global rows,
            nearest first. Beyond what was found, ids are -1 and distances +inf (l2) or -inf (ip).
            An index that stores codes gives distances to the decoded vectors.

        Raises:
            RetroDataError: queries of another dimension.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise RetroDataError(
                f"queries of shape {queries.shape}; this index holds vectors of dimension "
                f"{self.dim}. Embed both by one encoder."
            )
        vectors = np.ascontiguousarray(queries, np.float32)
        distances, ids = self._index.search(vectors, k, params=self._chosen)
        distances[ids < 0] = np.inf if self.metric == "l2" else -np.inf
        return distances, ids


def load_index(folder: Path, manifest: Mapping[str, Any] | None = None) -> SearchIndex:
    """Open a finished index.

    Args:
        folder: of the artifact.
        manifest: its manifest; read from the folder where None.

    Raises:
        RetroDataError: it is unfinished or damaged, or faiss is missing.
    """
    return SearchIndex(folder, manifest if manifest is not None else store.finished(folder))
