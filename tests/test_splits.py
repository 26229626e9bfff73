"""Splits by hash: fixed by a document's identity and the salt, moved by nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data.errors import RetroDataError
from retro_data.scan import document_key, keys_array
from retro_data.splits import SPLITS, SplitSettings, split_hash, split_of_documents

Array = np.ndarray[Any, Any]
TRAIN, VAL, TEST, DATABASE = (SPLITS.index(name) for name in ("train", "val", "test", "database"))


def keys(count: int, first: int = 0, corpus: str = "c") -> Array:
    names = (f"document-{i}" for i in range(first, first + count))
    return keys_array([document_key(corpus, name) for name in names])


MANY = keys(20_000)


def codes(val: float, test: float, salt: str = "retro_data", of: Array = MANY) -> Array:
    return split_of_documents(of, "hash", SplitSettings(val, test, salt=salt))


def test_hashes_are_even_in_the_unit_interval() -> None:
    place = split_hash(MANY, "retro_data")
    assert place.shape == (20_000,)
    assert ((place >= 0) & (place < 1)).all()
    counts = np.histogram(place, 20, (0, 1))[0]
    assert (np.abs(counts - 1000) < 5 * np.sqrt(1000)).all(), "five standard deviations"


def test_the_hash_is_fixed_for_all_time() -> None:
    """Another value would move documents between the splits of artifacts that exist."""
    found = split_hash(np.array([[0, 0], [1, 2], [2**64 - 1, 2**63]], np.uint64), "retro_data")
    assert [f"{x:.12f}" for x in found] == ["0.712205289749", "0.691795810598", "0.416973834138"]


@pytest.mark.parametrize(("val", "test"), [(0.05, 0.05), (0.2, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_shares_are_about_the_fractions(val: float, test: float) -> None:
    found = codes(val, test)
    assert found.dtype == np.uint8
    for split, share in ((VAL, val), (TEST, test), (TRAIN, 1 - val - test)):
        assert (found == split).mean() == pytest.approx(share, abs=0.01 if share else 0)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_growth_and_order_move_no_document(data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(200))))
    some = order[: data.draw(st.integers(0, 200))]
    np.testing.assert_array_equal(codes(0.1, 0.1, of=MANY[some]), codes(0.1, 0.1)[some])


@settings(deadline=None, max_examples=30)
@given(small=st.floats(0, 0.4), more=st.floats(0, 0.5))
def test_a_larger_evaluation_only_takes_from_training(small: float, more: float) -> None:
    kept = codes(small, 0.05) == TRAIN
    left = codes(small + more, 0.05) == TRAIN
    assert not (left & ~kept).any(), "no document becomes a training document"
    before, after = codes(0.0, small) == TEST, codes(0.0, small + more) == TEST
    assert not (before & ~after).any()


def test_the_lower_half_trains_under_any_sensible_fractions() -> None:
    lower = split_hash(MANY, "retro_data") < 0.5
    for val, test in ((0.05, 0.05), (0.25, 0.25), (0.5, 0.0), (0.0, 0.5)):
        assert (codes(val, test)[lower] == TRAIN).all()


def test_what_is_only_retrieved_is_taken_from_training_alone() -> None:
    with_all = codes(0.1, 0.05)
    found = split_of_documents(MANY, "hash", SplitSettings(0.1, 0.05, database=0.6))
    assert (found == DATABASE).mean() == pytest.approx(0.6, abs=0.01)
    assert (found == np.where(found == DATABASE, DATABASE, with_all)).all()
    assert (with_all[found == DATABASE] == TRAIN).all()


def test_another_salt_is_another_split_independent_of_the_first() -> None:
    one, two = codes(0.5, 0.0) == VAL, codes(0.5, 0.0, salt="other") == VAL
    assert (one & two).mean() == pytest.approx(0.25, abs=0.02)


def test_a_document_of_the_same_id_in_another_corpus_falls_anew() -> None:
    one, two = codes(0.5, 0.0), codes(0.5, 0.0, of=keys(20_000, corpus="d"))
    assert (one == two).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_a_corpus_may_be_of_one_split(split: str) -> None:
    found = split_of_documents(MANY[:9], split, SplitSettings())
    assert found.tolist() == [SPLITS.index(split)] * 9


def test_no_document_is_no_split() -> None:
    assert codes(0.1, 0.1, of=MANY[:0]).shape == (0,)


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.1, -0.1), (0.5, 0.5), (1.0, 0.0)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(val: float, test: float) -> None:
    with pytest.raises(RetroDataError, match=r"splits\.val="):
        SplitSettings(val, test)
    with pytest.raises(RetroDataError, match=r"splits\.database="):
        SplitSettings(0.2, 0.2, database=0.6)


def test_a_split_that_is_none_is_refused() -> None:
    with pytest.raises(RetroDataError, match=r"corpus\.split='valid'"):
        split_of_documents(MANY, "valid", SplitSettings())
