"""Triton kernels of exact search on a GPU; `exact_triton` says how they work together.

A score is ``-|q - x|²/2`` (L2) or ``q·x`` (inner product), and a *group* is 8 columns of one query,
or 8 queries of one column. Which 8 is what a thread holds of the product's accumulator, so that its
maximum is taken in registers:

    columns  128 h + 32 c + 8 b + 2 p + e  (b < 4, e < 2)  are group  16 h + 4 p + c
    rows     256 h + 128 a + 16 w + 8 b + 2 p + e  (a, b, e < 2)  are group  32 h + 4 w + p

Any partition is as exact as another: the k best columns lie in the k groups with the best maxima.
A group of queries is marked by `ROW_GROUP`.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8
ROW_GROUP = 1 << 30
WIDTH = 256  # terms of a distance that are summed side by side, as in `exact.fixed_sum`

_ROW_GROUP = tl.constexpr(ROW_GROUP)
_LOWEST = tl.constexpr(-(2**31))
_NO_ID = tl.constexpr(2**31 - 1)
_UNIT = tl.constexpr(2.0**-23)  # of a float32 sum that truncates, as tensor cores do


# ---- products and maxima -------------------------------------------------------------------------


@triton.jit
def _row_maxima(scores, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN // 128, 16): maxima of the groups of columns of rows in the order of `_row_order`."""
    maxima = tl.max(tl.max(tl.reshape(scores, (BM, BN // 32, 4, 4, 2)), 4), 2)
    maxima = tl.reshape(maxima, (BM // 128, 8, 2, 8, BN // 128, 4, 4))  # a w b p h c q
    return tl.reshape(tl.permute(maxima, (0, 2, 1, 3, 4, 6, 5)), (BM, BN // 128, 16))


@triton.jit
def _row_order(BM: tl.constexpr):
    row = tl.arange(0, BM)
    return row // 128 * 128 + row // 8 % 8 * 16 + row // 64 % 2 * 8 + row % 8


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "final_rows", "one"])
def group_maxima_kernel(
    queries,
    columns,
    query_bias,
    bias,
    low,
    high,
    block_low,
    block_high,
    fine,
    coarse,
    column_fine,
    flags,
    least,
    num_rows,
    first_column,
    num_tiles,
    final_rows,
    fine_stride,
    coarse_stride,
    flag_stride,
    one,
    DIM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SWIZZLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
):
    """Maxima of groups of the scores of num_rows queries and of columns from first_column on.

    fine[row, group] and coarse[row, tile] are of scores plus the query's bias, which the reader
    takes off. If SYMMETRIC (then BM is 256) also column_fine[column, group of rows], of scores, and
    flags[block of rows, column] = 1 where one of them beats the column's `least`, for columns from
    `final_rows` on. Rows and columns of padding have a bias of +inf.

    Every tensor of the last part is laid out so that the thread that computed an element stores it:
    shared memory and its barriers, in the shadow of nothing, would cost a fifth of the time. `one`
    is 1, unknown to the compiler, which would otherwise arrange stores by contiguous addresses.
    """
    blocks_m = tl.cdiv(num_rows, BM)
    width = SWIZZLE * num_tiles
    m_range = tl.arange(0, BM)
    n_range = tl.arange(0, BN)
    for tile in tl.range(tl.program_id(0), blocks_m * num_tiles, PROGRAMS, flatten=True):
        # Neighbouring programs share queries and columns, so that both stay in the cache.
        first = (tile // width) * SWIZZLE
        height = tl.minimum(blocks_m - first, SWIZZLE)
        block_m = first + (tile % width) % height
        block_n = (tile % width) // height
        row = block_m * BM
        column = first_column + block_n * BN
        scores = tl.zeros((BM, BN), tl.float32)
        for k in range(0, DIM, BK):
            scores = tl.dot(queries.load([row, k]), columns.load([column, k]).T, scores)
        # Before the mask below: a branch that writes the product's own registers makes the assembler
        # run its instructions one after the other.
        scores -= tl.load(bias + column + n_range)[None, :]
        if (tl.load(block_low + row // BM) < column + BN) & (
            tl.load(block_high + row // BM) > column
        ):
            lo = tl.load(low + row + m_range)[:, None]
            hi = tl.load(high + row + m_range)[:, None]
            at = column + n_range[None, :]
            scores = tl.where((at >= lo) & (at < hi), float("-inf"), scores)

        maxima = _row_maxima(scores, BM, BN)
        line = (block_m * BM + _row_order(BM)).to(tl.int64)
        half = tl.arange(0, BN // 128)[None, :, None]
        group = block_n * (BN // 8) + 16 * half + tl.arange(0, 16)[None, None, :]
        tl.store(fine + line[:, None, None] * fine_stride + group, maxima)
        top = tl.broadcast_to(tl.max(tl.max(maxima, 2), 1)[None, :], (4, BM))
        copy = tl.arange(0, 4)[:, None]
        place = coarse + line[None, :] * coarse_stride + block_n + copy * 0
        tl.store(place, top, mask=copy == 0)

        if SYMMETRIC:
            part = tl.arange(0, 128)
            upper = tl.load(query_bias + row + part)[:, None]
            lower = tl.load(query_bias + row + 128 + part)[:, None]
            halves = tl.permute(tl.reshape(scores, (2, 128, BN)), (1, 2, 0))
            scores_upper, scores_lower = tl.split(halves)
            maxima = tl.maximum(scores_upper - upper, scores_lower - lower)
            maxima = tl.max(tl.max(tl.reshape(maxima, (8, 2, 4, 2, BN)), 1), 2)
            # Two lanes hold each maximum: one stores those of even blocks of 8 columns.
            maxima = tl.reshape(maxima, (8, 4, BN // 16, 2, 4, 2))  # w p j i q e
            even, odd = tl.split(tl.permute(maxima, (4, 1, 0, 5, 2, 3)))  # q p w e j
            i = tl.arange(0, 2)[None, :, None, None, None, None]
            maxima = tl.where(i == 0, even[:, None], odd[:, None])
            q = tl.arange(0, 4)[:, None, None, None, None, None]
            p = tl.arange(0, 4)[None, None, :, None, None, None]
            w = tl.arange(0, 8)[None, None, None, :, None, None]
            e = tl.arange(0, 2)[None, None, None, None, :, None]
            j = tl.arange(0, BN // 16)[None, None, None, None, None, :].to(tl.int64)
            inner = (8 * i + 2 * q + e * one).to(tl.int64)
            base = column_fine + (column.to(tl.int64) * COLUMN_STRIDE + block_m * 32)
            place = (inner * COLUMN_STRIDE + (w * 4 + p * one)) + 16 * COLUMN_STRIDE * j
            tl.store(base + place, maxima)
            threshold = tl.load((least + column) + inner + 16 * j)
            base = flags + (block_m.to(tl.int64) * flag_stride + column)
            place = (inner + (w + p) * 0) + 16 * j
            flag = tl.full(maxima.shape, 1, tl.int8)
            tl.store(base + place, flag, mask=(maxima > threshold) & (column >= final_rows))


# ---- lists of the best groups --------------------------------------------------------------------


@triton.jit
def _ordered(value):
    """float32 as int32 of the same order, or back: a warp compares integers in one instruction."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _insert(
    maxima, first_group, values, groups, least, floor, KEEP: tl.constexpr, IN_CELL: tl.constexpr
):
    """Those of a cell's maxima that beat a floor and the least of the list: one by one, in its place."""
    inner = tl.arange(0, IN_CELL)
    place = tl.arange(0, KEEP)
    top = tl.max(maxima, 0)
    while (top > least) & (top > floor):
        at = tl.min(tl.where(maxima == top, inner, IN_CELL), 0)
        worst = tl.min(tl.where(values == least, place, KEEP), 0)
        values = tl.where(place == worst, top, values)
        groups = tl.where(place == worst, first_group + at, groups)
        least = tl.min(values, 0)
        maxima = tl.where(inner == at, _LOWEST, maxima)
        top = tl.max(maxima, 0)
    return values, groups, least


@triton.jit(do_not_specialize=["num_cells", "first_group"])
def merge_rows_kernel(
    coarse,
    fine,
    query_bias,
    list_values,
    list_groups,
    list_least,
    num_cells,
    first_group,
    coarse_stride,
    fine_stride,
    KEEP: tl.constexpr,
    IN_CELL: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Lists of the best groups of rows from first_row on take in what they met; one warp a row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KEEP)
    span = tl.arange(0, SPAN)
    inner = tl.arange(0, IN_CELL)
    values = _ordered(tl.load(list_values + row * KEEP + place))
    groups = tl.load(list_groups + row * KEEP + place)
    own_bias = tl.load(query_bias + row)
    least = tl.min(values, 0)
    for start in range(0, num_cells, SPAN):
        inside = start + span < num_cells
        cells = tl.load(coarse + row * coarse_stride + start + span, inside, other=float("-inf"))
        cells = cells - own_bias
        top = tl.max(cells, 0)
        while _ordered(top) > least:
            at = tl.min(tl.where(cells == top, span, SPAN), 0)
            cell = (start + at) * IN_CELL
            maxima = _ordered(tl.load(fine + row * fine_stride + cell + inner) - own_bias)
            values, groups, least = _insert(
                maxima, first_group + cell, values, groups, least, _LOWEST, KEEP, IN_CELL
            )
            cells = tl.where(span == at, float("-inf"), cells)
            top = tl.max(cells, 0)
    tl.store(list_values + row * KEEP + place, _unordered(values))
    tl.store(list_groups + row * KEEP + place, groups)
    tl.store(list_least + row, _unordered(least))


@triton.jit(do_not_specialize=["first_column", "num_columns", "num_cells", "first_group"])
def merge_columns_kernel(
    flags,
    column_fine,
    list_values,
    list_groups,
    list_least,
    first_column,
    num_columns,
    num_cells,
    first_group,
    flag_stride,
    KEEP: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Lists of columns from first_column on take in flagged cells, whose flags are taken down.

    What does not beat a column's `list_least` is left: the least of its list, or more, where somebody
    knows of more.
    """
    first = first_column + tl.program_id(0) * COLUMNS
    some = first + tl.arange(0, COLUMNS)
    cell = tl.arange(0, CELLS)
    place = tl.arange(0, KEEP)
    inner = tl.arange(0, 32)
    stop = first_column + num_columns
    address = flags + cell.to(tl.int64)[:, None] * flag_stride + some[None, :]
    inside = (cell < num_cells)[:, None] & (some < stop)[None, :]
    flagged = tl.load(address, inside, other=0)
    if tl.max(tl.max(flagged.to(tl.int32), 1), 0) > 0:
        for number in range(COLUMNS):
            todo = tl.load(
                flags + cell.to(tl.int64) * flag_stride + first + number,
                (cell < num_cells) & (first + number < stop),
                other=0,
            )
            todo = tl.where(todo != 0, cell, CELLS)
            at = tl.min(todo, 0)
            if at < CELLS:
                column = (first + number).to(tl.int64)
                values = _ordered(tl.load(list_values + column * KEEP + place))
                groups = tl.load(list_groups + column * KEEP + place)
                least = tl.min(values, 0)
                floor = _ordered(tl.load(list_least + column))
                while at < CELLS:
                    maxima = tl.load(column_fine + column * COLUMN_STRIDE + at * 32 + inner)
                    values, groups, least = _insert(
                        _ordered(maxima),
                        first_group + at * 32,
                        values,
                        groups,
                        least,
                        floor,
                        KEEP,
                        32,
                    )
                    todo = tl.where(cell == at, CELLS, todo)
                    at = tl.min(todo, 0)
                tl.store(list_values + column * KEEP + place, _unordered(values))
                tl.store(list_groups + column * KEEP + place, groups)
                tl.store(list_least + column, _unordered(tl.maximum(least, floor)))
        tl.store(address, tl.zeros((CELLS, COLUMNS), tl.int8), inside)


# ---- exact distances -----------------------------------------------------------------------------


@triton.jit
def _error(norm, reach, DIM: tl.constexpr, L2: tl.constexpr):
    """How much a computed score of rows no longer than `reach` may differ from the true one.

    A product of DIM terms that truncates errs by DIM 2u |q||x|; the rest is for the biases, their
    subtraction, and the rounding of the distance to float32.
    """
    product = (DIM + 32) * _UNIT * norm * reach
    if L2:
        product += 16 * _UNIT * reach * reach
    return product


@triton.jit
def _floor(key, norm, reach, DIM: tl.constexpr, L2: tl.constexpr):
    """The least computed score by which a column may beat or tie with an exact `key`."""
    if L2:
        score = -0.5 * key
        reach = (norm + tl.sqrt(key)) * 1.001  # who is nearer than sqrt(key) is no longer
    else:
        score = -key
    return tl.where(key < float("inf"), score - _error(norm, reach, DIM, L2), float("-inf"))


@triton.jit
def choose_groups_kernel(
    list_values,
    list_groups,
    norms,
    order,
    counts,
    lowest,
    reach,
    K: tl.constexpr,
    LISTED: tl.constexpr,
    KEEP: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DIM: tl.constexpr,
    L2: tl.constexpr,
):
    """The groups of a row's list that may hold one of its K nearest, best first; one warp a row.

    order[row, :counts[row]]; lowest[row] is what no group outside a full list can exceed.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, KEEP)
    values = tl.load(list_values + row * KEEP + place)
    groups = tl.load(list_groups + row * KEEP + place)
    held = (place < LISTED) & (groups >= 0)
    values = tl.where(held, values, float("-inf"))
    rank = tl.zeros((KEEP,), tl.int32)
    for start in range(0, LISTED, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        used = other < LISTED
        used &= tl.load(list_groups + row * KEEP + other, used, other=-1) >= 0
        value = tl.load(list_values + row * KEEP + other, used, other=float("-inf"))
        better = (value[None, :] > values[:, None]) | (
            (value[None, :] == values[:, None]) & (other[None, :] < place[:, None])
        )
        rank += tl.sum((better & used[None, :]).to(tl.int32), 1)
    kth = tl.max(tl.where(held & (rank == K - 1), values, float("-inf")), 0)
    norm = tl.load(norms + row)
    if L2:
        reach = (norm + tl.sqrt(tl.maximum(-2 * kth, 0.0))) * 1.125  # more than an error can add
    floor = kth - 2 * _error(norm, reach, DIM, L2)
    floor = tl.where(kth > float("-inf"), floor, float("-inf"))
    chosen = held & (values >= floor)
    tl.store(order + row * KEEP + rank, groups, mask=chosen)
    tl.store(counts + row, tl.sum(chosen.to(tl.int32), 0))
    full = tl.sum(held.to(tl.int32), 0) == LISTED
    least = tl.min(tl.where(held, values, float("inf")), 0)
    tl.store(lowest + row, tl.where(full, least, float("-inf")))


@triton.jit
def _group_columns(group, member):
    """The column, or the row, that is a member (0 to 7) of a group."""
    number = group & (_ROW_GROUP - 1)
    columns = number // 16 * 128 + number % 4 * 32 + number // 4 % 4 * 2
    columns += member // 2 * 8 + member % 2
    rows = number // 32 * 256 + number // 4 % 8 * 16 + number % 4 * 2
    rows += member // 4 * 128 + member // 2 % 2 * 8 + member % 2
    return tl.where(group >= _ROW_GROUP, rows, columns)


@triton.jit
def _exact_keys(
    query,
    rows,
    bias,
    column,
    used,
    lo,
    hi,
    num_rows,
    DIM: tl.constexpr,
    BK: tl.constexpr,
    EACH: tl.constexpr,
    L2: tl.constexpr,
):
    """Keys of a query and (4, EACH) columns, summed in the order of `exact.fixed_sum`; +inf if none.

    One of 4 warps sums each row of them, and nothing passes from warp to warp.
    """
    real = used & (column < num_rows) & ~((column >= lo) & (column < hi))
    real &= tl.load(bias + column, real, other=float("inf")) < float("inf")
    k_range = tl.arange(0, BK)
    same = tl.arange(0, 4)[:, None] * 0
    offset = column.to(tl.int64)[:, :, None] * DIM + k_range[None, None, :]
    total = tl.zeros((4, EACH, BK), tl.float64)
    for k in range(0, DIM, BK):
        inside = k + k_range < DIM
        q = tl.load(query + (same + k + k_range[None, :]), inside[None, :], other=0.0)
        q = q.to(tl.float32).to(tl.float64)[:, None, :]
        x = tl.load(rows + offset + k, real[:, :, None] & inside[None, None, :], other=0.0)
        x = x.to(tl.float32).to(tl.float64)
        if L2:
            x = x - q
            total = total + x * x
        else:
            total = total - x * q
    # Sums of two are what they are in any order; a sum of more would be the compiler's choice.
    for level in tl.static_range(8):
        if BK >> level > 1:
            total = tl.sum(tl.reshape(total, (4, EACH, BK >> (level + 1), 2)), 3)
    return tl.where(real, tl.reshape(total, (4, EACH)).to(tl.float32), float("inf"))


@triton.jit(do_not_specialize=["num_rows"])
def exact_keys_kernel(
    queries,
    rows,
    bias,
    low,
    high,
    order,
    counts,
    keys,
    columns,
    num_rows,
    DIM: tl.constexpr,
    BK: tl.constexpr,
    KEEP: tl.constexpr,
    EACH: tl.constexpr,
    L2: tl.constexpr,
):
    """Exact keys of every column of a row's chosen groups: (lines, KEEP * 8), +inf for none."""
    row = tl.program_id(0).to(tl.int64)
    lo = tl.load(low + row)
    hi = tl.load(high + row)
    count = tl.load(counts + row) * 8
    inner = tl.arange(0, 4)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    for start in range(0, count, 4 * EACH):
        slot = start + inner
        used = slot < count
        group = tl.load(order + row * KEEP + slot // 8, used, other=0)
        column = _group_columns(group, slot % 8)
        key = _exact_keys(
            queries + row * DIM, rows, bias, column, used, lo, hi, num_rows, DIM, BK, EACH, L2
        )
        tl.store(keys + row * (KEEP * 8) + slot, key, used)
        tl.store(columns + row * (KEEP * 8) + slot, column, used)


@triton.jit(do_not_specialize=["first_id"])
def select_kernel(
    keys,
    columns,
    counts,
    lowest,
    norms,
    best_keys,
    best_ids,
    floors,
    crowded,
    first_id,
    reach,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DIM: tl.constexpr,
    L2: tl.constexpr,
):
    """The K first by (key, id) of a row's candidates and of what it has, in order.

    A row is crowded where a group that its list had no room for may hold one of them.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CANDIDATES)
    place = tl.arange(0, PLACES)
    used = slot < tl.load(counts + row) * 8
    key = tl.load(keys + row * CANDIDATES + slot, used, other=float("inf"))
    ident = tl.load(columns + row * CANDIDATES + slot, used, other=0) + first_id
    had = place < K
    old_key = tl.load(best_keys + row * K + place, had, other=float("inf"))
    old_id = tl.load(best_ids + row * K + place, had, other=-1)
    new_key = tl.full((PLACES,), float("inf"), tl.float32)
    new_id = tl.full((PLACES,), -1, tl.int32)
    kth = float("-inf")
    for number in range(K):
        kth = tl.minimum(tl.min(key, 0), tl.min(old_key, 0))
        if kth < float("inf"):
            first = tl.minimum(
                tl.min(tl.where(key == kth, ident, _NO_ID), 0),
                tl.min(tl.where(old_key == kth, old_id, _NO_ID), 0),
            )
            new_key = tl.where(place == number, kth, new_key)
            new_id = tl.where(place == number, first, new_id)
            key = tl.where((key == kth) & (ident == first), float("inf"), key)
            old_key = tl.where((old_key == kth) & (old_id == first), float("inf"), old_key)
    tl.store(best_keys + row * K + place, new_key, had)
    tl.store(best_ids + row * K + place, new_id, had)
    floor = _floor(kth, tl.load(norms + row), reach, DIM, L2)
    tl.store(floors + row, floor)
    bound = tl.load(lowest + row)
    tl.store(crowded + row, ((bound > float("-inf")) & (bound >= floor)).to(tl.int8))


@triton.jit(do_not_specialize=["first_id", "num_rows", "num_cells"])
def open_crowded_kernel(
    crowded,
    coarse,
    fine,
    query_bias,
    queries,
    rows,
    bias,
    low,
    high,
    norms,
    best_keys,
    best_ids,
    floors,
    first_id,
    num_rows,
    num_cells,
    reach,
    coarse_stride,
    fine_stride,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    IN_CELL: tl.constexpr,
    SPAN: tl.constexpr,
    DIM: tl.constexpr,
    BK: tl.constexpr,
    L2: tl.constexpr,
):
    """Crowded rows look at every group that may hold one of their K nearest, however many."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(crowded + row) != 0:
        place = tl.arange(0, PLACES)
        span = tl.arange(0, SPAN)
        inner = tl.arange(0, IN_CELL)
        member = tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :]
        lo = tl.load(low + row)
        hi = tl.load(high + row)
        own_bias = tl.load(query_bias + row)
        norm = tl.load(norms + row)
        had = place < K
        # Places that are not part of the list hold less than any key, so nothing replaces them.
        old_key = tl.load(best_keys + row * K + place, had, other=float("-inf"))
        old_id = tl.load(best_ids + row * K + place, had, other=-1)
        old_id = tl.where(had & (old_id < 0), _NO_ID - place, old_id)  # empty places differ
        worst_key = tl.max(old_key, 0)
        worst_id = tl.max(tl.where(old_key == worst_key, old_id, -1), 0)
        floor = _floor(worst_key, norm, reach, DIM, L2)
        for start in range(0, num_cells, SPAN):
            inside = start + span < num_cells
            cells = tl.load(
                coarse + row * coarse_stride + start + span, inside, other=float("-inf")
            )
            cells = cells - own_bias
            top = tl.max(cells, 0)
            while (top >= floor) & (top > float("-inf")):
                at = tl.min(tl.where(cells == top, span, SPAN), 0)
                cell = (start + at) * IN_CELL
                maxima = tl.load(fine + row * fine_stride + cell + inner) - own_bias
                best = tl.max(maxima, 0)
                while (best >= floor) & (best > float("-inf")):
                    group = tl.min(tl.where(maxima == best, inner, IN_CELL), 0)
                    column = _group_columns(cell + group + member * 0, member)
                    key = _exact_keys(
                        queries + row * DIM,
                        rows,
                        bias,
                        column,
                        member >= 0,
                        lo,
                        hi,
                        num_rows,
                        DIM,
                        BK,
                        2,
                        L2,
                    )
                    key = tl.reshape(key, (8,))
                    ident = tl.reshape(column, (8,)) + first_id
                    better = (key < worst_key) | ((key == worst_key) & (ident < worst_id))
                    better &= key < float("inf")
                    while tl.max(better.to(tl.int32), 0) > 0:
                        new_id = tl.min(tl.where(better, ident, _NO_ID), 0)
                        new_key = tl.max(tl.where(ident == new_id, key, float("-inf")), 0)
                        known = tl.max((had & (old_id == new_id)).to(tl.int32), 0)
                        worst = had & (old_key == worst_key) & (old_id == worst_id)
                        worst &= known == 0
                        old_key = tl.where(worst, new_key, old_key)
                        old_id = tl.where(worst, new_id, old_id)
                        worst_key = tl.max(old_key, 0)
                        worst_id = tl.max(tl.where(old_key == worst_key, old_id, -1), 0)
                        better &= ident != new_id
                        better &= (key < worst_key) | ((key == worst_key) & (ident < worst_id))
                    floor = _floor(worst_key, norm, reach, DIM, L2)
                    maxima = tl.where(inner == group, float("-inf"), maxima)
                    best = tl.max(maxima, 0)
                cells = tl.where(span == at, float("-inf"), cells)
                top = tl.max(cells, 0)
        new_keys = tl.full((PLACES,), float("inf"), tl.float32)
        new_ids = tl.full((PLACES,), -1, tl.int32)
        old_key = tl.where(had, old_key, float("inf"))
        for number in range(K):
            key = tl.min(old_key, 0)
            if key < float("inf"):
                first = tl.min(tl.where(old_key == key, old_id, _NO_ID), 0)
                new_keys = tl.where(place == number, key, new_keys)
                new_ids = tl.where(place == number, first, new_ids)
                old_key = tl.where((old_key == key) & (old_id == first), float("inf"), old_key)
        tl.store(best_keys + row * K + place, new_keys, had)
        tl.store(best_ids + row * K + place, new_ids, had)
        tl.store(floors + row, floor)
