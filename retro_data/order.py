"""In which order samples are trained on: a permutation an epoch, or a mixture of several corpora's.

    corpus a  permutation, permutation, …  ─┐ so many of each an epoch
    corpus b  permutation, permutation, …  ─┴─► shuffled ─► the order of the epoch

Each corpus of a mixture is a stream of permutations of its sequences, which goes on from epoch to
epoch: at the end of any epoch all sequences of a corpus have come equally often, give or take one.
Everything follows from (seed, epoch), so a position is a number of samples, as without a mixture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_data.errors import RetroDataError

Array = np.ndarray[Any, Any]


def global_order(num_samples: int, seed: int, epoch: int) -> Array:
    """The permutation of an epoch: (num_samples,) uint32, or uint64 where that is too narrow."""
    order: Array = np.arange(num_samples, dtype=_index_dtype(num_samples))
    key = (seed % 2**64) | (epoch << 64)
    np.random.Generator(np.random.Philox(key=key)).shuffle(order)
    return order


def _index_dtype(num_samples: int) -> type:
    return np.uint32 if num_samples <= 2**32 else np.uint64


def check_shares(shares: Any, corpora: Sequence[str]) -> None:
    """Refuse a mixture that is none of these corpora.

    Raises:
        RetroDataError: it is no mapping of shares, or names something else.
    """
    values = list(shares.values()) if isinstance(shares, Mapping) else []
    if not all(map(_is_share, values)) or not any(values):
        raise RetroDataError(
            f"mixture={shares!r}: expected corpus: share, each a number of at least 0, not all of "
            "them 0."
        )
    if unknown := sorted(set(shares) - set(corpora)):
        raise RetroDataError(f"mixture names {unknown}; the corpora are {list(corpora)}.")


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


class Mixture:
    """The shares in which an epoch draws from several corpora.

    An epoch has as many samples as the corpora that are drawn from have sequences.

    Args:
        sequences: corpus -> its training sequences, in the order of the dataset.
        shares: corpus -> its share of the samples, in any unit; 0 draws none. All corpora with
            training sequences must be named.

    Attributes:
        names: of the corpora.
        num_samples: of an epoch.
        counts: (corpora,) int64, samples of each in an epoch: the shares, rounded so that they add up.

    Raises:
        RetroDataError: names or shares that do not fit.
    """

    def __init__(self, sequences: Mapping[str, int], shares: Mapping[str, float]) -> None:
        self.names = list(sequences)
        self.sizes = np.array(list(sequences.values()), np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._check(sequences, shares)
        weights = np.array([float(shares.get(name, 0)) for name in self.names])
        weights /= weights.sum()
        self.num_samples = int(self.sizes[weights > 0].sum())
        exact = weights * self.num_samples
        self.counts: Array = np.floor(exact).astype(np.int64)
        left = self.num_samples - int(self.counts.sum())
        self.counts[np.argsort(self.counts - exact, kind="stable")[:left]] += 1

    def _check(self, sequences: Mapping[str, int], shares: Mapping[str, float]) -> None:
        check_shares(shares, list(sequences))
        train = [name for name, count in sequences.items() if count]
        unnamed = [name for name in train if name not in shares]
        without = [name for name, share in shares.items() if share and name not in train]
        if unnamed or without:
            raise RetroDataError(
                f"mixture names {list(shares)}; the corpora with training sequences are {train}. "
                "Give each of these a share (0 leaves it out), and no other."
            )

    def order(self, seed: int, epoch: int) -> Array:
        """The samples of an epoch: (num_samples,) indices into the dataset, uint32 or uint64."""
        drawn = [self._draw(corpus, seed, epoch) for corpus in np.flatnonzero(self.counts)]
        return np.concatenate(drawn)[global_order(self.num_samples, seed, epoch)]

    def _draw(self, corpus: int, seed: int, epoch: int) -> Array:
        """What the epoch takes of a corpus' stream of permutations."""
        name = f"{seed}/{self.names[corpus]}".encode()
        own_seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
        size, count = int(self.sizes[corpus]), int(self.counts[corpus])
        first, stop = epoch * count, (epoch + 1) * count
        rounds = range(first // size, -(-stop // size))
        stream = np.concatenate([global_order(size, own_seed, round) for round in rounds])
        skipped = first - rounds.start * size
        drawn: Array = stream[skipped : skipped + count].astype(_index_dtype(int(self.sizes.sum())))
        drawn += drawn.dtype.type(self.starts[corpus])
        return drawn

    def drawn(self, epoch: int, order: Array) -> dict[str, int]:
        """Samples of each corpus in all epochs before `epoch`, and in the part `order` of it."""
        corpus = np.searchsorted(self.starts + self.sizes, order, side="right")
        total = epoch * self.counts + np.bincount(corpus, minlength=len(self.names))
        return dict(zip(self.names, total.tolist(), strict=True))
