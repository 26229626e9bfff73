"""The stage `codebook`: which index is built, trained on a uniform sample of the whole database.

    all rows ─► uniform sample ─► train ─► trained.index: centroids, rotation, codes, no row

What kind of index is chosen in `index_factory`; training is faiss' own. Every worker of the stage
`index` fills a copy of the one trained index, so that all files of an index share their centroids
and codes, and what is found in them is what one index of all rows would find.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import store
from retro_data.database import Database, DatabasePlace, draw_rows
from retro_data.errors import RetroDataError
from retro_data.index_factory import (
    FLAT,
    SMALL_ROWS,
    choose_factory,
    import_faiss,
    installed_faiss,
)
from retro_data.index_parts import (
    Array,
    Index,
    create,
    has_plain_centroids,
    innermost,
    inverted,
    metric_code,
    reason,
    same_graph,
    threads,
    transform,
    write,
)
from retro_data.index_settings import IndexSettings, check_metric
from retro_data.stage import Block, BlockWriter, Receipt, Resources, block_files

log = logging.getLogger(__name__)

POINTS_PER_LIST = 100  # training vectors a list, between faiss' 39 and 256
POINTS_PER_CODEBOOK = 65_536  # training vectors of a product quantizer: 256 a centroid
TRAINING_BYTES = 10  # for each number of a vector trained on: as stored, as float32, and rotated


@dataclass
class CodebookContext:
    database: Database
    device: str


class CodebookStage:
    """Chooses an index of all admitted rows of a database, and trains it; it stays empty.

    Args:
        settings: which index.
        metric: "l2" or "ip".
        database: whose vectors.
    """

    name = "codebook"
    version = 1
    unit = "indexes"
    tolerance = math.inf  # a rotation trained by another number of threads has other bytes

    def __init__(self, settings: IndexSettings, metric: str, database: DatabasePlace) -> None:
        check_metric(metric)
        self.settings = settings
        self.metric = metric
        self.database = database
        self.resources = Resources()
        with contextlib.suppress(RetroDataError):  # unfinished or damaged: nothing can be made yet
            self.resources = self._resources()

    def _resources(self) -> Resources:
        rows, dim = shape_of(self.database)
        sample = min(self.settings.sample_size, rows)  # of which fewer may do
        return Resources(
            gpu=has_gpu_wheel(),
            threads=0,
            light=rows < SMALL_ROWS,
            memory=Resources.memory + rows + TRAINING_BYTES * sample * dim,
        )

    def key_fields(self) -> dict[str, Any]:
        return {"metric": self.metric, **self.settings.training_fields()}

    def parents(self) -> dict[str, str]:
        return self.database.parents()

    def blocks(self) -> list[Block]:
        return [Block(0, 0, 1)]

    @contextmanager
    def open(self, device: str) -> Iterator[CodebookContext]:
        with threads(self.settings.threads):
            yield CodebookContext(self.database.open(), device)

    def make(self, context: CodebookContext, block: Block, out: BlockWriter) -> None:
        database = context.database
        began = time.monotonic()
        trainer = Trainer(self.settings, self.metric, database, context.device)
        trainer.train()
        seconds = time.monotonic() - began
        with out.file(store.TRAINED_INDEX) as handle:
            write(trainer.index, handle)
        out.rows = trainer.training_rows
        out.note("factory", trainer.factory)
        out.note("dim", database.shape[1])
        out.note("figures", {"build_seconds": round(seconds, 3)})

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        (receipt,) = receipts
        files = block_files(receipts)
        return {"arrays": {}, "files": files, "rows": receipt.rows, **receipt.notes}


def shape_of(database: DatabasePlace) -> tuple[int, int]:
    """(rows, dim) of a finished database."""
    return database.rows, store.Embeddings(database.embeddings[0][0]).shape[1]


def rows_to_train_on(factory: str) -> int:
    """Most vectors that an index of one of the planners' families is trained on; 0 for none."""
    lists = re.search(r"IVF(\d+)", factory)
    if not lists and not re.search(r"OPQ|PCA|PQ|SQ", factory):
        return 0
    return max(POINTS_PER_CODEBOOK, POINTS_PER_LIST * int(lists[1]) if lists else 0)


def has_gpu_wheel() -> bool:
    return any(name.startswith("faiss-gpu") for name in installed_faiss())


def gpu_resources(device: str) -> Any:
    """What faiss needs to work on a device, None where it cannot."""
    faiss = import_faiss()
    on_gpu = device.startswith("cuda") and hasattr(faiss, "StandardGpuResources")
    return faiss.StandardGpuResources() if on_gpu else None


# ---- training ------------------------------------------------------------------------------------


class Trainer:
    """Chooses and trains an index.

    Attributes:
        factory: what was chosen, once `train` is done.
        index: the faiss index, trained and empty, on the CPU.
        training_rows: vectors that it was trained on.
    """

    def __init__(
        self, settings: IndexSettings, metric: str, database: Database, device: str
    ) -> None:
        self.settings = settings
        self.database = database
        self.faiss = import_faiss()
        self.metric = metric
        self.gpu = gpu_resources(device)
        self.index: Index = None
        self.factory = FLAT
        self.training_rows = 0

    def train(self) -> None:
        settings, dim = self.settings, self.database.shape[1]
        rows = int(np.count_nonzero(self.database.admitted))
        factory = settings.factory
        if factory is None:
            factory = choose_factory(
                *(settings.planner, rows, dim, settings.max_index_memory, settings.memory_mapped)
            )
        self.factory = factory
        self.index = create(self.factory, dim, self.metric)
        least, wanted = _training_rows(self.index)
        if least <= rows and least > settings.sample_size:
            raise RetroDataError(
                f"{self.factory} needs at least {least} vectors to train on, "
                f"index.sample_size={settings.sample_size} allows fewer. Raise it, or name a "
                "smaller index.factory."
            )
        sample = self._sample(min(wanted, settings.sample_size))
        if len(sample) < least:
            log.log(
                logging.INFO if settings.factory is None else logging.WARNING,
                "%s needs %d vectors to train on, found %d: %s is built instead",
                *(self.factory, least, len(sample), FLAT),
            )
            self.factory = FLAT
            self.index = create(FLAT, dim, self.metric)
        elif not self.index.is_trained:
            self.training_rows = len(sample)
            try:
                self._train_on(sample)
            except RuntimeError as error:
                raise RetroDataError(
                    f"{self.factory} cannot be trained on {len(sample)} vectors of dimension "
                    f"{dim}: {reason(error)}. Name another index.factory, or null to let "
                    "index.planner choose."
                ) from error

    def _sample(self, count: int) -> Array:
        """(<= count, d) float32: admitted rows, drawn from the whole database alike."""
        rows = draw_rows(self.database.admitted, count, [self.settings.seed, 0])
        vectors: Array = self.database.vectors.take(rows).astype(np.float32)
        nonzero = vectors.any(axis=1)
        return vectors if nonzero.all() else vectors[nonzero]

    def _train_on(self, sample: Array) -> None:
        lists = inverted(self.index)
        if lists is not None:
            lists.cp.seed = self.settings.seed
            lists.cp.min_points_per_centroid = 1  # fewer are no news worth a warning
            if hasattr(lists, "do_polysemous_training"):
                lists.do_polysemous_training = False  # minutes, for a filter that is not used
            # Left to faiss, the graph of centroids would be linked outside `same_graph`.
            if has_plain_centroids(lists):
                self._train_centroids(lists, transform(self.index, sample, train=True))
        self.index.train(sample)

    def _train_centroids(self, lists: Index, sample: Array) -> None:
        faiss = self.faiss
        assigner = faiss.IndexFlat(lists.d, metric_code(self.metric))
        if self.gpu is not None:
            assigner = faiss.index_cpu_to_gpu(self.gpu, 0, assigner)
        clustering = faiss.Clustering(lists.d, lists.nlist, lists.cp)
        clustering.train(sample, assigner)
        centroids = faiss.vector_to_array(clustering.centroids).reshape(lists.nlist, lists.d)
        lists.quantizer.reset()
        with same_graph():
            lists.quantizer.add(centroids)


def _training_rows(index: Index) -> tuple[int, int]:
    """How many vectors an index needs to train at all, and how many to train well."""
    faiss = import_faiss()
    if index.is_trained:
        return 0, 0
    least, wanted = 1, POINTS_PER_CODEBOOK
    lists, outer = inverted(index), faiss.downcast_index(index)
    if lists is not None:
        least, wanted = lists.nlist, max(wanted, POINTS_PER_LIST * lists.nlist)
    for part in (lists, innermost(index)):
        if hasattr(part, "pq"):
            least = max(least, part.pq.ksub)
    if isinstance(outer, faiss.IndexPreTransform):
        steps = [outer.chain.at(i) for i in range(outer.chain.size())]
        least = max(least, *(0 if step.is_trained else max(256, step.d_in) for step in steps))
    return least, max(least, wanted)
