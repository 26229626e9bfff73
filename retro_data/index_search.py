"""Searching an index of one or several files, and measuring how well it finds.

Each file, a *shard*, holds its own rows of the database under their global ids. What the shards find
is merged by distance. The inverted files of all have the same centroids, so which lists are looked into
is found once a query; in each file anew, from its own copy, it would cost more than the lists do. Files
of product codes are searched as one whose lists are those of all end to end: the copies of the lists
that faiss makes for that are small, and its tables of distances to codes, which may outweigh the codes
themselves, are there once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retro_data import artifact, store
from retro_data.errors import RetroDataError
from retro_data.index_factory import import_faiss
from retro_data.index_parts import (
    Array,
    Index,
    inverted,
    parameter_steps,
    query_parameters,
    threads,
    transform,
)
from retro_data.vectors import recall

PLATEAU = 0.005  # recall within this of the best is not worth twice the time


def merge(found: Sequence[tuple[Array, Array]], k: int, metric: str) -> tuple[Array, Array]:
    """The k nearest of several lists for each query, ties to the lower id.

    Args:
        found: (Q, any) float32 distances and int64 ids each, -1 where nothing was found.

    Returns:
        (Q, k) float32 distances and int64 ids, nearest first; +inf (l2) or -inf (ip) beside -1.
    """
    distances = np.concatenate([each for each, _ in found], axis=1)
    ids = np.concatenate([each for _, each in found], axis=1)
    worst = np.inf if metric == "l2" else -np.inf
    distances[ids < 0] = worst
    order = np.lexsort((ids, distances if metric == "l2" else -distances))[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


@contextmanager
def outside(low: int, high: int) -> Iterator[Any]:
    """faiss' selector of the ids that are not in [low, high)."""
    faiss = import_faiss()
    inside = faiss.IDSelectorRange(low, high)  # the other only points to it
    yield faiss.IDSelectorNot(inside)


class Shards:
    """The files of an index, read by memory map.

    Args:
        paths: of the files.
        metric: "l2" or "ip".

    Raises:
        RuntimeError: a file is no index.
    """

    def __init__(self, paths: Sequence[Path], metric: str) -> None:
        faiss = import_faiss()
        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
        self.metric = metric
        self.indexes = [faiss.read_index(str(paths[0]), flags)]
        self.dim = int(self.indexes[0].d)
        self._lists: list[Index] = []  # of several files
        if len(paths) > 1 and isinstance(inverted(self.indexes[0]), faiss.IndexIVFPQ):
            flags |= faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE
            self._end_to_end([faiss.read_index(str(path), flags) for path in paths])
        else:
            self.indexes += [faiss.read_index(str(path), flags) for path in paths[1:]]
            if len(paths) > 1 and inverted(self.indexes[0]) is not None:
                self._lists = [inverted(index) for index in self.indexes]

    def _end_to_end(self, parts: list[Index]) -> None:
        """Give the one index the inverted lists of all."""
        faiss, (whole,) = import_faiss(), self.indexes
        lists = faiss.InvertedListsPtrVector()
        for part in parts:
            lists.push_back(inverted(part).invlists)
        stack = faiss.HStackInvertedLists(lists.size(), lists.data())
        inverted(whole).replace_invlists(stack, False)
        inverted(whole).ntotal = whole.ntotal = sum(part.ntotal for part in parts)
        self._kept = parts, stack  # faiss only points to them

    def __len__(self) -> int:
        return sum(int(index.ntotal) for index in self.indexes)

    def steps(self) -> list[dict[str, int]]:
        """Search parameters to try, cheapest first."""
        return parameter_steps(self.indexes[0], len(self))

    def search(
        self, queries: Array, k: int, parameters: Mapping[str, int], selector: Any = None
    ) -> tuple[Array, Array]:
        """The k nearest that are found, as `SearchIndex.search` has them.

        Args:
            queries: (Q, d) float32.
            parameters: e.g. {"nprobe": 16}, the same for each file.
            selector: faiss' own, of the ids that may be found.
        """
        if self._lists:
            return merge(self._of_lists(queries, k, parameters, selector), k, self.metric)
        found = [
            index.search(queries, k, params=query_parameters(index, parameters, selector))
            for index in self.indexes
        ]
        if len(found) > 1:
            return merge(found, k, self.metric)
        distances, ids = found[0]
        distances[ids < 0] = np.inf if self.metric == "l2" else -np.inf
        return distances, ids

    def _of_lists(
        self, queries: Array, k: int, parameters: Mapping[str, int], selector: Any
    ) -> list[tuple[Array, Array]]:
        """What each inverted file finds in the lists that the first one's centroids name."""
        first = self._lists[0]
        given = query_parameters(first, parameters, selector)
        vectors = np.ascontiguousarray(transform(self.indexes[0], queries))
        probes = min(given.nprobe, first.nlist)
        near = first.quantizer.search(vectors, probes, params=given.quantizer_params)
        pointer, count, found = import_faiss().swig_ptr, len(vectors), []
        for lists in self._lists:
            distances, ids = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
            question = count, pointer(vectors), k, pointer(near[1]), pointer(near[0])
            # The wrapper without `_c` takes no parameters.
            lists.search_preassigned_c(*question, pointer(distances), pointer(ids), False, given)
            found.append((distances, ids))
        return found


class SearchIndex:
    """A finished index, read by memory map, with the search parameters it was measured with.

    Attributes:
        metric: "l2" or "ip".
        parameters: e.g. {"nprobe": 16}.
        dim: of the vectors.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.metric: str = manifest["fields"]["metric"]
        self.parameters: dict[str, int] = manifest["search_parameters"]
        self.dim: int = manifest["dim"]
        folder = Path(folder)
        try:
            paths = [folder / name for name in store.index_names(manifest["files"])]
            self._shards = Shards(paths, self.metric)
        except RuntimeError as error:
            raise RetroDataError(
                f"the index in {folder} cannot be read ({error}). {artifact.MEND}"
            ) from error
        if (len(self), self._shards.dim) != (manifest["rows"], self.dim):
            raise RetroDataError(
                f"the index in {folder} holds {len(self)} vectors of dimension "
                f"{self._shards.dim}, its manifest says {manifest['rows']} of {self.dim}. "
                f"{artifact.MEND}"
            )

    def __len__(self) -> int:
        return len(self._shards)

    def wider(self) -> list[dict[str, int]]:
        """The search parameters, then those with which more is looked at."""
        steps = self._shards.steps()
        return steps[steps.index(self.parameters) :]

    def search(
        self,
        queries: Array,
        k: int,
        excluded: Array | None = None,
        parameters: Mapping[str, int] | None = None,
    ) -> tuple[Array, Array]:
        """The k nearest rows that the index finds.

        Args:
            queries: (n, d) float16 or float32.
            excluded: (2,) global rows [lo, hi) that are not to be found: of the queries' document.
            parameters: in the place of its own.

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
        parameters = self.parameters if parameters is None else parameters
        if excluded is None:
            return self._shards.search(vectors, k, parameters)
        with outside(*excluded.tolist()) as selector:
            return self._shards.search(vectors, k, parameters, selector)


def load_index(folder: Path, manifest: Mapping[str, Any] | None = None) -> SearchIndex:
    """Open a finished index.

    Args:
        folder: of the artifact.
        manifest: its manifest; read from the folder where None.

    Raises:
        RetroDataError: it is unfinished or damaged, or faiss is missing.
    """
    return SearchIndex(folder, manifest if manifest is not None else store.finished(folder))


# ---- measuring -----------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One row of the trade of recall against time; recall is None where nothing can be found."""

    parameters: dict[str, int]
    recall: float | None
    ms_per_query: float
    queries: int


def measure(
    shards: Shards, queries: Array, own: Array, truth: Array, target_recall: float
) -> Measured:
    """The cheapest search parameter that reaches the target recall, else one as good as the best.

    Queries are searched one at a time on one thread, as generation does.

    Args:
        queries: (Q, d) float16 database rows.
        own: (Q, 2) global rows [lo, hi) of each query's own document: neither in the truth nor found.
        truth: (Q, k) int64, the nearest by exact search, -1 for none.
    """
    steps = shards.steps()
    if not (truth >= 0).any():  # a single document, or none: any parameter would look perfect
        return Measured(steps[-1], None, 0.0, 0)
    tried, wide = [], queries.astype(np.float32)
    for step in steps:
        began = time.perf_counter()
        ids = _search_others(shards, step, wide, own, truth.shape[1])
        ms = 1000 * (time.perf_counter() - began) / len(queries)
        found = recall(ids, truth)
        tried.append(Measured(step, found, round(ms, 4), len(queries)))
        if found >= target_recall:
            return tried[-1]
    return first_of_the_best(tried)


def first_of_the_best(tried: Sequence[Measured]) -> Measured:
    """The cheapest of those that find about as much as the one that finds most."""
    recalls = np.array([one.recall for one in tried])
    return tried[int(np.argmax(recalls >= recalls.max() - PLATEAU))]


def _search_others(
    shards: Shards, parameters: Mapping[str, int], queries: Array, own: Array, k: int
) -> Array:
    """(Q, k) int64 ids found for each query by itself, outside its own document."""
    ids = np.empty((len(queries), k), np.int64)
    with threads(1):
        for i, (low, high) in enumerate(own.tolist()):
            with outside(low, high) as others:
                ids[i] = shards.search(queries[i : i + 1], k, parameters, others)[1][0]
    return ids
