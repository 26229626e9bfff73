"""One global order of samples an epoch, sliced late, with a position to resume from.

The order (`retro_data.order`) depends on (seed, epoch) alone. It is cut into global batches, and
those into one share a rank: B = ceil(samples / global_batch_size) batches for R ranks are B * R
shares, which take the samples in order, each floor or ceil(samples / (B * R)) of them. A share
shorter than the rank's batch size is padded with index -1, a row of padding. So each sample is seen
exactly once an epoch, no batch is much smaller than another, all ranks make as many steps, and the
samples of a global batch are the same for any number of ranks and workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from retro_data.errors import RetroDataError
from retro_data.order import Mixture, global_order

Array = np.ndarray[Any, Any]

PADDING = -1
READ_BATCHES = 256  # batches turned into Python numbers at a time


class _BatchSampler(DistributedSampler[Any]):
    """What both samplers share: a rank's batches, each a share of a global batch, padded with -1.

    A DistributedSampler, since Lightning wraps any other in one that drops and reorders samples.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        num_sequences: int | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % num_replicas:
            raise RetroDataError(
                f"global_batch_size={global_batch_size} cannot be shared evenly by {num_replicas} "
                "ranks: make it a multiple of the number of ranks."
            )
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_sequences = len(dataset) if num_sequences is None else num_sequences
        self.global_batch_size = global_batch_size
        self.batch_size = global_batch_size // num_replicas
        self.num_batches = -(-self.num_sequences // global_batch_size)
        self.num_samples = self.num_batches * self.batch_size  # of this rank, with padding
        self.total_size = self.num_batches * global_batch_size

    def _bounds(self, shares: Array) -> Array:
        """Where shares begin in the order, and the ones before them end: by batch, then by rank."""
        num_shares = self.num_batches * self.num_replicas
        return -(-shares * self.num_sequences // num_shares)  # rounded up: short ones come last

    def _batches(self, order: Array | None, start: int, repeat: bool) -> Iterator[int]:
        """This rank's indices from batch `start` on; None is the order of the dataset."""
        for first in range(start, self.num_batches, READ_BATCHES):
            batches = np.arange(first, min(first + READ_BATCHES, self.num_batches))
            shares = batches * self.num_replicas + self.rank
            begin, end = self._bounds(shares), self._bounds(shares + 1)
            place = begin[:, None] + np.arange(self.batch_size)
            beyond = place >= end[:, None]
            if repeat:
                beyond[:, 0] = False
            place = np.minimum(place, self.num_sequences - 1)
            indices = place if order is None else order[place].astype(np.int64)
            indices[beyond] = PADDING
            yield from indices.ravel().tolist()


class GlobalOrderSampler(_BatchSampler):
    """Training order: a new permutation each epoch, and a position to resume from.

    Only with fewer samples than shares (one row a rank and batch, say) would a rank get a batch
    of nothing but padding, which has no loss; it then repeats one sample of another rank.

    The position is a number of samples of the padded global order, so of whole global batches. A
    loaded one is used once: by the next iteration, whatever `set_epoch` says, since a Trainer that
    goes on inside an epoch may count it as the next one. From then on epochs are counted from it.

    Args:
        dataset: whose length is the number of samples.
        global_batch_size: samples of one step of all ranks, a multiple of `num_replicas`.
        num_replicas, rank: of the process group.
        seed: of the order.
        mixture: shares of several corpora; None: each sample once an epoch.

    Attributes:
        running: epoch of the order that is being read; None before the first sample.
        batches_read: of it, those a loader has handed out; the loader counts.

    Raises:
        RetroDataError: `global_batch_size` cannot be shared evenly.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        num_sequences = None if mixture is None else mixture.num_samples
        super().__init__(
            dataset, global_batch_size, num_replicas, rank, seed, num_sequences=num_sequences
        )
        self.mixture = mixture
        self.running: int | None = None
        self.batches_read = 0
        self._shift = 0  # of the order's epoch against the caller's
        self._loaded: tuple[int, int] | None = None

    @property
    def next_position(self) -> tuple[int, int]:
        """Epoch of the order, and global samples in it, at which the next iteration will begin."""
        return self._loaded or (self.epoch + self._shift, 0)

    def state_dict(
        self, batches: int | None = None, epoch_batches: float = math.inf
    ) -> dict[str, int]:
        """The position to resume from, as `load_state_dict` takes it.

        Args:
            batches: of the running epoch that count as done; None: those handed out.
            epoch_batches: after which an epoch ends, if that is before all samples are read.
        """
        if self.running is None:
            epoch, samples = self.next_position
        else:
            batches = self.batches_read if batches is None else batches
            epoch, samples = self.running, batches * self.global_batch_size
            if batches >= min(self.num_batches, epoch_batches):
                epoch, samples = epoch + 1, 0
        return {"epoch": epoch, "samples": samples}

    def order(self, epoch: int) -> Array:
        """The samples of an epoch, of all ranks."""
        if self.mixture is not None:
            return self.mixture.order(self.seed, epoch)
        return global_order(self.num_sequences, self.seed, epoch)

    def drawn(self, position: Mapping[str, int]) -> dict[str, int]:
        """Samples of each corpus of the mixture before a position, as `state_dict` gives it."""
        assert self.mixture is not None
        shares = np.array(position["samples"] // self.global_batch_size * self.num_replicas)
        order = self.order(position["epoch"])[: int(self._bounds(shares))]
        return self.mixture.drawn(position["epoch"], order)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the next iteration at `samples` global samples of epoch `epoch`.

        Raises:
            RetroDataError: that lies inside a global batch.
        """
        if state["samples"] % self.global_batch_size:
            raise RetroDataError(
                f"position {state['samples']} (global samples) lies inside a global batch of "
                f"{self.global_batch_size}: resume with the global_batch_size it was saved with."
            )
        self._loaded = state["epoch"], state["samples"]

    def __iter__(self) -> Iterator[int]:
        epoch, samples = self.next_position
        self._shift = epoch - self.epoch
        self._loaded = None
        self.running = epoch
        self.batches_read = samples // self.global_batch_size
        return self._batches(self.order(epoch), self.batches_read, repeat=True)


class EvaluationSampler(_BatchSampler):
    """The order of the dataset, each sample exactly once; padding makes ranks step together.

    Args:
        dataset: whose length is the number of samples.
        global_batch_size: samples of one step of all ranks, a multiple of `num_replicas`.
        num_replicas, rank: of the process group.

    Raises:
        RetroDataError: `global_batch_size` cannot be shared evenly.
    """

    def __init__(
        self, dataset: Sized, global_batch_size: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(dataset, global_batch_size, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return self._batches(None, 0, repeat=False)
