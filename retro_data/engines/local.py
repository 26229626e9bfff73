"""Blocks made by children of this process: one a GPU (or one for all), or one or more CPU workers.

A child is started anew by `python -m retro_data.engines.worker`, never forked (CUDA does not survive
a fork), sees the devices that it works on, and no variables by which torch.distributed, torchrun or
Slurm would take it for a rank. Parent and child speak over a socket pair: the stage once, then a
block for every receipt, of as many at once as the stage wants. The first failure, or a child that
dies, ends the run with its cause. A child takes seconds to start (imports, a GPU's context, compiled
kernels), so the next stage that wants the same environment is given to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from retro_data.engines.inline import InlineEngine
from retro_data.engines.pending import PendingBlocks
from retro_data.engines.settings import EngineSettings
from retro_data.errors import RetroDataError
from retro_data.stage import Block, Receipt, Resources, Stage

RANK_VARIABLES = (
    "MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK NODE_RANK GROUP_RANK ROLE_RANK "
    "LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE ROLE_NAME PL_GLOBAL_SEED"
).split()
RANK_PREFIXES = ("TORCHELASTIC_", "SLURM_", "PMI_", "OMPI_")
ONE_GPU = "cuda:0"  # what a worker calls the only one that it sees
END_SECONDS = 10.0  # for a worker without work to end by itself
KEPT = "Finished blocks are kept; the next `retro-data prepare` goes on from them."


class StageFailed(RetroDataError):
    """A block failed, or a worker died."""


class LocalEngine:
    """Runs blocks in child processes, one a device; within `with`, children outlive their stage.

    Args:
        settings: devices and number of CPU workers.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self.settings = settings or EngineSettings()
        self._keeps = False
        self._idle: list[_Child] = []

    def __enter__(self) -> LocalEngine:
        self._keeps = True
        return self

    def __exit__(self, *_: object) -> None:
        self._keeps = False
        self._end_idle()

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]:
        if stage.resources.light:
            yield from InlineEngine().run(stage, folder, missing)
            return
        places = self.places(stage.resources, len(missing))
        pending = PendingBlocks(missing, len(places) if stage.resources.in_runs else 1)
        taken = [self._take_idle(variables) for _, variables in places]
        children = {child.connection: child for child in taken if child is not None}
        try:
            self._end_idle(but_on=places[0][0] if places else "")  # before others start
            for number, (device, variables) in enumerate(places):
                child = taken[number] or _Child(variables)
                children[child.connection] = child
                child.begin(number, stage, folder, device)
            running = dict(children)
            while running:
                for connection in wait(list(running)):
                    child = children[connection]  # type: ignore[index]
                    receipt = child.receive(stage.name)
                    if receipt is not None:
                        yield receipt
                    block = pending.next_of(child.number)
                    if block is not None:
                        child.give(block)
                    elif child.dismiss():
                        del running[child.connection]
            for child in children.values():
                child.receive(stage.name)  # that it closed the stage
            self._idle += children.values()
            children.clear()
        finally:
            for child in children.values():
                child.stop()
            if not self._keeps:
                self._end_idle()

    def _take_idle(self, variables: dict[str, str]) -> _Child | None:
        for child in self._idle:
            if child.variables == variables and child.process.poll() is None:
                self._idle.remove(child)
                return child
        return None

    def _end_idle(self, but_on: str = "") -> None:
        """End children that wait for a stage; those of other GPUs stay where one begins on some."""
        kept = [c for c in self._idle if c.device == but_on == ONE_GPU and c.process.poll() is None]
        ended = [child for child in self._idle if child not in kept]
        self._idle = kept
        try:
            for child in ended:
                child.give(None)
            for child in ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(END_SECONDS)
        finally:
            for child in ended:
                child.stop()

    def places(self, wanted: Resources, blocks: int) -> list[tuple[str, dict[str, str]]]:
        """(device, environment) of each worker that `run` starts for so many blocks of a stage."""
        devices = visible_devices(self.settings.devices) if wanted.gpu else []
        if devices and wanted.together:
            return [("cuda", {"CUDA_VISIBLE_DEVICES": ",".join(devices)})]
        if devices:
            return [(ONE_GPU, {"CUDA_VISIBLE_DEVICES": name}) for name in devices[:blocks]]
        cores = available_cores()
        threads = wanted.threads or cores
        workers = self.settings.workers or max(1, cores // threads)
        workers = min(workers, blocks)
        return [("cpu", cpu_variables(max(1, cores // workers)))] * workers


def cpu_variables(threads: int) -> dict[str, str]:
    """The environment of a CPU worker of so many threads."""
    count = str(threads)
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "RAYON_NUM_THREADS": count,
        "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
    }


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices(chosen: Sequence[int] | None) -> list[str]:
    """Names of the GPUs to use, as CUDA_VISIBLE_DEVICES takes them.

    Args:
        chosen: indices among the visible GPUs; None means all of them.
    """
    if chosen is not None and not chosen:
        return []
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return device_names(torch.cuda.device_count(), names, chosen)


def device_names(found: int, visible: str | None, chosen: Sequence[int] | None) -> list[str]:
    """What a child's CUDA_VISIBLE_DEVICES must say for each chosen GPU.

    Args:
        found: GPUs that this process can use.
        visible: this process' own CUDA_VISIBLE_DEVICES, which may name GPUs by index or UUID.
        chosen: indices among them; None means all.
    """
    tokens = [t.strip() for t in visible.split(",") if t.strip()] if visible else []
    tokens = tokens[:found] if tokens else [str(i) for i in range(found)]
    if chosen is None:
        return tokens
    missing = [i for i in chosen if not 0 <= i < len(tokens)]
    if missing:
        raise RetroDataError(
            f"engine.devices names GPU {missing}, found {len(tokens)} visible. "
            "Set engine.devices to indices of visible GPUs, or null for all."
        )
    return [tokens[i] for i in chosen]


class _Child:
    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables
        ours, theirs = socket.socketpair()
        lifeline_read, self.lifeline = os.pipe()  # closes when this process dies, however it dies
        descriptors = (theirs.fileno(), lifeline_read)
        command = [sys.executable, "-m", "retro_data.engines.worker", *map(str, descriptors)]
        with theirs, _interrupts_held():
            self.process = subprocess.Popen(
                command,
                env=child_environment(variables),
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
            )
        os.close(lifeline_read)
        self.connection = Connection(ours.detach())
        self.number = 0  # among those of a stage
        self.device = ""
        self.threads = 0  # of it that still ask for blocks
        self.blocks: set[int] = set()  # in its hands

    def begin(self, number: int, stage: Stage, folder: Path, device: str) -> None:
        self.number, self.device = number, device
        self.threads = stage.resources.threads_of_worker(device)
        self.give((stage, folder, device))

    def give(self, work: Block | tuple[Stage, Path, str] | None) -> None:
        """Hand over the next block, or the next stage; None where there is none."""
        if isinstance(work, Block):
            self.blocks.add(work.index)
        # A child that is gone: `receive` meets the end of the stream, and says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(work)

    def receive(self, stage: str) -> Receipt | None:
        """The next message; None when a thread is ready for its first block, or the stage is closed."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise StageFailed(self._obituary(stage)) from None
        if kind == "failed":
            block, reason, trace = content
            raise StageFailed(
                f"{stage}: {describe([] if block is None else [block])} failed: {reason}\n"
                f"{KEPT}\n{trace}"
            )
        receipt: Receipt | None = content
        if receipt is not None:
            self.blocks.remove(receipt.block)
        return receipt

    def _obituary(self, stage: str) -> str:
        code = self.process.wait()
        if code < 0:
            cause = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                cause += " (often the kernel, for want of memory)"
        else:
            cause = f"ended with exit code {code}"
        return (
            f"{stage}: the worker process {self.process.pid} {cause} during "
            f"{describe(self.blocks)}. {KEPT}"
        )

    def dismiss(self) -> bool:
        """End the thread that asks for a block. Returns whether it was the last."""
        self.give(None)
        self.threads -= 1
        return not self.threads

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.connection.close()
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1


def describe(blocks: Iterable[int]) -> str:
    """What a worker does with these blocks in its hands, for a message."""
    names = " and ".join(map(str, sorted(blocks)))
    return f"block {names}" if names else "opening or closing the stage"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C reaches this thread after, and a process begun within only once it lets it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


def child_environment(variables: dict[str, str]) -> dict[str, str]:
    """This environment without what would make a child take itself for a distributed rank."""
    kept = {name: value for name, value in os.environ.items() if not names_rank(name)}
    return {**kept, "PYTHONPATH": os.pathsep.join(import_path()), **variables}


def names_rank(variable: str) -> bool:
    """Whether a process takes itself for a rank of a distributed run by this variable."""
    return variable in RANK_VARIABLES or variable.startswith(RANK_PREFIXES)


def import_path() -> list[str]:
    """Where this process finds its modules."""
    return [entry or os.getcwd() for entry in sys.path]
