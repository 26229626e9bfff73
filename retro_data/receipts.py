"""What an unfinished artifact knows of itself: the plan of its blocks, and a receipt for each done.

The plan is written before the first block and keeps the tiling: a resume reads it and ignores the
settings. A receipt is one line of a journal, synced before the next; only receipts prove that a
block is done, never a file's name or size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from retro_data import artifact
from retro_data.errors import RetroDataError

CHECK_LETTERS = 16  # of the digest that stands before each receipt: 64 bits


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a stage's work; `extra` is JSON that only the stage reads."""

    index: int
    start: int
    stop: int
    extra: Any = None


@dataclass(frozen=True)
class Receipt:
    """Proof that a block is done: file name -> what it holds (rows, bytes, digest)."""

    block: int
    rows: int
    files: dict[str, dict[str, Any]]
    counts: dict[str, int]  # add up over blocks
    notes: dict[str, Any]  # say something of this block alone
    seconds: float
    device: str


# ---- the plan ------------------------------------------------------------------------------------


def write_plan(folder: Path, key: str, blocks: Sequence[Block]) -> None:
    plan = {"key": key, "blocks": [asdict(block) for block in blocks]}
    artifact.write_record(folder / artifact.PLAN, plan)


def read_plan(folder: Path, key: str | None = None) -> list[Block] | None:
    """The tiling of an artifact; None before it is made.

    Raises:
        RetroDataError: the plan is damaged, or of another artifact than `key`.
    """
    path = folder / artifact.PLAN
    try:
        plan = artifact.read_record(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if key is not None and plan["key"] != key:
        raise RetroDataError(
            f"{path} belongs to key {plan['key'][:16]}, this stage has {key[:16]}: "
            f"remove {folder} and run `retro-data prepare` again."
        )
    return [Block(**block) for block in plan["blocks"]]


# ---- the journal ---------------------------------------------------------------------------------


def read_receipts(folder: Path) -> list[Receipt]:
    """Receipts kept so far, the last one of each block; a torn or damaged line proves nothing."""
    try:
        lines = (folder / artifact.RECEIPTS).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    receipts = {}
    for line in lines[:-1]:
        check, _, content = line.partition(b"\t")
        if check == _check(content):
            receipt = Receipt(**json.loads(content))
            receipts[receipt.block] = receipt
    return list(receipts.values())


def append_receipt(journal: BinaryIO, receipt: Receipt) -> None:
    """Add one receipt to an open journal; it is on disk when this returns."""
    journal.write(_line(receipt))
    journal.flush()
    os.fsync(journal.fileno())


@contextlib.contextmanager
def open_journal(folder: Path) -> Iterator[BinaryIO]:
    """The journal, written anew and opened for appending.

    A run that was stopped for so long that another took over may have the old file open, and would
    append to it once it goes on, before it looks at its lease again.
    """
    replace_receipts(folder, read_receipts(folder))
    with open(folder / artifact.RECEIPTS, "ab") as handle:
        yield handle


def replace_receipts(folder: Path, receipts: Iterable[Receipt]) -> None:
    """Make these receipts the whole journal."""
    with artifact.new_file(folder / artifact.RECEIPTS, replace=True) as handle:
        handle.writelines(map(_line, receipts))


def _line(receipt: Receipt) -> bytes:
    content = json.dumps(asdict(receipt)).encode()
    return _check(content) + b"\t" + content + b"\n"


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:CHECK_LETTERS].encode()
