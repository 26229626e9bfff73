"""Mixtures: shares as asked for, each corpus in turn, the same from any position."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data.errors import RetroDataError
from retro_data.order import Mixture
from retro_data.sampler import GlobalOrderSampler

SETTINGS = settings(deadline=None, max_examples=60)
corpora = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 10).map(lambda x: x if x > 0.01 else 0.0)),
    min_size=1,
    max_size=4,
).filter(lambda given: any(share for _, share in given))


def mixture_of(given: list[tuple[int, float]]) -> Mixture:
    return Mixture(
        {f"c{i}": size for i, (size, _) in enumerate(given)},
        {f"c{i}": share for i, (_, share) in enumerate(given)},
    )


@SETTINGS
@given(corpora, st.integers(0, 2**40), st.integers(1, 5))
def test_shares_are_kept_and_a_corpus_is_read_whole_before_it_is_read_again(
    given: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    mixture = mixture_of(given)
    shares = np.array([share for _, share in given])
    exact = shares / shares.sum() * mixture.num_samples
    assert mixture.num_samples == sum(size for size, share in given if share)
    assert mixture.counts.sum() == mixture.num_samples
    assert (np.abs(mixture.counts - exact) < 1).all()
    seen: Counter[int] = Counter()
    for epoch in range(epochs):
        order = mixture.order(seed, epoch)
        assert order.shape == (mixture.num_samples,)
        seen.update(order.tolist())
        assert mixture.drawn(epoch, order) == mixture.drawn(epoch + 1, order[:0])
    for (size, _), start, count in zip(given, mixture.starts, mixture.counts, strict=True):
        times = [seen[i] for i in range(start, start + size)]
        assert sum(times) == epochs * count
        assert max(times) - min(times) <= 1


def test_orders_differ_by_seed_and_epoch_and_mix_the_corpora() -> None:
    mixture = Mixture({"a": 1000, "b": 1000}, {"a": 3, "b": 1})
    orders = [mixture.order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    for order in orders:
        parts = [(part < 1000).mean() for part in np.split(order, 10)]
        assert 0.65 < min(parts) <= max(parts) < 0.85
    again = Mixture({"a": 1000, "b": 1000}, {"b": 0.25, "a": 0.75})
    assert (again.order(1, 1) == orders[3]).all()


@SETTINGS
@given(corpora, st.sampled_from([(1, 4), (2, 4), (4, 4), (3, 6)]), st.data())
def test_ranks_share_a_mixture_and_resume_inside_it(
    given: list[tuple[int, float]], shape: tuple[int, int], data: st.DataObject
) -> None:
    world, size = shape
    mixture = mixture_of(given)
    dataset = range(sum(size for size, _ in given))

    def epoch_of(number: int, done: int = 0) -> np.ndarray:
        shares = []
        for rank in range(world):
            sampler = GlobalOrderSampler(dataset, size, world, rank, 5, mixture)
            sampler.load_state_dict({"epoch": number, "samples": done * size})
            shares.append(np.array(list(sampler), np.int64).reshape(-1, size // world))
        return np.stack(shares, 1)

    whole = epoch_of(2)
    if mixture.num_samples >= whole.shape[0] * world:
        assert Counter(whole[whole >= 0].tolist()) == Counter(mixture.order(5, 2).tolist())
    done = data.draw(st.integers(0, len(whole)))
    assert (epoch_of(2, done) == whole[done:]).all()
    sampler = GlobalOrderSampler(dataset, size, world, 0, 5, mixture)
    drawn = sampler.drawn({"epoch": 2, "samples": done * size})
    read = whole[:done][whole[:done] >= 0]
    if mixture.num_samples >= whole.shape[0] * world:
        assert drawn == mixture.drawn(2, read)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 1}, r"the corpora with training sequences are \['a', 'b'\]"),
        ({"a": 1, "b": 1, "x": 0}, r"mixture names \['x'\]; the corpora are"),
        ({"a": 1, "b": 1, "held": 1}, "and no other"),
        ({"a": 0, "b": 0}, "not all of them 0"),
        ({"a": "most", "b": 1}, "at least 0"),
        ([0.5, 0.5], "expected corpus: share"),
        ({"a": -1, "b": 2}, "at least 0"),
        ({"a": float("nan"), "b": 2}, "at least 0"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares: Any, message: str) -> None:
    with pytest.raises(RetroDataError, match=message):
        Mixture({"a": 5, "held": 0, "b": 5}, shares)
