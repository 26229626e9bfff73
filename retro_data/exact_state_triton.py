"""What exact search on a GPU keeps there: rows, the lists of their best groups, results, and buffers.

`exact_triton` says what they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from retro_data.errors import RetroDataError
from retro_data.exact_kernels_triton import GROUP
from retro_data.vectors import Metric, Neighbors

SPARE = 8  # groups of a list beyond k, for what rounding may reorder
LOAD_ROWS = 2**16  # rows read from disk and sent to the device at once
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


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# ---- rows on the device --------------------------------------------------------------------------


class Rows:
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

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of these, as views."""
        part = object.__new__(Rows)
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


class OwnColumns(NamedTuple):
    """Columns [low, high) of each row's own document, and of each block of rows together."""

    low: Tensor  # (height,) int32; NOWHERE where there is none
    high: Tensor  # (height,) int32; 0 where there is none

    @classmethod
    def of(cls, ranges: Tensor, first: int, width: int, height: int) -> OwnColumns:
        """Ranges (n, 2) of rows of the whole, as columns of a tile that starts at `first`."""
        low, high = (torch.full((height,), f, device=ranges.device) for f in (NOWHERE, 0))
        inside = (ranges - first).clamp_(0, width)
        real = inside[:, 0] < inside[:, 1]
        low[: len(ranges)] = torch.where(real, inside[:, 0], NOWHERE)
        high[: len(ranges)] = torch.where(real, inside[:, 1], 0)
        return cls(low.int(), high.int())

    def blocks(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.low.view(-1, rows).amin(1), self.high.view(-1, rows).amax(1)


class GroupLists:
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

    def part(self, start: int, stop: int) -> GroupLists:
        """Lists of rows [start, stop), as views."""
        part = object.__new__(GroupLists)
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


class Best:
    """The k nearest so far of each row: exact keys and ids, in order."""

    def __init__(self, height: int, k: int, device: torch.device) -> None:
        self.k = k
        self.keys = torch.full((height, k), torch.inf, device=device)
        self.ids = torch.full((height, k), -1, dtype=torch.int32, device=device)
        self.floors = torch.full((height,), -torch.inf, device=device)
        self.crowded = torch.zeros(height, dtype=torch.int8, device=device)

    def part(self, start: int, stop: int) -> Best:
        """Rows [start, stop) of these, as views."""
        part = object.__new__(Best)
        part.k = self.k
        part.keys, part.ids, part.floors, part.crowded = (
            whole[start:stop] for whole in (self.keys, self.ids, self.floors, self.crowded)
        )
        return part


class Buffers:
    """What the kernels write for one panel of rows against at most `width` columns."""

    def __init__(self, panel: int, width: int, device: torch.device, by_columns: bool) -> None:
        self.panel, self.device = panel, device
        self.fine = torch.empty(panel, width // GROUP, device=device)
        self.coarse = torch.empty(panel, round_up(width // 128, 16), device=device)
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


class Streams:
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


class OnItsWay(NamedTuple):
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
