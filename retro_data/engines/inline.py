"""Blocks made one after the other in this very process: for tests, and for work of no weight."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from retro_data.stage import Block, Receipt, Stage, make_block


class InlineEngine:
    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]:
        with stage.open(self.device) as context:
            for block in missing:
                yield make_block(stage, context, block, folder, self.device)
