"""Blocks still to be given out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from retro_data.stage import Block


class PendingBlocks:
    """Blocks still to be given out, in order: one run for all workers, or one for each."""

    def __init__(self, blocks: Sequence[Block], runs: int) -> None:
        edges = [len(blocks) * i // runs for i in range(runs + 1)]
        self.runs = [list(blocks[low:high]) for low, high in pairwise(edges)]

    def next_of(self, worker: int) -> Block | None:
        """The first block left of the worker's run; when that is done, the last of the longest."""
        own = self.runs[worker % len(self.runs)]
        if own:
            return own.pop(0)
        longest = max(self.runs, key=len)
        return longest.pop() if longest else None

    def give_back(self, worker: int, block: Block) -> None:
        """A block that its worker did not make: the next one of the worker's run."""
        self.runs[worker % len(self.runs)].insert(0, block)

    def __bool__(self) -> bool:
        return any(self.runs)
