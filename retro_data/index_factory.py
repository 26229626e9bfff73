"""Which faiss index to build: by autofaiss or by a rule of our own, within a budget of memory.

An index is named by its *factory* string, in the language of faiss: "Flat", "HNSW32",
"IVF4096,SQfp16", "OPQ64_256,IVF65536_HNSW32,PQ64". The choice follows from the number of rows,
their dimension and the budget alone, never from what is free on this machine.
"""

from __future__ import annotations

import math
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from retro_data.errors import RetroDataError

PLANNERS = ("autofaiss", "builtin")
FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")

SMALL_ROWS = 10_000  # below, scanning everything costs less than a millisecond or two
LARGEST_GRAPH_ROWS = 10_000_000  # linking a row into a graph takes a core about a millisecond
MANY_LISTS = 2**14  # from here on, finding the nearest centroids needs an index of its own
SHARDS = 16  # files of an index that is as large as it may be
SMALLEST_SHARD = 2**20  # rows: fewer are soon added by one worker
POINTS_PER_LIST = 39  # fewer than this and k-means centroids are noise (faiss' own limit)
FLAT = "Flat"


# ---- faiss itself --------------------------------------------------------------------------------


def installed_faiss() -> list[str]:
    """The faiss wheels that this Python has."""
    found = []
    for name in FAISS_WHEELS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return found


@cache  # looking through what is installed takes a millisecond
def import_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        RetroDataError: it is missing, or two wheels overwrote each other's files.
    """
    wheels = installed_faiss()
    if len(wheels) > 1:
        raise RetroDataError(
            f"{' and '.join(wheels)} are both installed, but they own the same folder, so what is "
            f"there is a mixture. Run `pip uninstall -y {' '.join(wheels)}`, then "
            f"`pip install faiss-cpu` or `pip install faiss-gpu`."
        )
    try:
        import faiss
    except ImportError as error:
        raise RetroDataError(
            f"an index needs faiss, which cannot be imported ({error}). Run "
            "`pip install 'retro_data[cpu]'` or `pip install 'retro_data[gpu]'` (not both), or set "
            "neighbors.search=exact."
        ) from error
    return faiss


# ---- budgets -------------------------------------------------------------------------------------


def parse_memory(text: str) -> int:
    """Bytes of "512M", "4G", "1.5T" (powers of 1024; "4GB" is the same as "4G").

    Raises:
        RetroDataError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])B?\s*", str(text), re.IGNORECASE)
    if not match:
        raise RetroDataError(f'index.max_index_memory={text!r}: expected e.g. "512M" or "16G".')
    return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2].upper())))


def format_memory(count: float) -> str:
    """Bytes as people read them: 3.1G."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.3g}{'BKMGT'[power]}"


def estimated_bytes(factory: str, rows: int, dim: int) -> int:
    """Size of an index of one of the families that the planners choose from.

    Counted are codes, 8-byte ids, centroids, graphs, codebooks and rotations.
    """
    rotation = re.search(r"OPQ\d+_(\d+)", factory)
    lists = re.search(r"IVF(\d+)", factory)
    graph = re.search(r"HNSW(\d+)", factory)
    product = re.search(r",PQ(\d+)(?:x(\d+))?", factory)
    width = int(rotation[1]) if rotation else dim
    if product:
        bits = int(product[2] or 8)
        code, codebook = math.ceil(int(product[1]) * bits / 8), 4 * (1 << bits) * width
    else:
        code, codebook = {"SQfp16": 2, "SQ8": 1}.get(factory.split(",")[-1], 4) * width, 0
    size = rows * (code + 8) + codebook + (4 * dim * width if rotation else 0)
    centroids = int(lists[1]) if lists else 0
    linked = centroids or rows
    return size + 4 * centroids * width + (linked * (8 * int(graph[1]) + 20) if graph else 0)


def choose_shard_rows(factory: str, rows: int, dim: int, memory: str) -> int:
    """Rows of each file of an index, such that none takes more than a sixteenth of the budget.

    So the budget bounds what a worker holds that makes one. A file has a million rows at least,
    unless there are fewer.

    Args:
        rows: of the whole index.
        memory: the budget, as `parse_memory` takes it.
    """
    share = parse_memory(memory) // SHARDS
    return max(SMALLEST_SHARD, rows * share // max(1, estimated_bytes(factory, rows, dim)))


# ---- planners ------------------------------------------------------------------------------------


def choose_factory(planner: str, rows: int, dim: int, memory: str, memory_mapped: bool) -> str:
    """The best index of a planner that fits a budget.

    Args:
        planner: "autofaiss" (its own candidates, best first) or "builtin".
        rows: vectors to hold.
        memory: the budget, as `parse_memory` takes it.
        memory_mapped: leave out graphs over all vectors, which want to be in memory.

    Raises:
        RetroDataError: nothing fits (the numbers are in the message), or autofaiss is not there.
    """
    budget = parse_memory(memory)
    if planner == "autofaiss":
        candidates = _autofaiss_candidates(rows, dim, budget, memory_mapped)
    else:
        candidates = _builtin_candidates(rows, dim, memory_mapped)
    sizes = [estimated_bytes(factory, rows, dim) for factory in candidates]
    for factory, size in zip(candidates, sizes, strict=True):
        if size <= budget:
            return factory
    need, smallest = min(zip(sizes, candidates, strict=True))
    raise RetroDataError(
        f"no index of {rows} vectors of dimension {dim} fits index.max_index_memory={memory} "
        f"({budget} bytes): the smallest that planner {planner} knows, {smallest}, needs about "
        f"{format_memory(need)} ({need} bytes). Raise index.max_index_memory, admit fewer "
        "documents (database.splits, database.corpora), or set neighbors.search=exact."
    )


def _autofaiss_candidates(rows: int, dim: int, budget: int, memory_mapped: bool) -> list[str]:
    """What autofaiss proposes, best first.

    It counts neither ids nor centroids, so that its first word may not fit: it is asked again with
    lower budgets, then for every quantization that it knows.
    """
    try:
        from autofaiss.external import optimize
    except ImportError as error:
        raise RetroDataError(
            f"index.planner=autofaiss, but autofaiss cannot be imported ({error}). Run "
            "`pip install 'retro_data[autofaiss]'` (it needs numpy < 2 and Python < 3.13), or set "
            "index.planner=builtin."
        ) from error

    found: list[str] = []
    try:
        for tenths in range(10, 4, -1):
            found += optimize.get_optimal_index_keys_v2(
                rows,
                dim,
                f"{budget * tenths // 10}B",
                should_be_memory_mappable=memory_mapped,
                # Its default quantizes from a million rows on, even where whole vectors fit.
                ivf_flat_threshold=rows + 1,
            )
        if rows >= SMALL_ROWS:
            found += optimize.get_optimal_quantization(rows, dim)
            found += optimize.get_optimal_ivf(rows)
    except Exception as error:  # whatever it meets
        raise RetroDataError(
            f"autofaiss failed to choose an index of {rows} vectors of dimension {dim} "
            f"({type(error).__name__}: {error}). Set index.planner=builtin, or index.factory."
        ) from error
    return found


def _builtin_candidates(rows: int, dim: int, memory_mapped: bool) -> list[str]:
    """Whole vectors first (float16 is what embeddings are stored in), then ever shorter codes.

    The number of lists is the power of two next to 4 sqrt(rows), the lower end of what faiss'
    guidelines advise, with enough rows a list to find its centroid.
    """
    most = max(1, rows // POINTS_PER_LIST)
    lists = 2 ** min(round(math.log2(4 * math.sqrt(max(rows, 1)))), int(math.log2(most)))
    inverted = f"IVF{lists}_HNSW32" if lists >= MANY_LISTS else f"IVF{lists}"
    whole = [FLAT] if rows < SMALL_ROWS else []
    if not memory_mapped and SMALL_ROWS <= rows <= LARGEST_GRAPH_ROWS:
        whole.append("HNSW32")
    scalars = [f"{inverted},SQfp16", f"{inverted},SQ8"]
    codes = (code for code in (256, 128, 64, 32, 16, 8) if code <= dim)
    products = [f"OPQ{code}_{dim // code * code},{inverted},PQ{code}" for code in codes]
    return [*whole, *scalars, *products]
