"""A stage that says which devices its worker saw; in a module of its own, for workers to import."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from retro_data.stage import Block, BlockWriter, Receipt, Resources, tile


class DeviceStage:
    name = "devices"
    version = 1
    resources = Resources(gpu=True)
    unit = "rows"
    tolerance = 0.0

    def key_fields(self) -> dict[str, Any]:
        return {}

    def parents(self) -> dict[str, str]:
        return {}

    def blocks(self) -> list[Block]:
        return tile(8, 1)

    def open(self, device: str) -> AbstractContextManager[str]:
        return contextlib.nullcontext(device)

    def make(self, context: str, block: Block, out: BlockWriter) -> None:
        import torch

        time.sleep(0.5)  # so that every worker gets some
        out.note("visible", os.environ["CUDA_VISIBLE_DEVICES"])
        out.note("count", torch.cuda.device_count())
        out.note("sum", float(torch.ones(10, device=context).sum()))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        return {"notes": [receipt.notes for receipt in receipts]}
