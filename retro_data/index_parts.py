"""What lies inside a faiss index, and how one is made and asked: what all who hold one need.

Under maps of ids and transforms of vectors lies what holds the codes: a flat array, a graph, or an
inverted file, whose centroids are an index of their own, the quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, BinaryIO

import numpy as np

from retro_data.errors import RetroDataError
from retro_data.index_factory import import_faiss

Array = np.ndarray[Any, Any]
Index = Any  # faiss.Index: faiss has no types, and is imported only where it is used

WIDEST_STEP = 4096  # of nprobe and efSearch: beyond, exact search is the better choice
NARROWEST_GRAPH_STEP = 16


# ---- making --------------------------------------------------------------------------------------


def create(factory: str, dim: int, metric: str) -> Index:
    """An empty index that takes global ids."""
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dim, factory, metric_code(metric))
        if isinstance(faiss.downcast_index(index), faiss.IndexIDMap):
            raise RuntimeError("it maps ids itself, to which global rows are not known")
        if inverted(index) is None:
            index = faiss.IndexIDMap(index)
        query_parameters(index, {})
    except RuntimeError as error:
        raise RetroDataError(
            f"faiss cannot make index.factory={factory!r} for dimension {dim}: {reason(error)}. "
            'Expected e.g. "Flat", "HNSW32", "IVF4096,SQfp16" or "OPQ64_256,IVF4096,PQ64", or null '
            "to let index.planner choose."
        ) from error
    return index


def write(index: Index, handle: BinaryIO) -> None:
    """Write an index to an open file."""
    faiss = import_faiss()
    faiss.write_index(index, faiss.PyCallbackIOWriter(handle.write))


def metric_code(metric: str) -> int:
    """faiss' name of "l2" or "ip"."""
    faiss = import_faiss()
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def reason(error: RuntimeError) -> str:
    """What faiss found, without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


# ---- looking inside ------------------------------------------------------------------------------


def inverted(index: Index) -> Index:
    """The inverted file within an index, None where there is none."""
    faiss = import_faiss()
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


def innermost(index: Index) -> Index:
    """What holds the codes: without maps of ids and transforms of vectors."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def has_plain_centroids(lists: Index) -> bool:
    """Whether the centroids of an inverted file are vectors that k-means finds, in any index."""
    code = lists.quantizer_trains_alone  # a C char, which some bindings give as text
    return (ord(code) if isinstance(code, str) else int(code)) in (0, 2)


def transform(index: Index, vectors: Array, *, train: bool = False) -> Array:
    """(n, d) float32 vectors as the innermost index sees them: rotated, where there is a rotation."""
    faiss, index = import_faiss(), import_faiss().downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            step = faiss.downcast_VectorTransform(index.chain.at(place))
            if train and not step.is_trained:
                step.train(vectors)
            vectors = step.apply(vectors)
    return vectors


# ---- threads -------------------------------------------------------------------------------------


def same_graph() -> AbstractContextManager[None]:
    """Linking an HNSW graph within this makes the same graph each time.

    Threads of older versions race; newer ones link batches that do not depend on each other.
    """
    faiss = import_faiss()
    has_fixed_order = hasattr(faiss, "hnsw_add_vertices_deterministic")
    is_optional = hasattr(faiss.cvar, "hnsw_deterministic_build")
    return nullcontext() if has_fixed_order and not is_optional else threads(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this, faiss has so many threads; 0 leaves it its own number."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# ---- asking --------------------------------------------------------------------------------------


def query_parameters(index: Index, parameters: Mapping[str, int], selector: Any = None) -> Any:
    """faiss' search parameters for an index; `selector` says which ids may be found.

    Raises:
        RuntimeError: the kind of index takes no selector, so its recall cannot be measured.
    """
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIDMap):
        return query_parameters(index.index, parameters, selector)
    if isinstance(index, faiss.IndexPreTransform):
        inner = query_parameters(index.index, parameters, selector)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF) and not isinstance(index, faiss.IndexIVFPQR):
        if "quantizer_efSearch" in parameters:
            chosen["quantizer_params"] = faiss.SearchParametersHNSW(
                efSearch=parameters["quantizer_efSearch"]
            )
        return faiss.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=parameters.get("efSearch", 16), **chosen)
    if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return faiss.SearchParameters(**chosen)
    raise RuntimeError(f"{type(index).__name__} is not of the families Flat, SQ, HNSW, IVF")


def parameter_steps(index: Index, rows: int) -> list[dict[str, int]]:
    """Search parameters to try, cheapest first: powers of two, and all lists where that is few."""
    faiss = import_faiss()
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        lists = min(inner.nlist, WIDEST_STEP)
        probes = [2**i for i in range(lists.bit_length()) if 2**i < lists] + [lists]
        if isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexHNSW):
            return [{"nprobe": n, "quantizer_efSearch": max(16, 2 * n)} for n in probes]
        return [{"nprobe": n} for n in probes]
    if isinstance(inner, faiss.IndexHNSW):
        last = max(NARROWEST_GRAPH_STEP, min(rows, WIDEST_STEP))
        powers = range(NARROWEST_GRAPH_STEP.bit_length() - 1, last.bit_length())
        return [{"efSearch": 2**i} for i in powers]
    return [{}]
