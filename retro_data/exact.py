"""Exact k-nearest-neighbor search with the query's own document left out before selection.

    queries ──► panel (resident) ─┐
                                  ├─► scores of one tile ─► candidates ─► exact distances ─► sorted
    database ─► tile by tile ─────┘    fp32 product          per query     float64

A *panel* is as many queries as memory allows; the database streams past it once, one *tile* of
admitted rows at a time. Scores ``s = q·x - |x|²/2`` (for the inner product ``s = q·x``) order rows
as the distance does and cost one product.

Two steps keep this near the rate of the product. The scores of a tile are reduced to the maxima of
groups of its rows, and only groups whose maximum reaches the query's threshold are opened: the k
best rows lie in the k groups with the largest maxima, so nothing is missed (the grouping of
approximate top-k on accelerators, Chern et al. 2022, "TPU-KNN", here without its approximation).
And the threshold rises from tile to tile, so that later tiles open almost nothing.

Why the result is exact. A float32 score differs from the true one by at most a bound E (see
`_Panel._margin`). If k rows have scores of at least t, a row below ``t - 2E`` is farther than all
of them and is dropped; every other row stays a candidate. Where more rows than a list has room for
lie that close, their exact distances decide at once. What remains is ranked by ``(distance, id)``,
the distance being summed in float64 in an order that depends on nothing but ``d``, then rounded to
float32. So tiles, threads, memory and the block of queries change no bit of the result, and lists
of row ranges merge by ``(distance, id)`` into the list of the whole.
"""

from __future__ import annotations

import importlib.util
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from retro_data.errors import RetroDataError
from retro_data.vectors import Metric, Neighbors, Vectors

if TYPE_CHECKING:
    from retro_data.exact_triton import GpuSearch

log = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 1 << 30

_GROUP = 16  # rows of a tile a maximum stands for: of 32 more are opened, of 8 more compared
_MAX_SQUARED_NORM = 2.0**120  # keeps every score and distance below the largest float32 (2**128)
_LOWEST = -(2.0**125)  # below every score, and finite so that margins can be subtracted
_UNIT = 2.0**-24  # unit roundoff of float32
_SUM_WIDTH = 256  # columns whose terms are summed side by side
_CHECKED_AT_ONCE = 1 << 15  # ranges, that stay in a core's cache
_TILES_AHEAD = 2  # read while workers are at earlier ones, so that none waits for another
_MOST_WORKERS = 16  # beyond, Python itself would hold them up; each then has several threads


def nearest(
    queries: np.ndarray | Vectors,
    database: Vectors,
    k: int,
    *,
    metric: Metric,
    excluded: np.ndarray | None,
    admitted: np.ndarray | None = None,
    device: str = "cpu",
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Neighbors:
    """The k nearest admitted database rows of each query, outside its own document.

    queries: (Q, d) float16 or float32.
    database: (N, d); rows are read in order, once per panel of queries, and only if admitted.
    metric: "l2", squared L2 distance, smallest first; "ip", inner product, largest first.
    excluded: (Q, 2) int64, rows [lo, hi) of each query's own document (lo == hi: none there);
        None excludes nothing.
    admitted: which rows may be neighbors: (N,) bool, or (M, 2) int64 ascending disjoint ranges
        [lo, hi); None admits all.
    memory_bytes: goal for working memory on the CPU, whatever N is; the least is a few MB.

    Ties of the stored float32 distance go to the lower id. At least k other admitted rows fill all
    k places. A database row of zeros stands for a chunk without embedder tokens and is never a
    neighbor; a query of zeros has none.

    Raises RetroDataError for a row, named, that is not finite or too long to compare in float32,
    and for arguments that do not fit each other.
    """
    search = Search(
        database, metric=metric, admitted=admitted, device=device, memory_bytes=memory_bytes
    )
    return search(queries, k, excluded)


class Search:
    """A database made ready for any number of searches on one device; arguments as in `nearest`.

    On a CUDA device with Triton the admitted rows stay in its memory, or are streamed to it where
    they do not fit (`exact_triton`); "cuda", without a number, stands for all that are visible, each
    with all rows. Anything else is searched on the CPU, with the same results.

    Attributes:
        gpus: the search of each device; none on a CPU.
    """

    def __init__(
        self,
        database: Vectors,
        *,
        metric: Metric,
        admitted: np.ndarray | None = None,
        device: str = "cpu",
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self.database, self.metric, self.admitted = database, metric, admitted
        self.memory_bytes = memory_bytes
        self.gpus: list[GpuSearch] = []
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda"):
            raise RetroDataError(f"exact search runs on 'cpu' or 'cuda', asked for {device!r}")
        devices = _devices(device) if kind == "cuda" else []
        if devices and all(_has_kernels(each, database) for each in devices):
            from retro_data.exact_triton import GpuSearch

            no_queries = np.empty((0, database.shape[1]), np.float16)
            _check(Vectors([no_queries]), database, 1, metric, None, admitted)
            mask = _as_mask(admitted, database.shape[0])
            with ThreadPoolExecutor(len(devices)) as pool:
                made = pool.map(lambda each: GpuSearch(database, metric, mask, each), devices)
                self.gpus = list(made)

    def __call__(
        self, queries: np.ndarray | Vectors, k: int, excluded: np.ndarray | None
    ) -> Neighbors:
        if not isinstance(queries, Vectors):
            queries = Vectors([queries])
        excluded = _check(queries, self.database, k, self.metric, excluded, self.admitted)
        if self.gpus and queries.dtype == np.float16:
            from retro_data.exact_triton import search_together

            return search_together(self.gpus, queries.rows(0, queries.shape[0]), k, excluded)
        return self._on_cpu(queries, k, excluded)

    @property
    def on_gpu_whole(self) -> bool:
        """Whether each GPU holds the whole database, so that `of_itself` halves the products."""
        return bool(self.gpus) and all(gpu.is_resident for gpu in self.gpus)

    def of_itself(
        self,
        k: int,
        excluded: np.ndarray | None,
        start: int = 0,
        stop: int | None = None,
    ) -> SelfSearch:
        """A search whose queries are rows [start, stop) of the database; None: to its end.

        excluded: (N, 2) int64, for every row of the database the rows [lo, hi) of its document;
            the rows of a document all have the same.

        Raises RetroDataError for ranges that are not those of documents.
        """
        return SelfSearch(self, k, excluded, start, stop)

    def _on_cpu(self, queries: Vectors, k: int, excluded: np.ndarray) -> Neighbors:
        ids = np.empty((queries.shape[0], k), np.int64)
        distances = np.empty((queries.shape[0], k), np.float32)
        with torch.inference_mode(), _full_float32_products(), _Workers() as workers:
            sizes = _sizes(*queries.shape, k, self.memory_bytes, workers.count)
            for start in range(0, queries.shape[0], sizes.panel):
                part = slice(start, min(start + sizes.panel, queries.shape[0]))
                panel = _Panel(queries, part, self.database, excluded, k, self.metric, sizes)
                for tile in _tiles(self.database, self.admitted, self.metric, sizes.tile_rows):
                    workers.start(panel.add, tile)
                workers.start(panel.result, ids[part], distances[part])
                workers.wait(left=0)
        return Neighbors(ids, distances)


class SelfSearch:
    """Neighbors of the database's own rows; made by `Search.of_itself`.

    On a GPU that holds the database, the rows asked for in ascending order cost half the products:
    what a row is to a later one is found with what that one is to it.
    """

    def __init__(
        self,
        search: Search,
        k: int,
        excluded: np.ndarray | None,
        start: int,
        stop: int | None,
    ) -> None:
        total, dim = search.database.shape
        self.search, self.k = search, k
        stop = total if stop is None else stop
        if not 0 <= start <= stop <= total:
            raise RetroDataError(f"rows [{start}, {stop}) of a database of {total} rows")
        no_queries = Vectors([np.empty((0, dim), search.database.dtype)])
        _check(no_queries, search.database, k, search.metric, None, search.admitted)
        if excluded is None:
            excluded = np.zeros((total, 2), np.int64)
        _check_documents(excluded, total)
        self.excluded = excluded
        self.pairs: Any = None
        if search.on_gpu_whole and start < stop:
            from retro_data.all_pairs_triton import AllPairs

            self.pairs = AllPairs(search.gpus, k, excluded, start, stop)

    def rows(self, start: int, stop: int) -> Neighbors:
        """Neighbors of database rows [start, stop)."""
        if self.pairs is not None and start < stop:
            found: Neighbors = self.pairs.neighbors(start, stop)
            return found
        queries = self.search.database.rows(start, stop)
        return self.search(queries, self.k, self.excluded[start:stop])


def _devices(device: str) -> list[str]:
    """The devices that a name stands for."""
    if torch.device(device).index is not None:
        return [device]
    count = torch.cuda.device_count()
    if not count:
        raise RetroDataError(f"exact search on {device!r}: no CUDA device is visible. Take 'cpu'.")
    return [f"cuda:{index}" for index in range(count)]


def _has_kernels(device: str, database: Vectors) -> bool:
    """Whether the search can run on this GPU; where not, it is said once and the CPU does it."""
    reason = ""
    if importlib.util.find_spec("triton") is None:
        reason = "the package triton is missing"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "it needs a GPU of compute capability 8.0"
    elif database.dtype != np.float16:
        reason = f"it is for float16 vectors, found {database.dtype}"
    if reason:
        log.warning("exact search runs on the CPU, not on %s: %s", device, reason)
    return not reason


def _as_mask(admitted: np.ndarray | None, total: int) -> np.ndarray | None:
    """Admitted rows as (N,) bool, from ranges too."""
    if admitted is None or admitted.dtype == bool:
        return admitted
    mask = np.zeros(total, bool)
    for low, high in admitted.tolist():
        mask[low:high] = True
    return mask


def rank(queries: np.ndarray, database: Vectors, ids: np.ndarray, *, metric: Metric) -> Neighbors:
    """Candidates of each query in the order of their exact distances, as `nearest` has them.

    queries: (Q, d) float16 or float32.
    ids: (Q, w) int64 rows of the database, -1 for none; no row twice.

    Returns ids and distances (Q, w), nearest first, ties to the lower id, -1 at the end.
    """
    order, keys = _order_by_distance(
        torch.from_numpy(np.array(queries)).float(),
        database,
        torch.from_numpy(np.array(ids)),
        torch.from_numpy(ids >= 0),
        metric,
        pairs=2048,
    )
    return Neighbors(
        np.take_along_axis(ids, order.numpy(), 1), (keys if metric == "l2" else -keys).numpy()
    )


# --- tiles of the database -----------------------------------------------------------------------


class _Tile(NamedTuple):
    """n admitted database rows, padded to whole groups with rows that score -inf."""

    ids: torch.Tensor  # (n,) int64, ascending
    vectors: torch.Tensor  # (width, d) float32
    bias: torch.Tensor  # (width,) float32: -|x|²/2 for l2, 0 for ip, -inf for padding
    reach: float  # the largest norm among the rows


def _tiles(
    database: Vectors, admitted: np.ndarray | None, metric: Metric, tile_rows: int
) -> Iterator[_Tile]:
    for ids in _admitted_rows(database.shape[0], admitted, tile_rows):
        contiguous = ids[-1] - ids[0] == len(ids) - 1
        rows = database.rows(ids[0], ids[-1] + 1) if contiguous else database.take(ids)
        vectors, squared = _widen(rows, ids, "database")
        real = _is_nonzero(vectors, squared)
        if not real.all():
            ids, vectors, squared = ids[real.numpy()], vectors[real], squared[real]
        if len(ids):
            padding = -len(ids) % _GROUP
            bias = -0.5 * squared if metric == "l2" else torch.zeros_like(squared)
            yield _Tile(
                torch.from_numpy(ids),
                torch.nn.functional.pad(vectors, (0, 0, 0, padding)) if padding else vectors,
                torch.nn.functional.pad(bias, (0, padding), value=-torch.inf),
                float(squared.max().sqrt()),
            )


def _admitted_rows(total: int, admitted: np.ndarray | None, tile_rows: int) -> Iterator[np.ndarray]:
    """Admitted rows in ascending order, `tile_rows` at a time, so that no tile is thin."""
    pending = np.empty(0, np.int64)
    for start in range(0, total, tile_rows):
        stop = min(start + tile_rows, total)
        if admitted is None:
            inside = np.arange(start, stop)
        elif admitted.ndim == 1:
            inside = start + np.flatnonzero(admitted[start:stop])
        else:
            first = np.searchsorted(admitted[:, 1], start, side="right")
            last = np.searchsorted(admitted[:, 0], stop, side="left")
            steps = np.zeros(stop - start + 1, np.int64)
            np.add.at(steps, np.maximum(admitted[first:last, 0], start) - start, 1)
            np.add.at(steps, np.minimum(admitted[first:last, 1], stop) - start, -1)
            inside = start + np.flatnonzero(np.cumsum(steps[:-1]))
        pending = np.concatenate([pending, inside])
        if len(pending) >= tile_rows:
            yield pending[:tile_rows]
            pending = pending[tile_rows:]
    if len(pending):
        yield pending


def _widen(rows: np.ndarray, ids: np.ndarray, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) float32 rows and their (n,) squared norms; refuses rows no distance can be had of."""
    vectors = torch.from_numpy(np.array(rows)).float()
    squared = vectors.square().sum(1)
    bad = ~(squared <= _MAX_SQUARED_NORM)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RetroDataError(
            f"{name} row {ids[row]} has a squared norm of {float(squared[row]):g}; expected finite "
            f"embeddings with squared norms of at most {_MAX_SQUARED_NORM:g}. Embed this chunk "
            f"again, in fp32 if its values overflow the encoder's precision."
        )
    return vectors, squared


def _is_nonzero(vectors: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """(n,) bool: rows that are not all zeros; tiny rows, whose square underflows, are not."""
    real = squared > 0
    small = (~real).nonzero().squeeze(1)
    real[small] = vectors[small].any(1)
    return real


# --- a panel of queries --------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """How the work is cut; changes speed and memory, never the result."""

    panel: int  # queries that stay in memory while the database passes
    queries: int  # those whose scores a worker computes at once
    tile_rows: int
    kept: int  # candidates a query keeps when its list is cut
    listed: int  # candidates its list holds before it is cut
    pairs: int  # distances a worker computes at once
    workers: int  # threads, which share the queries of a panel


def _sizes(num_queries: int, dim: int, k: int, memory_bytes: int, workers: int) -> _Sizes:
    def share(part: float, row_bytes: int, least: int, most: int) -> int:
        return min(max(int(memory_bytes * part) // row_bytes, least), most)

    kept = k + max(16, k // 2)
    listed = kept + max(32, k)
    # A tile that is read takes 10 bytes a value for a moment, those in use or waiting 4.
    tile_rows = share(1 / 4, 24 * dim, 64, max(2048, 64 * k)) // _GROUP * _GROUP
    return _Sizes(
        panel=share(1 / 2, 10 * dim + 12 * listed + 64, 16, max(num_queries, 16)),
        queries=share(1 / 8, 5 * tile_rows * workers, 16, max(2**22 // tile_rows, 256)),
        tile_rows=tile_rows,
        kept=kept,
        listed=listed,
        pairs=share(1 / 16, 24 * dim * workers, 64, 512),
        workers=workers,
    )


class _Panel:
    """Queries held in memory with the candidates found for each of them so far.

    `kth[q]` never exceeds the scores of k rows already seen, so a row that scores less than
    `kth[q] - margin[q]` is farther than k others and is no candidate.
    """

    def __init__(
        self,
        queries: Vectors,
        part: slice,
        database: Vectors,
        excluded: np.ndarray,
        k: int,
        metric: Metric,
        sizes: _Sizes,
    ) -> None:
        ids = np.arange(part.start, part.stop)
        self.queries, squared = _widen(queries.rows(part.start, part.stop), ids, "query")
        self.norms = squared.sqrt()
        self.is_real = _is_nonzero(self.queries, squared)
        self.database, self.excluded = database, excluded[part]
        self.k, self.metric, self.sizes = k, metric, sizes
        self.reach = torch.zeros(len(ids))  # the largest norm among the database rows seen
        self.kth = torch.full((len(ids),), _LOWEST)
        self.scores = torch.full((len(ids), sizes.listed), -torch.inf)
        self.ids = torch.full((len(ids), sizes.listed), -1, dtype=torch.int64)
        self.filled = torch.zeros(len(ids), dtype=torch.int64)  # places in use, from the left
        rounds = -(-len(ids) // (sizes.queries * sizes.workers))
        edges = np.linspace(0, len(ids), rounds * sizes.workers + 1, dtype=int).tolist()
        self.blocks = [slice(low, high) for low, high in pairwise(edges) if low < high]
        self.buffers = [torch.empty(sizes.queries * sizes.tile_rows) for _ in range(sizes.workers)]

    def add(self, worker: int, tile: _Tile) -> None:
        """Scores this worker's queries against a tile and keeps what may be among the k nearest."""
        width = len(tile.bias)
        for rows in self.blocks[worker :: self.sizes.workers]:
            self.reach[rows].clamp_(min=tile.reach)
            # One query a column: the maxima of groups of rows then read memory in order.
            scores = self.buffers[worker][: (rows.stop - rows.start) * width].view(width, -1)
            torch.addmm(tile.bias[:, None], tile.vectors, self.queries[rows].T, out=scores)
            self._hide_own(scores, rows, tile.ids)
            self._open(scores.view(width // _GROUP, _GROUP, -1), rows, tile.ids)

    def result(self, worker: int, out_ids: np.ndarray, out_distances: np.ndarray) -> None:
        """Writes the k nearest rows of this worker's queries and their distances."""
        for block in self.blocks[worker :: self.sizes.workers]:
            rows = torch.arange(block.start, block.stop)
            self._cut(rows)
            ids, scores = self.ids[block, : self.sizes.kept], self.scores[block, : self.sizes.kept]
            order, keys = self._rank(rows, ids, scores >= self._floor(block)[:, None])
            found = (keys < torch.inf) & self.is_real[block, None]
            keys = keys.where(found, torch.inf)[:, : self.k]
            out_ids[block] = ids.gather(1, order).where(found, -1)[:, : self.k]
            out_distances[block] = keys if self.metric == "l2" else -keys

    def _margin(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """2E for these queries: rows whose scores differ by more are ordered by them.

        Whatever the order of summation (Higham 2002, section 3.1), a product of d terms and the
        bias errs by (d + 1) u (|q||x| + |x|²/2), the bias itself by d u |x|²/2, and rounding the
        distance to float32 adds u (|q| + |x|)²/2. What is added to these factors takes up
        terms in u², and the last term products that underflow.
        """
        dim = self.queries.shape[1]
        norms, reach = self.norms[rows], self.reach[rows]
        if self.metric == "l2":
            error = 1.01 * (dim + 10) * reach * (norms + reach) + norms.square()
        else:
            error = 1.01 * (dim + 10) * reach * norms
        return 2 * (_UNIT * error + dim * 2.0**-124)

    def _hide_own(self, scores: torch.Tensor, rows: slice, tile_ids: torch.Tensor) -> None:
        """Scores of each query's own document become -inf."""
        low, high = np.searchsorted(tile_ids.numpy(), self.excluded[rows]).T
        touched = np.flatnonzero(low < high)
        if not len(touched):
            return
        part = slice(touched[0], touched[-1] + 1)
        own = torch.arange(low[touched].min(), high[touched].max())[:, None]
        inside = (own >= torch.from_numpy(low[part])) & (own < torch.from_numpy(high[part]))
        scores[own[0] : own[-1] + 1, part].masked_fill_(inside, -torch.inf)

    def _floor(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """The least scores by which a row may be among the k nearest of these queries."""
        return self.kth[rows] - self._margin(rows)

    def _open(self, scores: torch.Tensor, rows: slice, tile_ids: torch.Tensor) -> None:
        """Finds the candidates in (groups, rows of a group, queries) scores."""
        maxima = scores.amax(1)
        group, query = (maxima >= self._floor(rows)).nonzero(as_tuple=True)
        crowded = (query.bincount(minlength=scores.shape[2]) > 2 * self.k).nonzero().squeeze(1)
        if len(crowded):
            # k groups hold k rows of at least the k-th maximum: seeds and lifts the threshold.
            seen = rows.start + crowded
            lifted = maxima[:, crowded].T.topk(self.k).values[:, -1]
            self.kth[seen] = torch.maximum(self.kth[seen], lifted)
            group, query = (maxima >= self._floor(rows)).nonzero(as_tuple=True)
        for part in torch.arange(len(query)).split(max(scores.numel() // 128, 1)):
            groups, queries = group[part], query[part]
            values = scores[groups, :, queries]
            hit, member = (values >= self._floor(rows)[queries, None]).nonzero(as_tuple=True)
            queries, order = queries[hit].sort(stable=True)
            ids = tile_ids[groups[hit] * _GROUP + member]
            self._join(rows.start + queries, ids[order], values[hit, member][order])

    def _join(self, rows: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Candidates, ordered by query, join the lists of their queries; full lists are cut."""
        while len(rows):
            queries, slot, counts = rows.unique_consecutive(return_inverse=True, return_counts=True)
            first = counts.cumsum(0) - counts
            place = torch.arange(len(rows)) + (self.filled[queries] - first)[slot]
            fits = place < self.sizes.listed
            at = rows[fits] * self.sizes.listed + place[fits]
            self.scores.view(-1)[at], self.ids.view(-1)[at] = scores[fits], ids[fits]
            self.filled[queries] += counts
            full = queries[self.filled[queries] >= self.sizes.listed]
            if not len(full):
                return
            self._cut(full)
            late = (~fits).nonzero().squeeze(1)
            late = late[scores[late] >= self._floor(rows[late])]
            rows, ids, scores = rows[late], ids[late], scores[late]

    def _cut(self, rows: torch.Tensor) -> None:
        """Lists of these queries shrink to what may be among the k nearest."""
        k, kept = self.k, self.sizes.kept
        ids, scores = self.ids[rows], self.scores[rows]
        best, place = scores.topk(kept + 1)
        self.kth[rows] = torch.maximum(self.kth[rows], best[:, k - 1])
        reach = best >= self._floor(rows)[:, None]
        tied = reach[:, kept].nonzero().squeeze(1)
        if len(tied):
            # More near-ties than a list keeps: the exact distances of all of them decide.
            valid = scores[tied] >= self._floor(rows[tied])[:, None]
            order = self._rank(rows[tied], ids[tied], valid)[0][:, :k]
            place[tied, :k], best[tied, :k] = order, scores[tied].gather(1, order)
            best[tied, k:], reach[tied, k:] = -torch.inf, False
            self.kth[rows[tied]] = torch.maximum(self.kth[rows[tied]], best[tied, :k].amin(1))
        self.scores[rows] = -torch.inf
        self.scores[rows, :kept] = best[:, :kept]
        self.ids[rows, :kept] = ids.gather(1, place[:, :kept])
        self.filled[rows] = reach[:, :kept].sum(1)

    def _rank(
        self, rows: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries = self.queries[rows]
        return _order_by_distance(
            queries, self.database, ids, valid, self.metric, pairs=self.sizes.pairs
        )


def _order_by_distance(
    queries: torch.Tensor,
    database: Vectors,
    ids: torch.Tensor,
    valid: torch.Tensor,
    metric: Metric,
    *,
    pairs: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order by (distance, id) of (n, w) candidates, the invalid last, and the sorted keys.

    Keys are squared distances or negated products, +inf for invalid candidates.
    """
    keys = torch.full(ids.shape, torch.inf)
    row, column = valid.nonzero(as_tuple=True)
    pair_ids = ids[row, column]
    for pair in pair_ids.argsort().split(pairs):  # reads the database in order
        # By way of float32, which is exact: there is no fast conversion from float16 to float64.
        terms = torch.from_numpy(database.take(pair_ids[pair].numpy())).float().double()
        query = queries.index_select(0, row[pair]).double()
        terms = terms.sub_(query).square_() if metric == "l2" else terms.mul_(query).neg_()
        keys[row[pair], column[pair]] = fixed_sum(terms).float()
    order = torch.from_numpy(np.lexsort((ids.numpy(), keys.numpy())))
    return order, keys.gather(1, order)


def fixed_sum(terms: torch.Tensor) -> torch.Tensor:
    """(n,) sums of (n, d) terms, which it overwrites; equal rows have equal sums, bit for bit.

    The order is fixed by additions of elements, where a library's sum may change with shapes and
    threads: to each of the first 256 columns is added, in turn, every 256th column after it, then
    neighbors are added, two by two, until one is left. A GPU has it by the same additions.
    """
    total = terms[:, :_SUM_WIDTH]
    for start in range(_SUM_WIDTH, terms.shape[1], _SUM_WIDTH):
        part = terms[:, start : start + _SUM_WIDTH]
        total[:, : part.shape[1]] += part
    while total.shape[1] > 1:
        even, odd = total[:, ::2], total[:, 1::2]
        even[:, : odd.shape[1]] += odd
        total = even
    return total[:, 0]


# --- arguments -----------------------------------------------------------------------------------


def _check(
    queries: Vectors,
    database: Vectors,
    k: int,
    metric: str,
    excluded: np.ndarray | None,
    admitted: np.ndarray | None,
) -> np.ndarray:
    """Refuses arguments that do not fit; returns `excluded`, made empty ranges if None."""
    total, dim = database.shape
    if queries.shape[1] != dim:
        raise RetroDataError(
            f"queries have {queries.shape[1]} columns, the database {dim}: embed both alike"
        )
    if k < 1:
        raise RetroDataError(f"k is {k}; a search needs k of at least 1")
    if metric not in ("l2", "ip"):
        raise RetroDataError(f"metric is {metric!r}; expected 'l2' or 'ip'")
    if excluded is None:
        excluded = np.zeros((queries.shape[0], 2), np.int64)
    _check_ranges("excluded", excluded, total)
    if len(excluded) != queries.shape[0]:
        raise RetroDataError(f"excluded has {len(excluded)} ranges for {queries.shape[0]} queries")
    if admitted is None:
        return excluded
    if admitted.dtype == bool:
        if admitted.shape != (total,):
            raise RetroDataError(f"admitted has shape {admitted.shape} for {total} database rows")
        return excluded
    _check_ranges("admitted", admitted, total)
    if (admitted[1:, 0] < admitted[:-1, 1]).any():
        raise RetroDataError("admitted ranges overlap or are not ascending: sort and merge them")
    return excluded


def _check_ranges(name: str, ranges: np.ndarray, total: int) -> None:
    if ranges.ndim != 2 or ranges.shape[1] != 2 or ranges.dtype != np.int64:
        raise RetroDataError(
            f"{name} is {ranges.dtype} {ranges.shape}; expected int64 (n, 2), rows [lo, hi)"
        )
    for start in range(0, len(ranges), _CHECKED_AT_ONCE):
        low, high = ranges[start : start + _CHECKED_AT_ONCE].T
        bad = (low > high) | ((low < high) & ((low < 0) | (high > total)))
        if bad.any():
            at = int(bad.argmax())
            raise RetroDataError(
                f"{name}[{start + at}] is [{low[at]}, {high[at]}); expected 0 <= lo <= hi <= {total}"
            )


def _check_documents(excluded: np.ndarray, total: int) -> None:
    """Refuses ranges that do not part the rows into documents (and rows without any)."""
    _check_ranges("excluded", excluded, total)
    if len(excluded) != total:
        raise RetroDataError(f"excluded has {len(excluded)} ranges for {total} database rows")
    if not total:
        return
    flat = np.ascontiguousarray(excluded).reshape(-1)
    differs = (flat[2:] != flat[:-2]).view(np.uint16)  # row i + 1 from row i, in either end
    edges = np.flatnonzero(differs)
    begins, ends = np.append(0, edges + 1), np.append(edges, total - 1)
    low, high = excluded[begins].T
    bad = (low < high) & ((low != begins) | (high != ends + 1))
    if bad.any():
        at = int(bad.argmax())
        raise RetroDataError(
            f"excluded[{begins[at]}] is [{low[at]}, {high[at]}), not the range of a document: "
            f"expected it to hold row {begins[at]} and to be the range of every row in it"
        )


class _Workers:
    """Threads that each run their own products, in place of threads that share each operation.

    Most operations between the products are short or serial: shared, they cost a barrier each and
    leave all threads but one idle. Takes the caller's number of torch threads and gives it back.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.count = min(self.threads, _MOST_WORKERS)
        self.pools = [ThreadPoolExecutor(1) for _ in range(self.count)]
        self.running: deque[list[Future[None]]] = deque()

    def __enter__(self) -> _Workers:
        torch.set_num_threads(self.threads // self.count)  # new threads begin with it
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)

    def start(self, work: Callable[..., None], *arguments: object) -> None:
        """Each worker in turn calls `work` with its number and the arguments, one after another.

        Waits until few calls are ahead, so that what is read for them does not pile up.
        """

        def run(worker: int) -> None:
            with torch.inference_mode():  # a setting of each thread
                work(worker, *arguments)

        self.wait(left=_TILES_AHEAD)
        self.running.append([pool.submit(run, worker) for worker, pool in enumerate(self.pools)])

    def wait(self, left: int) -> None:
        """Until only so many calls are not done; raises what one of them raised."""
        while len(self.running) > left:
            for future in self.running.popleft():
                future.result()


@contextmanager
def _full_float32_products() -> Iterator[None]:
    """A caller's float32 matmul precision of "medium" would break the error bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
