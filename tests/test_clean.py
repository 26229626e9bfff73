"""Old artifacts stay until they are cleaned away, and only they go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retro_data import artifact, clean, pipeline
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError

Small = Callable[..., dict[str, Any]]


def prepared(small: Small, **changes: Any) -> pipeline.Settings:
    settings = pipeline.Settings.create(**small(**changes))
    pipeline.prepare(settings, InlineEngine())
    return settings


def files(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def test_nothing_that_is_used_can_go(small: Small) -> None:
    settings = prepared(small)
    assert clean.removable(settings) == []
    assert clean.removable(settings, others=True) == []


def test_what_a_changed_corpus_left_can_go(small: Small, tmp_path: Path, corpus_file: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(corpus_file.read_bytes())
    changes = {"corpus": {"name": "c", "path": str(corpus)}}
    old = files(prepared(small, **changes).root)
    corpus.write_bytes(corpus_file.read_bytes().replace(b"harbour", b"Harbour", 1))
    settings = prepared(small, **changes)
    new = files(settings.root)
    found = clean.removable(settings)
    assert [item.path.parent.name for item in found] == [
        *("corpus", "tokenizer", "chunks", "embeddings", "database", "neighbors", "leakage")
    ]
    assert files(settings.root) == new  # looking removes nothing
    assert sum(item.bytes for item in found) > 10_000
    clean.remove(found)
    left = files(settings.root)
    assert left == new - {p for p in old if any(item.path in p.parents for item in found)}
    pipeline.check(settings)
    assert not any(pipeline.verify(settings).values())


def test_what_other_configurations_use_stays_unless_asked_for(small: Small) -> None:
    first = prepared(small)
    second = prepared(small, neighbors={"num_stored": 5})
    assert clean.removable(second) == []
    found = clean.removable(second, others=True)
    assert sorted(item.path.parent.name for item in found) == ["leakage", "neighbors", "prepared"]
    clean.remove(found)
    pipeline.check(second)
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        pipeline.check(first)


def test_an_unfinished_artifact_of_this_configuration_stays_and_others_go(small: Small) -> None:
    settings = prepared(small)
    (folder,) = settings.root.glob("neighbors/*")
    (folder / artifact.MANIFEST).unlink()
    stray = settings.root / "chunks" / "old-0123456789abcdef"
    stray.mkdir()
    (stray / artifact.PLAN).write_bytes(b"{}")
    mine = settings.root / "chunks" / "notes"  # no artifact: somebody else's
    mine.mkdir()
    (mine / "todo.txt").write_text("keep")
    assert [item.path for item in clean.removable(settings)] == [stray]


def test_what_is_being_worked_on_stays(small: Small) -> None:
    settings = prepared(small)
    stray = settings.root / "chunks" / "old-0123456789abcdef"
    stray.mkdir()
    (stray / artifact.PLAN).write_bytes(b"{}")
    found = clean.removable(settings)
    with artifact.Lease(stray):
        assert clean.removable(settings) == []
        with pytest.raises(RetroDataError, match="worked on"):
            clean.remove(found)
    assert clean.removable(settings) == found
