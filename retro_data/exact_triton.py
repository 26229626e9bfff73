"""Exact nearest-neighbor search on a GPU, by the semantics of `exact.nearest`.

    queries (panel) ─┐
                     ├─► products ─► maxima of groups of 8 columns ─► the best groups of each query
    tile of rows ────┘     (never written)                        ─► their columns scored again
                                                                  ─► exact distances, (distance, id)

The k columns with the largest scores lie in the k groups with the largest maxima, whatever the
groups are, so keeping whole groups loses nothing: the method is exact, not approximate. A score is
q·x - |x|²/2 (q·x for the inner product), in float16 products with float32 accumulation. The maxima
are taken of the accumulator in registers; only they are written, an eighth of the score matrix, and
above them one maximum a query and block of columns: a query opens a block only where that beats
its k-th best group. The query's own document, a contiguous range of columns, is set to -inf in the
blocks that touch it.

Candidates (k and some spare for rounding) are ranked by distances summed in float64 in the fixed
order of the CPU path, so both paths give the same bits but for ties that rounding hides from one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from retro_data.errors import RetroDataError
from retro_data.exact import Metric, Neighbors, Vectors, fixed_sum

GROUP = 8  # columns a maximum stands for: two fragments of four pairs in the accumulator's layout
BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64  # queries, columns and dimensions of one product
SPARE = 16  # candidates beyond k, for what rounding of float32 scores may reorder
PANEL_ROWS = 16_384  # queries whose group maxima are in memory at once
TILE_ROWS = 2**20  # database rows searched at once
LOAD_ROWS = 2**18  # rows read from disk and sent to the device at once
RESIDENT_SHARE = 0.5  # of free device memory that a database may fill; a larger one is streamed
MAXIMA_SHARE = 0.15  # of free device memory for the group maxima of one panel
PAIR_BYTES = 2**30  # float64 terms of exact distances at once, where memory allows


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tiles"])
def _group_maxima_kernel(
    queries,
    rows,
    bias,
    low,
    high,
    block_low,
    block_high,
    fine,
    coarse,
    num_queries,
    num_tiles,
    fine_stride,
    coarse_stride,
    DIM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Maxima of groups of columns (fine) and of BN columns (coarse) of each query's scores."""
    blocks_m = tl.cdiv(num_queries, BM)
    width = SWIZZLE * num_tiles
    m_range = tl.arange(0, BM)
    n_range = tl.arange(0, BN)
    for tile in tl.range(tl.program_id(0), blocks_m * num_tiles, PROGRAMS, flatten=FLATTEN):
        # Neighbouring programs share queries and rows, so that both stay in the cache.
        first = (tile // width) * SWIZZLE
        height = tl.minimum(blocks_m - first, SWIZZLE)
        m = (first + (tile % width) % height) * BM
        block_n = (tile % width) // height
        n = block_n * BN
        scores = tl.zeros((BM, BN), tl.float32)
        for k in range(0, DIM, BK):
            scores = tl.dot(queries.load([m, k]), rows.load([n, k]).T, scores)
        # Before the mask below: a branch that writes the product's own registers makes the assembler
        # run its instructions one after the other.
        scores -= tl.load(bias + n + n_range)[None, :]
        if (tl.load(block_low + m // BM) < n + BN) & (tl.load(block_high + m // BM) > n):
            lo = tl.load(low + m + m_range)[:, None]
            hi = tl.load(high + m + m_range)[:, None]
            column = n + n_range[None, :]
            scores = tl.where((column >= lo) & (column < hi), float("-inf"), scores)
        # Column 32 c + 8 b + 2 p + e belongs to group 4 c + p: what one thread holds of a row.
        maxima = tl.max(tl.max(tl.reshape(scores, (BM, BN // 32, 4, 4, 2)), 4), 2)
        maxima = tl.reshape(maxima, (BM, BN // 8))
        query = (m + m_range).to(tl.int64)
        group = block_n * (BN // 8) + tl.arange(0, BN // 8)
        tl.store(fine + query[:, None] * fine_stride + group[None, :], maxima)
        tl.store(coarse + query * coarse_stride + block_n, tl.max(maxima, 1))


@triton.jit(do_not_specialize=["num_tiles"])
def _best_groups_kernel(
    coarse,
    fine,
    floor,
    groups,
    num_tiles,
    coarse_stride,
    fine_stride,
    KEEP: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The KEEP groups of a query with the largest maxima above its floor; one warp a query."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KEEP)
    span = tl.arange(0, SPAN)
    inner = tl.arange(0, IN_BLOCK)
    least = tl.load(floor + query)
    best = tl.zeros((KEEP,), tl.float32) + least
    best_group = tl.zeros((KEEP,), tl.int32) - 1
    for start in range(0, num_tiles, SPAN):
        value = tl.load(
            coarse + query * coarse_stride + start + span,
            mask=start + span < num_tiles,
            other=float("-inf"),
        )
        top, at = tl.max(value, 0, return_indices=True)
        while top > least:
            maxima = tl.load(fine + query * fine_stride + (start + at) * IN_BLOCK + inner)
            group_top, group_at = tl.max(maxima, 0, return_indices=True)
            while group_top > least:  # it takes the place of the smallest one kept
                _, worst = tl.min(best, 0, return_indices=True)
                best = tl.where(place == worst, group_top, best)
                best_group = tl.where(
                    place == worst, (start + at) * IN_BLOCK + group_at, best_group
                )
                least = tl.min(best, 0)
                maxima = tl.where(inner == group_at, float("-inf"), maxima)
                group_top, group_at = tl.max(maxima, 0, return_indices=True)
            value = tl.where(span == at, float("-inf"), value)
            top, at = tl.max(value, 0, return_indices=True)
    tl.store(groups + query * KEEP + place, best_group)


@triton.jit
def _score_groups_kernel(
    queries,
    rows,
    bias,
    groups,
    low,
    high,
    scores,
    columns,
    first_query,
    num_rows,
    DIM: tl.constexpr,
    KEEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BK: tl.constexpr,
):
    """Scores of every column of a query's best groups, anew in float32; -inf for its own."""
    row = tl.program_id(0).to(tl.int64)
    query = first_query + row
    lo = tl.load(low + query)
    hi = tl.load(high + query)
    k_range = tl.arange(0, BK)
    for start in range(0, KEEP * 8, AT_ONCE):
        slot = start + tl.arange(0, AT_ONCE)
        member = slot % 8
        group = tl.load(groups + query * KEEP + slot // 8)
        column = group // 4 * 32 + group % 4 * 2 + member // 2 * 8 + member % 2
        real = (group >= 0) & (column < num_rows) & ~((column >= lo) & (column < hi))
        total = tl.zeros((AT_ONCE, BK), tl.float32)
        offset = column.to(tl.int64)[:, None] * DIM + k_range[None, :]
        for k in range(0, DIM, BK):
            inside = k + k_range < DIM
            q = tl.load(queries + query * DIM + k + k_range, mask=inside, other=0.0)
            x = tl.load(rows + offset + k, mask=real[:, None] & inside[None, :], other=0.0)
            total += x.to(tl.float32) * q.to(tl.float32)[None, :]
        score = tl.sum(total, 1) - tl.load(bias + column, mask=real, other=0.0)
        out = row * KEEP * 8 + slot
        tl.store(scores + out, tl.where(real, score, float("-inf")))
        tl.store(columns + out, tl.where(real, column, -1))


# ---- the database on the device ------------------------------------------------------------------


class _Tile(NamedTuple):
    """Admitted rows [first, first + num_rows) of the database, padded to whole blocks of columns."""

    first: int
    num_rows: int
    rows: Tensor  # (width, d) float16
    bias: Tensor  # (width,) float32, |x|²/2 or 0; +inf for padding
    largest: float  # squared norm among the rows


class GpuSearch:
    """A database made ready on one GPU, for any number of searches.

    Args:
        database: (N, d) float16.
        metric: "l2" or "ip".
        admitted: (N,) bool; None admits all. Rows of zeros are never neighbors.
        device: a CUDA device ("cpu" only under Triton's interpreter).
        resident_bytes: a larger database is streamed from the host, tile by tile, in every search;
            None takes a share of the free device memory.
    """

    def __init__(
        self,
        database: Vectors,
        metric: Metric,
        admitted: np.ndarray[Any, Any] | None,
        device: str,
        resident_bytes: int | None = None,
        tile_rows: int = TILE_ROWS,
    ) -> None:
        self.database = database
        self.metric = metric
        self.device = torch.device(device)
        self.dim = -(-database.shape[1] // 8) * 8  # rows begin at multiples of 16 bytes
        self.tile_rows = tile_rows
        self.ids = self._real_rows(admitted)  # (M,) int64, of the rows that may be found
        size = len(self.ids) * self.dim * 2
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else 2**32
        query_bytes = 4 * max(1, min(tile_rows, len(self.ids)) // GROUP)
        panel = int(free * MAXIMA_SHARE) // query_bytes // BLOCK_M * BLOCK_M
        self.panel_rows = min(max(panel, BLOCK_M), PANEL_ROWS)
        self.pair_bytes = min(PAIR_BYTES, free // 16)
        if resident_bytes is None:
            resident_bytes = int(free * RESIDENT_SHARE)
        self.is_resident = size <= resident_bytes
        self._tiles = list(self._load()) if self.is_resident else None
        self.device_ids = torch.from_numpy(self.ids).to(self.device)

    def _real_rows(self, admitted: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        found = []
        for start in range(0, self.database.shape[0], LOAD_ROWS):
            stop = min(start + LOAD_ROWS, self.database.shape[0])
            real = self.database.rows(start, stop).any(1)
            if admitted is not None:
                real &= admitted[start:stop]
            found.append(start + np.flatnonzero(real))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def tiles(self) -> Iterator[_Tile]:
        return iter(self._tiles) if self._tiles is not None else self._load()

    def _load(self) -> Iterator[_Tile]:
        """Tiles of the database; while one is searched, the next is on its way."""
        for first in range(0, len(self.ids), self.tile_rows):
            ids = self.ids[first : first + self.tile_rows]
            width = -(-len(ids) // BLOCK_N) * BLOCK_N
            rows = torch.zeros(width, self.dim, dtype=torch.float16, device=self.device)
            for start in range(0, len(ids), LOAD_ROWS):
                part = self.database.take(ids[start : start + LOAD_ROWS])
                host = torch.from_numpy(part)
                if self.device.type == "cuda":
                    host = host.pin_memory()
                target = rows[start : start + len(part), : part.shape[1]]
                target.copy_(host, non_blocking=True)
            squared = torch.cat([part.float().square().sum(1) for part in rows.split(LOAD_ROWS)])
            bias = squared / 2 if self.metric == "l2" else torch.zeros_like(squared)
            bias[len(ids) :] = torch.inf
            largest = float(squared.max())
            if not largest < torch.inf:
                bad = int(ids[int(squared.isfinite().logical_not().nonzero()[0])])
                raise RetroDataError(
                    f"database row {bad} is not finite. Embed this chunk again, in fp32 if its "
                    "values overflow the encoder's precision."
                )
            yield _Tile(first, len(ids), rows, bias, largest)

    # ---- searching ----

    def search(
        self, queries: np.ndarray[Any, Any], k: int, excluded: np.ndarray[Any, Any]
    ) -> Neighbors:
        """As `exact.nearest`; queries (Q, d) float16, excluded (Q, 2) database rows [lo, hi)."""
        count = len(queries)
        ids = torch.full((count, k), -1, dtype=torch.int64, device=self.device)
        keys = torch.full((count, k), torch.inf, device=self.device)
        own = torch.from_numpy(np.searchsorted(self.ids, excluded)).to(self.device)
        panels = [
            _Panel(queries[start : start + self.panel_rows], self.dim, self.device)
            for start in range(0, count, self.panel_rows)
        ]
        for tile in self.tiles():
            for number, panel in enumerate(panels):
                first = number * self.panel_rows
                part = slice(first, first + panel.count)
                found = self._search_tile(panel, tile, own[part], keys[part, -1], k)
                keys[part], ids[part] = _merge((keys[part], ids[part]), found, k)
        if panels:
            zero = torch.cat([panel.squared for panel in panels]) == 0
            ids[zero], keys[zero] = -1, torch.inf
        distances = keys if self.metric == "l2" else -keys
        return Neighbors(ids.cpu().numpy(), distances.cpu().numpy())

    def _search_tile(
        self, panel: _Panel, tile: _Tile, own: Tensor, worst: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Exact keys and database rows (count, candidates) of a panel's best in one tile."""
        height, count = panel.rows.shape[0], panel.count
        low, high = (_padded(own[:, i] - tile.first, height) for i in (0, 1))
        floor = _padded(self._floor(panel, worst), height, -torch.inf)
        keep = triton.next_power_of_2(k + SPARE)
        groups = self._best_groups(panel, tile, low, high, floor, keep)
        candidates = min(k + SPARE, keep * GROUP)
        keys = torch.full((count, candidates), torch.inf, device=self.device)
        ids = torch.full((count, candidates), -1, dtype=torch.int64, device=self.device)
        step = max(1, 2**28 // (keep * GROUP * 8))
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            scores, columns = self._score_groups(panel, tile, groups, (low, high), rows)
            best = scores.topk(candidates, 1)
            chosen = torch.where(best.values > -torch.inf, columns.gather(1, best.indices), -1)
            keys[rows], ids[rows] = self._ranked(panel.rows[rows], tile, chosen)
            # Where near-ties go on beyond the candidates, every column of the groups is ranked.
            slack = self._slack(panel, rows, tile)
            close = best.values[:, -1] >= best.values[:, min(k, candidates) - 1] - slack
            crowded = (close & (best.values[:, -1] > -torch.inf)).nonzero().squeeze(1)
            for some in crowded.split(max(1, step // 64)):
                wide = torch.where(scores[some] > -torch.inf, columns[some], -1)
                ranked = self._ranked(panel.rows[rows][some], tile, wide)
                keys[rows.start + some], ids[rows.start + some] = (
                    r[:, :candidates] for r in ranked
                )
        return keys, ids

    def _slack(self, panel: _Panel, rows: slice, tile: _Tile) -> Tensor:
        """More than the rounding of two float32 scores of these queries can differ by."""
        factor: float = 2.0**-20 * (self.dim + 16) ** 0.5
        return factor * (panel.squared[rows] + tile.largest)

    def _floor(self, panel: _Panel, worst: Tensor) -> Tensor:
        """A score that a group must beat to matter, given the k-th best key so far."""
        if self.metric == "ip":
            score = -worst
            slack = worst.abs()
        else:
            score = (panel.squared - worst) / 2
            slack = panel.squared + worst.abs()
        floor = score - 2.0**-10 * slack  # wider than the rounding of any float32 score
        return torch.where(worst.isfinite(), floor, -torch.inf)

    def _best_groups(
        self, panel: _Panel, tile: _Tile, low: Tensor, high: Tensor, floor: Tensor, keep: int
    ) -> Tensor:
        height = panel.rows.shape[0]
        blocks = tile.rows.shape[0] // BLOCK_N
        fine = torch.empty(height, blocks * (BLOCK_N // GROUP), device=self.device)
        coarse = torch.empty(height, -(-blocks // 4) * 4, device=self.device)
        on_gpu = self.device.type == "cuda"
        programs = (
            torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 4
        )
        _group_maxima_kernel[(programs,)](
            TensorDescriptor.from_tensor(panel.rows, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(tile.rows, [BLOCK_N, BLOCK_K]),
            tile.bias,
            low,
            high,
            low.view(-1, BLOCK_M).amin(1),
            high.view(-1, BLOCK_M).amax(1),
            fine,
            coarse,
            height,
            blocks,
            fine.stride(0),
            coarse.stride(0),
            DIM=self.dim,
            PROGRAMS=programs,
            SWIZZLE=8,
            BM=BLOCK_M,
            BN=BLOCK_N,
            BK=BLOCK_K,
            FLATTEN=True,
            num_warps=8,
            num_stages=3,
        )
        groups = torch.empty(height, keep, dtype=torch.int32, device=self.device)
        _best_groups_kernel[(height,)](
            coarse,
            fine,
            floor,
            groups,
            blocks,
            coarse.stride(0),
            fine.stride(0),
            KEEP=keep,
            IN_BLOCK=BLOCK_N // GROUP,
            SPAN=1024,
            num_warps=1,
        )
        return groups

    def _score_groups(
        self,
        panel: _Panel,
        tile: _Tile,
        groups: Tensor,
        own: tuple[Tensor, Tensor],
        rows: slice,
    ) -> tuple[Tensor, Tensor]:
        """Scores and columns (n, 8 * groups) of every column of the best groups; -inf and -1."""
        keep, count = groups.shape[1], rows.stop - rows.start
        scores = torch.empty(count, keep * GROUP, device=self.device)
        columns = torch.empty(count, keep * GROUP, dtype=torch.int64, device=self.device)
        _score_groups_kernel[(count,)](
            panel.rows,
            tile.rows,
            tile.bias,
            groups,
            *own,
            scores,
            columns,
            rows.start,
            tile.num_rows,
            DIM=self.dim,
            KEEP=keep,
            AT_ONCE=16,
            BK=256,
            num_warps=4,
        )
        return scores, columns

    def _ranked(self, queries: Tensor, tile: _Tile, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Exact keys and database rows of candidates, ordered by (key, row)."""
        keys = self._exact_keys(queries, tile, columns)
        place = (tile.first + columns).clamp(min=0)
        ids = torch.where(columns >= 0, self.device_ids[place], -1)
        return _ordered(keys, ids)

    def _exact_keys(self, queries: Tensor, tile: _Tile, columns: Tensor) -> Tensor:
        """Squared distances or negated products, in float64, rounded to float32; +inf for -1."""
        keys = torch.full(columns.shape, torch.inf, device=self.device)
        row, place = (columns >= 0).nonzero(as_tuple=True)
        for pairs in torch.arange(len(row), device=self.device).split(
            self.pair_bytes // (8 * self.dim)
        ):
            x = tile.rows[columns[row[pairs], place[pairs]]].double()
            q = queries[row[pairs]].double()
            terms = x.sub_(q).square_() if self.metric == "l2" else x.mul_(q).neg_()
            # The dimensions added for alignment are zeros, and are left out: the order of the sum
            # is that of the CPU path.
            terms = terms[:, : self.database.shape[1]].contiguous()
            keys[row[pairs], place[pairs]] = fixed_sum(terms).float()
        return keys


class _Panel:
    """Queries on the device: (height, d) float16, padded with rows of zeros to whole blocks."""

    def __init__(self, queries: np.ndarray[Any, Any], dim: int, device: torch.device) -> None:
        self.count = len(queries)
        height = -(-self.count // BLOCK_M) * BLOCK_M
        self.rows = torch.zeros(height, dim, dtype=torch.float16, device=device)
        host = torch.from_numpy(np.ascontiguousarray(queries))
        self.rows[: self.count, : queries.shape[1]] = host.to(device)
        self.squared = self.rows[: self.count].float().square().sum(1)
        if self.count and not self.squared.isfinite().all():
            bad = int(self.squared.isfinite().logical_not().nonzero()[0])
            raise RetroDataError(f"query row {bad} of this block is not finite: embed it again.")


def _padded(values: Tensor, height: int, fill: float = 0) -> Tensor:
    """Values of queries as int32 or float32, with `fill` for the padding rows of a panel."""
    dtype = torch.float32 if values.is_floating_point() else torch.int32
    padded = torch.full((height,), fill, dtype=dtype, device=values.device)
    padded[: len(values)] = values.to(dtype)
    return padded


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k first of two lists of (keys, ids) by (key, id)."""
    keys, ids = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    keys, ids = _ordered(keys, ids)
    return keys[:, :k], ids[:, :k]


def _ordered(keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of (keys, ids) ordered by (key, id)."""
    by_id = ids.argsort(dim=1, stable=True)
    keys, ids = keys.gather(1, by_id), ids.gather(1, by_id)
    order = keys.argsort(dim=1, stable=True)
    return keys.gather(1, order), ids.gather(1, order)
