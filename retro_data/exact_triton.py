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

Where the queries are the database (`AllPairs`), a panel of rows meets only the columns from its own
first row on: what it is to them is found in the same accumulator, as maxima of groups of 8 rows.
Rows later than the panel keep a list that earlier panels fill. That is half the products.

Why it is exact. A list holds some groups more than k. By a bound on the rounding of a score
(`_error`, after Higham 2002, section 3.1), every group that may hold one of the k nearest is either
opened, or the query is *crowded*: its near-ties go on beyond its list. Crowded queries look at all
groups within the bound. Candidates are ranked by ``(key, id)``; a key is summed in float64, in the
order of `exact.fixed_sum`, then rounded to float32. So no bit differs from the CPU path.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from retro_data import exact_kernels_triton as kernels
from retro_data.errors import RetroDataError
from retro_data.exact import Metric, Neighbors, Vectors

GROUP = kernels.GROUP
ALIGN = 256  # rows and columns of whole blocks of either shape below
SPARE = 8  # groups of a list beyond k, for what rounding may reorder
PANEL_ROWS = 16_384  # queries whose group maxima are in memory at once
PANEL_STEP = 4096  # of larger panels: kernels are compiled for each height, and memory decides
TILE_ROWS = 2**21  # database rows searched at once
LEAST_QUERIES = 1024  # that a further device is given
LOAD_ROWS = 2**16  # rows read from disk and sent to the device at once
RESIDENT_SHARE = 0.5  # of free device memory that a database may fill; a larger one is streamed
MAXIMA_SHARE = 0.4  # of free device memory for the group maxima of one panel
COLUMNS_AT_ONCE = 32  # columns whose lists a warp looks after
CANDIDATES_AT_ONCE = 16  # columns of which a block of threads computes the distances
NOWHERE = 2**31 - 1


class Shape(NamedTuple):
    """Block of one product: rows, columns, dimensions at once, and how many of these are ahead."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int = 8

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.columns) * self.depth * 2


ONE_SIDED = Shape(128, 256, 64, 3)
SYMMETRIC = Shape(256, 128, 64, 4)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


# ---- rows on the device --------------------------------------------------------------------------


class _Rows:
    """Rows on the device, padded with rows of zeros that nobody finds.

    Attributes:
        count: real rows, of `height`.
        rows: (height, d) float16.
        bias: (height,) float32: |x|²/2 for L2, 0 for the inner product; +inf for rows of zeros.
        norms: (height,) float32.
    """

    def __init__(self, rows: Tensor, count: int, metric: Metric) -> None:
        self.rows, self.count, self.height = rows, count, rows.shape[0]
        squared = torch.cat([part.double().square_().sum(1) for part in rows.split(LOAD_ROWS)])
        bias = squared / 2 if metric == "l2" else torch.zeros_like(squared)
        self.bias = bias.masked_fill_(squared == 0, torch.inf).float()
        self.norms = squared.sqrt_().float()

    def part(self, start: int, stop: int) -> _Rows:
        """Rows [start, stop) of these, as views."""
        part = object.__new__(_Rows)
        part.rows, part.bias, part.norms = (
            whole[start:stop] for whole in (self.rows, self.bias, self.norms)
        )
        part.height, part.count = stop - start, min(stop, self.count) - start
        return part

    def reach(self, name: Callable[[int], str]) -> float:
        """The largest norm; waits for the device. Raises RetroDataError for rows not finite."""
        largest = float(self.norms.max()) if self.height else 0.0
        if not largest < torch.inf:
            bad = int(self.norms.isfinite().logical_not().nonzero()[0])
            raise RetroDataError(
                f"{name(bad)} is not finite. Embed this chunk again, in fp32 if its values "
                "overflow the encoder's precision."
            )
        return largest

    def descriptor(self, block: int, depth: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.rows, [block, depth])


class _Own(NamedTuple):
    """Columns [low, high) of each row's own document, and of each block of rows together."""

    low: Tensor  # (height,) int32; NOWHERE where there is none
    high: Tensor  # (height,) int32; 0 where there is none

    @classmethod
    def of(cls, ranges: Tensor, first: int, width: int, height: int) -> _Own:
        """Ranges (n, 2) of rows of the whole, as columns of a tile that starts at `first`."""
        low, high = (torch.full((height,), f, device=ranges.device) for f in (NOWHERE, 0))
        inside = (ranges - first).clamp_(0, width)
        real = inside[:, 0] < inside[:, 1]
        low[: len(ranges)] = torch.where(real, inside[:, 0], NOWHERE)
        high[: len(ranges)] = torch.where(real, inside[:, 1], 0)
        return cls(low.int(), high.int())

    def blocks(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.low.view(-1, rows).amin(1), self.high.view(-1, rows).amax(1)


class _Lists:
    """The best groups of each of `height` rows: `listed` of them, in arrays of `keep`.

    Attributes:
        least: (height,) what a group must beat to come into the list of a row: its least value, or more.
    """

    def __init__(self, height: int, k: int, device: torch.device) -> None:
        self.listed = k + SPARE
        self.keep = triton.next_power_of_2(self.listed)
        self.values = torch.empty(height, self.keep, device=device)
        self.groups = torch.empty(height, self.keep, dtype=torch.int32, device=device)
        self.least = torch.empty(height, device=device)

    def part(self, start: int, stop: int) -> _Lists:
        """Lists of rows [start, stop), as views."""
        part = object.__new__(_Lists)
        part.listed, part.keep = self.listed, self.keep
        part.values, part.groups, part.least = (
            whole[start:stop] for whole in (self.values, self.groups, self.least)
        )
        return part

    def take_in(self, others: Sequence[Sequence[Tensor]]) -> None:
        """The best of these lists and of others of the same rows: (values, groups) of other groups."""
        n = self.listed
        values, groups = (
            torch.cat([part[:, :n] for part in parts], 1)
            for parts in zip((self.values, self.groups), *others, strict=True)
        )
        best = values.topk(n, 1, sorted=False)
        self.values[:, :n] = best.values
        self.groups[:, :n] = groups.gather(1, best.indices)

    def clear(self, floors: Tensor | None = None) -> None:
        """Empty lists, into which only what beats a row's floor will come."""
        self.values[:, self.listed :] = torch.inf
        self.groups.fill_(-1)
        if floors is None:
            self.values[:, : self.listed] = -torch.inf
            self.least.fill_(-torch.inf)
        else:
            self.values[:, : self.listed] = floors[:, None]
            self.least.copy_(floors)


class _Best:
    """The k nearest so far of each row: exact keys and ids, in order."""

    def __init__(self, height: int, k: int, device: torch.device) -> None:
        self.k = k
        self.keys = torch.full((height, k), torch.inf, device=device)
        self.ids = torch.full((height, k), -1, dtype=torch.int32, device=device)
        self.floors = torch.full((height,), -torch.inf, device=device)
        self.crowded = torch.zeros(height, dtype=torch.int8, device=device)

    def part(self, start: int, stop: int) -> _Best:
        """Rows [start, stop) of these, as views."""
        part = object.__new__(_Best)
        part.k = self.k
        part.keys, part.ids, part.floors, part.crowded = (
            whole[start:stop] for whole in (self.keys, self.ids, self.floors, self.crowded)
        )
        return part


class _Buffers:
    """What the kernels write for one panel of rows against at most `width` columns."""

    def __init__(self, panel: int, width: int, device: torch.device, by_columns: bool) -> None:
        self.panel, self.device = panel, device
        self.fine = torch.empty(panel, width // GROUP, device=device)
        self.coarse = torch.empty(panel, _up(width // 128, 16), device=device)
        shape = (width, panel // GROUP) if by_columns else (1, 1)
        self.column_fine = torch.empty(shape, device=device)
        cells = (panel // SYMMETRIC.rows, width) if by_columns else (1, 1)
        self.flags = torch.zeros(cells, dtype=torch.int8, device=device)
        self.counts = torch.empty(panel, dtype=torch.int32, device=device)
        self.lowest = torch.empty(panel, device=device)
        self.order = self.keys = self.ids = torch.empty(0)

    def room_for_candidates(self, keep: int) -> None:
        if self.order.shape != (self.panel, keep):
            whole = {"dtype": torch.int32, "device": self.device}
            self.order = torch.empty(self.panel, keep, **whole)  # type: ignore[call-overload]
            self.ids = torch.empty(self.panel, keep * GROUP, **whole)  # type: ignore[call-overload]
            self.keys = torch.empty(self.panel, keep * GROUP, device=self.device)


# ---- the database on the device ------------------------------------------------------------------


class _Tile(NamedTuple):
    """Admitted rows [first, first + columns.count) of the database."""

    first: int
    columns: _Rows
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
        self.dim = _up(database.shape[1], 8)  # rows begin at multiples of 16 bytes
        self.tile_rows = _up(tile_rows, ALIGN)
        self.panel_rows = _up(panel_rows, ALIGN)
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

    def _load_resident(self) -> _Tile:
        height = _up(self.num_rows, ALIGN)
        rows = torch.zeros(height, self.dim, dtype=torch.float16, device=self.device)
        self._send(rows, 0, self.num_rows)
        return self._tile(0, self.num_rows, rows)

    def _tile(self, first: int, count: int, rows: Tensor) -> _Tile:
        def name(bad: int) -> str:
            return f"database row {first + bad if self.ids is None else self.ids[first + bad]}"

        columns = _Rows(rows, count, self.metric)
        return _Tile(first, columns, columns.reach(name))

    def tiles(self) -> Iterator[_Tile]:
        """The database in parts; a tile is good until the next one is asked for."""
        if self.resident is None:
            yield from self._streamed()
            return
        whole = self.resident
        for first in range(0, whole.columns.height, self.tile_rows):
            stop = min(first + self.tile_rows, whole.columns.height)
            yield whole._replace(first=first, columns=whole.columns.part(first, stop))

    def _streamed(self) -> Iterator[_Tile]:
        """Tiles from the host by turns in two buffers: one is filled while the other is searched."""
        shape = (2, self.tile_rows, self.dim)
        buffers = torch.zeros(shape, dtype=torch.float16, device=self.device)
        streams = _Streams(self.device)
        starts = range(0, self.num_rows, self.tile_rows)
        for number, first in enumerate(starts):
            count = min(self.tile_rows, self.num_rows - first)
            rows = buffers[number % 2][: _up(count, ALIGN)]
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
        height = _up(count, ALIGN)
        rows = torch.zeros(height, self.dim, dtype=torch.float16, device=self.device)
        self._copy(queries if isinstance(queries, Tensor) else _as_tensor(queries), rows)
        panels = _Rows(rows, count, self.metric)
        panels.reach(lambda bad: f"query row {bad}")
        best = _Best(height, k, self.device)
        lists = _Lists(min(height, self.panel_rows), k, self.device)
        for tile in self.tiles():
            step = self._panel_height(tile, height)
            ranges = _Own.of(own, tile.first, tile.columns.height, height)
            work = _Buffers(step, tile.columns.height, self.device, by_columns=False)
            for first in range(0, height, step):
                stop = min(first + step, height)
                self._search_panel(panels, first, stop, tile, ranges, lists, best, work)
        return self.on_its_way(best, count).arrived()[0]

    def own_ranges(self, excluded: np.ndarray[Any, Any]) -> Tensor:
        """(Q, 2) int64 on the device, in numbers of rows that may be found."""
        ranges = excluded if self.ids is None else np.searchsorted(self.ids, excluded)
        return _as_tensor(np.ascontiguousarray(ranges)).to(self.device)

    def _panel_height(self, tile: _Tile, height: int) -> int:
        fitting = self.free_for_maxima() // max(1, tile.columns.height // 2)
        return max(min(self.panel_rows, fitting // ALIGN * ALIGN, height), ALIGN)

    def _search_panel(
        self,
        queries: _Rows,
        first: int,
        stop: int,
        tile: _Tile,
        own: _Own,
        lists: _Lists,
        best: _Best,
        work: _Buffers,
    ) -> None:
        """Queries [first, stop) take in what a tile has for them."""
        panel = queries.part(first, stop)
        own = _Own(own.low[first:stop], own.high[first:stop])
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
        panel: _Rows,
        own: _Own,
        columns: _Rows,
        start: int,
        stop: int,
        lists: _Lists,
        work: _Buffers,
    ) -> None:
        """The lists of a panel take in columns [start, stop), whole blocks."""
        self._maxima(panel, own, columns, start, stop, work, ONE_SIDED)
        self._merge_rows(panel, lists, start, stop, work, ONE_SIDED)

    def two_sided(
        self,
        panel: _Rows,
        own: _Own,
        columns: _Rows,
        start: int,
        stop: int,
        lists: _Lists,
        all_lists: _Lists,
        work: _Buffers,
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
        panel: _Rows,
        own: _Own,
        columns: _Rows,
        start: int,
        stop: int,
        work: _Buffers,
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
        self, panel: _Rows, lists: _Lists, start: int, stop: int, work: _Buffers, shape: Shape
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
        self, panel: _Rows, own: _Own, tile: _Tile, lists: _Lists, best: _Best, work: _Buffers
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

    def on_its_way(self, best: _Best, count: int) -> _OnItsWay:
        """The first rows of a result, on their way to the host."""
        ids = best.ids[:count].long()
        if self.device_ids is not None:
            ids = torch.where(ids >= 0, self.device_ids[ids.clamp(min=0)], -1)
        keys = best.keys[:count]
        distances = keys.clone() if self.metric == "l2" else -keys
        found = _OnItsWay(ids, distances, best.crowded[:count].clone(), None)
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
        return _OnItsWay(ids, distances, crowded, event)


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


class _Streams:
    """A stream for copies beside that of the search; nothing at all without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.search: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.search = torch.cuda.current_stream(device)
            self.copies = torch.cuda.Stream(device)
            self.copies.wait_stream(self.search)
            self.enqueued: torch.cuda.Event | None = None

    def copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.search is None else torch.cuda.stream(self.copies)

    def search_waits(self, *made: Tensor) -> None:
        """What comes next on the search's stream waits for the copies, and uses tensors of theirs."""
        if self.search is not None:
            self.search.wait_stream(self.copies)
            for tensor in made:
                tensor.record_stream(self.search)

    def end(self) -> Any:
        """When the search has done all that it was set to do by now."""
        return self.search.record_event() if self.search is not None else True

    def copy_waits_for_search_before(self) -> None:
        """The next copy waits for the search but one: of the buffer that it will fill."""
        if self.search is not None:
            if self.enqueued is not None:
                self.copies.wait_event(self.enqueued)
            self.enqueued = self.search.record_event()


class _OnItsWay(NamedTuple):
    """Results that a copy in progress brings to the host."""

    ids: Tensor
    distances: Tensor
    crowded: Tensor
    event: Any

    def arrived(self) -> tuple[Neighbors, np.ndarray[Any, Any]]:
        """The results, and which rows are crowded."""
        if self.event is not None:
            self.event.synchronize()
        return Neighbors(self.ids.numpy(), self.distances.numpy()), self.crowded.numpy() != 0


# ---- the database's own rows ---------------------------------------------------------------------


class _Past(NamedTuple):
    """A panel that a side has been set to; no `_Panel`: one that its side held would hold its side,
    whose buffers would stay until garbage is collected.

    Attributes:
        first, last: its rows.
        end: of its products.
        floors: (stop - last,) float32, at its end: what a group had to beat to come into the list of
            each later row that will be asked for.
    """

    first: int
    last: int
    end: Any
    floors: Tensor


class _Side:
    """One device's part of all pairs: the rows, the lists that it keeps of them, and its buffers.

    Attributes:
        past: its latest panels.
    """

    def __init__(self, search: GpuSearch, k: int, own: _Own, panel: int, remembered: int) -> None:
        assert search.resident is not None
        self.search, self.tile = search, search.resident
        self.rows = self.tile.columns
        height = self.rows.height
        with search.current():
            self.own = _Own(*(part.to(search.device) for part in own))
            self.lists = _Lists(height, k, search.device)
            self.lists.clear()
            self.work = _Buffers(panel, height, search.device, by_columns=True)
            self.streams = _Streams(search.device)
        self.past: deque[_Past] = deque(maxlen=remembered)

    def before(self, row: int) -> _Past | None:
        """Its last panel before a row; None where there is none."""
        return next((past for past in reversed(self.past) if past.first < row), None)

    def bring(self, other: _Side, end: Any, *parts: Tensor) -> list[Tensor]:
        """Parts of what the other side has as of `end`, on this side's device."""
        if self.streams.search is None or other.streams.search is None:
            return list(parts)
        # Not in the streams of the searches: neither device waits for what the other has to do next.
        with other.streams.copying(), self.streams.copying():
            other.streams.copies.wait_event(end)
            copied = [part.to(self.search.device, non_blocking=True) for part in parts]
        for part in parts:
            part.record_stream(other.streams.copies)
        self.streams.search_waits(*copied)
        return copied

    def raise_floors(self, other: _Side, past: _Past, first: int) -> None:
        """What the other's lists of rows from `first` on had no room for is nothing to this side's."""
        (floors,) = self.bring(other, past.end, past.floors[first - past.last :])
        least = self.lists.least[first : past.last + len(past.floors)]
        torch.maximum(least, floors, out=least)


@dataclass
class _Panel:
    """Rows [first, last) on their way."""

    first: int
    last: int
    side: _Side
    end: Any  # of its products
    results: _OnItsWay | None = None

    @property
    def is_to_do(self) -> bool:
        """Whether products are left to do, where a device tells."""
        return self.end is True or not self.end.query()


class AllPairs:
    """The nearest rows of each row of a resident database, at half the products.

    Rows are asked for in ascending order, in any pieces; what was asked for is worked on in panels.
    A panel meets the columns that no panel before it was: those later than its first row, for both
    sides at once, and earlier ones that were left out, for itself alone. Panels are ahead of what
    was asked for, so that the device does not wait while results are used.

    Of several devices the one with the fewest products left to do takes the next panel: panels meet
    ever fewer columns, and devices differ. Each keeps lists of its own for the rows that its panels
    meet; when a panel is ranked, the lists that the others have of its rows are taken in. So what the
    list of one of them has no room for need not come into its own: it learns their floors. Either is
    of two rounds ago, so that devices seldom wait for each other.

    Args:
        searches: of one database that is resident, one of each device.
        k: neighbors of each row.
        excluded: (N, 2) int64, the database rows [lo, hi) of each row's own document; the rows of a
            document have the same.
        start, stop: rows that will be asked for.
    """

    def __init__(
        self,
        searches: Sequence[GpuSearch],
        k: int,
        excluded: np.ndarray[Any, Any],
        start: int,
        stop: int,
    ) -> None:
        search = searches[0]
        self.searches, self.search = list(searches), search
        self.k, self.excluded = k, excluded
        first, last = self._numbers(start), self._numbers(stop)
        self.position = first // ALIGN * ALIGN  # the first row that no panel has come to
        self.stop = _up(last, ALIGN)
        self.met: list[tuple[int, int]] = []  # ranges of rows that panels have been, in order
        height = _up(search.num_rows, ALIGN)
        fitting = min(s.free_for_maxima() for s in searches) // max(1, height)
        fitting = fitting // PANEL_STEP * PANEL_STEP or fitting // ALIGN * ALIGN
        panel = min(search.panel_rows, fitting, self.stop - self.position)
        self.panel = max(panel, ALIGN)
        with search.current():
            ranges = search.own_ranges(excluded if search.ids is None else excluded[search.ids])
            own = _Own.of(ranges, 0, height, height)
        count = len(searches)
        self.lag = 2 * count if count > 1 else 0  # panels, from products to ranking
        # At most `lag` panels begin between a panel's start and its ranking; one before it is kept.
        self.sides = [_Side(each, k, own, self.panel, self.lag + 2) for each in searches]
        self.ahead = max(1, 2 * self.lag)
        self.flying: deque[_Panel] = deque()
        self.held: tuple[int, int, Neighbors] | None = None

    def _numbers(self, row: int) -> int:
        """How many rows that may be found lie before a database row."""
        ids = self.search.ids
        return row if ids is None else int(np.searchsorted(ids, row))

    def neighbors(self, start: int, stop: int) -> Neighbors:
        """Of database rows [start, stop); those that may not be found themselves are searched."""
        first, last = self._numbers(start), self._numbers(stop)
        admitted = self.search.ids
        if admitted is None:
            return self._of_numbers(first, last)
        ids = np.empty((stop - start, self.k), np.int64)
        distances = np.empty((stop - start, self.k), np.float32)
        place = admitted[first:last] - start
        ids[place], distances[place] = self._of_numbers(first, last)
        others = np.setdiff1d(np.arange(stop - start), place, assume_unique=True)
        if len(others):
            vectors, own = self.search.database.take(start + others), self.excluded[start + others]
            found = search_together(self.searches, vectors, self.k, own)
            ids[others], distances[others] = found
        return Neighbors(ids, distances)

    def _of_numbers(self, first: int, last: int) -> Neighbors:
        """Neighbors of rows [first, last) of those that may be found."""
        ids = np.empty((last - first, self.k), np.int64)
        distances = np.empty((last - first, self.k), np.float32)
        at = first
        while at < last:
            panel = self._panel_of(at)
            if panel is None:  # a panel of long ago, whose results are gone
                rest = np.arange(at, last)
                ids[at - first :], distances[at - first :] = self._searched(rest)
                break
            begin, end, found = panel
            stop = min(end, last)
            part, source = slice(at - first, stop - first), slice(at - begin, stop - begin)
            ids[part], distances[part] = found.ids[source], found.distances[source]
            at = stop
        return Neighbors(ids, distances)

    def _panel_of(self, row: int) -> tuple[int, int, Neighbors] | None:
        """The panel that a row is in, with its results; None for one that is gone."""
        if self.held is not None and self.held[0] <= row < self.held[1]:
            return self.held
        while self.flying and self.flying[0].last <= row:
            self.flying.popleft()
        if row < (self.flying[0].first if self.flying else self.position):
            return None
        if not self.flying:
            self.position = row // ALIGN * ALIGN
        while not self.flying or self.flying[0].results is None or len(self.flying) <= self.ahead:
            if not self._advance():
                break
        panel = self.flying.popleft()
        assert panel.results is not None
        found, crowded = panel.results.arrived()
        if crowded.any():
            rows = np.flatnonzero(crowded)
            found.ids[rows], found.distances[rows] = self._searched(panel.first + rows)
        self.held = panel.first, panel.last, found
        return self.held

    def _searched(self, numbers: np.ndarray[Any, Any]) -> Neighbors:
        """Neighbors of rows that may be found, by a search of the whole database."""
        rows = numbers if self.search.ids is None else self.search.ids[numbers]
        on_device = torch.from_numpy(numbers).to(self.search.device)
        queries = self.sides[0].rows.rows[on_device]
        return self.search.search(queries, self.k, self.excluded[rows])

    def _advance(self) -> bool:
        """Start one more panel, and rank one whose turn it is. False where nothing is left to do."""
        is_more = self.position < self.stop
        if is_more:
            self.flying.append(self._start_panel(self.position))
        unranked = [panel for panel in self.flying if panel.results is None]
        if unranked and (len(unranked) > self.lag or not is_more):
            self._rank(unranked[0])
        return is_more or bool(unranked)

    def _freest(self) -> _Side:
        """The device with the fewest columns to meet, from the first rows of its panels on."""
        to_do = {id(side): 0 for side in self.sides}
        for panel in self.flying:
            if panel.is_to_do:
                to_do[id(panel.side)] += panel.side.rows.height - panel.first
        return min(self.sides, key=lambda side: to_do[id(side)])

    def _start_panel(self, first: int) -> _Panel:
        """Sets a device to the products of the panel that begins at row `first`; does not wait."""
        last = min(first + self.panel, self.stop)
        side = self._freest()
        search, work, columns = side.search, side.work, side.rows
        panel = columns.part(first, last)
        own = _Own(side.own.low[first:last], side.own.high[first:last])
        lists = side.lists.part(first, last)
        with search.current():
            self._learn_floors(side, first)
            for low, high in self._left_out(first):
                search.one_sided(panel, own, columns, low, high, lists, work)
            if last == columns.height or last == self.stop:
                search.one_sided(panel, own, columns, first, columns.height, lists, work)
            else:
                search.two_sided(panel, own, columns, first, self.stop, lists, side.lists, work)
                if self.stop < columns.height:
                    search.one_sided(panel, own, columns, self.stop, columns.height, lists, work)
            floors = side.lists.least[last : self.stop]
            if len(self.sides) > 1:
                floors = floors.clone()
            end = side.streams.end()
        side.past.append(_Past(first, last, end, floors))
        joined = self.met.pop()[0] if self.met and self.met[-1][1] == first else first
        self.met.append((joined, last))
        self.position = last
        return _Panel(first, last, side, end)

    def _learn_floors(self, side: _Side, first: int) -> None:
        """Of the other devices' lists, as they were two rounds before the panel from `first` on."""
        for other in self.sides:
            past = other.before(first - self.lag * self.panel + 1)
            if other is not side and past is not None:
                side.raise_floors(other, past, first)

    def _rank(self, panel: _Panel) -> None:
        """Sets the panel's device to rank its rows, once every panel before it has ended."""
        first, last, side = panel.first, panel.last, panel.side
        search, lists = side.search, side.lists.part(first, last)
        with search.current():
            others = []
            for other in self.sides:
                past = other.before(first)
                if other is not side and past is not None:
                    part = other.lists.part(first, last)
                    others.append(side.bring(other, past.end, part.values, part.groups))
            if others:
                lists.take_in(others)
            best = _Best(last - first, self.k, search.device)
            own = _Own(side.own.low[first:last], side.own.high[first:last])
            rows = side.rows.part(first, last)
            search.rank(rows, own, side.tile, lists, best, side.work)
            panel.results = search.on_its_way(best, rows.count)

    def _left_out(self, row: int) -> list[tuple[int, int]]:
        """Ranges of columns before a row that were no panel."""
        edges = [0, *(edge for panel in self.met for edge in panel), row]
        ranges = zip(edges[::2], edges[1::2], strict=True)
        return [(low, high) for low, high in ranges if low < high]


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The same memory as a tensor, which is only read: memory maps are not writable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
