"""Figures of stored neighbors against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_dataset import database_of, write_chunks

from retro_data import quality
from retro_data.quality import hub_share, neighbor_quality, successor_bigrams
from retro_data.row_readers import ChunkReader
from retro_data.store import ChunkStore


def test_successors_are_foretold_by_a_twin_and_not_by_a_stranger(tmp_path: Path) -> None:
    """Document 0 holds 0 to 9, rows 0 to 2; the database has it too, and another from 100 on."""
    chunks = write_chunks(tmp_path / "c", [10])
    twin, stranger = write_chunks(tmp_path / "t", [10]), write_chunks(tmp_path / "s", [9], 100)
    reader = ChunkReader(database_of(twin, stranger), 4, prefetch=False)
    rows = np.array([0, 1])  # successors 4 5 6 7 and 8 9
    for neighbors, expected in (
        ([0, 1], 1.0),  # the chunk itself: its continuation is the successor
        ([1, 0], (1 + 0) / 2),  # 4 to 9 hold 4 5 6 7; 0 to 7 do not hold 8 9
        ([2, 2], (0 + 1) / 2),
        ([3, 5], 0.0),
    ):
        assert successor_bigrams(chunks, rows, reader, np.array(neighbors)) == expected
    assert successor_bigrams(chunks, rows[:0], reader, rows[:0]) is None


def test_bigrams_end_with_the_document(tmp_path: Path) -> None:
    """A successor of one token has none; what lies beyond a length is no bigram."""
    chunks = write_chunks(tmp_path / "c", [5, 6], pad=3)
    reader = ChunkReader(database_of(chunks), 4, prefetch=False)
    assert successor_bigrams(chunks, np.array([0]), reader, np.array([0])) is None
    both = successor_bigrams(chunks, np.array([0, 2]), reader, np.array([0, 3]))
    assert both == 1.0  # 9 10 stands in the last chunk itself


def test_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    even = np.arange(1000).reshape(-1, 10)
    admitted = np.ones(1000, bool)
    assert hub_share(even, admitted) == pytest.approx(0.01)
    skewed = even.copy()
    skewed[:, :5] = np.arange(5)  # half of all hits on 5 of 1000
    assert hub_share(skewed, admitted) == pytest.approx(0.5 + 5 / 1000, abs=0.01)
    assert hub_share(np.full((3, 4), -1), admitted) is None
    admitted[500:] = False  # those below are the whole now
    assert hub_share(even[:50], admitted) == pytest.approx(0.01)
    monkeypatch.setattr(quality, "HUB_ROWS", 300)
    assert hub_share(even, np.ones(1000, bool)) == pytest.approx(3 / 250, abs=0.01)


def test_figures_of_a_store_without_any_neighbor(tmp_path: Path) -> None:
    chunks: ChunkStore = write_chunks(tmp_path / "c", [9, 2])
    reader = ChunkReader(database_of(chunks), 4, prefetch=False)
    ids, distances = np.full((4, 3), -1), np.full((4, 3), np.inf, np.float32)
    found = neighbor_quality(chunks, ids, distances, reader, np.ones(4, bool))
    assert found == {
        "distances": {"nearest": None, "last": None},
        "hub_share": None,
        "successor_bigrams": {"nearest": None, "random": None},
    }
