"""How a stage is brought to its end, whatever happened before."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arithmetic_stage import MAIN, SQUARES, ArithmeticStage, blocks_made
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data import artifact, integrity, stage
from retro_data.artifact import LeaseLost, open_array, read_manifest
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.receipts import append_receipt, open_journal
from retro_data.stage import complete, read_receipts, tile

ROWS = 95  # ten blocks of ten rows, the last one shorter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary.jsonl"


def squares(folder: Path) -> list[int]:
    return open_array(folder / SQUARES).tolist()


EXPECTED = [i * i for i in range(ROWS)]


def interrupted(folder: Path, diary: Path, block: int, **options: Any) -> ArithmeticStage:
    """The stage as it should be, after a run that failed at `block`."""
    with pytest.raises(ArithmeticError, match=f"block {block}"):
        complete(
            ArithmeticStage(ROWS, diary, fate={block: "raise"}, **options), folder, InlineEngine()
        )
    assert read_manifest(folder) is None
    return ArithmeticStage(ROWS, diary, **options)


@given(rows=st.integers(0, 300), block_rows=st.integers(1, 50))
@settings(deadline=None, max_examples=50)
def test_blocks_tile_the_rows(rows: int, block_rows: int):
    blocks = tile(rows, block_rows)
    assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(rows))
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert all(b.stop - b.start <= block_rows for b in blocks)


def test_an_artifact_is_made_block_by_block_and_told_in_its_manifest(folder: Path, diary: Path):
    manifest = complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    assert squares(folder) == EXPECTED
    assert blocks_made(diary) == list(range(10))
    assert manifest == read_manifest(folder)
    assert manifest["key"] == stage.stage_key(ArithmeticStage(ROWS, diary))
    assert (manifest["stage"], manifest["fields"]) == ("arithmetic", {"rows": ROWS})
    assert (manifest["blocks"], manifest["rows"], manifest["devices"]) == (10, ROWS, ["cpu"])
    assert manifest["figures"] == {"squares": ROWS}
    assert [e["rows"] for e in manifest["arrays"][SQUARES]["extents"]] == [10] * 9 + [5]
    assert integrity.damage(folder, read=True) == []
    assert sorted(p.name for p in folder.iterdir()) == [
        *("manifest.json", "plan.json", "receipts.jsonl", SQUARES)
    ]


def test_a_finished_artifact_is_returned_untouched(folder: Path, diary: Path):
    first = complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    before = {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]}
    assert complete(ArithmeticStage(ROWS, diary), folder, InlineEngine()) == first
    assert {p: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]} == before
    assert len(blocks_made(diary)) == 10


def test_a_resume_makes_only_the_missing_blocks(folder: Path, diary: Path):
    whole = interrupted(folder, diary, 6)
    assert [r.block for r in read_receipts(folder)] == list(range(6))
    kept = (folder / "receipts.jsonl").read_bytes()
    complete(whole, folder, InlineEngine())
    assert blocks_made(diary) == [*range(6), 6, *range(6, 10)]
    assert squares(folder) == EXPECTED
    assert (folder / "receipts.jsonl").read_bytes().startswith(kept)


def test_a_receipt_torn_by_a_kill_counts_as_not_written(folder: Path, diary: Path):
    whole = interrupted(folder, diary, 6)
    path = folder / "receipts.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    complete(whole, folder, InlineEngine())
    assert blocks_made(diary) == [*range(6), 6, *range(5, 10)]
    assert squares(folder) == EXPECTED
    assert [r.block for r in read_receipts(folder)] == list(range(10))


def test_a_resume_keeps_the_tiling_of_the_plan(folder: Path, diary: Path):
    interrupted(folder, diary, 6)
    manifest = complete(ArithmeticStage(ROWS, diary, block_rows=7), folder, InlineEngine())
    assert manifest["blocks"] == 10
    assert blocks_made(diary)[7:] == list(range(6, 10))
    assert squares(folder) == EXPECTED


def test_a_receipt_of_a_run_that_was_taken_over_is_not_kept(
    folder: Path, diary: Path, tmp_path: Path
) -> None:
    """It was stopped just before it wrote, and goes on when another run has begun."""
    complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    receipts = read_receipts(folder)
    other = tmp_path / "other"
    other.mkdir()
    with open_journal(other) as frozen:
        append_receipt(frozen, receipts[0])
        with open_journal(other) as journal:
            append_receipt(frozen, receipts[1])
            append_receipt(journal, receipts[2])
        assert read_receipts(other) == [receipts[0], receipts[2]]


@pytest.mark.parametrize("content", ["right", "zeros", "torn"])
def test_a_file_without_a_receipt_proves_nothing(folder: Path, diary: Path, content: str):
    """A block's file may stand complete, full of zeros, or half: it is made anew all the same."""
    whole = interrupted(folder, diary, 6)
    rows = np.arange(60, 70) ** 2 * (content != "zeros")
    path = folder / "parts" / f"00006.{SQUARES}"
    artifact.save_array(path, rows)
    if content == "torn":
        os.truncate(path, path.stat().st_size - 8)
    complete(whole, folder, InlineEngine())
    assert blocks_made(diary)[7:] == list(range(6, 10))
    assert squares(folder) == EXPECTED


def test_temporary_files_of_a_killed_run_are_removed(folder: Path, diary: Path):
    whole = interrupted(folder, diary, 6)
    for place in (folder, folder / "parts"):
        (place / ".tmp-0123").write_bytes(b"half")
    complete(whole, folder, InlineEngine())
    assert not list(folder.rglob(".tmp-*"))


def test_a_receipt_whose_file_is_gone_is_no_proof(folder: Path, diary: Path):
    whole = interrupted(folder, diary, 6)
    (folder / "parts" / f"00002.{SQUARES}").unlink()
    complete(whole, folder, InlineEngine())
    assert blocks_made(diary)[7:] == [2, *range(6, 10)]
    assert squares(folder) == EXPECTED


def test_a_run_that_failed_in_finish_makes_no_block_again(folder: Path, diary: Path):
    class Unlucky(ArithmeticStage):
        def finish(self, *arguments: Any) -> dict[str, Any]:
            super().finish(*arguments)
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        complete(Unlucky(ROWS, diary), folder, InlineEngine())
    assert read_manifest(folder) is None
    complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    assert len(blocks_made(diary)) == 10
    assert integrity.damage(folder, read=True) == []


def test_parts_left_by_a_kill_after_the_manifest_are_removed_later(folder: Path, diary: Path):
    complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    (folder / "parts").mkdir()
    (folder / "parts" / f"00000.{SQUARES}").write_bytes(b"left")
    complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    assert not (folder / "parts").exists()
    assert squares(folder) == EXPECTED


def test_an_unfinished_artifact_whose_plan_is_damaged_begins_again(folder: Path, diary: Path):
    whole = interrupted(folder, diary, 6)
    plan = folder / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"10", b"11", 1))
    diary.unlink()
    complete(whole, folder, InlineEngine())
    assert blocks_made(diary) == list(range(10))
    assert integrity.damage(folder, read=True) == []
    assert squares(folder) == EXPECTED


def test_a_folder_of_another_key_is_refused(folder: Path, diary: Path):
    interrupted(folder, diary, 6)
    with pytest.raises(RetroDataError, match=r"plan\.json belongs to key .*retro-data prepare"):
        complete(ArithmeticStage(ROWS + 1, diary), folder, InlineEngine())


def test_an_engine_that_loses_blocks_is_found_out(folder: Path, diary: Path):
    class Forgetful(InlineEngine):
        def run(self, stage: Any, folder: Path, missing: Any) -> Any:
            return super().run(stage, folder, missing[:-2])

    with pytest.raises(RetroDataError, match=r"without making blocks \[8, 9\]"):
        complete(ArithmeticStage(ROWS, diary), folder, Forgetful())
    assert read_manifest(folder) is None


# ---- kills ---------------------------------------------------------------------------------------

SYNCS = """
import os, signal, sys
from pathlib import Path
from arithmetic_stage import ArithmeticStage, complete
from retro_data.engines import InlineEngine

def run(folder, at):
    real, count = os.fsync, [0]
    def fsync(handle):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)
    os.fsync = fsync
    complete(ArithmeticStage(35, Path(folder + ".diary")), Path(folder), InlineEngine())

at = 0
while True:  # one process a place, until one is not killed
    at += 1
    child = os.fork()
    if child == 0:
        run(f"{sys.argv[1]}/{at}", at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
print(at)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_kill_at_any_write_leaves_what_a_resume_completes(tmp_path: Path):
    """Killed at every single sync to disk in turn: of a file, of a name, of a receipt."""
    command = [sys.executable, "-c", SYNCS, str(tmp_path)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    places = int(ran.stdout)
    assert places > 15
    for at in range(1, places):
        folder, diary = tmp_path / str(at), tmp_path / f"{at}.diary"
        done = [r.block for r in read_receipts(folder)]
        before = blocks_made(diary)
        complete(ArithmeticStage(35, diary), folder, InlineEngine())
        again = blocks_made(diary)[len(before) :]
        assert again == [b for b in range(4) if b not in done]
        assert integrity.damage(folder, read=True) == []
        assert squares(folder) == EXPECTED[:35]
        assert {p.name for p in folder.iterdir()} == {
            *("manifest.json", "plan.json", "receipts.jsonl", SQUARES)
        }


def start(folder: Path, diary: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = [str(folder), str(diary), "0", json.dumps({"rows": ROWS, **options})]
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_two_processes_make_each_block_once(folder: Path, diary: Path):
    children = [start(folder, diary, seconds=0.05) for _ in range(2)]
    for child in children:
        assert child.wait(timeout=60) == 0, child.communicate()[1]
        child.communicate()
    assert sorted(blocks_made(diary)) == list(range(10))
    assert squares(folder) == EXPECTED


def test_a_frozen_process_is_followed_and_wakes_to_no_harm(
    folder: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "Lease", functools.partial(artifact.Lease, stale_seconds=0.5))
    child = start(folder, diary, seconds=0.2)
    try:
        wait_for(lambda: len(read_receipts(folder)) == 3)
        child.send_signal(signal.SIGSTOP)
        complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
        child.send_signal(signal.SIGCONT)
        said = child.communicate(timeout=30)[1]
    finally:
        child.kill()
    assert child.returncode == 1
    assert LeaseLost.__name__ in said
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in before} == before
    assert integrity.damage(folder, read=True) == []
    assert squares(folder) == EXPECTED


# ---- progress ------------------------------------------------------------------------------------


def test_progress_of_a_resume_counts_what_was_there(
    folder: Path, diary: Path, caplog: pytest.LogCaptureFixture
):
    whole = interrupted(folder, diary, 6)
    with caplog.at_level("INFO", logger="retro_data"):
        complete(whole, folder, InlineEngine())
    lines = [record.getMessage() for record in caplog.records]
    assert any("going on, 6 of 10 blocks done" in line for line in lines)
    assert any(f"arithmetic: {ROWS} of {ROWS} rows" in line for line in lines)
