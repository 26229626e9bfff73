"""Blocks made by child processes: the same bytes, and every failure told with its cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arithmetic_stage import (
    MAIN,
    SQUARES,
    ArithmeticStage,
    Threads,
    Unclosable,
    blocks_made,
    entries,
)

from retro_data.artifact import open_array, read_manifest
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine, open_engine
from retro_data.engines.local import (
    END_SECONDS,
    StageFailed,
    child_environment,
    device_names,
    visible_devices,
)
from retro_data.engines.pending import PendingBlocks
from retro_data.engines.ray_cluster import worker_shape
from retro_data.errors import RetroDataError
from retro_data.stage import Resources, complete, read_receipts, tile

ROWS = 55


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary.jsonl"


def local(workers: int) -> LocalEngine:
    return LocalEngine(EngineSettings(workers=workers))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# ---- the same bytes ------------------------------------------------------------------------------


def test_worker_counts_and_the_order_of_blocks_change_no_byte(tmp_path: Path):
    class Backwards(InlineEngine):
        def run(self, stage, folder, missing):
            return super().run(stage, folder, missing[::-1])

    engines = {"here": InlineEngine(), "back": Backwards(), "1": local(1), "3": local(3)}
    found = {}
    for name, engine in engines.items():
        folder, diary = tmp_path / name, tmp_path / f"{name}.diary"
        stage = ArithmeticStage(ROWS, diary, fate={0: "meet"} if name == "3" else {})
        complete(stage, folder, engine)
        assert sorted(blocks_made(diary)) == list(range(6))
        found[name] = (folder / SQUARES).read_bytes()
    assert open_array(tmp_path / "3" / SQUARES).tolist() == [i * i for i in range(ROWS)]
    assert len(set(found.values())) == 1
    assert os.getpid() not in {entry["pid"] for entry in entries(tmp_path / "3.diary")}


def test_a_light_stage_starts_no_process(tmp_path: Path, diary: Path):
    complete(
        ArithmeticStage(ROWS, diary, resources=Resources(light=True)), tmp_path / "a", local(2)
    )
    assert {entry["pid"] for entry in entries(diary)} == {os.getpid()}


def test_no_worker_is_started_without_a_block_for_it(tmp_path: Path, diary: Path):
    complete(ArithmeticStage(10, diary, seconds=0.05), tmp_path / "a", local(4))
    assert len({entry["pid"] for entry in entries(diary)}) == 1


def test_workers_go_from_stage_to_stage_while_the_engine_is_open(tmp_path: Path):
    def pids_of(name: str, engine: LocalEngine, rows: int = ROWS) -> set[int]:
        diary = tmp_path / f"{name}.diary"
        fate = {0: "meet"} if rows == ROWS else {}
        complete(ArithmeticStage(rows, diary, fate=fate), tmp_path / name, engine)
        squares = [i * i for i in range(rows)]
        assert open_array(tmp_path / name / SQUARES).tolist() == squares
        return {entry["pid"] for entry in entries(diary)}

    with local(2) as engine:
        first = pids_of("first", engine)
        assert len(first) == 2
        assert pids_of("second", engine) == first
        killed = min(first)
        os.kill(killed, signal.SIGKILL)  # as the kernel may, for want of memory
        (dying,) = (child.process for child in engine._idle if child.process.pid == killed)
        wait_for(lambda: dying.poll() is not None)  # not before its last thread is gone
        third = pids_of("third", engine)
        assert len(third) == 2
        assert third & first == first - {killed}
        (alone,) = pids_of("alone", engine, rows=10)  # of all threads: another environment
        assert alone not in third
        assert not any(map(is_running, first | third))
        assert is_running(alone)
        copy = os.dup(engine._idle[0].connection.fileno())  # as a fork of this process would have
        began = time.monotonic()
    assert time.monotonic() - began < END_SECONDS
    assert not is_running(alone)
    os.close(copy)
    assert not pids_of("after", engine) & {alone, *third}


def test_a_failure_leaves_the_open_engine_to_go_on_with_new_workers(tmp_path: Path, diary: Path):
    with local(2) as engine:
        with pytest.raises(StageFailed, match="block 3 failed"):
            complete(ArithmeticStage(ROWS, diary, fate={3: "raise"}), tmp_path / "a", engine)
        failed = {entry["pid"] for entry in entries(diary)}
        assert not any(map(is_running, failed))
        complete(ArithmeticStage(ROWS, diary), tmp_path / "a", engine)
    assert open_array(tmp_path / "a" / SQUARES).tolist() == [i * i for i in range(ROWS)]


def test_a_stage_that_cannot_be_closed_is_told(tmp_path: Path, diary: Path):
    with pytest.raises(StageFailed, match="closing the stage failed: OSError: it would not close"):
        complete(Unclosable(ROWS, diary), tmp_path / "a", local(1))
    assert not any(is_running(entry["pid"]) for entry in entries(diary))


def test_a_worker_of_a_gpu_makes_two_blocks_at_once(tmp_path: Path, diary: Path):
    assert Resources(blocks_at_once=2).threads_of_worker("cuda:0") == 2
    assert Resources(blocks_at_once=2).threads_of_worker("cpu") == 1
    stage = ArithmeticStage(ROWS, diary, fate={0: "pair"}, resources=Threads(blocks_at_once=2))
    complete(stage, tmp_path / "a", local(1))
    assert sorted(blocks_made(diary)) == list(range(6))
    assert len({entry["pid"] for entry in entries(diary)}) == 1
    assert open_array(tmp_path / "a" / SQUARES).tolist() == [i * i for i in range(ROWS)]


@pytest.mark.parametrize(
    ("fate", "cause"),
    [("raise", "block 1 failed: ArithmeticError"), ("kill", "SIGKILL .*during block 0 and 1")],
)
def test_of_two_blocks_at_once_the_first_failure_ends_the_run(
    tmp_path: Path, diary: Path, fate: str, cause: str
):
    began = time.monotonic()
    fates = {0: "sleep", 1: fate}
    stage = ArithmeticStage(ROWS, diary, fate=fates, resources=Threads(blocks_at_once=2))
    with pytest.raises(StageFailed, match=cause):
        complete(stage, tmp_path / "a", local(1))
    assert time.monotonic() - began < 30
    assert not any(is_running(entry["pid"]) for entry in entries(diary))


# ---- failures ------------------------------------------------------------------------------------


def test_an_exception_in_a_worker_ends_the_run_with_its_own_traceback(tmp_path: Path, diary: Path):
    folder = tmp_path / "a"
    stage = ArithmeticStage(ROWS, diary, fate={0: "raise"}, seconds=0.2)
    with pytest.raises(StageFailed) as failure:
        complete(stage, folder, local(2))
    message = str(failure.value)
    assert "arithmetic: block 0 failed: ArithmeticError: no square for block 0" in message
    assert "arithmetic_stage.py" in message
    assert "retro-data prepare" in message
    assert len(blocks_made(diary)) < 6  # the others were not finished first
    assert not any(is_running(entry["pid"]) for entry in entries(diary))
    assert read_manifest(folder) is None
    done = [r.block for r in read_receipts(folder)]
    before = len(blocks_made(diary))
    complete(ArithmeticStage(ROWS, diary), folder, InlineEngine())
    assert blocks_made(diary)[before:] == [b for b in range(6) if b not in done]


@pytest.mark.parametrize(
    ("fate", "cause"), [("kill", "was killed by SIGKILL"), ("exit", "ended with exit code 7")]
)
def test_a_worker_that_dies_is_named_with_its_cause(
    tmp_path: Path, diary: Path, fate: str, cause: str
):
    began = time.monotonic()
    with pytest.raises(StageFailed) as failure:
        complete(
            ArithmeticStage(ROWS, diary, fate={0: fate}, seconds=0.1), tmp_path / "a", local(2)
        )
    dead = next(entry["pid"] for entry in entries(diary) if entry["block"] == 0)
    assert f"arithmetic: the worker process {dead} {cause}" in str(failure.value)
    assert "during block 0" in str(failure.value)
    assert not any(is_running(entry["pid"]) for entry in entries(diary))
    assert time.monotonic() - began < 30


def test_a_stage_that_cannot_be_opened_says_so(tmp_path: Path, diary: Path):
    stage = ArithmeticStage(ROWS, diary)
    stage.open = "not a method"  # type: ignore[assignment,method-assign]
    with pytest.raises(StageFailed, match="opening or closing the stage failed: TypeError"):
        complete(stage, tmp_path / "a", local(1))


def test_workers_of_a_parent_that_was_killed_end_by_themselves(tmp_path: Path, diary: Path):
    folder = tmp_path / "a"
    options = json.dumps({"rows": ROWS, "seconds": 60})
    command = [sys.executable, "-c", MAIN, str(folder), str(diary), "2", options]
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        wait_for(lambda: len(entries(diary)) == 2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    children = [entry["pid"] for entry in entries(diary)]
    wait_for(lambda: not any(map(is_running, children)), seconds=5)


# ---- where workers run ---------------------------------------------------------------------------

RANK = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "TORCHELASTIC_RUN_ID": "none",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
}


def test_a_worker_is_no_rank_of_the_run_that_started_it(
    tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {**RANK, "KEPT": "yes", "CUDA_VISIBLE_DEVICES": "0,1"}.items():
        monkeypatch.setenv(name, value)
    complete(ArithmeticStage(10, diary), tmp_path / "a", local(1))
    (entry,) = entries(diary)
    assert not set(RANK) & set(entry["environment"])
    assert entry["environment"]["KEPT"] == "yes"
    assert entry["environment"]["CUDA_VISIBLE_DEVICES"] == ""  # a stage for the CPU
    assert entry["device"] == "cpu"


def test_threads_are_shared_among_the_workers():
    cores = len(os.sched_getaffinity(0))
    for workers in (1, cores, 2 * cores):
        stage = ArithmeticStage(1000, Path("unused"))
        places = local(workers).places(stage.resources, 100)
        assert len(places) == workers
        assert {v["OMP_NUM_THREADS"] for _, v in places} == {str(max(1, cores // workers))}
    assert len(local(0).places(ArithmeticStage(1000, Path("unused")).resources, 100)) == cores


def test_a_childs_environment_can_be_told_more():
    assert child_environment({"CUDA_VISIBLE_DEVICES": "2"})["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("found", "visible", "chosen", "expected"),
    [
        (0, None, None, []),
        (0, "", None, []),
        (0, "0,1", None, []),  # named, but not there
        (3, None, None, ["0", "1", "2"]),
        (3, None, (2, 0), ["2", "0"]),
        (2, "4, 6", None, ["4", "6"]),
        (2, "4,6", (1,), ["6"]),
        (2, "GPU-aa,GPU-bb", (1,), ["GPU-bb"]),
        (1, "5,99", None, ["5"]),  # CUDA ignores what follows a device that is not there
    ],
)
def test_a_gpu_is_named_as_the_parent_sees_it(found, visible, chosen, expected):
    assert device_names(found, visible, chosen) == expected


@pytest.mark.parametrize("chosen", [(1,), (-1,)])
def test_a_gpu_that_is_not_there_is_refused(chosen: tuple[int, ...]):
    with pytest.raises(RetroDataError, match=r"engine\.devices names GPU .*found 1 visible"):
        device_names(1, "7", chosen)


def test_no_gpu_is_used_where_none_is_wanted():
    assert visible_devices(()) == []


def test_one_worker_takes_all_devices_where_a_stage_wants_them_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("retro_data.engines.local.visible_devices", lambda chosen: ["3", "5"])
    stage = ArithmeticStage(1000, Path("unused"))
    stage.resources = Resources(gpu=True)
    alone = [("cuda:0", {"CUDA_VISIBLE_DEVICES": name}) for name in ("3", "5")]
    assert LocalEngine().places(stage.resources, 100) == alone
    stage.resources = Resources(gpu=True, together=True)
    assert LocalEngine().places(stage.resources, 100) == [("cuda", {"CUDA_VISIBLE_DEVICES": "3,5"})]


@pytest.mark.gpu
def test_each_worker_sees_one_gpu(tmp_path: Path, diary: Path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    stage = ArithmeticStage(ROWS, diary, seconds=0.2, resources=Resources(gpu=True))
    complete(stage, tmp_path / "a", LocalEngine())
    seen = {(e["device"], e["environment"]["CUDA_VISIBLE_DEVICES"]) for e in entries(diary)}
    assert seen <= {("cuda:0", name) for name in visible_devices(None)}
    assert read_manifest(tmp_path / "a")["devices"] == [torch.cuda.get_device_name(0)]


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_blocks_are_given_out_in_runs_and_each_once(runs: int) -> None:
    """A worker's own run in order; one that is done takes from the end of the longest."""
    pending = PendingBlocks(tile(17, 1), runs)
    first = [block.index for _ in range(3) if (block := pending.next_of(0)) is not None]
    assert first == [0, 1, 2]
    rest = [block.index for block in iter(lambda: pending.next_of(runs - 1), None)]
    assert sorted(first + rest) == list(range(17))
    assert rest[: 17 // runs - 3] == sorted(rest[: 17 // runs - 3])


# ---- a cluster, as far as it needs no Ray --------------------------------------------------------


def test_a_block_that_was_not_made_is_the_next_one_of_its_run() -> None:
    pending = PendingBlocks(tile(6, 1), 2)
    taken = pending.next_of(1)
    assert taken is not None
    pending.give_back(1, taken)
    again = [block.index for block in iter(lambda: pending.next_of(1), None)]
    assert again == [3, 4, 5, 2, 1, 0]
    assert not pending


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retro_data.engines.ray_cluster.find_spec", lambda name: None)
    with (
        pytest.raises(RetroDataError, match=r"pip install 'retro_data\[ray\]'"),
        open_engine(EngineSettings(kind="ray")),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "slurm"}, r"engine\.kind='slurm': expected local or ray"),
        ({"kind": "ray", "devices": (0,)}, r"engine\.devices=\[0\].*set engine\.gpus"),
        ({"tries": 0}, r"engine\.tries=0: expected at least 1"),
        (
            {"kind": "ray", "address": "ray://a:10001"},
            r"on a node of it, with engine\.address=auto",
        ),
    ],
)
def test_what_an_engine_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RetroDataError, match=message):
        EngineSettings(**given)


GIB = 2**30
HEAD = {"CPU": 4, "memory": 8 * GIB}
GPU_NODE = {"CPU": 24, "GPU": 4, "memory": 64 * GIB}
WHOLE, ONE, GPU = Resources(threads=0), Resources(threads=1), Resources(gpu=True, threads=0)
TOGETHER = Resources(gpu=True, threads=0, together=True)


@pytest.mark.parametrize(
    ("nodes", "wanted", "blocks", "settings", "expected"),
    [  # expected: device, GPUs, CPUs, memory in GiB, room
        ([HEAD, HEAD], WHOLE, 9, {}, ("cpu", 0, 4, 1, 2)),
        ([HEAD, GPU_NODE], WHOLE, 9, {}, ("cpu", 0, 4, 1, 7)),  # as large as the smallest node
        ([HEAD, GPU_NODE], WHOLE, 1, {}, ("cpu", 0, 24, 1, 1)),  # as the largest
        ([HEAD, GPU_NODE], ONE, 9, {}, ("cpu", 0, 1, 1, 28)),
        ([HEAD, GPU_NODE], GPU, 9, {}, ("cuda:0", 1, 6, 1, 4)),  # the head's CPUs are for others
        ([HEAD, GPU_NODE], GPU, 9, {"gpus": 0}, ("cpu", 0, 4, 1, 7)),
        ([HEAD, GPU_NODE], TOGETHER, 9, {"gpus": 4}, ("cuda", 4, 24, 1, 1)),
        ([HEAD], GPU, 9, {}, ("cpu", 0, 4, 1, 1)),
        ([HEAD], GPU, 9, {"gpus": 1}, ("cuda:0", 1, 1, 1, 0)),  # none yet: it waits for one
        ([HEAD, GPU_NODE], ONE, 9, {"cpus": 2, "memory": 8 * GIB}, ("cpu", 0, 2, 8, 9)),
        ([{"memory": GIB / 2}], WHOLE, 9, {}, ("cpu", 0, 1, 0.5, 0)),
    ],
)
def test_a_worker_is_as_large_as_the_nodes_let_it_be(nodes, wanted, blocks, settings, expected):
    shape = worker_shape(EngineSettings(kind="ray", **settings), wanted, nodes, blocks)
    assert (shape.device, shape.gpus, shape.cpus, shape.memory / GIB, shape.room) == expected
    assert shape.variables.get("OMP_NUM_THREADS") == (None if shape.gpus else str(shape.cpus))
