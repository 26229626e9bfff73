"""A stage of pure arithmetic that child processes can import: row i of its array holds i squared."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    complete,
    lay_parts,
    tile,
    total_counts,
)
from retro_data.store import part_name

SQUARES = "squares.npy"


class Threads(Resources):
    """A worker makes as many blocks at once as one on a GPU would."""

    def threads_of_worker(self, device: str) -> int:
        return self.blocks_at_once


class ArithmeticStage:
    """Squares of [0, rows).

    Args:
        diary: a file to which every block made adds a line: its number and the process.
        block_rows: the tiling, which no byte depends on.
        seconds: that a block takes.
        fate: block number to "raise" (an error), "kill" (SIGKILL), "exit" (of the process), or
            "meet": wait until `meeting` processes have begun one, "pair": until another block has
            begun, "sleep": for a minute.
    """

    name = "arithmetic"
    version = 1
    unit = "rows"
    tolerance = 0.0

    def __init__(
        self,
        rows: int,
        diary: Path,
        *,
        block_rows: int = 10,
        seconds: float = 0.0,
        fate: Mapping[int, str] | None = None,
        meeting: int = 2,
        resources: Resources | None = None,
    ) -> None:
        self.rows = rows
        self.diary = diary
        self.block_rows = block_rows
        self.seconds = seconds
        self.fate = dict(fate or {})
        self.meeting = meeting
        self.resources = resources or Resources(threads=1)

    def key_fields(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def parents(self) -> dict[str, str]:
        return {}

    def blocks(self) -> list[Block]:
        return tile(self.rows, self.block_rows)

    def open(self, device: str) -> AbstractContextManager[str]:
        return contextlib.nullcontext(device)

    def make(self, context: str, block: Block, out: BlockWriter) -> None:
        environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
        entry = {"block": block.index, "pid": os.getpid(), "environment": environment}
        with open(self.diary, "ab", buffering=0) as diary:  # in one piece, whoever else writes
            diary.write((json.dumps({**entry, "device": context}) + "\n").encode())
        time.sleep(self.seconds)
        match self.fate.get(block.index):
            case "raise":
                raise ArithmeticError(f"no square for block {block.index}")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case "meet":
                self._wait(lambda: len({e["pid"] for e in entries(self.diary)}) >= self.meeting)
            case "sleep":
                time.sleep(60)
            case "pair":
                self._wait(lambda: len(entries(self.diary)) > 1)
        out.array(part_name(block.index, SQUARES), np.arange(block.start, block.stop) ** 2)
        out.rows = block.stop - block.start
        out.count("squares", out.rows)

    def _wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError("too few other blocks were begun")
            time.sleep(0.01)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        return {
            "arrays": {SQUARES: lay_parts(folder, receipts, SQUARES)},
            "rows": sum(r.rows for r in receipts),
            "figures": total_counts(receipts),
        }


class Unclosable(ArithmeticStage):
    """Its context fails when it is left."""

    @contextlib.contextmanager
    def open(self, device: str) -> Iterator[str]:
        yield device
        raise OSError("it would not close")


def entries(diary: Path) -> list[dict[str, Any]]:
    if not diary.exists():
        return []
    whole = diary.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def blocks_made(diary: Path) -> list[int]:
    return [entry["block"] for entry in entries(diary)]


MAIN = (
    "from arithmetic_stage import main; main()"  # by `python -c`, so that children find the class
)


def main() -> None:
    """Complete a stage by command line: folder, diary, workers (0: no children), JSON options."""
    folder, diary, workers, options = sys.argv[1:5]
    stage = ArithmeticStage(diary=Path(diary), **json.loads(options))
    engine = LocalEngine(EngineSettings(workers=int(workers))) if int(workers) else InlineEngine()
    complete(stage, Path(folder), engine)
