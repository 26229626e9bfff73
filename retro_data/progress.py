"""Progress of long work: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)
LINE_SECONDS = 15.0


class Progress:
    """Counts rows of one stage, with rate and remaining time.

    Args:
        name: of the stage.
        total: rows to reach.
        unit: of a row, e.g. "chunks".
        done: rows that earlier runs made; they count as reached but not in the rate.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.first = done
        self.began = self.told = time.monotonic()
        self.bar: tqdm[None] | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.name,
                unit=f" {self.unit}",
                unit_scale=True,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()

    def advance(self, rows: int) -> None:
        self.done += rows
        if self.bar is not None:
            self.bar.update(rows)
        elif time.monotonic() - self.told > LINE_SECONDS:
            self.told = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self.began, 1e-9)
        rate = (self.done - self.first) / seconds
        left = (self.total - self.done) / rate if rate else float("inf")
        log.info(
            "%s: %d of %d %s, %.0f %s/s, %.0f s to go",
            *(self.name, self.done, self.total, self.unit, rate, self.unit, left),
        )
