"""Blocks made by actors of a Ray cluster, which may grow, and may lose nodes, while they are made.

The driver, this process, keeps everything that must be kept: which blocks are done, in hand, and still
to be given out. Actors are never restarted by Ray and no call is ever repeated by it: a restarted actor
waits for the resources of a node that is gone, and its blocks with it. Instead, the blocks of a
lost worker go back to the others, and new workers are asked for without waiting for them: they come
when there is room, on whatever node.

    asked for ──► look at the node ──► open the stage ──► blocks, until none is left
                  (the same root?)
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_data import artifact
from retro_data.engines.inline import InlineEngine
from retro_data.engines.local import KEPT, StageFailed, describe, import_path
from retro_data.engines.pending import PendingBlocks
from retro_data.engines.ray_cluster import Cluster, require_ray, worker_shape
from retro_data.engines.ray_worker import Failed, Made, Opened, Place, RayWorker, Token
from retro_data.engines.settings import EngineSettings
from retro_data.stage import Block, Receipt, Stage

log = logging.getLogger(__name__)

SEEN_SECONDS = 10.0  # until every node of a shared file system must see a new file
WAIT_SECONDS = 1.0
TELL_SECONDS = 30.0  # between two words about waiting for room
SETTLE_SECONDS = 3.0  # until a cluster knows that the node of a dead worker is dead, too
MOST_NODES_TOLD = 8
MOST_LOSSES = 10  # workers lost over one block, or one after the other before they opened the stage
ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class RayEngine:
    """Runs blocks in actors of a Ray cluster. Connects when the first block is to be made.

    Args:
        settings: which cluster, and how large its workers are.

    Raises:
        RetroDataError: Ray is not installed.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        require_ray()
        self.settings = settings or EngineSettings(kind="ray")
        self._cluster: Cluster | None = None

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]:
        if stage.resources.light:
            yield from InlineEngine().run(stage, folder, missing)
            return
        self._cluster = self._cluster or Cluster(self.settings.address)
        with (
            _token(folder) as token,
            contextlib.closing(
                _Run(self._cluster, self.settings, stage, folder, missing, token)
            ) as run,
        ):
            yield from run.receipts()

    def close(self) -> None:
        """Leave the cluster; a later run connects again."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Token]:
    token = Token(folder / artifact.temporary_name(), uuid.uuid4().hex, SEEN_SECONDS)
    token.path.write_text(token.content, "ascii")
    try:
        yield token
    finally:
        token.path.unlink(missing_ok=True)


@dataclass(eq=False)
class _Worker:
    number: int  # in the run of blocks that it works on; its successor takes it over
    actor: Any
    place: Place | None = None  # None: there is no room for it yet, or it is just starting
    is_open: bool = False
    blocks: dict[int, Block] = field(default_factory=dict)  # in its hands

    def __str__(self) -> str:
        if self.place is None:
            return f"worker {self.number}"
        return f"worker {self.number} on {self.place.host}, process {self.place.pid},"


_Call = tuple[_Worker, int | None]  # whose, and on which block


class _Run:
    """The blocks of one stage on their way through the workers."""

    def __init__(
        self,
        cluster: Cluster,
        settings: EngineSettings,
        stage: Stage,
        folder: Path,
        missing: Sequence[Block],
        token: Token,
    ) -> None:
        self.cluster, self.ray, self.settings = cluster, cluster.ray, settings
        self.stage, self.folder, self.token = stage, folder, token
        self.shape = worker_shape(self.settings, stage.resources, cluster.nodes(), len(missing))
        self.threads = stage.resources.threads_of_worker(self.shape.device)
        self.left = {block.index for block in missing}  # without a receipt
        first = min(self._wanted(), max(1, self.shape.room))
        self.pending = PendingBlocks(missing, first if stage.resources.in_runs else 1)
        self.workers: list[_Worker] = []
        self.calls: dict[Any, _Call] = {}  # answers to come
        # By block, None for opening the stage: tries that failed, and workers that were lost.
        self.tries: Counter[int | None] = Counter()
        self.losses: Counter[int | None] = Counter()
        self.lost_writers: set[str] = set()
        self.told = time.monotonic()
        self.given_stage = self.ray.put(stage)
        self.actor_class = self.ray.remote(RayWorker).options(
            num_gpus=self.shape.gpus,
            num_cpus=self.shape.cpus,
            memory=self.shape.memory,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=self.threads,
            runtime_env={"env_vars": self.shape.variables},
        )
        if not self.shape.room:
            if cluster.is_alone:
                raise StageFailed(self._no_room())
            log.warning("%s", self._no_room())

    def receipts(self) -> Iterator[Receipt]:
        self._ask()
        while self.left:
            ready, _ = self.ray.wait(list(self.calls), num_returns=1, timeout=WAIT_SECONDS)
            for reference in ready:
                receipt = self._answer(reference)
                if receipt is not None:
                    self.left.remove(receipt.block)
                    yield receipt
            self._ask()
            self._tell_of_waiting()

    def close(self) -> None:
        for worker in list(self.workers):
            self._let_go(worker)
        for writer in self.lost_writers:
            artifact.remove_temporaries_of(self.folder, writer)

    # ---- workers ---------------------------------------------------------------------------------

    def _wanted(self) -> int:
        """Workers that there is work for."""
        count = -(-len(self.left) // self.threads)
        return min(count, self.settings.workers or count)

    def _ask(self) -> None:
        """Ask for workers: all that there is room for, later as many again as there are.

        They wait in the cluster, where they are what an autoscaler goes by, not here.
        """
        started = sum(worker.place is not None for worker in self.workers)
        waiting = len(self.workers) - started
        while (
            self.pending
            and len(self.workers) < self._wanted()
            and waiting < max(1, self.shape.room - started, started)
        ):
            taken = {worker.number for worker in self.workers}
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            worker = _Worker(number, self.actor_class.remote(import_path()))
            self.workers.append(worker)
            self._call(worker, "look", self.token)
            waiting += 1

    def _call(self, worker: _Worker, method: str, *arguments: Any) -> None:
        block = next((a.index for a in arguments if isinstance(a, Block)), None)
        self.calls[getattr(worker.actor, method).remote(*arguments)] = worker, block

    def _give(self, worker: _Worker) -> None:
        """The next block, or its leave where there is none for it."""
        block = self.pending.next_of(worker.number)
        if block is not None:
            worker.blocks[block.index] = block
            self._call(worker, "make", block)
        elif not worker.blocks:
            self._let_go(worker)

    def _let_go(self, worker: _Worker) -> None:
        """End a worker, whatever it does; its blocks go back to the others."""
        self.workers.remove(worker)
        self.calls = {c: of for c, of in self.calls.items() if of[0] is not worker}
        for block in worker.blocks.values():
            self.pending.give_back(worker.number, block)
        if worker.blocks and worker.place is not None:
            self.lost_writers.add(worker.place.writer)
        with contextlib.suppress(self.ray.exceptions.RaySystemError, RuntimeError, ValueError):
            self.ray.kill(worker.actor)  # unless the cluster itself is gone

    # ---- answers ---------------------------------------------------------------------------------

    def _answer(self, reference: Any) -> Receipt | None:
        """Take a worker's answer, and give it what comes next."""
        worker, block = self.calls.pop(reference)
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
        except errors.RayTaskError as error:  # what was sent could not be read there
            answer = Failed(type(error).__name__, str(error))
        except errors.RayError as error:
            self._lose(worker, error)
            return None
        match answer:
            case Place():
                self._arrive(worker, answer)
            case Opened():
                worker.is_open = True
                log.info("%s: %s began", self.stage.name, str(worker).rstrip(","))
                self.losses[None] = 0
                for _ in range(self.threads):
                    if worker in self.workers:
                        self._give(worker)
            case Made(receipt, warnings):
                for line in warnings:
                    log.warning("%s: %s", worker.place.host if worker.place else "", line)
                del worker.blocks[receipt.block]
                self._give(worker)
                return receipt
            case Failed():
                self._fail(worker, block, answer)
        return None

    def _arrive(self, worker: _Worker, place: Place) -> None:
        worker.place = place
        if place.trouble is not None:
            raise StageFailed(
                f"{self.stage.name}: node {place.host} does not see what this machine sees: "
                f"{place.trouble}. Set root to storage that all nodes share, mounted at the same "
                f"path on each, and writable. {KEPT}"
            )
        self._compare(place)
        self._call(worker, "open", self.given_stage, self.folder, self.shape.device)

    def _compare(self, place: Place) -> None:
        """Other code there would make other bytes under the same key."""
        ours = artifact.library_versions()
        other = {
            name: (version, ours[name])
            for name, version in place.versions.items()
            if name in ours and version.split("+")[0] != ours[name].split("+")[0]
        }
        if "retro-data" in other:
            there, here = other["retro-data"]
            raise StageFailed(
                f"{self.stage.name}: node {place.host} has retro_data {there}, this machine {here}: "
                "install the same version on all."
            )
        for name, (there, here) in other.items():
            log.warning(
                "%s: node %s has %s %s, this machine %s: its blocks may have other bytes",
                *(self.stage.name, place.host, name, there, here),
            )

    # ---- failures --------------------------------------------------------------------------------

    def _fail(self, worker: _Worker, block: int | None, failed: Failed) -> None:
        """A block, or opening the stage, raised. Another worker tries it: a device may be at fault."""
        self.tries[block] += 1
        what = (
            f"{self.stage.name}: {_what(block)} failed on {_host(worker)}, try {self.tries[block]} of "
            f"{self.settings.tries}: {failed.reason}"
        )
        if self.tries[block] >= self.settings.tries:
            raise StageFailed(f"{what}\n{KEPT}\n{failed.trace}")
        log.warning("%s", what)
        self._let_go(worker)

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """A worker is gone, or cannot be reached. What it had in hand is made by others.

        If its node is gone, too, that says nothing of the block; else the block may be what kills.
        """
        if getattr(error, "actor_init_failed", False):
            raise StageFailed(
                f"{self.stage.name}: a worker cannot be started: is retro_data installed on every node? "
                f"{KEPT}\n{ANSI_COLOR.sub('', str(error))}"
            )
        alone = isinstance(error, self.ray.exceptions.ActorDiedError) and self._node_lives(worker)
        lost = sorted(worker.blocks) if worker.is_open else [None]
        cause = _cause(error)
        what = f"{self.stage.name}: {worker} was lost during {describe(worker.blocks)}: {cause}"
        self._let_go(worker)
        for block in lost:
            self.losses[block] += 1
            self.tries[block] += alone
            most = MOST_LOSSES if worker.is_open else max(MOST_LOSSES, self.shape.room)
            if self.tries[block] >= self.settings.tries or self.losses[block] >= most:
                raise StageFailed(f"{what}\nThis was not the first time. {KEPT}")
        log.warning("%s", what)

    def _node_lives(self, worker: _Worker) -> bool:
        """Whether the worker's node is there still; a cluster takes a moment to see that it is not."""
        if worker.place is None:
            return False
        until = time.monotonic() + SETTLE_SECONDS
        while lives := self.cluster.lives(worker.place.node):
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        return lives

    def _tell_of_waiting(self) -> None:
        if any(worker.place for worker in self.workers):
            self.told = time.monotonic()
        elif time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            log.warning("%s", self._no_room())

    def _no_room(self) -> str:
        nodes = [
            ", ".join(f"{node.get(name, 0):g} {name}s" for name in ("GPU", "CPU"))
            for node in self.cluster.nodes()[:MOST_NODES_TOLD]
        ]
        return (
            f"{self.stage.name}: no room yet for a worker, which takes {self.shape}. There are "
            f"{len(self.cluster.nodes())} nodes, of {'; '.join(nodes)}. Add a node, wait for what "
            "others hold, or lower engine.gpus, engine.cpus or engine.memory."
        )


def _what(block: int | None) -> str:
    return describe([] if block is None else [block])


def _cause(error: Exception) -> str:
    """What Ray knows of a death, in a line, without its names for it and its advice."""
    text = " ".join(str(error).split())
    return text[max(0, text.find("The actor is dead")) :].split(" Some common causes")[0]


def _host(worker: _Worker) -> str:
    return worker.place.host if worker.place else "a node"
