"""Several GPUs of one host: prepared by all, trained on by all. `pytest -m gpu` where there are two."""

from __future__ import annotations

import contextlib
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
import psutil
import pytest
import torch
from arithmetic_stage import ArithmeticStage, entries
from device_stage import DeviceStage

from retro_data import RetroDataModule, pipeline
from retro_data.engines import EngineSettings, LocalEngine
from retro_data.exact import Search
from retro_data.stage import Resources, complete
from retro_data.store import Embeddings, NeighborLists
from retro_data.vectors import Vectors

DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICES < 2, reason="needs two CUDA devices"),
]
Small = Callable[..., dict[str, Any]]
RUN = Path(__file__).with_name("resumed_run.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += [f"--nproc-per-node={DEVICES}"]


def start(launch: list[str], folder: Path, arguments: dict[str, Any]) -> subprocess.Popen[str]:
    told = {"folder": str(folder), "arguments": arguments, "devices": DEVICES, "accelerator": "gpu"}
    return subprocess.Popen(
        [*launch, str(RUN), json.dumps(told, default=str)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def workers_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if "retro_data.engines.worker" in child.cmdline():
                found.append(child)
    return found


def lines(folder: Path, rank: int) -> list[list[int]]:
    text = (folder / f"order-{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def arrays(root: Path) -> dict[str, Any]:
    (embeddings,) = (root / "embeddings").iterdir()
    (neighbors,) = (root / "neighbors").iterdir()
    return {
        "vectors": np.concatenate(list(Embeddings(embeddings).blocks())),
        "ids": NeighborLists(neighbors).ids,
    }


@pytest.mark.parametrize("launch", [TORCHRUN, [sys.executable]], ids=["torchrun", "lightning"])
def test_all_ranks_prepare_on_all_devices_and_see_each_sample_once(
    small: Small, tmp_path: Path, launch: list[str]
) -> None:
    given = {"seq_len": 64, "batch_size": 4, "splits": {"val": 0.2}}
    arguments = {**small(root=tmp_path / "all"), **given}
    run = start(launch, tmp_path / "run", arguments)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]
    alone = RetroDataModule(**{**small(root=tmp_path / "one"), **given}, engine={"devices": [1]})
    alone.prepare_data()
    for name, array in arrays(tmp_path / "all").items():
        np.testing.assert_array_equal(array, arrays(tmp_path / "one")[name], err_msg=name)
    alone.setup("fit")
    dataset = alone.dataset("train")
    expected = sorted(dataset[i]["chunk_ids"][0].item() for i in range(len(dataset)))
    ranks = [lines(tmp_path / "run", rank) for rank in range(DEVICES)]
    half = len(ranks[0]) // 2  # of two epochs
    for epoch in (slice(0, half), slice(half, None)):
        seen = [i for rank in ranks for batch in rank[epoch] for i in batch if i >= 0]
        assert sorted(seen) == expected


def test_a_killed_worker_ends_all_ranks_with_its_cause_and_the_next_run_resumes(
    small: Small, tmp_path: Path
) -> None:
    arguments = {**small(root=tmp_path / "root"), "seq_len": 64, "batch_size": 4}
    run = start(TORCHRUN, tmp_path / "killed", arguments)
    deadline = time.monotonic() + 240
    while not (tmp_path / "root" / "embeddings").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    victims: list[psutil.Process] = []
    while not victims:  # the second worker of the stage
        assert time.monotonic() < deadline
        victims = workers_of(run)[1:]
    victims[0].send_signal(signal.SIGKILL)
    _, errors = run.communicate(timeout=300)
    assert run.returncode != 0
    said = errors.count("was killed by SIGKILL")  # each rank ends with its traceback
    assert said >= DEVICES, errors[-3000:]
    assert "embeddings: the worker process" in errors
    again = start(TORCHRUN, tmp_path / "again", arguments)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-3000:]


def test_devices_that_are_not_visible_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = LocalEngine(EngineSettings(devices=(1,)))
    notes = complete(DeviceStage(), tmp_path / "chosen", chosen)["notes"]
    assert {(note["visible"], note["count"]) for note in notes} == {("1", 1)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # of this process' children alone
    code = (
        "from pathlib import Path; import sys; from device_stage import DeviceStage\n"
        "from retro_data.engines import LocalEngine; from retro_data.stage import complete\n"
        "if __name__ == '__main__':\n"
        "    notes = complete(DeviceStage(), Path(sys.argv[1]), LocalEngine())['notes']\n"
        "    assert {note['visible'] for note in notes} == {'1'}, notes\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "visible")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_workers_of_gpus_wait_for_a_later_stage_while_one_needs_fewer(tmp_path: Path) -> None:
    pids = []
    with LocalEngine() as engine:
        for name, blocks in (("all", 10 * DEVICES), ("one", 1), ("again", 10 * DEVICES)):
            diary = tmp_path / f"{name}.diary"
            fate = dict.fromkeys(range(blocks), "meet") if blocks > 1 else {}
            needs = Resources(gpu=True)
            stage = ArithmeticStage(10 * blocks, diary, fate=fate, meeting=DEVICES, resources=needs)
            complete(stage, tmp_path / name, engine)
            pids.append({entry["pid"] for entry in entries(diary)})
    assert len(pids[0]) == DEVICES
    assert pids[1] < pids[0]
    assert pids[2] == pids[0]


def test_exact_search_shares_queries_among_all_devices() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9000, 64)).astype(np.float16)
    low = np.arange(len(x)) // 20 * 20
    own = np.stack([low, np.minimum(low + 20, len(x))], 1)
    one, many = (Search(Vectors([x]), metric="l2", device=d) for d in ("cuda:1", "cuda"))
    assert (len(one.gpus), len(many.gpus)) == (1, DEVICES)
    for found, expected in (
        (many(x, 8, own), one(x, 8, own)),
        (many.of_itself(8, own).rows(0, len(x)), one(x, 8, own)),
    ):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_neighbors_of_a_prepared_corpus_are_those_of_one_device(
    small: Small, tmp_path: Path
) -> None:
    found = []
    for name, devices in (("all", None), ("one", [1])):
        settings = pipeline.Settings.create(
            **small(root=tmp_path / name, engine={"devices": devices})
        )
        pipeline.prepare(settings)
        found.append(arrays(settings.root)["ids"])
    np.testing.assert_array_equal(*found)
