"""Keys, files that are whole or not there, arrays that cannot be misread, and leases."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from retro_data import artifact
from retro_data.artifact import Lease, free, keyed
from retro_data.errors import RetroDataError

# ---- keys ----------------------------------------------------------------------------------------

FIELDS = {"chunk_size": 64, "bos": True, "encoding": "utf-8"}
PARENTS = {"corpus": "a" * 64, "tokenizer": "b" * 64}


def test_a_key_does_not_depend_on_the_order_of_fields_and_parents():
    turned = dict(reversed(FIELDS.items())), dict(reversed(PARENTS.items()))
    assert artifact.artifact_key("chunks", 1, *turned) == artifact.artifact_key(
        "chunks", 1, FIELDS, PARENTS
    )


def test_every_field_every_parent_the_stage_and_its_version_change_the_key():
    changed = [
        ("chunks", 1, FIELDS, PARENTS),
        ("chunk", 1, FIELDS, PARENTS),
        ("chunks", 2, FIELDS, PARENTS),
        ("chunks", 1, FIELDS, {}),
        ("chunks", 1, {}, PARENTS),
        *(("chunks", 1, {**FIELDS, name: "other"}, PARENTS) for name in FIELDS),
        *(("chunks", 1, FIELDS, {**PARENTS, name: "c" * 64}) for name in PARENTS),
        ("chunks", 1, FIELDS, {"corpus": PARENTS["tokenizer"], "tokenizer": PARENTS["corpus"]}),
    ]
    keys = {artifact.artifact_key(*identity) for identity in changed}
    assert len(keys) == len(changed)
    assert all(len(key) == 64 for key in keys)


def test_a_settings_field_that_says_neither_keyed_nor_free_is_an_error():
    @dataclass
    class Forgotten:
        a: int = keyed(1)
        b: int = free(2)
        c: int = 3

    with pytest.raises(TypeError, match="c is neither keyed"):
        artifact.key_fields(Forgotten())


def test_only_keyed_fields_enter_a_key():
    @dataclass
    class Told:
        a: int = keyed(1)
        b: int = free(2)

    assert artifact.key_fields(Told(5, 6)) == {"a": 5}


# ---- files ---------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "whole.bin"
    with artifact.new_file(path) as handle:
        handle.write(b"half")
        handle.flush()
        assert not path.exists()
        handle.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["whole.bin"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_exception_leaves_neither_the_file_nor_a_temporary_one(tmp_path: Path, replace: bool):
    def write() -> None:
        with artifact.new_file(tmp_path / "half.bin", replace=replace) as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == []


def test_the_first_file_of_a_name_stays_unless_it_is_to_be_replaced(tmp_path: Path):
    path = tmp_path / "file.bin"
    for content in (b"first", b"second"):
        with artifact.new_file(path) as handle:
            handle.write(content)
    assert path.read_bytes() == b"first"
    with artifact.new_file(path, replace=True) as handle:
        handle.write(b"third")
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["file.bin"]


def test_an_exception_while_replacing_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "file.json"
    artifact.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        artifact.write_json(path, {"a": object()}, replace=True)
    assert artifact.read_json(path) == {"a": 1}
    assert names(tmp_path) == ["file.json"]


def test_a_record_is_read_only_as_it_was_written(tmp_path: Path):
    path, value = tmp_path / "record.json", {"rows": 10, "name": "words"}
    artifact.write_record(path, value)
    assert artifact.read_record(path) == value
    written = path.read_bytes()
    for harmed in (written.replace(b"10", b"11"), b"[]", b"{}", written[:-3]):
        path.write_bytes(harmed)
        with pytest.raises(RetroDataError, match=r"record\.json.*retro-data prepare"):
            artifact.read_record(path)


def test_json_that_cannot_be_read_names_the_file_and_the_command(tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(b'{"key": ')
    with pytest.raises(RetroDataError, match=r"manifest\.json.*retro-data prepare"):
        artifact.read_manifest(tmp_path)
    assert artifact.read_manifest(tmp_path / "nowhere") is None


@given(
    content=st.binary(max_size=200),
    start=st.integers(0, 220),
    count=st.one_of(st.none(), st.integers(0, 220)),
)
@settings(deadline=None, max_examples=40)
def test_a_digest_covers_the_range_it_is_asked_for(
    content: bytes, start: int, count: int | None, tmp_path_factory: pytest.TempPathFactory
):
    import hashlib

    path = tmp_path_factory.getbasetemp() / "digest.bin"
    path.write_bytes(content)
    stop = None if count is None else start + count
    expected = hashlib.sha256(content[start:stop]).hexdigest()
    assert artifact.file_digest(path, start, count) == expected


# ---- arrays --------------------------------------------------------------------------------------

DTYPES = st.sampled_from([np.dtype(code) for code in "?bBhHiIqQefd"])


def saved(folder: Path, array: np.ndarray) -> Path:
    path = folder / "array.npy"
    path.unlink(missing_ok=True)
    artifact.save_array(path, array)
    return path


@given(
    array=npst.arrays(
        DTYPES,
        npst.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    )
)
@settings(deadline=None, max_examples=60)
def test_an_array_comes_back_as_it_was(array: np.ndarray, tmp_path_factory: pytest.TempPathFactory):
    path = saved(tmp_path_factory.getbasetemp(), array)
    for read in (artifact.open_array(path), np.load(path)):
        assert read.dtype == array.dtype
        assert read.shape == array.shape
        assert read.tobytes() == array.tobytes()


def test_an_array_is_opened_read_only_and_a_read_changes_nothing_on_disk(tmp_path: Path):
    path = saved(tmp_path, np.arange(1000, dtype=np.uint16))
    before = path.stat()
    array = artifact.open_array(path)
    assert int(array[-1]) == 999
    with pytest.raises(IndexError):
        array[1000]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    del array
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def extend(path: Path) -> None:
    with open(path, "ab") as handle:
        handle.write(b"\0\0")


def behead(path: Path) -> None:
    """What a bare memory map leaves: the bytes of the rows and nothing else."""
    path.write_bytes(np.load(path).tobytes())


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: cut(path, 2),
    "without its rows": lambda path: cut(path, 2 * 1000),
    "cut inside the header": lambda path: os.truncate(path, 20),
    "empty": lambda path: os.truncate(path, 0),
    "extended": extend,
    "headerless": behead,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_refused_with_the_command_that_mends_it(tmp_path: Path, damage: str):
    path = saved(tmp_path, np.zeros(1000, np.uint16))  # zeros: a lost tail would look like the rest
    DAMAGES[damage](path)
    with pytest.raises(RetroDataError, match=r"array\.npy.*retro-data prepare"):
        artifact.open_array(path)


def test_a_flipped_bit_anywhere_in_a_header_is_refused(tmp_path: Path):
    path = saved(tmp_path, np.zeros((4, 3), np.float16))
    whole = path.read_bytes()
    for bit in range(8 * len(artifact.npy_header(np.dtype(np.float16), (4, 3)))):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        if harmed[: len(whole)] == whole.replace(b"<f2", b">f2"):
            continue  # a header like any other: a manifest tells it from what was written
        with pytest.raises(RetroDataError, match=r"array\.npy.*retro-data prepare"):
            artifact.open_array(path)


def test_an_array_of_objects_or_in_fortran_order_is_refused(tmp_path: Path):
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((3, 4))))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("fortran.npy", "object.npy"):
        with pytest.raises(RetroDataError, match=name):
            artifact.open_array(tmp_path / name)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_parts_are_laid_as_concatenate_would(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("laid")
    dtype = data.draw(DTYPES)
    row = data.draw(npst.array_shapes(min_dims=0, max_dims=2, min_side=1, max_side=4))
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    arrays = [data.draw(npst.arrays(dtype, (count, *row))) for count in rows]
    parts = [folder / f"{i}.npy" for i in range(len(arrays))]
    for path, array in zip(parts, arrays, strict=True):
        artifact.save_array(path, array)
    artifact.lay_arrays(folder / "whole.npy", parts, dtype, row, rows)
    whole, expected = artifact.open_array(folder / "whole.npy"), np.concatenate(arrays)
    assert (whole.dtype, whole.shape) == (expected.dtype, expected.shape)
    assert whole.tobytes() == expected.tobytes()


def test_parts_are_laid_where_the_kernel_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any) -> int:
        raise OSError("across file systems")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    parts = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for i, path in enumerate(parts):
        artifact.save_array(path, np.full(700, i, np.int32))
    artifact.lay_arrays(tmp_path / "c.npy", parts, np.dtype(np.int32), (), [700, 700])
    assert artifact.open_array(tmp_path / "c.npy").tolist() == [0] * 700 + [1] * 700


def test_a_part_that_is_too_short_leaves_no_array(tmp_path: Path):
    part = saved(tmp_path, np.arange(10))
    cut(part, 8)
    with pytest.raises(RetroDataError, match="8 bytes early"):
        artifact.lay_arrays(tmp_path / "whole.npy", [part], np.dtype(np.int64), (), [10])
    assert names(tmp_path) == ["array.npy"]


# ---- leases --------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from retro_data.artifact import Lease, LeaseLost, write_record
folder = Path(sys.argv[1])
with Lease(folder, beat_seconds=0.05) as lease:
    print("holds", flush=True)
    while not (folder / "go").exists():
        time.sleep(0.02)
    try:
        lease.check()
        write_record(folder / "manifest.json", {"key": "child"})
        print("committed", flush=True)
    except LeaseLost as error:
        print("lost", error, flush=True)
"""

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Start]:
    """Starts a child that holds the lease of `tmp_path` until a file `go` appears, then commits."""
    children: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "holds\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def lease(folder: Path, stale_seconds: float = 60.0) -> Lease:
    finished = folder / "manifest.json"
    options = {"beat_seconds": 0.05, "stale_seconds": stale_seconds}
    return Lease(folder, give_up=finished.exists, **options)


def test_a_removal_under_a_lost_lease_is_undone(tmp_path: Path):
    path = tmp_path / "array.npy"
    with artifact.Lease(tmp_path) as lease:
        path.write_bytes(b"ours")
        lease.remove(path)
        lease.remove(path)  # there is none: nothing to do
        assert names(tmp_path) == ["lease.json"]
        path.write_bytes(b"of whoever took over")
        lease.path.unlink()
        with pytest.raises(artifact.LeaseLost):
            lease.remove(path)
        assert path.read_bytes() == b"of whoever took over"
        assert names(tmp_path) == ["array.npy"]


def test_a_lease_ends_with_its_block(tmp_path: Path):
    with lease(tmp_path) as first:
        first.check()
    assert names(tmp_path) == []
    with lease(tmp_path) as second:
        (tmp_path / "lease.json").unlink()
        with pytest.raises(artifact.LeaseLost):
            second.check()


def test_the_second_process_waits_and_then_finds_the_finished_artifact(
    tmp_path: Path, holder: Start
):
    child = holder()
    (tmp_path / "go").touch()
    with lease(tmp_path):
        assert artifact.read_manifest(tmp_path) == {"key": "child"}
    assert child.communicate(timeout=10)[0] == "committed\n"
    assert not (tmp_path / "lease.json").exists()


def test_a_dead_holder_is_followed_at_once(tmp_path: Path, holder: Start):
    child = holder()
    child.kill()
    child.wait()
    assert (tmp_path / "lease.json").exists()
    began = time.monotonic()
    with lease(tmp_path, stale_seconds=1000) as ours:
        assert ours.held
        ours.check()
    assert time.monotonic() - began < 1


def test_a_holder_that_counts_is_never_followed(tmp_path: Path, holder: Start):
    child = holder()
    began = time.monotonic()
    ours = Lease(
        tmp_path,
        beat_seconds=0.05,
        stale_seconds=0.5,
        give_up=lambda: time.monotonic() - began > 1.5,
    )
    with ours:
        assert not ours.held
    (tmp_path / "go").touch()
    assert child.communicate(timeout=10)[0] == "committed\n"


def test_a_frozen_holder_is_followed_and_commits_nothing_when_it_wakes(
    tmp_path: Path, holder: Start
):
    child = holder()
    child.send_signal(signal.SIGSTOP)
    with lease(tmp_path, stale_seconds=0.5) as ours:
        assert ours.held
        (tmp_path / "go").touch()
        child.send_signal(signal.SIGCONT)
        said = child.communicate(timeout=10)[0]
        assert said.startswith("lost")
        assert f"process {os.getpid()} on" in said
        ours.check()  # waking up took nothing from us
    assert names(tmp_path) == ["go"]


def test_a_lease_on_another_host_is_stale_by_our_own_clock_alone(tmp_path: Path):
    """Its process id says nothing here, and neither do the times of its files."""
    foreign = {"token": "x", "host": "elsewhere", "pid": os.getpid(), "counter": "1"}
    artifact.write_json(tmp_path / "lease.json", foreign)
    os.utime(tmp_path / "lease.json", (0, 0))
    began = time.monotonic()
    with lease(tmp_path, stale_seconds=0.4) as ours:
        assert ours.held
    assert 0.4 < time.monotonic() - began < 2
