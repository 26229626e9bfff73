"""What is said before anything is computed, held against what then comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import make_documents, write_jsonl

from retro_data import pipeline, plan
from retro_data.corpus import CorpusSettings, Document, open_reader
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.errors import RetroDataError
from retro_data.plan import Plan, StagePlan, _sample, _Spread

Small = Callable[..., dict[str, Any]]


class HereEngine(InlineEngine, LocalEngine):
    """Blocks in this process, as if in one worker."""

    def __init__(self) -> None:
        InlineEngine.__init__(self)
        self.settings = EngineSettings(devices=(), workers=1)


def test_the_plan_holds(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a corpus of several files, a third of it sampled: sizes as they come out, within 10%."""
    documents = make_documents(240)
    for i in range(24):
        write_jsonl(tmp_path / "corpus" / f"{i:02d}.jsonl", documents[10 * i : 10 * i + 10])
    settings = pipeline.Settings.create(
        **small(
            corpus={"name": "c", "path": str(tmp_path / "corpus")},
            neighbors={"num_stored": 8, "search": "exact"},
            selection={"max_overlap": 0.5, "rerank": "bm25"},
            near_duplicates={},
            packing={"seq_len": 256},
        )
    )
    monkeypatch.setattr(plan, "SAMPLE_FILES", 8)
    monkeypatch.setattr(plan, "MEASURE_SECONDS", 0.1)
    found = plan.plan(settings, HereEngine())
    assert not settings.root.exists()
    assert found.sampled_bytes < 0.4 * found.text_bytes
    assert found.refusals() == []
    pipeline.prepare(settings, InlineEngine())
    made = {row.title: row for row in pipeline.status(settings)}
    assert [row.title for row in found.stages] == list(made)
    for stage in found.stages:
        manifest = pipeline.store.finished(made[stage.title].folder)
        if stage.title != "tokenizer":
            rows = sum(1 for _ in documents) if stage.title.startswith("corpus") else None
            far = 0.3 if stage.title.startswith("leakage") else 0.1  # of some 24 documents
            assert stage.rows == pytest.approx(rows or manifest["rows"], rel=far), stage
        assert stage.memory > 0
        if stage.title.split()[0] in (
            *("chunks", "embeddings", "shingles", "neighbors", "selection"),
        ):
            assert stage.bytes == pytest.approx(made[stage.title].bytes, rel=0.2, abs=8000), stage
            assert stage.seconds > 0
    assert found.chunks == pytest.approx(made["embeddings c"].bytes / 2 / found.dim, rel=0.1)
    assert found.disk_peak >= sum(stage.bytes for stage in found.stages)


def test_an_index_is_planned_by_the_rows_that_will_be(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MEASURE_SECONDS", 0.1)
    neighbors = {"search": "index", "num_stored": 8}
    settings = pipeline.Settings.create(**small(neighbors=neighbors, index={"planner": "builtin"}))
    found = plan.plan(settings, HereEngine())
    assert found.search == "index"
    assert found.factory == "Flat"
    titles = ["codebook", "index", "neighbors", "leakage"]
    assert [row.title.split()[0] for row in found.stages][-4:] == titles
    pipeline.prepare(settings, InlineEngine())
    made = {row.title: row for row in pipeline.status(settings)}
    for stage in found.stages[-4:-2]:
        manifest = pipeline.store.finished(made[stage.title].folder)
        assert stage.rows == pytest.approx(manifest["rows"], rel=0.1), stage
        files = {**manifest["files"], **manifest["arrays"]}
        size = sum((made[stage.title].folder / name).stat().st_size for name in files)
        assert stage.bytes == pytest.approx(size, rel=0.2, abs=1000), stage
        assert stage.memory > 0


def test_a_sample_is_spread_over_what_passes_by() -> None:
    spread = _Spread(1000)
    for i in range(10_000):
        spread.add(Document(i, str(i), "x" * 10))
    places = [document.position for document, _ in spread.kept]
    assert 1000 <= spread.kept_bytes <= 2000
    assert spread.seen_bytes == 100_000
    assert max(places) > 9000
    assert len({b - a for a, b in pairwise(places)}) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_corpus_that_is_not_read_to_its_end_is_reckoned_with(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    from backports import zstd

    packed = {
        ".jsonl": lambda data: data,
        ".jsonl.gz": gzip.compress,
        ".jsonl.zst": zstd.compress,
    }[suffix]
    plain = write_jsonl(tmp_path / "plain", make_documents(4000, longest=800))
    for i in range(4):
        (tmp_path / f"{i}{suffix}").write_bytes(packed(plain.read_bytes()))
    reader = open_reader(CorpusSettings(name="c", path=str(tmp_path), glob=f"*{suffix}"))
    monkeypatch.setattr(plan, "READ_SECONDS", 0.08)
    share = _sample(reader, 200_000, tmp_path / "sample")
    text = 4 * sum(len(d["text"]) for d in make_documents(4000, longest=800))
    assert share.scale > 2
    assert share.text_bytes * share.scale == pytest.approx(text, rel=0.5)
    assert share.documents == pytest.approx(16_000, rel=0.5)


def test_a_corpus_without_documents_is_refused(small: Small, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"id": "a", "body": "other field"}])
    settings = pipeline.Settings.create(**small(corpus={"name": "bad", "path": str(path)}))
    with pytest.raises(RetroDataError, match=r"corpus\.text_field"):
        plan.plan(settings, HereEngine())


def test_what_will_not_do_is_refused_with_the_numbers() -> None:
    stage = StagePlan("index", 10, 2**30, 2**30, 2**34, 1.0, "measured")
    fits = Plan(1, 1, 1, 1, 1, 1, "index", "Flat", (stage,), 2**31, 2**32, 2**35)
    assert fits.refusals() == []
    (disk,) = replace(fits, disk_free=2**30).refusals()
    assert "2G are needed" in disk
    assert "1G are free" in disk
    (memory,) = replace(fits, memory_free=2**33).refusals()
    assert "index needs 16G, 8G are free" in memory
    assert "index.max_index_memory" in memory
