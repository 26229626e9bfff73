"""A connection to a Ray cluster, and how large a worker of a stage is made there.

Ray is told to be quiet and to stay at home: no dashboard, no usage statistics, no upload of the
program's folder. A connection that the program has already is used and left as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from retro_data.engines.local import available_cores, cpu_variables
from retro_data.engines.settings import EngineSettings
from retro_data.errors import RetroDataError
from retro_data.stage import Resources

log = logging.getLogger(__name__)

STORE_BYTES = 80 * 2**20  # of Ray's object store: only stages and receipts pass through it
KNOCK_SECONDS = 10.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would have each node build an environment anew
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a CPU worker is told to see no GPU
}


def require_ray() -> None:
    if find_spec("ray") is None:
        raise RetroDataError(
            "engine.kind=ray needs Ray, which is not installed: `pip install 'retro_data[ray]'`, "
            "here and on every node. Or set engine.kind=local."
        )


class Cluster:
    """A connection to a Ray cluster, opened when made.

    Args:
        address: as `EngineSettings.address`.

    Raises:
        RetroDataError: there is no such cluster.
    """

    def __init__(self, address: str | None) -> None:
        require_ray()
        with _environment(QUIET):
            import ray

            self.ray: Any = ray
            self.ours = not ray.is_initialized()
            self.is_alone = False  # of this machine, and cannot grow
            how = self._connect(address) if self.ours else "this program is connected to"
        nodes = self.nodes()
        amount = ", ".join(f"{sum(n.get(r, 0) for n in nodes):g} {r}s" for r in ("CPU", "GPU"))
        log.info("Ray: %s: %d nodes, %s", how, len(nodes), amount)

    def _connect(self, address: str | None) -> str:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {}
        if address == "local":
            options = {
                "num_cpus": available_cores(),
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            }
        else:
            _knock(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
        try:
            with _own_signals():
                self.ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # of many kinds
            raise RetroDataError(_unreachable(address, error)) from error
        found = self.ray.get_runtime_context().gcs_address
        self.is_alone = address == "local"
        if self.is_alone:
            return (
                "started on this machine alone (engine.address=auto joins a cluster that runs), "
                f"{found}"
            )
        return f"joined the cluster at {found} (address {address})"

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; not if the program's own is used."""
        if self.ours:
            self.ray.shutdown()

    def nodes(self) -> list[dict[str, float]]:
        """Resources of each node that is alive."""
        return [dict(node["Resources"]) for node in self.ray.nodes() if node["Alive"]]

    def lives(self, node: str) -> bool:
        return any(n["NodeID"] == node and n["Alive"] for n in self.ray.nodes())


def _knock(address: str) -> None:
    """Ray itself would try for ever to join where nobody answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as error:
        raise RetroDataError(_unreachable(address, error)) from error


def _unreachable(address: str, error: Exception) -> str:
    found = " ".join(str(error).split())
    if address == "local":
        return f"Ray could not be started on this machine: {type(error).__name__}: {found}"
    if address == "auto":
        return (
            "engine.address=auto: no running Ray cluster was found from this machine. Start one with "
            "`ray start --head` here, or name one (engine.address=host:6379, or the variable "
            f"RAY_ADDRESS); engine.address=null starts one of this machine alone. ({found})"
        )
    return (
        f"engine.address={address}: no Ray cluster could be joined there "
        f"({type(error).__name__}: {found}). Expected auto, or host:port of `ray start --head`."
    )


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that are set for a while, where they have no value yet; what Ray sets of others goes."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in variables.items() if name not in before})
    try:
        yield
    finally:
        for name in {*os.environ, *before}:
            ray_needs_it = name.startswith("RAY_") and name not in variables
            if ray_needs_it or os.environ.get(name) == before.get(name):
                continue
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself: the program's own way to end stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


# ---- the size of a worker ------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerShape:
    """What each worker of a stage is given.

    Attributes:
        device: that the stage is opened on.
        gpus, cpus, memory: resources it takes of its node; memory in bytes.
        variables: of its environment.
        room: workers that the nodes there are now could hold, were they empty.
    """

    device: str
    gpus: int
    cpus: int
    memory: int
    variables: dict[str, str]
    room: int

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPUs, " if self.gpus else ""
        return f"{gpus}{self.cpus} CPUs and {self.memory / 2**30:.1f} GiB of memory"


def worker_shape(
    settings: EngineSettings, wanted: Resources, nodes: Sequence[Mapping[str, float]], blocks: int
) -> WorkerShape:
    """How large a worker is made, by the nodes there are.

    A GPU worker takes its GPU's share of a node's CPUs. A CPU worker of a stage that can use a whole
    machine takes the smallest node's CPUs, so that every node is used whole or nearly; the largest
    node's if there is one block only.

    Args:
        wanted: by the stage.
        nodes: resources of each.
        blocks: to be made.
    """
    gpus = 0
    if wanted.gpu:
        gpus = int(any(_whole(n, "GPU") for n in nodes)) if settings.gpus is None else settings.gpus
    cpus = settings.cpus or (_cpus_beside(gpus, nodes) if gpus else _cpus(wanted, nodes, blocks))
    most = max((_whole(node, "memory") for node in nodes), default=0)
    memory = settings.memory or min(wanted.memory, most)
    need = {"GPU": gpus, "CPU": cpus, "memory": memory}
    on_gpus = "cuda" if wanted.together else "cuda:0"
    return WorkerShape(
        on_gpus if gpus else "cpu",
        *(gpus, cpus, memory),
        {} if gpus else cpu_variables(max(1, cpus)),
        sum(min(_whole(n, name) // count for name, count in need.items() if count) for n in nodes),
    )


def _cpus_beside(gpus: int, nodes: Sequence[Mapping[str, float]]) -> int:
    """CPUs to each worker's GPUs where that are fewest; none where nodes do not say."""
    shares = [
        _whole(n, "CPU") // (_whole(n, "GPU") // gpus) for n in nodes if _whole(n, "GPU") >= gpus
    ]
    return min(shares, default=1)


def _cpus(wanted: Resources, nodes: Sequence[Mapping[str, float]], blocks: int) -> int:
    counts = [count for node in nodes if (count := _whole(node, "CPU"))] or [1]
    whole = max(counts) if blocks == 1 else min(counts)
    return min(wanted.threads or whole, max(counts))


def _whole(node: Mapping[str, float], resource: str) -> int:
    return int(node.get(resource, 0))
