"""Exact nearest-neighbor search on a GPU, by the semantics of `exact.nearest`.

    queries ─┐
             ├─► products ─► maxima of groups of 8 columns ─► lists of each query's best groups
    tile ────┘    (never written)                         ─► their columns: exact keys ─► (key, id)

The k columns with the best scores lie in the k groups with the best maxima, whatever the groups are,
so keeping whole groups loses nothing: the method is exact, not approximate. Products are of float16
with float32 sums. The maxima are taken of the accumulator in registers; only they are written, an
eighth of the scores, and above them one maximum a query and block of columns: a query opens a block
only where that beats the least group of its list. The query's own document, a contiguous range of
columns, is set to -inf in the blocks that touch it.

Where the queries are the database, half the products do: `all_pairs_triton`.

Why it is exact. A list holds some groups more than k. By a bound on the rounding of a score
(`_error`, after Higham 2002, section 3.1), every group that may hold one of the k nearest is either
opened, or the query is *crowded*: its near-ties go on beyond its list. Crowded queries look at all
groups within the bound. Candidates are ranked by ``(key, id)``; a key is summed in float64, in the
order of `exact.fixed_sum`, then rounded to float32. So no bit differs from the CPU path.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from retro_data import exact_kernels_triton as kernels
from retro_data.exact_kernels_triton import GROUP
from retro_data.exact_state_triton import (
    LOAD_ROWS,
    ONE_SIDED,
    SYMMETRIC,
    Best,
    Buffers,
    GroupLists,
    OnItsWay,
    OwnColumns,
    Rows,
    Shape,
    Streams,
    round_up,
)
from retro_data.vectors import Metric, Neighbors, Vectors

ALIGN = 256  # rows and columns of whole blocks of either shape of a product
PANEL_ROWS = 16_384  # queries whose group maxima are in memory at once
TILE_ROWS = 2**21  # database rows searched at once
LEAST_QUERIES = 1024  # that a further device is given
RESIDENT_SHARE = 0.5  # of free device memory that a database may fill; a larger one is streamed
MAXIMA_SHARE = 0.4  # of free device memory for the group maxima of one panel
COLUMNS_AT_ONCE = 32  # columns whose lists a warp looks after
CANDIDATES_AT_ONCE = 16  # columns of which a block of threads computes the distances


class Tile(NamedTuple):
    """Admitted rows [first, first + columns.count) of the database."""

    first: int
    columns: Rows
    reach: float


class GpuSearch:
    """A database made ready on one GPU, for any number of searches.

    Args:
        database: (N, d) float16.
        metric: "l2" or "ip".
        admitted: (N,) bool; None admits all. Rows of zeros are never neighbors.
        device: a CUDA device ("cpu" only under Triton's interpreter).
        resident_bytes: a larger database is streamed from the host, tile by tile, in every search;
            None takes a share of the free device memory.
        tile_rows, panel_rows: database rows and queries at once, at most.

    Attributes:
        timings: a list here takes the name of each part of the work and the event of its end.
    """

    def __init__(
        self,
        database: Vectors,
        metric: Metric,
        admitted: np.ndarray[Any, Any] | None,
        device: str,
        resident_bytes: int | None = None,
        tile_rows: int = TILE_ROWS,
        panel_rows: int = PANEL_ROWS,
    ) -> None:
        self.database = database
        self.metric = metric
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.dim = round_up(database.shape[1], 8)  # rows begin at multiples of 16 bytes
        self.tile_rows = round_up(tile_rows, ALIGN)
        self.panel_rows = round_up(panel_rows, ALIGN)
        self.timings: list[tuple[str, Any]] | None = None
        # Rows that may be found are numbered anew; ids are turned back at the end.
        self.ids = None if admitted is None or admitted.all() else np.flatnonzero(admitted)
        self.num_rows = database.shape[0] if self.ids is None else len(self.ids)
        self.programs, self.shared_bytes = 4, 2**18
        if self.on_gpu:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.synchronize(index)  # Triton asks the driver, which torch starts when it must
            properties = triton.runtime.driver.active.utils.get_device_properties(index)
            self.programs = properties["multiprocessor_count"]
            self.shared_bytes = properties["max_shared_mem"] - 2**13
        if resident_bytes is None:
            resident_bytes = int(self._free_bytes() * RESIDENT_SHARE)
        self.is_resident = self.num_rows * self.dim * 2 <= resident_bytes
        self.device_ids = None
        if self.ids is not None:
            self.device_ids = torch.from_numpy(self.ids).to(self.device)
        with self.current():
            self.resident = self._load_resident() if self.is_resident else None

    def current(self) -> AbstractContextManager[Any]:
        """Kernels run, and streams are taken, on this search's device."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    def _free_bytes(self) -> int:
        if not self.on_gpu:
            return 2**32
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0] + unused)

    def free_for_maxima(self) -> int:
        """Bytes of device memory for the group maxima of one panel."""
        return int(self._free_bytes() * MAXIMA_SHARE)

    def mark(self, part: str) -> None:
        """Notes the end of a part of the work, where somebody measures."""
        if self.timings is not None and self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.timings.append((part, event))

    # ---- from the host ----

    def _host_rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows [start, stop) of those that may be found."""
        if self.ids is None:
            return self.database.rows(start, stop)
        return self.database.take(self.ids[start:stop])

    def _send(self, target: Tensor, start: int, stop: int) -> None:
        """Copies rows [start, stop) of those that may be found to the device."""
        for low in range(start, stop, LOAD_ROWS):
            high = min(low + LOAD_ROWS, stop)
            self._copy(_as_tensor(self._host_rows(low, high)), target[low - start :])

    def _copy(self, rows: Tensor, target: Tensor) -> None:
        """Copies rows to the first ones of a target, by way of pinned memory, and does not wait."""
        if self.on_gpu and not rows.is_cuda:
            pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            rows = pinned.copy_(rows)  # by all threads of torch
        target[: len(rows), : rows.shape[1]].copy_(rows, non_blocking=True)

    def _load_resident(self) -> Tile:
        height = round_up(self.num_rows, ALIGN)
        rows = torch.zeros(height, self.dim, dtype=torch.float16, device=self.device)
        self._send(rows, 0, self.num_rows)
        return self._tile(0, self.num_rows, rows)

    def _tile(self, first: int, count: int, rows: Tensor) -> Tile:
        def name(bad: int) -> str:
            return f"database row {first + bad if self.ids is None else self.ids[first + bad]}"

        columns = Rows(rows, count, self.metric)
        return Tile(first, columns, columns.reach(name))

    def tiles(self) -> Iterator[Tile]:
        """The database in parts; a tile is good until the next one is asked for."""
        if self.resident is None:
            yield from self._streamed()
            return
        whole = self.resident
        for first in range(0, whole.columns.height, self.tile_rows):
            stop = min(first + self.tile_rows, whole.columns.height)
            yield whole._replace(first=first, columns=whole.columns.part(first, stop))

    def _streamed(self) -> Iterator[Tile]:
        """Tiles from the host by turns in two buffers: one is filled while the other is searched."""
        shape = (2, self.tile_rows, self.dim)
        buffers = torch.zeros(shape, dtype=torch.float16, device=self.device)
        streams = Streams(self.device)
        starts = range(0, self.num_rows, self.tile_rows)
        for number, first in enumerate(starts):
            count = min(self.tile_rows, self.num_rows - first)
            rows = buffers[number % 2][: round_up(count, ALIGN)]
            with streams.copying():
                if number == 0:
                    self._send(rows, first, first + count)
                rows[count:] = 0
                tile = self._tile(first, count, rows)  # waits for the copy, not for the search
            streams.search_waits(tile.columns.bias, tile.columns.norms)
            yield tile
            if number + 1 < len(starts):
                streams.copy_waits_for_search_before()
                with streams.copying():
                    first = starts[number + 1]
                    count = min(self.tile_rows, self.num_rows - first)
                    self._send(buffers[(number + 1) % 2], first, first + count)

    # ---- searching ----

    def search(
        self, queries: np.ndarray[Any, Any] | Tensor, k: int, excluded: np.ndarray[Any, Any]
    ) -> Neighbors:
        """As `exact.nearest`; queries (Q, d) float16, excluded (Q, 2) database rows [lo, hi)."""
        with self.current():
            return self._search(queries, k, excluded)

    def _search(
        self, queries: np.ndarray[Any, Any] | Tensor, k: int, excluded: np.ndarray[Any, Any]
    ) -> Neighbors:
        count = len(queries)
        own = self.own_ranges(excluded)
        height = round_up(count, ALIGN)
        rows = torch.zeros(height, self.dim, dtype=torch.float16, device=self.device)
        self._copy(queries if isinstance(queries, Tensor) else _as_tensor(queries), rows)
        panels = Rows(rows, count, self.metric)
        panels.reach(lambda bad: f"query row {bad}")
        best = Best(height, k, self.device)
        lists = GroupLists(min(height, self.panel_rows), k, self.device)
        for tile in self.tiles():
            step = self._panel_height(tile, height)
            ranges = OwnColumns.of(own, tile.first, tile.columns.height, height)
            work = Buffers(step, tile.columns.height, self.device, by_columns=False)
            for first in range(0, height, step):
                stop = min(first + step, height)
                self._search_panel(panels, first, stop, tile, ranges, lists, best, work)
        return self.on_its_way(best, count).arrived()[0]

    def own_ranges(self, excluded: np.ndarray[Any, Any]) -> Tensor:
        """(Q, 2) int64 on the device, in numbers of rows that may be found."""
        ranges = excluded if self.ids is None else np.searchsorted(self.ids, excluded)
        return _as_tensor(np.ascontiguousarray(ranges)).to(self.device)

    def _panel_height(self, tile: Tile, height: int) -> int:
        fitting = self.free_for_maxima() // max(1, tile.columns.height // 2)
        return max(min(self.panel_rows, fitting // ALIGN * ALIGN, height), ALIGN)

    def _search_panel(
        self,
        queries: Rows,
        first: int,
        stop: int,
        tile: Tile,
        own: OwnColumns,
        lists: GroupLists,
        best: Best,
        work: Buffers,
    ) -> None:
        """Queries [first, stop) take in what a tile has for them."""
        panel = queries.part(first, stop)
        own = OwnColumns(own.low[first:stop], own.high[first:stop])
        part = best.part(first, stop)
        lists = lists.part(0, stop - first)
        lists.clear(part.floors)
        self.one_sided(panel, own, tile.columns, 0, tile.columns.height, lists, work)
        self.rank(panel, own, tile, lists, part, work)
        kernels.open_crowded_kernel[(panel.count,)](
            part.crowded,
            work.coarse,
            work.fine,
            panel.bias,
            panel.rows,
            tile.columns.rows,
            tile.columns.bias,
            own.low,
            own.high,
            panel.norms,
            part.keys,
            part.ids,
            part.floors,
            tile.first,
            tile.columns.count,
            tile.columns.height // ONE_SIDED.columns,
            tile.reach,
            work.coarse.stride(0),
            work.fine.stride(0),
            K=best.k,
            PLACES=triton.next_power_of_2(best.k),
            IN_CELL=ONE_SIDED.columns // GROUP,
            SPAN=256,
            **self._exactly(4),
        )
        self.mark("crowded queries")

    def one_sided(
        self,
        panel: Rows,
        own: OwnColumns,
        columns: Rows,
        start: int,
        stop: int,
        lists: GroupLists,
        work: Buffers,
    ) -> None:
        """The lists of a panel take in columns [start, stop), whole blocks."""
        self._maxima(panel, own, columns, start, stop, work, ONE_SIDED)
        self._merge_rows(panel, lists, start, stop, work, ONE_SIDED)

    def two_sided(
        self,
        panel: Rows,
        own: OwnColumns,
        columns: Rows,
        start: int,
        stop: int,
        lists: GroupLists,
        all_lists: GroupLists,
        work: Buffers,
    ) -> None:
        """As `one_sided`, for a panel that begins at `start`; later columns take in its rows too."""
        later = start + panel.height
        thresholds = (all_lists.least, later)
        self._maxima(panel, own, columns, start, stop, work, SYMMETRIC, thresholds)
        self._merge_rows(panel, lists, start, stop, work, SYMMETRIC)
        cells = panel.height // SYMMETRIC.rows
        kernels.merge_columns_kernel[(triton.cdiv(stop - later, COLUMNS_AT_ONCE),)](
            work.flags,
            work.column_fine,
            all_lists.values,
            all_lists.groups,
            all_lists.least,
            later,
            stop - later,
            cells,
            kernels.ROW_GROUP + start // GROUP,
            work.flags.stride(0),
            KEEP=all_lists.keep,
            COLUMN_STRIDE=work.column_fine.stride(0),
            CELLS=triton.next_power_of_2(work.panel // SYMMETRIC.rows),
            COLUMNS=COLUMNS_AT_ONCE,
            num_warps=1,
        )
        self.mark("merge by columns")

    def _maxima(
        self,
        panel: Rows,
        own: OwnColumns,
        columns: Rows,
        start: int,
        stop: int,
        work: Buffers,
        shape: Shape,
        later: tuple[Tensor, int] | None = None,
    ) -> None:
        """Maxima of groups; also those by columns, where later: (their thresholds, first one)."""
        thresholds, final = (work.coarse, 0) if later is None else later
        kernels.group_maxima_kernel[(self.programs,)](
            panel.descriptor(shape.rows, shape.depth),
            columns.descriptor(shape.columns, shape.depth),
            panel.bias,
            columns.bias,
            own.low,
            own.high,
            *own.blocks(shape.rows),
            work.fine,
            work.coarse,
            work.column_fine,
            work.flags,
            thresholds,
            panel.height,
            start,
            (stop - start) // shape.columns,
            final,
            work.fine.stride(0),
            work.coarse.stride(0),
            work.flags.stride(0),
            1,
            DIM=self.dim,
            PROGRAMS=self.programs,
            SWIZZLE=8,
            BM=shape.rows,
            BN=shape.columns,
            BK=shape.depth,
            SYMMETRIC=later is not None,
            COLUMN_STRIDE=work.column_fine.stride(0),
            num_warps=shape.warps,
            num_stages=min(shape.stages, max(1, self.shared_bytes // shape.stage_bytes)),
        )
        self.mark("products")

    def _merge_rows(
        self, panel: Rows, lists: GroupLists, start: int, stop: int, work: Buffers, shape: Shape
    ) -> None:
        kernels.merge_rows_kernel[(panel.count,)](
            work.coarse,
            work.fine,
            panel.bias,
            lists.values,
            lists.groups,
            lists.least,
            (stop - start) // shape.columns,
            start // GROUP,
            work.coarse.stride(0),
            work.fine.stride(0),
            KEEP=lists.keep,
            IN_CELL=shape.columns // GROUP,
            SPAN=1024,
            num_warps=1,
        )
        self.mark("merge by rows")

    def rank(
        self, panel: Rows, own: OwnColumns, tile: Tile, lists: GroupLists, best: Best, work: Buffers
    ) -> None:
        """Exact keys of the columns of a panel's lists, and the k best of these and before."""
        constants = self._exactly(1)
        work.room_for_candidates(lists.keep)
        kernels.choose_groups_kernel[(panel.count,)](
            lists.values,
            lists.groups,
            panel.norms,
            work.order,
            work.counts,
            work.lowest,
            tile.reach,
            K=best.k,
            LISTED=lists.listed,
            KEEP=lists.keep,
            AT_ONCE=8,
            DIM=self.dim,
            L2=self.metric == "l2",
            num_warps=1,
        )
        kernels.exact_keys_kernel[(panel.count,)](
            panel.rows,
            tile.columns.rows,
            tile.columns.bias,
            own.low,
            own.high,
            work.order,
            work.counts,
            work.keys,
            work.ids,
            tile.columns.count,
            KEEP=lists.keep,
            EACH=CANDIDATES_AT_ONCE // 4,
            **{**constants, "num_warps": 4},
        )
        self.mark("distances")
        kernels.select_kernel[(panel.count,)](
            work.keys,
            work.ids,
            work.counts,
            work.lowest,
            panel.norms,
            best.keys,
            best.ids,
            best.floors,
            best.crowded,
            tile.first,
            tile.reach,
            K=best.k,
            PLACES=triton.next_power_of_2(best.k),
            CANDIDATES=lists.keep * GROUP,
            DIM=self.dim,
            L2=self.metric == "l2",
            num_warps=1 if lists.keep <= 64 else 4,
        )
        self.mark("select")

    def _exactly(self, warps: int) -> dict[str, Any]:
        """Constants of kernels that sum exact keys; a fused multiplication would change bits."""
        return {
            "DIM": self.dim,
            "BK": min(kernels.WIDTH, triton.next_power_of_2(self.dim)),
            "L2": self.metric == "l2",
            "num_warps": warps,
            "enable_fp_fusion": False,
        }

    def on_its_way(self, best: Best, count: int) -> OnItsWay:
        """The first rows of a result, on their way to the host."""
        ids = best.ids[:count].long()
        if self.device_ids is not None:
            ids = torch.where(ids >= 0, self.device_ids[ids.clamp(min=0)], -1)
        keys = best.keys[:count]
        distances = keys.clone() if self.metric == "l2" else -keys
        found = OnItsWay(ids, distances, best.crowded[:count].clone(), None)
        if not self.on_gpu:
            return found
        ids, distances, crowded = (
            torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(
                source, non_blocking=True
            )
            for source in found[:3]
        )
        event = torch.cuda.current_stream(self.device).record_event()
        self.mark("results to the host")
        return OnItsWay(ids, distances, crowded, event)


def search_together(
    searches: Sequence[GpuSearch],
    queries: np.ndarray[Any, Any],
    k: int,
    excluded: np.ndarray[Any, Any],
) -> Neighbors:
    """As `GpuSearch.search`, a part of the queries on each device; few of them all on the first."""
    count = min(len(searches), len(queries) // LEAST_QUERIES)
    if count < 2:
        return searches[0].search(queries, k, excluded)
    edges = np.linspace(0, len(queries), count + 1, dtype=int).tolist()

    def search(one: GpuSearch, low: int, high: int) -> Neighbors:
        return one.search(queries[low:high], k, excluded[low:high])

    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(search, searches, edges, edges[1:]))
    return Neighbors(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The same memory as a tensor, which is only read: memory maps are not writable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
