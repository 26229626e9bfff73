"""The data as a program sees it: from settings to what was prepared of them, and its sequences.

    data = RetroData(root="data", corpus={"name": "wiki", "path": "wiki/*.jsonl"})
    data.prepare_data()
    batch = data.dataset("train").__getitems__([0, 1])

Lightning is never loaded, torch with the first dataset or where a stage wants it. `datamodule` adds
Lightning's hooks.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_data import pipeline
from retro_data.errors import RetroDataError
from retro_data.order import check_shares
from retro_data.pipeline import Prepared, Settings
from retro_data.sequences import MODES

if TYPE_CHECKING:
    from retro_data.dataset import RetroDataset
    from retro_data.leakage_curve import EvaluationLeakage

PREPARE = ("auto", "build", "verify")


class RetroData:
    """Batches of sequences with their retrieved neighbors, from a corpus of text.

    Every batch is as the table in `retro_data.dataset` says. `vocab_size`, `pad_id`, `bos_id`,
    `eos_id`, `chunk_size` and `bytes_per_token` are known as soon as the data is prepared, so a
    model can be built before training: call `prepare_data()` first.

    The sizes of batches, `seed`, `num_workers`, `pin_memory` and `prepare_data_per_node` are for the
    loaders of `RetroDataModule`, and so is `mixture`, which is held against the corpora here.

    Args:
        root: folder of all artifacts, on storage that all nodes share.
        corpus: one corpus (`name`, `path`, ...) or a list of them; `retro_data.corpus`.
        tokenizer, chunks, splits, embedder, database, index, neighbors, engine: settings of each
            stage, as in `retro_data.pipeline.Settings`; None for its defaults. `engine="ray"` prepares
            on a cluster, with its devices instead of the Trainer's.
        selection: filter the stored neighbors and rank them again, without searching again: settings as
            in `retro_data.selection`; None: they are read as they are stored.
        near_duplicates: leave documents that are near-duplicates of evaluation documents out of
            training and database, and split near-duplicates as one: settings as in
            `retro_data.shingles`, {} for the defaults; None: they are not looked for.
        chunk_size: tokens of a chunk.
        prepare: "build" brings the artifacts up to date with the corpus; "verify" never builds and
            names the command that does; "auto" verifies where root is read-only, else builds.
        seq_len: tokens of a sequence, whole chunks.
        mode: "document": one document a sequence, the end padded; "packed": training sequences are
            filled with whole chunks of several documents. Evaluation is of one document a sequence.
        mixture: corpus -> its share of the training samples, where corpora are to be trained on more
            or less than their size says: {"wiki": 0.7, "manuals": 0.3}. An epoch has as many samples
            as these corpora have sequences, and each corpus goes on where the epoch before left it.
            None: every sequence once an epoch.
        num_neighbors: neighbors of each chunk, at most `neighbors.num_stored`; 0 reads none.
        eval_stride: tokens by which evaluation moves on, whole chunks; None: half of seq_len.
        batch_size: sequences a rank and step in training.
        eval_batch_size: the same in evaluation; None: as in training.
        global_batch_size: sequences of all ranks a step in training, instead of `batch_size`: then
            a run can be resumed on another number of ranks.
        seed: of the order of samples.
        num_workers: loader processes. 0 is fastest unless storage is slow.
        pin_memory: None: when training on CUDA.
        prefetch: for roots on disk that memory does not hold: all pages of a batch are asked for at
            once. With it, num_workers read several batches at a time.
        prepare_data_per_node: for roots that are not shared: each node prepares its own.

    Raises:
        RetroDataError: an unknown setting, or a value that cannot be.
    """

    def __init__(
        self,
        root: str | Path,
        corpus: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tokenizer: Mapping[str, Any] | None = None,
        chunk_size: int = 64,
        chunks: Mapping[str, Any] | None = None,
        splits: Mapping[str, Any] | None = None,
        embedder: Mapping[str, Any] | None = None,
        database: Mapping[str, Any] | None = None,
        index: Mapping[str, Any] | None = None,
        neighbors: Mapping[str, Any] | None = None,
        selection: Mapping[str, Any] | None = None,
        near_duplicates: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | str | None = None,
        prepare: str = "auto",
        seq_len: int = 1024,
        mode: str = "document",
        mixture: Mapping[str, float] | None = None,
        num_neighbors: int = 2,
        eval_stride: int | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        global_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        prefetch: bool = False,
        prepare_data_per_node: bool = False,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = prepare_data_per_node  # Lightning's own is set just above
        self.root = _absolute(os.fspath(root))
        self.corpus = _with_absolute_paths(plain(corpus))
        self._groups = {
            "tokenizer": plain(tokenizer),
            "chunks": plain(chunks),
            "splits": plain(splits),
            "embedder": plain(embedder),
            "database": plain(database),
            "index": plain(index),
            "neighbors": plain(neighbors),
            "selection": plain(selection),
            "near_duplicates": plain(near_duplicates),
            "engine": plain(engine),
        }
        self._keep_arguments(root=root, corpus=corpus)
        if prepare not in PREPARE:
            raise RetroDataError(f"prepare={prepare!r}; expected one of {', '.join(PREPARE)}.")
        if mode not in MODES:
            raise RetroDataError(f"mode={mode!r}; expected one of {', '.join(MODES)}.")
        self.prepare = prepare
        self.chunk_size = chunk_size
        self.seq_len, self.mode = seq_len, mode
        self.mixture: dict[str, float] | None = plain(mixture)
        self.num_neighbors, self.eval_stride = num_neighbors, eval_stride
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.prefetch = prefetch
        self._prepared: Prepared | None = None
        self._datasets: dict[str, RetroDataset] = {}
        settings = self.settings()
        if self.mixture is not None:
            check_shares(self.mixture, [corpus.name for corpus in settings.corpora])

    def _keep_arguments(self, **paths: Any) -> None:
        """For a subclass that remembers what it was made of; `paths` may have become absolute.

        Lightning finds the arguments in the frames that call this one.
        """

    # ---- what the data is ------------------------------------------------------------------------

    def settings(self) -> Settings:
        """Settings of the pipeline."""
        groups = dict(self._groups)
        if self.mode == "packed":
            groups["packing"] = {"seq_len": self.seq_len}
        return Settings.create(self.root, self.corpus, chunk_size=self.chunk_size, **groups)

    @property
    def prepared(self) -> Prepared:
        """All artifacts that are read, opened when first asked for."""
        if self._prepared is None:
            self._prepared = pipeline.open_prepared(self.settings())
        return self._prepared

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.prepared.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        """Stands where there is no token; equal to vocab_size."""
        return self.prepared.tokenizer.pad_id

    @property
    def bos_id(self) -> int | None:
        """The token that begins documents, None if the tokenizer has none."""
        return self.prepared.tokenizer.bos_id

    @property
    def eos_id(self) -> int | None:
        """The label after a document's last token, None if the tokenizer has none."""
        return self.prepared.tokenizer.eos_id

    @property
    def bytes_per_token(self) -> np.ndarray[Any, Any] | None:
        """(vocab_size,) int32 UTF-8 bytes of each id; None if they would not be exact."""
        return self.prepared.tokenizer.bytes_per_token

    def dataset(self, split: str) -> RetroDataset:
        """The sequences of "train", or of "val" or "test" as evaluation reads them."""
        from retro_data.dataset import RetroDataset  # loads torch

        if split not in self._datasets:
            self._datasets[split] = RetroDataset(
                self.prepared.corpora,
                split,
                database=self.prepared.database,
                seq_len=self.seq_len,
                pad_id=self.pad_id,
                eos_id=self.eos_id,
                num_neighbors=self.num_neighbors,
                eval_stride=None if split == "train" else self._eval_stride(),
                mode=self.mode if split == "train" else "document",
                prefetch=self.prefetch,
            )
        return self._datasets[split]

    def leakage(self) -> EvaluationLeakage | None:
        """How much of each evaluation chunk was retrieved; None where that was not measured."""
        from retro_data.leakage_curve import EvaluationLeakage

        return EvaluationLeakage.of(self.prepared.corpora, self.num_neighbors)

    def _eval_stride(self) -> int:
        half = self.seq_len // self.chunk_size // 2 * self.chunk_size
        return self.eval_stride or max(half, self.chunk_size)

    # ---- preparing -------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build or verify the artifacts, as `prepare` says.

        Raises:
            RetroDataError: they cannot be built, or under "verify", are not there.
        """
        if self._may_build():
            pipeline.prepare(self.settings())
        else:
            pipeline.check(self.settings())
        self._forget()

    def _forget(self) -> None:
        """Close what was opened: it may be of another state of the corpus."""
        self._prepared = None
        self._datasets.clear()

    def _may_build(self) -> bool:
        read_only = os.path.exists(self.root) and not os.access(self.root, os.W_OK)
        return self.prepare == "build" or (self.prepare == "auto" and not read_only)


# ---- arguments -----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The same value in lists, dicts, strings and numbers."""
    if "omegaconf" in sys.modules:
        from omegaconf import OmegaConf

        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def _absolute(path: str) -> str:
    """A path as seen from where the program was started, also when Hydra changed the folder."""
    path = os.path.expanduser(path)
    if "hydra" in sys.modules:
        from hydra.utils import to_absolute_path

        return to_absolute_path(path)
    return os.path.abspath(path)


def _with_absolute_paths(corpus: Any) -> Any:
    if isinstance(corpus, list):
        return [_with_absolute_paths(one) for one in corpus]
    path = corpus.get("path")
    if not isinstance(path, str) or "://" in path:
        return corpus
    absolute = _absolute(path)
    if corpus.get("format") == "huggingface" and not os.path.exists(absolute):
        return corpus  # the name of a dataset on the hub
    return {**corpus, "path": absolute}
