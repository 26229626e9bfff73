"""What no configuration leads to any more: old artifacts, and what killed runs left behind.

Artifacts are never overwritten: a changed setting or corpus makes others beside them. What the given
configuration leads to is kept, finished or not, and what every other configuration of this root was
last prepared to (its prepared note), unless that is to go too.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retro_data import artifact, store
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings, steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removable:
    """A folder or file that can go, and why."""

    path: Path
    bytes: int
    reason: str


def removable(settings: Settings, *, others: bool = False) -> list[Removable]:
    """What can go from the root of a configuration.

    Args:
        others: also what only other configurations of this root lead to.
    """
    root = settings.root
    kept = {step.folder for step in steps(settings)}
    notes = [path for path in store.prepared_notes(root) if path != settings.prepared_path()]
    used_by_others = {folder for note in notes for folder in _folders_of_note(root, note)} - kept
    found = []
    for folder in _artifacts(root):
        if folder in kept or artifact.is_leased(folder):
            continue
        if folder not in used_by_others:
            found.append(_entry(folder, "no configuration leads to it"))
        elif others:
            found.append(_entry(folder, "of another configuration"))
    if others:
        found += [_entry(note, "of another configuration") for note in notes]
    return found


def remove(found: list[Removable]) -> None:
    """Remove them. An artifact first loses its manifest: half of one is never taken for whole."""
    for item in found:
        if item.path.is_dir():
            if artifact.is_leased(item.path):
                raise RetroDataError(f"{item.path} is being worked on: run this again later.")
            (item.path / artifact.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
        log.info("removed %s", item.path)


def _artifacts(root: Path) -> Iterator[Path]:
    """Folders below `root` that are artifacts, or began to be; nothing else is ever touched."""
    for stage in store.STAGES:
        for folder in sorted((root / stage).glob("*")):
            names = (artifact.MANIFEST, artifact.PLAN)
            if folder.is_dir() and any((folder / name).exists() for name in names):
                yield folder


def _folders_of_note(root: Path, note: Path) -> Iterator[Path]:
    for stage, keys in artifact.read_record(note).items():
        for corpus, key in keys.items():
            yield store.folder_of(root, stage, key, corpus or None)


def _entry(path: Path, reason: str) -> Removable:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return Removable(path, sum(p.stat().st_size for p in files), reason)
