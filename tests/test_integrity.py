"""Damage is found by block, named, and mended by making just the damaged blocks again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arithmetic_stage import SQUARES, ArithmeticStage, blocks_made

from retro_data import artifact, integrity
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.stage import BlockWriter, complete, read_receipts
from retro_data.store import block_name

ROWS = 95  # ten blocks of ten rows, the last one shorter


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def extend(path: Path) -> None:
    with open(path, "ab") as handle:
        handle.write(b"\0")


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def zero_tail(path: Path) -> None:
    """What a kill leaves of a file that was given its full size first."""
    size = path.stat().st_size
    os.truncate(path, size - 8)
    os.truncate(path, size)


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def replace_record(path: Path, **changes: Any) -> None:
    record = {**artifact.read_record(path), **changes}
    path.unlink()
    artifact.write_record(path, record)


HARMS: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "bit flipped": flip,
    "extended": extend,
    "missing": os.unlink,
}


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """An artifact of an array in two extents, two other arrays, and a file of another kind."""
    first, second = np.arange(20, dtype=np.float16).reshape(10, 2), np.arange(7, dtype=np.int64)
    entries: dict[str, Any] = {}
    for name, array in (("second", second), ("third", second[::-1])):
        artifact.save_array(tmp_path / f"{name}.npy", array)
        digest = artifact.array_digest(array)
        entries[f"{name}.npy"] = {"dtype": "<i8", "shape": [7], "sha256": digest}
    artifact.save_array(tmp_path / "first.npy", first)
    extents = [
        {"rows": 4, "sha256": artifact.array_digest(first[:4])},
        {"rows": 6, "sha256": artifact.array_digest(first[4:])},
    ]
    entries["first.npy"] = {"dtype": "<f2", "shape": [10, 2], "extents": extents}
    (tmp_path / "index.bin").write_bytes(b"faiss")
    digest = artifact.file_digest(tmp_path / "index.bin")
    manifest = {"arrays": entries, "files": {"index.bin": {"bytes": 5, "sha256": digest}}}
    artifact.write_record(tmp_path / "manifest.json", manifest)
    return tmp_path


def test_nothing_is_wrong_with_a_whole_artifact(whole: Path):
    assert integrity.damage(whole, read=True) == []
    assert integrity.damage(whole, read=False) == []


@pytest.mark.parametrize("name", ["first.npy", "second.npy", "index.bin", "manifest.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_named(whole: Path, name: str, harm: str):
    HARMS[harm](whole / name)
    (found,) = integrity.damage(whole, read=True)
    assert name in found or (name, harm) == ("manifest.json", "missing")
    if harm != "bit flipped":  # what costs no reading
        assert integrity.damage(whole, read=False) == [found]


def test_the_damaged_rows_are_named(whole: Path):
    zero_tail(whole / "first.npy")
    (found,) = integrity.damage(whole, read=True)
    assert "rows 4 to 10" in found


def test_swapped_files_are_both_named(whole: Path):
    swap(whole / "second.npy", whole / "third.npy")
    found = " ".join(integrity.damage(whole, read=True))
    assert "second.npy" in found
    assert "third.npy" in found


# ---- repair --------------------------------------------------------------------------------------


class TwoKinds(ArithmeticStage):
    """Beside the laid array, a file a block that stays, and a part that is not laid as it is."""

    def make(self, context: str, block: Any, out: BlockWriter) -> None:
        super().make(context, block, out)
        rows = np.arange(block.start, block.stop, dtype=np.float16)[:, None]
        out.array(block_name(block.index), rows)
        out.bytes(f"parts/{block.index:05d}.note", b"block %d\n" % block.index)

    def finish(self, folder: Path, receipts: Any) -> dict[str, Any]:
        result = super().finish(folder, receipts)
        notes = b"".join((folder / f"parts/{r.block:05d}.note").read_bytes() for r in receipts)
        with artifact.new_file(folder / "notes.txt", replace=True) as handle:
            handle.write(notes)
        names = [block_name(r.block) for r in receipts]
        arrays = {n: r.files[n] for n, r in zip(names, receipts, strict=True)}
        digest = artifact.file_digest(folder / "notes.txt")
        files = {"notes.txt": {"bytes": len(notes), "sha256": digest}}
        return {**result, "arrays": {**result["arrays"], **arrays}, "files": files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished")
    complete(TwoKinds(ROWS, place / "diary"), place / "artifact", InlineEngine())
    return place / "artifact"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "artifact")


def contents(folder: Path) -> dict[str, bytes]:
    """All files but those that tell times."""
    telling = ("manifest.json", "receipts.jsonl")
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in telling)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def mended(folder: Path, *, verify: bool = True) -> list[int]:
    """Blocks made when the artifact is completed again."""
    diary = folder.with_name("diary")
    complete(TwoKinds(ROWS, diary, block_rows=7), folder, InlineEngine(), verify=verify)
    return sorted(blocks_made(diary))


def row(number: int) -> int:
    """Where a row of the laid array begins, from the end of its file."""
    return 8 * (number - ROWS)


ALL = list(range(10))

DAMAGE: dict[str, tuple[Callable[[Path], Any], list[int]]] = {
    "nothing": (lambda _: None, []),
    "a bit of the laid array": (lambda f: flip(f / SQUARES, row(34)), [3]),
    "its last rows": (lambda f: zero_tail(f / SQUARES), [9]),
    "two of its blocks": (
        lambda f: (flip(f / SQUARES, row(0)), flip(f / SQUARES, row(94))),
        [0, 9],
    ),
    "the laid array is missing": (lambda f: (f / SQUARES).unlink(), ALL),
    "the laid array is cut": (lambda f: cut(f / SQUARES), ALL),
    "a file of a block is missing": (lambda f: (f / block_name(4)).unlink(), [4]),
    "a file of a block is cut": (lambda f: cut(f / block_name(4)), [4]),
    "a bit of a file": (lambda f: flip(f / block_name(4)), [4]),
    "two files swapped": (lambda f: swap(f / block_name(2), f / block_name(5)), [2, 5]),
    "what was made at the end": (lambda f: flip(f / "notes.txt"), []),
    "a part that stayed": (lambda f: flip(f / "parts" / "00006.note"), []),
    "a part and what it went into": (
        lambda f: (flip(f / "parts" / "00006.note"), cut(f / "notes.txt")),
        [6],
    ),
    "a bit of the manifest": (lambda f: flip(f / "manifest.json", 40), []),
    "plan and manifest swapped": (
        lambda f: swap(f / "manifest.json", f / "plan.json"),
        list(range(14)),  # the plan is lost: of a new tiling
    ),
    "the manifest of another": (
        lambda f: replace_record(f / "manifest.json", key="of another"),
        [],
    ),
    "the manifest is cut": (lambda f: cut(f / "manifest.json"), []),
    "the receipts are missing and a bit": (
        lambda f: ((f / "receipts.jsonl").unlink(), flip(f / block_name(4))),
        ALL,
    ),
    "a receipt and a bit": (
        lambda f: (flip(f / "receipts.jsonl", 200), flip(f / block_name(4))),
        ALL,  # where the other blocks begin in the laid array is not known without it
    ),
    "the plan and a bit": (
        lambda f: (flip(f / "plan.json", 90), flip(f / block_name(4))),
        list(range(14)),  # of a new tiling
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_just_the_damaged_blocks_are_made_again(folder: Path, finished: Path, damage: str):
    harm, blocks = DAMAGE[damage]
    harm(folder)
    assert mended(folder) == blocks
    assert integrity.damage(folder, read=True) == []
    if len(blocks) <= 10:
        expected = contents(finished)
        if damage == "a part that stayed":  # harmless: only another repair would need it
            expected["parts/00006.note"] = (folder / "parts/00006.note").read_bytes()
        assert contents(folder) == expected
    assert artifact.open_array(folder / SQUARES).tolist() == [i * i for i in range(ROWS)]
    assert not (folder / "lease.json").exists()


def test_without_reading_only_sizes_are_seen(folder: Path):
    flip(folder / block_name(3))
    assert mended(folder, verify=False) == []
    cut(folder / block_name(4))
    assert mended(folder, verify=False) == [3, 4]  # once opened, all of it is read


def test_damage_that_cannot_be_mended_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cut(folder / block_name(4))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # chmod does not stop root
    before = contents(folder)
    with pytest.raises(RetroDataError, match=r"00004\.npy.*prepare --verify"):
        mended(folder)
    assert contents(folder) == before


def test_what_was_made_on_another_device_with_other_bytes_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    class Other(TwoKinds):
        def make(self, context: str, block: Any, out: BlockWriter) -> None:
            super().make(context, block, out)
            out.files[block_name(block.index)]["sha256"] = "of other bytes"

    flip(folder / block_name(4))
    other = Other(ROWS, folder.with_name("diary"))
    complete(other, folder, InlineEngine("cuda"), verify=True)
    assert "block 4, made again on cuda, has other bytes than it had from cpu" in caplog.text


REPAIR_KILLED = """
import os, signal, sys
from pathlib import Path
from test_integrity import ROWS, InlineEngine, TwoKinds, complete

count, real = [0], {name: getattr(os, name) for name in ("fsync", "unlink")}
def counted(name):
    def call(*arguments, **options):
        count[0] += 1
        if count[0] == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments, **options)
    return call
for name in real:
    setattr(os, name, counted(name))
folder = Path(sys.argv[1])
complete(TwoKinds(ROWS, folder.with_name("diary")), folder, InlineEngine(), verify=True)
"""


@pytest.mark.parametrize("at", [1, 3, 8, 19, 20, 21, 22, 23, 25, 30, 36])
def test_a_repair_that_is_killed_is_repaired(folder: Path, finished: Path, at: int):
    """Killed at a sync to disk or a removal: while cutting out, reopening, making, laying."""
    flip(folder / SQUARES, row(34))
    flip(folder / block_name(7))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", REPAIR_KILLED, folder, str(at)], env=environment)
    assert ran.returncode == -signal.SIGKILL
    mended(folder)
    assert integrity.damage(folder, read=True) == []
    assert contents(folder) == contents(finished)


# ---- made again to compare -----------------------------------------------------------------------


def recomputed(folder: Path, stage: ArithmeticStage, share: float = 1.0) -> list[str]:
    return integrity.recompute(stage, folder, InlineEngine(), share)


def test_a_share_of_the_blocks_is_made_again_and_is_the_same(folder: Path):
    diary = folder.with_name("diary")
    before = contents(folder)
    for share, blocks in ((0.01, 1), (0.25, 3), (1.0, 10)):
        diary.unlink(missing_ok=True)
        assert recomputed(folder, TwoKinds(ROWS, diary), share) == []
        assert len(set(blocks_made(diary))) == blocks
    assert contents(folder) == before


class Drifted(TwoKinds):
    """Its vectors are not quite what they were."""

    drift = 0.01

    def make(self, context: str, block: Any, out: BlockWriter) -> None:
        super().make(context, block, out)
        name = block_name(block.index)
        rows = np.arange(block.start, block.stop, dtype=np.float16)[:, None]
        (out.folder / name).unlink()
        out.array(name, rows * np.float16(1 + self.drift))


def test_what_differs_is_named(folder: Path):
    found = recomputed(folder, Drifted(ROWS, folder.with_name("diary")))
    assert len(found) == 10
    assert "00003.npy: block 3 made again differs" in found[3]


@pytest.mark.parametrize(("drift", "differing"), [(0.01, 0), (0.1, 10)])
def test_vectors_may_differ_by_a_tolerance(folder: Path, drift: float, differing: int):
    class Tolerant(Drifted):
        tolerance = 0.05

    stage = Tolerant(ROWS, folder.with_name("diary"))
    stage.drift = drift
    found = recomputed(folder, stage)
    assert len(found) == differing
    assert all("expected at most 0.05" in line for line in found)


def test_without_receipts_nothing_can_be_compared(folder: Path):
    (folder / "receipts.jsonl").unlink()
    (found,) = recomputed(folder, TwoKinds(ROWS, folder.with_name("diary")))
    assert "receipts are missing" in found
    assert read_receipts(folder) == []
