"""Settings of the engines: where blocks are made, and with how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retro_data.artifact import free
from retro_data.errors import RetroDataError

KINDS = ("local", "ray")


@dataclass(frozen=True)
class EngineSettings:
    """Where the work runs. Nothing here changes a byte of any artifact on the same device kind.

    But where an index rotates its vectors (OPQ), training by another number of threads does.

    `engine: ray` is short for `engine: {kind: ray}`.

    Attributes:
        devices: local: GPUs to use, as their indices among the visible ones; None means all, [] none.
        workers: local: CPU workers a stage, 0 lets each stage choose by the cores there are; ray: most
            workers of a stage at a time, 0 means as many as the cluster has room for.
        kind: "local": processes of this machine; "ray": actors of a Ray cluster.
        address: ray: "auto" joins the cluster that runs, "host:port" that one; None the one that the
            variable RAY_ADDRESS names, and where it names none, a cluster of this machine alone is
            started. A connection that the program has already is used whatever stands here.
        gpus: ray: GPUs of a worker, in stages that use any; None means one where the cluster has any
            now, 0 none. 1 waits for a cluster that grows GPUs on demand.
        cpus: ray: CPUs of a worker; 0 lets each stage choose by the nodes there are.
        memory: ray: bytes of memory that a worker is given room for; 0 lets each stage choose.
        tries: ray: how often a block is made that raises, or whose worker dies, before the run ends.
            Blocks of a lost node run elsewhere and do not count.
    """

    devices: tuple[int, ...] | None = free(None)
    workers: int = free(0)
    kind: str = free("local")
    address: str | None = free(None)
    gpus: int | None = free(None)
    cpus: int = free(0)
    memory: int = free(0)
    tries: int = free(2)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RetroDataError(f"engine.kind={self.kind!r}: expected {' or '.join(KINDS)}.")
        if self.kind == "ray" and self.devices is not None:
            raise RetroDataError(
                f"engine.devices={list(self.devices)} names GPUs of one machine, but engine.kind is "
                "ray: leave it null, and set engine.gpus (0: none)."
            )
        if self.tries < 1:
            raise RetroDataError(f"engine.tries={self.tries}: expected at least 1.")
        if str(self.address).startswith("ray://"):
            raise RetroDataError(
                f"engine.address={self.address!r} is of Ray's client, whose program runs outside of the "
                "cluster. Run the command on a node of it, with engine.address=auto."
            )

    @staticmethod
    def named(given: Any) -> Any:
        """A mapping of settings, also where only the kind was given."""
        return {"kind": given} if isinstance(given, str) else given

    def on_this_machine(self) -> EngineSettings:
        """For what never runs on a cluster: measuring, and comparing aside."""
        return self if self.kind == "local" else EngineSettings()
