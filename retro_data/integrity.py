"""Finished artifacts read back: what is damaged, and how to make only that again.

An artifact's arrays are either files that one block wrote, or are laid together from the blocks'
parts. Either way a receipt holds the digest of what each block wrote, so damage is found by block,
and `reopen` turns a damaged artifact back into an unfinished one that lacks just these blocks.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_data import artifact, receipts, store
from retro_data.artifact import Lease, file_digest
from retro_data.errors import RetroDataError
from retro_data.receipts import Receipt

if TYPE_CHECKING:
    from retro_data.stage import Engine, Stage

log = logging.getLogger(__name__)


# ---- damage --------------------------------------------------------------------------------------


def damage(folder: Path, *, read: bool, key: str | None = None) -> list[str]:
    """What is wrong with the files of a finished artifact; empty if nothing is.

    Args:
        read: hold every byte against the digests; otherwise only names, sizes, dtypes and shapes.
        key: that the artifact must have, where it is known.
    """
    try:
        manifest = artifact.read_manifest(folder)
    except RetroDataError as error:
        return [str(error)]
    if manifest is None:
        return [f"{folder} is not finished: run `retro-data prepare`"]
    if key is not None and manifest["key"] != key:
        return [f"{folder}: its manifest belongs to key {manifest['key'][:16]}, not {key[:16]}"]
    wrong = []
    for name, entry in manifest.get("arrays", {}).items():
        wrong += _array_damage(folder / name, entry, read)
    for name, entry in manifest.get("files", {}).items():
        wrong += _file_damage(folder / name, entry, read)
    return wrong


def _file_damage(path: Path, entry: Mapping[str, Any], read: bool) -> list[str]:
    if not path.exists():
        return [f"{path} is missing"]
    if path.stat().st_size != entry["bytes"]:
        return [f"{path}: found {path.stat().st_size} bytes, expected {entry['bytes']}"]
    if read and file_digest(path) != entry["sha256"]:
        return [f"{path}: its bytes are not those that were written"]
    return []


def _array_damage(path: Path, entry: Mapping[str, Any], read: bool) -> list[str]:
    try:
        array = artifact.open_array(path)
    except RetroDataError as error:
        return [str(error)]
    if array.dtype.str != entry["dtype"] or list(array.shape) != entry["shape"]:
        found = f"{array.dtype.str}{list(array.shape)}"
        return [f"{path}: found {found}, expected {entry['dtype']}{entry['shape']}"]
    if not read:
        return []
    extents = entry.get("extents") or [{"rows": len(array), "sha256": entry["sha256"]}]
    return [
        f"{path}: rows {start} to {start + count} are not those that were written"
        for start, count, digest in _extents(extents)
        if _rows_digest(path, array, start, count) != digest
    ]


def _extents(extents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, str]]:
    """(first row, rows, digest) of consecutive row ranges."""
    start = 0
    for extent in extents:
        yield start, extent["rows"], extent["sha256"]
        start += extent["rows"]


def _rows_digest(path: Path, array: np.ndarray[Any, Any], start: int, count: int) -> str:
    header = len(artifact.npy_header(array.dtype, array.shape))
    row = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return file_digest(path, header + start * row, count * row)


# ---- repair --------------------------------------------------------------------------------------


def plan_is_damaged(folder: Path) -> bool:
    """Whether an unfinished artifact's plan is there and says nothing: it must begin again."""
    try:
        receipts.read_plan(folder)
    except RetroDataError:
        return True
    return False


def reopen(folder: Path, key: str, lease: Lease) -> list[Receipt]:
    """Turn a damaged artifact into an unfinished one that keeps every block that is whole.

    The rows of laid arrays that still match their receipts become parts again. The manifest goes
    last, so that a kill before leaves a damaged artifact, and a kill after an unfinished one.

    Returns:
        Receipts of the blocks that are not whole.
    """
    try:
        known = receipts.read_receipts(folder) if receipts.read_plan(folder, key) else []
    except RetroDataError as error:
        log.warning("%s; all of its blocks are made again", error)
        lease.remove(folder / artifact.PLAN)
        known = []
    known.sort(key=lambda receipt: receipt.block)
    recovered = {name for names in _recovered(folder, known) for name in names}
    whole = [
        r for r in known if all(_is_whole(folder, n, e, recovered) for n, e in r.files.items())
    ]
    lease.check()
    receipts.replace_receipts(folder, whole)
    lease.remove(folder / artifact.MANIFEST)
    log.warning("%s: %d of %d blocks are whole and kept", folder, len(whole), len(known))
    return [receipt for receipt in known if receipt not in whole]


def tell_changes(folder: Path, damaged: Sequence[Receipt]) -> None:
    """Say which mended blocks have other bytes than they had: made on another kind of device."""
    now = {receipt.block: receipt for receipt in receipts.read_receipts(folder)}
    for old in damaged:
        new = now[old.block]
        if new.files != old.files:
            log.warning(
                "%s: block %d, made again on %s, has other bytes than it had from %s",
                *(folder, old.block, new.device, old.device),
            )


def _is_whole(folder: Path, name: str, entry: Mapping[str, Any], recovered: set[str]) -> bool:
    if name in recovered:
        return True
    check = _array_damage if "dtype" in entry else _file_damage
    return not check(folder / name, entry, read=True)


def _recovered(folder: Path, known: Sequence[Receipt]) -> Iterator[list[str]]:
    """Parts of each laid array that were cut out of it again, by their names."""
    parts: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for receipt in known:
        for name, entry in receipt.files.items():
            folder_name, _, part = name.rpartition("/")
            if folder_name == artifact.PARTS and "dtype" in entry:
                parts.setdefault(store.kind_of_part(part), []).append((name, entry))
    for array_name, entries in parts.items():
        yield list(_cut_out(folder, array_name, entries))


def _cut_out(
    folder: Path, array_name: str, entries: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[str]:
    try:
        array = artifact.open_array(folder / array_name)
    except RetroDataError:
        return
    shapes = [(entry["dtype"], entry["shape"][1:]) for _, entry in entries]
    if any(shape != (array.dtype.str, list(array.shape[1:])) for shape in shapes):
        return
    extents = [{"rows": e["shape"][0], "sha256": e["sha256"]} for _, e in entries]
    for (part, _), (start, count, digest) in zip(entries, _extents(extents), strict=True):
        if _rows_digest(folder / array_name, array, start, count) == digest:
            path = folder / part
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            artifact.save_array(path, array[start : start + count])
            yield part


# ---- made again to compare -----------------------------------------------------------------------


def recompute(stage: Stage, folder: Path, engine: Engine, share: float) -> list[str]:
    """Make a random share of a finished artifact's blocks again, aside, and compare.

    Files are compared to the byte; vectors of a stage with a tolerance by the length of their
    difference, relative to the vector's. Of a stage that tolerates anything, it is only told.

    Args:
        share: of the blocks, rounded up to at least one.

    Returns:
        What differs; empty if nothing does.
    """
    known = {receipt.block: receipt for receipt in receipts.read_receipts(folder)}
    blocks = [block for block in receipts.read_plan(folder) or [] if block.index in known]
    if not blocks:
        return [f"{folder}: its plan or receipts are missing, so no block can be compared"]
    chosen = random.sample(blocks, math.ceil(share * len(blocks)))
    chosen.sort(key=lambda block: block.index)
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        for new in engine.run(stage, Path(name), chosen):
            for file, entry in known[new.block].files.items():
                wrong += _difference(stage, folder, Path(name), file, entry, new)
    return wrong


def _difference(
    stage: Stage, folder: Path, aside: Path, file: str, entry: Mapping[str, Any], new: Receipt
) -> list[str]:
    found = new.files.get(file)
    if found == entry:
        return []
    if found is not None and math.isinf(stage.tolerance):
        log.info("%s: made again on %s, with other bytes", folder / file, new.device)
        return []
    if found is None or not stage.tolerance or found.get("shape") != entry.get("shape"):
        return [f"{folder / file}: block {new.block} made again differs from what was written"]
    old, again = (artifact.open_array(place / file).astype(np.float32) for place in (folder, aside))
    lengths = np.maximum(np.linalg.norm(old, axis=1), np.finfo(np.float32).tiny)
    worst = float((np.linalg.norm(old - again, axis=1) / lengths).max())
    if worst <= stage.tolerance:
        log.info("%s: made again on %s, differs by %.2g at most", folder / file, new.device, worst)
        return []
    return [
        f"{folder / file}: a vector made again on {new.device} differs by {worst:.2g} of its length "
        f"from what was written; expected at most {stage.tolerance}"
    ]
