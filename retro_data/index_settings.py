"""Which index is built, within which budgets, and how its recall is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retro_data import artifact
from retro_data.artifact import free, keyed
from retro_data.errors import RetroDataError
from retro_data.index_factory import PLANNERS, parse_memory

METRICS = ("l2", "ip")
TRAINING_FIELDS = (  # of the keyed ones, those that the stage `codebook` depends on
    *("planner", "factory", "max_index_memory", "memory_mapped", "sample_size", "seed"),
)


@dataclass(frozen=True)
class IndexSettings:
    """Which index, within which budgets, and how its recall is measured.

    Attributes:
        planner: who chooses the index where `factory` is None: "autofaiss", or "builtin", which
            needs no package beyond faiss.
        factory: a faiss factory string, e.g. "IVF4096,SQfp16"; None lets the planner choose.
        max_index_memory: largest size of the whole index, all its files together, e.g. "16G"; it
            bounds what workers hold, too, unless `shard_rows` is set: beside their batches of rows,
            twice a file each while its lists grow.
        memory_mapped: choose only what can be searched from disk through a memory map, so no HNSW
            graph over all vectors, whose search jumps all over the file.
        max_query_ms: latency budget of one query on one thread. A slower index is told in a
            warning; time never decides, or no two machines would agree.
        target_recall: recall@`recall_at` that the search parameter must reach.
        recall_at: k of the measured recall@k.
        recall_queries: database rows drawn as queries to measure it.
        sample_size: most vectors to train on, drawn from all rows.
        seed: of the samples and of k-means.
        shard_rows: most database rows of one file of the index, a shard; each is made by one
            worker, which holds it whole. 0 takes as many as fill a sixteenth of `max_index_memory`,
            and a million at least: a small index is one file.
        threads: of training, and of each worker that adds rows; 0 leaves faiss its own number. In no
            key, though a rotation (OPQ) that another number trains has other bytes, as good.
    """

    planner: str = keyed("autofaiss")
    factory: str | None = keyed(None)
    max_index_memory: str = keyed("16G")
    memory_mapped: bool = keyed(True)
    target_recall: float = keyed(0.95)
    recall_at: int = keyed(10)
    recall_queries: int = keyed(1000)
    sample_size: int = keyed(2_000_000)
    seed: int = keyed(0)
    shard_rows: int = keyed(0)
    max_query_ms: float = free(10.0)
    threads: int = free(0)

    def __post_init__(self) -> None:
        if self.planner not in PLANNERS:
            raise RetroDataError(
                f"index.planner={self.planner!r}: expected one of {', '.join(PLANNERS)}."
            )
        parse_memory(self.max_index_memory)
        if not 0 < self.target_recall <= 1:
            raise RetroDataError(
                f"index.target_recall={self.target_recall}: expected more than 0 and at most 1."
            )
        for name in ("recall_at", "recall_queries", "sample_size", "max_query_ms"):
            if getattr(self, name) <= 0:
                raise RetroDataError(f"index.{name}={getattr(self, name)}: expected more than 0.")
        if self.shard_rows < 0:
            raise RetroDataError(f"index.shard_rows={self.shard_rows}: expected 0 or more.")

    def training_fields(self) -> dict[str, Any]:
        """The keyed settings that change what the index is trained to."""
        return {name: getattr(self, name) for name in TRAINING_FIELDS}

    def filling_fields(self) -> dict[str, Any]:
        """The other keyed settings."""
        fields = artifact.key_fields(self)
        return {name: value for name, value in fields.items() if name not in TRAINING_FIELDS}


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise RetroDataError(f"metric {metric!r}: expected one of {', '.join(METRICS)}.")
