"""Blocks made on a real Ray cluster of several nodes, some of which are lost or strangers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from arithmetic_stage import SQUARES, ArithmeticStage, Threads, blocks_made, entries
from click.testing import CliRunner
from test_configs import compose
from test_pipeline import contents, differing
from test_readme import blocks, section

from retro_data import artifact, integrity, pipeline
from retro_data.artifact import open_array
from retro_data.cli import main
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.engines.local import StageFailed
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings, steps
from retro_data.stage import Block, Receipt, Stage, complete, read_receipts

os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", uuid.uuid4().hex  # read once
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs the extra `ray`")
from ray.cluster_utils import Cluster  # noqa: E402
from ray.scripts.scripts import cli as ray_command  # noqa: E402

from retro_data.engines import ray as ray_engine  # noqa: E402
from retro_data.engines.ray import RayEngine  # noqa: E402

ROWS = 55
STORE = 80 * 2**20  # bytes of each node's object store
RAY = EngineSettings(kind="ray", memory=2**28)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("auto", r"engine\.address=auto: no running Ray cluster was found"),
        ("127.0.0.1:9", r"engine\.address=127\.0\.0\.1:9: no Ray cluster could be joined there"),
    ],
)
def test_where_no_cluster_runs_it_is_said(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before any test has started one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = RayEngine(EngineSettings(kind="ray", address=address))
    with pytest.raises(RetroDataError, match=message):
        complete(ArithmeticStage(ROWS, tmp_path / "diary"), tmp_path / "a", engine)
    assert not ray.is_initialized()


def test_without_an_address_a_cluster_of_this_machine_is_started_and_ended(
    tmp_path: Path, diary: Path, began: Began, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = _own_environment(), signal.getsignal(signal.SIGTERM)
    with RayEngine(RAY) as engine:
        complete(ArithmeticStage(ROWS, diary), tmp_path / "a", engine)
        assert ray.is_initialized()
        assert "started on this machine alone" in began.lines[0]
        engine.settings = dataclasses.replace(RAY, cpus=1000)
        with pytest.raises(StageFailed, match=r"no room yet for a worker, which takes 1000 CPUs"):
            complete(ArithmeticStage(ROWS, diary), tmp_path / "b", engine)
    assert not ray.is_initialized()
    assert (_own_environment(), signal.getsignal(signal.SIGTERM)) == before
    assert open_array(tmp_path / "a" / SQUARES).tolist() == [i * i for i in range(ROWS)]


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the head runs in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Cluster]:
    """A head with one CPU, to which no stranger can connect; RAY_ADDRESS names it."""
    with contextlib.chdir(home):
        made = Cluster(initialize_head=True, head_node_args=node_arguments(include_dashboard=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
    made.shutdown()


@pytest.fixture
def engine(cluster: Cluster) -> Iterator[RayEngine]:
    with RayEngine(RAY) as made:
        yield made
    assert not ray.is_initialized()


def node_arguments(**more: Any) -> dict[str, Any]:
    """Of a node that was started as a rank of a job of Slurm."""
    rank = {"RANK": "3", "SLURM_PROCID": "3"}
    return {"num_cpus": 1, "object_store_memory": STORE, "env_vars": rank, **more}


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Any]:
    node = cluster.add_node(**node_arguments())
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary.jsonl"


class Began(logging.Handler):
    """Which workers have begun, by stage: (beginning of Ray's name of the node, process)."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.workers: dict[str, list[tuple[str, int]]] = {}
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.lines.append(line)
        found = re.fullmatch(r"(\w+): worker \d+ on .*, (\w+)\), process (\d+) began", line)
        if found:
            stage, node, pid = found.groups()
            self.workers.setdefault(stage, []).append((node, int(pid)))


@pytest.fixture
def began() -> Iterator[Began]:
    handler, logger = Began(), logging.getLogger("retro_data.engines")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


# ---- the same bytes ------------------------------------------------------------------------------


class Unlucky(RayEngine):
    """Loses its newest node in the middle of some stages, with blocks in the hands of its worker.

    That a worker has a block in hand is made sure by freezing it; the other one is frozen until the
    worker of that node has made a block, so that neither does all the work before.
    """

    def __init__(self, cluster: Cluster, began: Began, stages: set[str]) -> None:
        super().__init__(RAY)
        self.cluster, self.began, self.stages = cluster, began, set(stages)
        self.receipts_after: dict[str, int] = {}

    def run(self, stage: Stage, folder: Path, missing: Sequence[Block]) -> Iterator[Receipt]:
        receipts = super().run(stage, folder, missing)
        if stage.name not in self.stages:
            yield from receipts
            return
        (node,) = self.cluster.worker_nodes
        yield next(receipts)
        frozen = self._workers(stage.name)
        others = [pid for name, pid in frozen.items() if name != node.node_id[:8]]
        if node.node_id[:8] not in frozen:
            _signal(others, signal.SIGSTOP)
            yield next(receipts)  # of a block that was done already, or of the lost node's worker
            while node.node_id[:8] not in self._workers(stage.name):
                yield next(receipts)
        doomed = [self._workers(stage.name)[node.node_id[:8]]]
        _signal(doomed, signal.SIGSTOP)
        _signal(others, signal.SIGCONT)
        for _ in range(2):
            yield next(receipts)
        self.cluster.remove_node(node, allow_graceful=False)
        _signal(doomed, signal.SIGKILL)
        self.cluster.add_node(**node_arguments())
        left = list(receipts)
        self.receipts_after[stage.name] = len(left)
        yield from left

    def _workers(self, stage: str) -> dict[str, int]:
        return dict(self.began.workers.get(stage, []))


def _signal(pids: Sequence[int], which: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, which)


def test_a_corpus_is_prepared_while_nodes_are_lost(
    small: Any, cluster: Cluster, second: Any, began: Began, tmp_path: Path
):
    """To the bytes that processes of one machine make, with a node lost in each of two stages."""
    sizes = {"embedder": {"block_rows": 48}, "neighbors": {"block_rows": 48}}
    arguments = small()
    for group, size in sizes.items():
        arguments[group] = {**arguments[group], **size}
    there, here = tmp_path / "cluster", tmp_path / "local"
    engine = Unlucky(cluster, began, {"embeddings", "neighbors"})
    try:
        pipeline.prepare(Settings.create(**{**arguments, "root": there}), engine)
        nodes = {name: {node for node, _ in found} for name, found in began.workers.items()}
        assert all(engine.receipts_after[name] > 2 for name in ("embeddings", "neighbors"))
        # The head, the node that is lost first, and the one that comes in its place.
        assert len(nodes["embeddings"] | nodes["neighbors"]) >= 3
        assert sum("was lost during block" in line for line in began.lines) == 2, began.lines
    finally:
        engine.close()
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node)
    assert f"joined the cluster at {cluster.address}" in began.lines[0]
    pipeline.prepare(Settings.create(**{**arguments, "root": here}), LocalEngine())
    assert differing(contents(there), contents(here)) == []
    for folder in there.glob("*/*"):
        receipts = read_receipts(folder)
        assert len({receipt.block for receipt in receipts}) == len(receipts)
        assert not list(folder.rglob(f"{artifact.TEMPORARY}*"))


def test_the_files_of_an_index_are_made_by_a_cluster(
    small: Any, engine: RayEngine, second: Any, began: Began
):
    """To the bytes that this process makes."""
    index = {"factory": "IVF4,SQfp16", "shard_rows": 64}
    settings = Settings.create(**small(index=index, neighbors={"search": "index"}))
    for step in itertools.takewhile(lambda s: s.stage.name != "neighbors", steps(settings)):
        inline = step.stage.name != "index"
        manifest = complete(step.stage, step.folder, InlineEngine() if inline else engine)
    assert list(began.workers) == ["index"]
    assert manifest["figures"]["shards"] > 2
    made = next(step for step in steps(settings) if step.stage.name == "index")
    assert integrity.recompute(made.stage, made.folder, InlineEngine(), 1.0) == []


def test_a_worker_is_no_rank_and_makes_two_blocks_at_once(
    cluster: Cluster, tmp_path: Path, diary: Path
):
    """Under a connection of the program's own, which stays."""
    stage = ArithmeticStage(ROWS, diary, fate={0: "pair"}, resources=Threads(blocks_at_once=2))
    with ray.init(log_to_driver=False, logging_level=logging.ERROR):
        with RayEngine(RAY) as engine:
            complete(stage, tmp_path / "a", engine)
        assert ray.is_initialized()
    assert sorted(blocks_made(diary)) == list(range(6))
    assert open_array(tmp_path / "a" / SQUARES).tolist() == [i * i for i in range(ROWS)]
    assert len({entry["pid"] for entry in entries(diary)} | {os.getpid()}) == 2
    environment = entries(diary)[0]["environment"]
    assert not {"RANK", "SLURM_PROCID"} & set(environment)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_workers_come_as_the_cluster_grows(
    cluster: Cluster, engine: RayEngine, tmp_path: Path, diary: Path
):
    """Block 1 waits until another process has begun a block: only a second node has room for one."""
    stage = ArithmeticStage(ROWS, diary, fate={1: "meet"})
    with contextlib.closing(engine.run(stage, tmp_path, stage.blocks())) as receipts:
        first = next(receipts)
        node = cluster.add_node(wait=False, **node_arguments())
        rest = [receipt.block for receipt in receipts]
    cluster.remove_node(node)
    assert sorted([first.block, *rest]) == list(range(6))


# ---- failures ------------------------------------------------------------------------------------


def test_a_failing_block_is_tried_elsewhere_and_ends_the_run_with_its_traceback(
    engine: RayEngine, tmp_path: Path, diary: Path
):
    with pytest.raises(StageFailed) as failure:
        complete(ArithmeticStage(ROWS, diary, fate={0: "raise"}), tmp_path / "a", engine)
    message = str(failure.value)
    assert "block 0 failed on" in message
    assert "try 2 of 2: ArithmeticError: no square for block 0" in message
    assert "arithmetic_stage.py" in message
    tried = [entry["pid"] for entry in entries(diary) if entry["block"] == 0]
    assert len(tried) == len(set(tried)) == 2
    complete(ArithmeticStage(ROWS, diary), tmp_path / "a", InlineEngine())  # goes on


def test_a_block_that_kills_its_workers_ends_the_run(
    engine: RayEngine, tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_engine, "SETTLE_SECONDS", 0.5)
    with pytest.raises(StageFailed, match=r"was lost during block 0: .*worker process has died"):
        complete(ArithmeticStage(ROWS, diary, fate={0: "kill"}), tmp_path / "a", engine)
    assert blocks_made(diary).count(0) == 2


def test_a_node_that_joins_and_sees_another_root_ends_the_run_before_it_works(
    cluster: Cluster,
    engine: RayEngine,
    home: Path,
    tmp_path: Path,
    diary: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The root's path goes by the folder that a process runs in, as others by a host's mounts."""
    monkeypatch.setattr(ray_engine, "SEEN_SECONDS", 1.0)
    root = Path("/proc/self/cwd/root")
    if not root.parent.exists():
        pytest.skip("needs /proc")
    elsewhere = tmp_path / "elsewhere"
    for place in (home, elsewhere):
        (place / "root").mkdir(parents=True)
    monkeypatch.chdir(home)
    stage = ArithmeticStage(ROWS, diary, fate={1: "meet"})  # waits for a second worker
    with contextlib.closing(engine.run(stage, root, stage.blocks())) as receipts:
        next(receipts)
        with contextlib.chdir(elsewhere):
            node = cluster.add_node(**node_arguments())
        try:
            with pytest.raises(StageFailed) as failure:
                list(receipts)
        finally:
            cluster.remove_node(node)
    assert (
        f"{node.node_id[:8]}) does not see what this machine sees: {root} is there, but is another"
        in str(failure.value)
    )
    assert len({entry["pid"] for entry in entries(diary)}) == 1
    assert list((elsewhere / "root").iterdir()) == []


# ---- what the README says ------------------------------------------------------------------------


def test_the_commands_of_the_readme(
    cluster: Cluster, tiny_encoder: Path, corpus_file: Path, tmp_path: Path, began: Began
):
    """The machines' commands have these options; the last one joins the cluster, and prepares."""
    text = section("## A cluster")
    (block,) = blocks(text, "bash")
    *machines, prepare = block.strip().splitlines()
    help_text = CliRunner().invoke(ray_command, ["start", "--help"]).output
    for line in machines:
        assert line.startswith("ray start --")
        assert all(f"  {option} " in help_text for option in re.findall(r"--[a-z-]+", line))
    symmetric = CliRunner().invoke(ray_command, ["symmetric-run", "--help"])
    assert "--min-nodes" in symmetric.output
    (manifest,) = map(yaml.safe_load, blocks(text, "yaml"))
    assert manifest["spec"]["entrypoint"] == prepare
    assert prepare in blocks(text, "sh")[0]
    overrides = re.sub(r"data\.(root|corpus\.path)=\S+ ", "", prepare).split()[2:]
    overrides += [f"data.root={tmp_path}", f"data.corpus.path={corpus_file}"]
    overrides += [f"data.embedder.name={tiny_encoder}", "data.tokenizer.vocab_size=400"]
    settings = hydra.utils.instantiate(compose(*overrides).data).settings()
    pipeline.prepare(settings, InlineEngine())
    shutil.rmtree(tmp_path / "neighbors")  # what is left for the cluster
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["prepare", *overrides]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert f"joined the cluster at {cluster.address} (address auto)" in began.lines[0]
    assert list(began.workers) == ["neighbors"]
