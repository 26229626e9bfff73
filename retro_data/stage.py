"""The contract between stages and engines, and the one way a stage is brought to its end.

A stage is a pure function of (finished parents, block). An engine decides where blocks are made.
`complete` keeps what makes it safe to kill anything at any time: the plan is written before the
first block, a receipt after each block, the manifest last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from retro_data import artifact, integrity, store
from retro_data.artifact import Lease, artifact_key
from retro_data.errors import RetroDataError
from retro_data.progress import Progress
from retro_data.receipts import (
    Block,
    Receipt,
    append_receipt,
    open_journal,
    read_plan,
    read_receipts,
    write_plan,
)

log = logging.getLogger(__name__)

Context = Any  # what a stage keeps open in a worker: models, memory maps, readers


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage wants.

    Attributes:
        gpu: one device a worker where the machine has any; a CPU worker otherwise.
        threads: threads a CPU worker can use well; 0 means all that the machine has.
        light: too little work to start a process for.
        blocks_at_once: blocks that a GPU worker makes at the same time, each in a thread of its own
            (`make` must allow that), so that the device works on one while another is read or written.
        in_runs: a worker gains by blocks that follow each other: each worker gets a run of them.
        together: one worker takes all devices of a machine, and is told "cuda".
        memory: bytes, about, that a worker holds: a cluster gives it that much room.
    """

    gpu: bool = False
    threads: int = 1
    light: bool = False
    blocks_at_once: int = 1
    in_runs: bool = False
    together: bool = False
    memory: int = 2**30

    def threads_of_worker(self, device: str) -> int:
        """Threads of a worker on this device that make blocks: it is given as many at once."""
        return self.blocks_at_once if device.startswith("cuda") else 1


@dataclass
class BlockWriter:
    """Writes the files of one block; what was written becomes the block's receipt."""

    folder: Path
    rows: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Save an array under `name` (relative to the artifact)."""
        path = self._path(name)
        artifact.save_array(path, array)
        header = len(artifact.npy_header(array.dtype, array.shape))
        self.files[name] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "sha256": artifact.file_digest(path, header),  # of what lies there: the first one stays
        }

    def bytes(self, name: str, content: bytes) -> None:
        with self.file(name) as handle:
            handle.write(content)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """Write a file of any kind under `name` (relative to the artifact)."""
        path = self._path(name)
        with artifact.new_file(path) as handle:
            yield handle
        entry = {"bytes": path.stat().st_size, "sha256": artifact.file_digest(path)}
        self.files[name] = entry

    def count(self, name: str, value: int) -> None:
        """Add to a count; counts of all blocks are added up."""
        self.counts[name] = self.counts.get(name, 0) + int(value)

    def note(self, name: str, value: Any) -> None:
        """Keep something of this block that is no count: JSON."""
        self.notes[name] = value

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)  # not its parents: an artifact that was removed stays so
        return path


class Stage(Protocol):
    """A stage of the pipeline. Picklable: it holds settings and its parents' folders, no arrays."""

    name: str
    version: int
    resources: Resources
    unit: str  # of its rows, for the progress bar
    # Of a vector's length, by which it may differ when made again; 0: to the byte; inf: as it likes.
    tolerance: float

    def key_fields(self) -> dict[str, Any]: ...
    def parents(self) -> dict[str, str]: ...
    def blocks(self) -> Sequence[Block]: ...
    def open(self, device: str) -> AbstractContextManager[Context]: ...
    def make(self, context: Context, block: Block, out: BlockWriter) -> None: ...
    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]: ...


class Engine(Protocol):
    """Where blocks are made. Yields a receipt for each, in any order; raises the first failure."""

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]: ...


def stage_key(stage: Stage) -> str:
    return artifact_key(stage.name, stage.version, stage.key_fields(), stage.parents())


def make_block(stage: Stage, context: Context, block: Block, folder: Path, device: str) -> Receipt:
    """Make one block in this process and return its receipt (used by every engine)."""
    began = time.monotonic()
    out = BlockWriter(folder)
    stage.make(context, block, out)
    seconds = round(time.monotonic() - began, 3)
    return Receipt(block.index, out.rows, out.files, out.counts, out.notes, seconds, device)


def tile(rows: int, block_rows: int) -> list[Block]:
    """Blocks of at most `block_rows` rows that cover [0, rows)."""
    starts = range(0, rows, block_rows)
    return [Block(i, start, min(start + block_rows, rows)) for i, start in enumerate(starts)]


# ---- bringing a stage to its end -----------------------------------------------------------------


def complete(stage: Stage, folder: Path, engine: Engine, *, verify: bool = False) -> dict[str, Any]:
    """Bring an artifact to its end, from whatever state it is in, and return its manifest.

    A finished artifact with files missing or of the wrong size is damaged: its whole blocks are
    kept, the others are made again.

    Args:
        stage: what to make; its parents must be finished.
        folder: of the artifact; made when missing.
        engine: where the missing blocks are made.
        verify: hold every byte of a finished artifact against its digest.

    Raises:
        RetroDataError: what a block raised, a lease that was lost meanwhile, or damage that cannot
            be mended because the folder is read-only.
    """
    if not store.is_finished(folder) or _damage(stage, folder, verify):
        _finish(stage, folder, engine, verify)
    manifest = artifact.read_manifest(folder)
    assert manifest is not None
    if not artifact.is_leased(folder):  # else somebody mends it just now
        with contextlib.suppress(OSError):  # a read-only root keeps them: they harm nobody
            _remove_leftovers(folder, manifest)
    return manifest


def _damage(stage: Stage, folder: Path, verify: bool) -> list[str]:
    wrong = integrity.damage(folder, read=verify, key=stage_key(stage))
    if wrong and not os.access(folder, os.W_OK):
        raise RetroDataError(
            f"{folder} is damaged and cannot be written to: {'; '.join(wrong)}. Run `retro-data "
            "prepare --verify` as a user who may write there."
        )
    for line in wrong:
        log.warning("%s", line)
    return wrong


def _finish(stage: Stage, folder: Path, engine: Engine, verify: bool) -> None:
    """Take the lease and end what is not ended; another process may end it while we wait."""
    folder.mkdir(parents=True, exist_ok=True)
    was_finished = store.is_finished(folder)
    with Lease(folder, give_up=lambda: not was_finished and store.is_finished(folder)) as lease:
        if not lease.held:
            return
        damaged: list[Receipt] = []
        if store.is_finished(folder):  # just before, or it is damaged: another may have mended it
            if not _damage(stage, folder, verify):
                return
            damaged = integrity.reopen(folder, stage_key(stage), lease)
        elif integrity.plan_is_damaged(folder):
            integrity.reopen(folder, stage_key(stage), lease)
        try:
            _complete_under_lease(stage, folder, engine, lease)
        except Exception:
            lease.check()  # whoever took over also removed files under our hands
            raise
        integrity.tell_changes(folder, damaged)


def _complete_under_lease(stage: Stage, folder: Path, engine: Engine, lease: Lease) -> None:
    began = time.time()
    blocks = _planned_blocks(stage, folder)
    receipts = {receipt.block: receipt for receipt in read_receipts(folder)}
    _remove_unproven(folder, receipts.values(), lease)
    receipts = {b: r for b, r in receipts.items() if all((folder / f).exists() for f in r.files)}
    missing = [block for block in blocks if block.index not in receipts]
    if receipts:
        log.info("%s: going on, %d of %d blocks done", folder, len(receipts), len(blocks))
    _make_missing(stage, folder, engine, missing, receipts, blocks, lease)
    ordered = [receipts[block.index] for block in blocks]
    result = stage.finish(folder, ordered)
    manifest = {
        "stage": stage.name,
        "version": stage.version,
        "key": stage_key(stage),
        "fields": stage.key_fields(),
        "parents": stage.parents(),
        "blocks": len(blocks),
        "seconds": round(sum(r.seconds for r in ordered), 3),
        "wall_seconds_of_last_run": round(time.time() - began, 3),
        "devices": sorted({r.device for r in ordered}),
        "libraries": artifact.library_versions(),
        **result,
    }
    lease.check()
    artifact.write_record(folder / artifact.MANIFEST, manifest)


def _remove_leftovers(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove what a finished artifact needs no more, or a kill just after its manifest left.

    Parts that were not laid into an array as they are stay: a repair cannot cut them out again.
    """
    laid = manifest.get("arrays", {})
    for path in (folder / artifact.PARTS).glob("*"):
        if store.kind_of_part(path.name) in laid:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or some stay
        (folder / artifact.PARTS).rmdir()
    for pattern in (f"{artifact.TEMPORARY}*", f"{artifact.LEASE}*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _remove_unproven(folder: Path, receipts: Iterable[Receipt], lease: Lease) -> None:
    """Remove what a run that was killed left without a receipt: it proves nothing.

    A process that was frozen here and wakes must not remove what another has finished meanwhile.
    """
    proven = {name for receipt in receipts for name in receipt.files}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        kept = name in proven or name in (artifact.PLAN, artifact.RECEIPTS)
        if not kept and not name.startswith(artifact.LEASE) and not path.is_dir():
            lease.remove(path)


def _planned_blocks(stage: Stage, folder: Path) -> list[Block]:
    """The tiling of the plan where there is one: a resume keeps it, whatever the settings say now."""
    key = stage_key(stage)
    if read_plan(folder, key) is None:
        write_plan(folder, key, stage.blocks())
    blocks = read_plan(folder, key)
    assert blocks is not None
    return blocks


def _make_missing(
    stage: Stage,
    folder: Path,
    engine: Engine,
    missing: Sequence[Block],
    receipts: dict[int, Receipt],
    blocks: Sequence[Block],
    lease: Lease,
) -> None:
    if not missing:
        return
    total = sum(block.stop - block.start for block in blocks)
    extents = {block.index: block.stop - block.start for block in blocks}
    done = total - sum(extents[block.index] for block in missing)
    lease.check()  # opening the journal writes it anew
    with (
        open_journal(folder) as journal,
        Progress(stage.name, total, stage.unit, done) as progress,
        contextlib.closing(engine.run(stage, folder, missing)) as made,
    ):
        for receipt in made:
            lease.check()
            append_receipt(journal, receipt)
            receipts[receipt.block] = receipt
            progress.advance(extents[receipt.block])
    lost = [block.index for block in missing if block.index not in receipts]
    if lost:
        raise RetroDataError(f"{stage.name}: the engine ended without making blocks {lost[:10]}")


# ---- what most stages' `finish` says -------------------------------------------------------------


def array_entry(
    dtype: str, shape: Sequence[int], extents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Manifest entry of one array: extents are its consecutive row ranges with their digests."""
    return {"dtype": dtype, "shape": list(shape), "extents": [dict(e) for e in extents]}


def block_files(receipts: Sequence[Receipt]) -> dict[str, dict[str, Any]]:
    """Manifest entries of files that stay as their blocks wrote them."""
    return {name: entry for receipt in receipts for name, entry in receipt.files.items()}


def total_counts(receipts: Sequence[Receipt]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for receipt in receipts:
        for name, value in receipt.counts.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def lay_parts(folder: Path, receipts: Sequence[Receipt], name: str) -> dict[str, Any]:
    """Lay the blocks' parts of the array `name` into that array, in block order.

    Returns:
        The manifest entry of the array, with one extent a block.
    """
    parts = [store.part_name(receipt.block, name) for receipt in receipts]
    entries = [receipt.files[part] for receipt, part in zip(receipts, parts, strict=True)]
    dtype = np.dtype(entries[0]["dtype"])
    row_shape = tuple(entries[0]["shape"][1:])
    rows = [entry["shape"][0] for entry in entries]
    artifact.lay_arrays(folder / name, [folder / part for part in parts], dtype, row_shape, rows)
    extents = [{"rows": r, "sha256": e["sha256"]} for r, e in zip(rows, entries, strict=True)]
    return array_entry(dtype.str, (sum(rows), *row_shape), extents)
