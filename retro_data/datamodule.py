"""Lightning's hooks around the pipeline, the dataset and the samplers; nothing else.

    prepare_data   one process: build what is missing, or verify that nothing is
    setup          every process: open what was prepared, from its manifests
    *_dataloader   every process: its share of one global order, in finished batches
    state_dict     where in that order training stands, to resume from exactly there

It works under `lightning` and `pytorch_lightning` alike, and without a Trainer:

    datamodule.prepare_data()
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from retro_data.data import RetroData, plain
from retro_data.dataset import RetroDataset, collate
from retro_data.errors import RetroDataError
from retro_data.order import Mixture
from retro_data.pipeline import Settings
from retro_data.sampler import EvaluationSampler, GlobalOrderSampler

log = logging.getLogger(__name__)

UNTRUE_WARNINGS = (  # Lightning's advice, which does not hold for these loaders
    ".*does not have many workers which may be a bottleneck",
    ".*ended before the epoch ended and your dataloader is not resumable",
)
POSITION = "retro_data_position"  # marks our state in a checkpoint, whatever class saved it
ORDER_FIELDS = ("data", "seq_len", "mode", "mixture", "seed")  # what the order depends on


def _data_module_base() -> type:
    """One class that every installed Lightning takes for its own LightningDataModule."""
    bases = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            bases.append(importlib.import_module(package).LightningDataModule)
        except ImportError:
            continue
    if not bases:
        raise RetroDataError("RetroDataModule needs Lightning: `pip install lightning`.")
    return type("LightningDataModule", tuple(bases), {})


if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule as _LightningDataModule
else:
    _LightningDataModule = _data_module_base()


class RetroDataModule(RetroData, _LightningDataModule):
    """`RetroData`, of the same arguments, with Lightning's hooks.

    A checkpoint holds the position in global samples. Resumed inside an epoch, training goes on
    with exactly the samples that are left, on any number of ranks and workers with the same global
    batch size. (Weights are exact only from checkpoints between accumulations of gradients.)
    """

    _failure: Exception | None = None  # of prepare_data, until all processes are told
    _sampler: GlobalOrderSampler | None = None
    _loaded: dict[str, Any] | None = None

    def _keep_arguments(self, **paths: Any) -> None:
        self.save_hyperparameters(logger=False)
        for name, value in self.hparams.items():  # plain values load with weights_only=True
            self.hparams[name] = plain(value)
        for name, given in paths.items():
            if self.hparams[name] == plain(given):  # and not a subclass' argument of that name
                self.hparams[name] = getattr(self, name)

    def settings(self) -> Settings:
        """Settings of the pipeline; under a Trainer with its devices and no others, or the cluster's."""
        made = super().settings()
        if self.trainer is None or made.engine.kind != "local":
            return made
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        devices = tuple(self.trainer.device_ids) if on_gpu else ()
        engine = dataclasses.replace(made.engine, devices=devices)
        return dataclasses.replace(made, engine=engine)

    # ---- preparing -------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build or verify the artifacts, as `prepare` says.

        Raises:
            RetroDataError: they cannot be built, or under "verify", are not there. In a Trainer of
                several processes `setup` raises it instead, in all of them.
        """
        self._failure = None
        try:
            super().prepare_data()
        except Exception as error:
            if not self._is_distributed():
                raise
            self._failure = error

    def setup(self, stage: str | None = None) -> None:
        """Open what was prepared. The corpus itself is not looked at."""
        self._raise_failure()
        if stage in (None, "fit"):  # each fit begins at the start, unless a checkpoint says where
            self._sampler = self._loaded = None
        self._forget()
        log.debug("opened %s", self.prepared.key)
        for untrue in UNTRUE_WARNINGS:
            warnings.filterwarnings("ignore", untrue)

    def _is_distributed(self) -> bool:
        return self.trainer is not None and self.trainer.world_size > 1

    def _raise_failure(self) -> None:
        """Raise what prepare_data met, in every process: the others would wait for the one lost."""
        if not self._is_distributed():
            return
        assert self.trainer is not None
        own = "".join(traceback.format_exception(self._failure)) if self._failure else None
        per_node = self.prepare_data_per_node
        prepared_by = range(0, self.trainer.world_size, self.trainer.num_devices)
        for rank in prepared_by if per_node else [0]:
            failure = self.trainer.strategy.broadcast(own, src=rank)
            if failure:
                raise RetroDataError(
                    f"prepare_data failed on rank {rank}:\n{failure}"
                ) from self._failure

    # ---- loaders ---------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in a new order each epoch, from the resumed position on."""
        dataset = self._required("train")
        self._resume_saved_by_another_class()
        size = self._global_batch_size()
        first = self._sampler is None
        if self._sampler is None or self._sampler.global_batch_size != size:
            mixture = None
            if self.mixture is not None:
                mixture = Mixture(dataset.sequences_of_corpora, self.mixture)
            self._sampler = GlobalOrderSampler(
                dataset, size, **self._place(), seed=self.seed, mixture=mixture
            )
        if first and self._loaded is not None:
            self._sampler.load_state_dict(self._loaded)
        loader = _TrainLoader(dataset, sampler=self._sampler, **self._loader_settings())
        loader.before_first = self._check_position
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The split "val". A fit without such documents gets no loader and does not validate."""
        fitting = self.trainer is not None and self.trainer.state.fn == "fit"
        if fitting and not len(self.dataset("val")):
            return []
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The split "test"."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The split "test", in the order of the corpus; rows of padding have chunk_ids -1."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        dataset = self._required(split)
        place = self._place()
        rank_batch = self.eval_batch_size or self._global_batch_size() // place["num_replicas"]
        sampler = EvaluationSampler(dataset, rank_batch * place["num_replicas"], **place)
        return DataLoader(dataset, sampler=sampler, **self._loader_settings(sampler.batch_size))

    def _required(self, split: str) -> RetroDataset:
        dataset = self.dataset(split)
        if not len(dataset):
            documents = sum(len(c.split_of_document) for c in self.prepared.corpora)
            raise RetroDataError(
                f"none of the {documents} documents belongs to the split {split!r}. Raise "
                f"splits.{split}, or add a corpus with split: {split}."
            )
        return dataset

    def _place(self) -> dict[str, int]:
        """How many processes share the samples, and which of them this is."""
        if self.trainer is not None:
            return self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size()
            return {"num_replicas": world, "rank": torch.distributed.get_rank()}
        return {"num_replicas": 1, "rank": 0}

    def _global_batch_size(self) -> int:
        return self.global_batch_size or self.batch_size * self._place()["num_replicas"]

    def _loader_settings(self, batch_size: int | None = None) -> dict[str, Any]:
        pin = self.pin_memory
        if pin is None:
            trainer = self.trainer
            pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": batch_size or self._global_batch_size() // self._place()["num_replicas"],
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": collate,
            "pin_memory": pin,
        }

    # ---- resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the order of samples, in plain values; {} before training."""
        if self._sampler is None:
            return {}
        if self.trainer is None:
            position = self._sampler.state_dict()
        else:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            limit = self.trainer.num_training_batches
            position = self._sampler.state_dict(progress.processed, limit)
        drawn = self._sampler.drawn(position) if self.mixture else None
        return {
            POSITION: 1,
            **position,
            "samples_of_corpora": drawn,
            "global_batch_size": self._sampler.global_batch_size,
            "trainer_epoch": self._sampler.epoch,
            **self._order(),
        }

    def _order(self) -> dict[str, Any]:
        values = (self.prepared.key, self.seq_len, self.mode, self.mixture, self.seed)
        return dict(zip(ORDER_FIELDS, values, strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a position; only for training, since evaluation may be of any checkpoint.

        Raises:
            RetroDataError: the order of samples is another one, or inside an epoch, the global
                batch size is.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        own = self._order()
        other = [name for name in ORDER_FIELDS if state_dict.get(name) != own[name]]
        if other:
            found = ", ".join(f"{name}={state_dict.get(name)}" for name in other)
            expected = ", ".join(f"{name}={own[name]}" for name in other)
            raise RetroDataError(
                "the checkpoint was saved while training on another order of samples: it has "
                f"{found}; this DataModule has {expected}. Set what it has, or start a new run "
                "from the checkpoint's weights alone."
            )
        saved, size = state_dict["global_batch_size"], self._global_batch_size()
        if state_dict["samples"] and saved != size:
            raise RetroDataError(
                f"the checkpoint was saved inside an epoch with a global batch size of {saved}; "
                f"this run's is {size}: samples would be dropped or repeated. Set "
                f"global_batch_size={saved}, or resume from a checkpoint of an epoch's end."
            )
        self._loaded = state_dict
        if self._sampler is not None:
            self._sampler.load_state_dict(state_dict)

    def _resume_saved_by_another_class(self) -> None:
        """Find the position in the checkpoint that is being resumed, where Lightning did not.

        It files our state under the name of our class, so that a subclass, or the class a
        subclass was derived from, is not given it.
        """
        trainer = self.trainer
        if self._sampler is not None or self._loaded is not None:
            return
        if trainer is None or trainer.state.fn != "fit" or not trainer.ckpt_path:
            return
        checkpoint = trainer.strategy.load_checkpoint(trainer.ckpt_path)
        for value in checkpoint.values():
            if isinstance(value, dict) and POSITION in value:
                self.load_state_dict(value)

    def _check_position(self, loader: DataLoader[Any]) -> None:
        """Hold the position against the Trainer's own count, before the first batch of an epoch."""
        trainer, sampler = self.trainer, self._sampler
        if sampler is None or loader.sampler is not sampler:
            return
        if trainer is None and self._place()["num_replicas"] != sampler.num_replicas:
            raise RetroDataError(
                f"the train loader was made for {sampler.num_replicas} process, and is read by "
                f"{self._place()['num_replicas']}, each of which would train on everything. Hand "
                "the DataModule itself to the Trainer: trainer.fit(model, datamodule=...)."
            )
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        epoch, samples = sampler.next_position
        closed = self._loaded is not None and sampler.epoch > self._loaded["trainer_epoch"]
        if batches == 0 and samples and closed:  # the Trainer had left that epoch unfinished
            sampler.load_state_dict({"epoch": epoch + 1, "samples": 0})
        elif samples != batches * sampler.global_batch_size:
            raise RetroDataError(
                f"the data stands at {samples} global samples of its epoch, the Trainer at "
                f"{batches} batches of global_batch_size={sampler.global_batch_size}, which is "
                f"{batches * sampler.global_batch_size}. Resume with the DataModule and the "
                "global_batch_size the checkpoint was saved with, or from an epoch's end."
            )


class _TrainLoader(DataLoader[Any]):
    """A DataLoader that looks at its sampler at the first `next`, not already at `iter`.

    Lightning makes the iterator before it has restored where it stands and told the sampler the
    epoch; worker processes would read ahead from there.
    """

    before_first: Callable[[DataLoader[Any]], None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.before_first is not None:
            self.before_first(self)
        counter = self.sampler if isinstance(self.sampler, GlobalOrderSampler) else None
        for batch in super().__iter__():
            if counter is not None:
                counter.batches_read += 1
            yield batch
