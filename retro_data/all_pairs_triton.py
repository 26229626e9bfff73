"""The nearest rows of each row of a database that GPUs hold, at half the products.

A panel of rows meets only the columns from its own first row on: what it is to them is found in the
same accumulator, as maxima of groups of 8 rows. Rows later than the panel keep a list that earlier
panels fill. The rest is as in `exact_triton`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retro_data.exact_state_triton import (
    Best,
    Buffers,
    GroupLists,
    OnItsWay,
    OwnColumns,
    Streams,
    round_up,
)
from retro_data.exact_triton import ALIGN, GpuSearch, search_together
from retro_data.vectors import Neighbors

PANEL_STEP = 4096  # of larger panels: kernels are compiled for each height, and memory decides


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

    def __init__(
        self, search: GpuSearch, k: int, own: OwnColumns, panel: int, remembered: int
    ) -> None:
        assert search.resident is not None
        self.search, self.tile = search, search.resident
        self.rows = self.tile.columns
        height = self.rows.height
        with search.current():
            self.own = OwnColumns(*(part.to(search.device) for part in own))
            self.lists = GroupLists(height, k, search.device)
            self.lists.clear()
            self.work = Buffers(panel, height, search.device, by_columns=True)
            self.streams = Streams(search.device)
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
    results: OnItsWay | None = None

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
        self.stop = round_up(last, ALIGN)
        self.met: list[tuple[int, int]] = []  # ranges of rows that panels have been, in order
        height = round_up(search.num_rows, ALIGN)
        fitting = min(s.free_for_maxima() for s in searches) // max(1, height)
        fitting = fitting // PANEL_STEP * PANEL_STEP or fitting // ALIGN * ALIGN
        panel = min(search.panel_rows, fitting, self.stop - self.position)
        self.panel = max(panel, ALIGN)
        with search.current():
            ranges = search.own_ranges(excluded if search.ids is None else excluded[search.ids])
            own = OwnColumns.of(ranges, 0, height, height)
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
        own = OwnColumns(side.own.low[first:last], side.own.high[first:last])
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
            best = Best(last - first, self.k, search.device)
            own = OwnColumns(side.own.low[first:last], side.own.high[first:last])
            rows = side.rows.part(first, last)
            search.rank(rows, own, side.tile, lists, best, side.work)
            panel.results = search.on_its_way(best, rows.count)

    def _left_out(self, row: int) -> list[tuple[int, int]]:
        """Ranges of columns before a row that were no panel."""
        edges = [0, *(edge for panel in self.met for edge in panel), row]
        ranges = zip(edges[::2], edges[1::2], strict=True)
        return [(low, high) for low, high in ranges if low < high]
