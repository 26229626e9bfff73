"""A worker of one stage in an actor of a Ray cluster: looks at its node, opens the stage, makes blocks.

What goes wrong in a stage comes back as an answer, with the traceback it had here. So whatever Ray
itself raises about a worker is of the cluster: it was lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_data import artifact
from retro_data.engines.local import names_rank
from retro_data.engines.worker import device_kind
from retro_data.stage import Block, Receipt, Stage, make_block

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Token:
    """A file of the driver's by which a node knows the artifact's folder: no other holds it.

    Attributes:
        path: of the file, in the artifact's folder.
        content: that it holds.
        seconds: after which a network file system must show it.
    """

    path: Path
    content: str
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where a worker is.

    Attributes:
        node: Ray's name of the node.
        host: name, address and the beginning of Ray's name, for messages.
        pid: of the worker.
        writer: how its temporary files are named, `artifact.writer`.
        versions: of the libraries that have a part in an artifact's bytes.
        trouble: why no work can be done there; None if it can.
    """

    node: str
    host: str
    pid: int
    writer: str
    versions: dict[str, str]
    trouble: str | None


@dataclass(frozen=True)
class Opened:
    """The stage is open."""


@dataclass(frozen=True)
class Made:
    """A block is done. `warnings` are what was logged meanwhile."""

    receipt: Receipt
    warnings: list[str]


@dataclass(frozen=True)
class Failed:
    """Opening the stage, or a block, raised."""

    reason: str
    trace: str


class RayWorker:
    """Becomes an actor.

    Args:
        path: where the driver finds its modules: for those that are not found here otherwise.
    """

    def __init__(self, path: Sequence[str]) -> None:
        # Of the job that started this node, or the program that started Ray.
        for name in [name for name in os.environ if names_rank(name)]:
            del os.environ[name]
        sys.path.extend(entry for entry in path if entry not in sys.path)
        self._warnings = _Warnings()
        logging.getLogger("retro_data").addHandler(self._warnings)
        self._contexts = contextlib.ExitStack()

    def look(self, token: Token) -> Place:
        """Where this worker is, and whether the artifact is there, too."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Place(
            node,
            f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, {node[:8]})",
            os.getpid(),
            artifact.writer(),
            artifact.library_versions(),
            trouble_with(token),
        )

    def open(self, stage: Stage, folder: Path, device: str) -> Opened | Failed:
        try:
            self._context = self._contexts.enter_context(stage.open(device))
            self._stage, self._folder, self._kind = stage, folder, device_kind(device)
        except Exception as error:
            return _failed(error)
        return Opened()

    def make(self, block: Block) -> Made | Failed:
        try:
            receipt = make_block(self._stage, self._context, block, self._folder, self._kind)
        except Exception as error:
            return _failed(error)
        return Made(receipt, self._warnings.take())


def trouble_with(token: Token) -> str | None:
    """Why this machine cannot work in the folder that the token lies in; None if it can."""
    folder = token.path.parent
    until = time.monotonic() + token.seconds
    while _read(token.path) != token.content:
        if time.monotonic() > until:
            if not folder.exists():
                return f"{folder} does not exist there"
            return (
                f"{folder} is there, but is another folder: a file just written in it is not found"
            )
        time.sleep(POLL_SECONDS)
    trial = folder / artifact.temporary_name()
    try:
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        return f"{folder} cannot be written to there ({error})"
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("ascii")
    except (OSError, ValueError):
        return None


def _failed(error: Exception) -> Failed:
    return Failed(f"{type(error).__name__}: {error}", traceback.format_exc())


class _Warnings(logging.Handler):
    """Keeps warnings, to be told where the run is followed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> list[str]:
        taken, self.lines = self.lines, []
        return taken
