"""What goes wrong with a machine is seen at once, by its cause, and leaves what a resume completes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from arithmetic_stage import MAIN, SQUARES, ArithmeticStage
from conftest import make_documents, write_jsonl

from retro_data import integrity
from retro_data.artifact import open_array, read_manifest
from retro_data.engines import InlineEngine
from retro_data.stage import complete, read_receipts

ROWS = 400  # forty blocks


def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def prepare_squares(folder: Path, workers: int = 2, seconds: float = 0.05) -> list[str | Path]:
    options = json.dumps({"rows": ROWS, "seconds": seconds})
    diary = folder.with_name("diary.jsonl")
    return [sys.executable, "-c", MAIN, folder, diary, str(workers), options]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_resumes(folder: Path) -> None:
    """To the whole, with no finished block made again."""
    assert read_manifest(folder) is None
    kept = read_receipts(folder)
    complete(ArithmeticStage(ROWS, folder.with_name("diary.jsonl")), folder, InlineEngine())
    assert integrity.damage(folder, read=True) == []
    assert open_array(folder / SQUARES).tolist() == [i * i for i in range(ROWS)]
    assert read_receipts(folder)[: len(kept)] == kept


# ---- the end of a run from outside ---------------------------------------------------------------


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_ctrl_c_while_workers_begin_is_the_parents_alone(tmp_path: Path) -> None:
    parent = start(prepare_squares(tmp_path / "artifact"))
    wait_for(lambda: len(processes_of_session(parent.pid)) == 3)
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate(timeout=30)[1]
    assert parent.returncode != 0
    assert said.count("Traceback") == 1
    wait_for(lambda: processes_of_session(parent.pid) == [])


def test_ctrl_c_ends_all_processes_and_leaves_what_a_resume_completes(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the parent and to its workers."""
    folder = tmp_path / "artifact"
    parent = start(prepare_squares(folder))
    wait_for(lambda: len(read_receipts(folder)) >= 3)
    os.killpg(parent.pid, signal.SIGINT)
    said = parent.communicate(timeout=30)[1]
    assert parent.returncode != 0
    assert said.count("Traceback") == 1  # the parent's own
    wait_for(lambda: not processes_of_session(parent.pid), 10)
    assert not (folder / "lease.json").exists()
    assert_resumes(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_a_code_and_one_sentence(
    tmp_path: Path, tiny_encoder: Path, number: signal.Signals, code: int
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(400))
    command = [
        *(sys.executable, "-m", "retro_data", "prepare", f"data.root={tmp_path / 'root'}"),
        *(f"data.corpus.path={corpus}", f"data.embedder.name={tiny_encoder}"),
        *("data.tokenizer.vocab_size=400", "data.chunk_size=16", "data.embedder.precision=fp32"),
        "+data.embedder.block_rows=50",
    ]
    parent = start(command)
    root = tmp_path / "root"
    wait_for(lambda: parent.poll() is not None or any(root.glob("embeddings/*/receipts.jsonl")))
    os.killpg(parent.pid, number)
    said = parent.communicate(timeout=30)[1]
    assert parent.returncode == code
    assert "Finished blocks are kept" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "root").rglob("lease.json"))


# ---- the file system -----------------------------------------------------------------------------


def test_a_root_that_disappears_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "artifact"
    parent = start(prepare_squares(folder))
    wait_for(lambda: len(read_receipts(folder)) >= 3)
    shutil.rmtree(tmp_path / "root", ignore_errors=True)
    shutil.rmtree(tmp_path / "root", ignore_errors=True)  # a worker may have written meanwhile
    said = parent.communicate(timeout=30)[1]
    assert parent.returncode == 1
    assert "was removed, or its file system is gone" in said
    assert not (tmp_path / "root").exists()


def can_mount() -> bool:
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    return done.returncode == 0


FULL_DISK = """
set -u
mkdir -p "$1" && mount -t tmpfs -o size=64k tmpfs "$1"
shift
"$@"; first=$?
mount -o remount,size=16m "${@: -4:1}"/..
"$@"; second=$?
echo "codes $first $second" >&2
"""


@pytest.mark.skipif(shutil.which("unshare") is None or not can_mount(), reason="cannot mount")
def test_a_full_disk_is_named_and_more_room_is_enough(tmp_path: Path) -> None:
    """A file system of 64 kB, then of 16 MB, in a name space of its own."""
    root = tmp_path / "root"
    script = tmp_path / "full.sh"
    script.write_text(FULL_DISK)
    command = prepare_squares(root / "artifact", seconds=0.0)
    options = json.dumps({"rows": 40_000, "block_rows": 1000})
    done = subprocess.run(
        ["unshare", "-m", "bash", script, root, *command[:-1], options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "No space left on device" in done.stderr
    assert "Finished blocks are kept" in done.stderr
    assert "codes 1 0" in done.stderr


def test_files_that_may_not_grow_are_named(tmp_path: Path) -> None:
    """As by a quota: no file may be over 4 kB, where a block's array is 8 kB."""
    import resource

    folder = tmp_path / "artifact"
    options = json.dumps({"rows": 2000, "block_rows": 1000})
    limit = (resource.RLIMIT_FSIZE, (4096, 4096))
    command = prepare_squares(folder, workers=1)[:-1]
    child = start([*command, options], preexec_fn=lambda: resource.setrlimit(*limit))
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 1
    assert "File too large" in said
    assert not list(folder.rglob(".tmp-*"))
    assert read_receipts(folder) == []
