"""The scan of a corpus: every document in exactly one span, and nothing changed unnoticed."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from conftest import make_documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data import artifact, pipeline, scan
from retro_data.corpus import CorpusSettings, Document, Reader, open_reader
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings
from retro_data.scan import CorpusStage, ScannedCorpus, block_documents, digest_files
from retro_data.stage import complete


def scanned(path: Path, root: Path, **options: Any) -> tuple[Reader, ScannedCorpus]:
    reader = open_reader(CorpusSettings(name="c", path=str(path), **options))
    stage = CorpusStage(reader.settings, digest_files(reader, root / "corpus" / "c.digests.tsv"))
    folder = root / "corpus" / "c-0"
    complete(stage, folder, InlineEngine())
    return reader, ScannedCorpus(folder)


def all_documents(reader: Reader) -> list[Document]:
    records = (record for file in reader.files() for record in reader.records(file.name))
    return [record for record in records if isinstance(record, Document)]


# ---- spans ---------------------------------------------------------------------------------------

TEXTS = st.one_of(st.just(""), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=60))
FILES = st.lists(st.lists(TEXTS, max_size=8), min_size=1, max_size=5)


def write_layout(folder: Path, files: list[list[str]], layout: str) -> None:
    """The texts as lines of JSON, compressed or not, with a broken line between; or as text files."""
    folder.mkdir()
    number = 0
    for i, texts in enumerate(files):
        lines = []
        for text in texts:
            number += 1
            if layout == "text":
                (folder / f"{number:03d}.txt").write_text(text, "utf-8", newline="")
            lines.append(json.dumps({"id": f"d{number}", "text": text}) + "\n")
            if number % 5 == 0:
                lines.append("{broken\n")
        content = "".join(lines).encode()
        if layout == "plain":
            (folder / f"{i}.jsonl").write_bytes(content)
        elif layout == "gz":
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(content))
        elif layout == "zst":
            (folder / f"{i}.jsonl.zst").write_bytes(zstd.compress(content))


@pytest.mark.parametrize("layout", ["plain", "gz", "zst", "text"])
@given(
    files=FILES,
    span_bytes=st.sampled_from([1, 50, 300, 2**20]),
    scan_bytes=st.sampled_from([1, 400, 2**20]),
    block_bytes=st.sampled_from([1, 100, 2**20]),
)
@settings(deadline=None, max_examples=15)
def test_blocks_tile_the_corpus_whatever_the_layout_of_its_files(
    layout: str,
    files: list[list[str]],
    span_bytes: int,
    scan_bytes: int,
    block_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
):
    place = tmp_path_factory.mktemp("layout")
    write_layout(place / "texts", [["some text to begin with"], *files], layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SPAN_BYTES", span_bytes)
        patch.setattr(scan, "SCAN_BYTES", scan_bytes)
        reader, corpus = scanned(place / "texts", place)
    expected = all_documents(reader)
    blocks = corpus.blocks(block_bytes)
    made = [list(block_documents(reader, corpus, block)) for block in blocks]
    assert [document for documents in made for document in documents] == expected
    assert [len(documents) for documents in made] == [b.stop - b.start for b in blocks]
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert all(documents for documents in made)
    assert corpus.text_bytes == sum(len(d.text.encode()) for d in expected)
    assert corpus.manifest["rows"] == len(expected)
    if block_bytes == 1:
        assert len(blocks) == len(corpus.spans)
    sizes = [sum(len(d.text.encode()) for d in documents) for documents in made]
    longest = max(len(d.text.encode()) for d in expected)
    assert max(sizes) < block_bytes + span_bytes + longest


def test_a_large_file_is_cut_and_small_files_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scan, "SPAN_BYTES", 4096)
    documents = make_documents(40)
    write_jsonl(tmp_path / "one" / "all.jsonl", documents)
    for i, document in enumerate(documents):
        write_jsonl(tmp_path / "many" / f"{i:02d}.jsonl", [document])
    counts = [len(scanned(tmp_path / n, tmp_path / f"{n}-root")[1].spans) for n in ("one", "many")]
    assert counts[0] == counts[1]
    assert 5 < counts[0] < 40


@pytest.mark.parametrize("ids", ["long", "short"])
def test_documents_of_little_text_make_spans_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: str
):
    """A later stage holds the ids of a span beside its texts, and something for each document."""
    monkeypatch.setattr(scan, "SPAN_BYTES", 4096)
    count, size = (20, 1000) if ids == "long" else (1000, 3)
    documents = [{"id": f"{i:0{size}d}", "text": "a"} for i in range(count)]
    _, corpus = scanned(write_jsonl(tmp_path / "a.jsonl", documents), tmp_path / "root")
    assert corpus.text_bytes == count
    assert corpus.spans[:, 4].max() * (1 + size + scan.DOCUMENT_BYTES) < 2 * 4096


def test_memory_does_not_grow_with_what_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A few kB may unpack to very many broken lines."""
    monkeypatch.setattr(artifact, "COPY_BYTES", 2**16)
    count = 10_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(b'{"text": "a"}\n' + b"x\n" * count))
    tracemalloc.start()
    _, corpus = scanned(tmp_path / "a.jsonl.zst", tmp_path / "root")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    report = corpus.folder / "skipped.jsonl"
    assert corpus.manifest["figures"]["skipped"] == count
    assert len(report.read_bytes().splitlines()) == count
    assert peak < report.stat().st_size


# ---- identity ------------------------------------------------------------------------------------


def test_an_identity_is_of_the_source_and_the_id():
    keys = [
        scan.document_key("books", "a"),
        scan.document_key("books", "b"),
        scan.document_key("news", "a"),
        scan.document_key("new", "sa"),
    ]
    assert len(set(keys)) == 4
    array = scan.keys_array(keys)
    assert (array.dtype, array.shape) == (np.uint64, (4, 2))
    assert int(array[0, 0]) << 64 | int(array[0, 1]) == int.from_bytes(keys[0], "big")


@pytest.mark.parametrize("scan_bytes", [1, 2**20], ids=["in two blocks", "in one block"])
def test_doubled_ids_are_refused_with_examples_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan_bytes: int
):
    monkeypatch.setattr(scan, "SCAN_BYTES", scan_bytes)
    documents = make_documents(10)
    write_jsonl(tmp_path / "texts" / "0.jsonl", documents)
    write_jsonl(tmp_path / "texts" / "1.jsonl", [documents[3], {"id": "new", "text": "a"}])
    with pytest.raises(RetroDataError) as refusal:
        scanned(tmp_path / "texts", tmp_path)
    assert "corpus c: 1 documents" in str(refusal.value)
    assert "'document-3'" in str(refusal.value)
    assert "corpus.id_field" in str(refusal.value)
    _, corpus = scanned(tmp_path / "texts", tmp_path / "other", id_field=None)
    assert corpus.manifest["rows"] == 12


# ---- digests -------------------------------------------------------------------------------------


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", make_documents(20)[6 * i : 6 * (i + 1)])
    return folder


def watched(path: Path) -> tuple[Reader, list[str]]:
    """A reader, and the names of the files whose bytes it is asked for."""
    reader, names = open_reader(CorpusSettings(name="c", path=str(path))), []
    opened = reader.open_bytes

    def open_bytes(name: str) -> Any:
        names.append(name)
        return opened(name)

    reader.open_bytes = open_bytes  # type: ignore[method-assign]
    return reader, names


def digested(path: Path, cache: Path) -> tuple[dict[str, str], list[str]]:
    """Digest of each file, and the files that were read for it."""
    reader, names = watched(path)
    found = digest_files(reader, cache)
    return {file.name: file.digest for file in found}, sorted(names)


def test_only_files_that_may_have_changed_are_read_again(corpus_folder: Path, tmp_path: Path):
    cache = tmp_path / "c.digests.tsv"
    everything = ["0.jsonl", "1.jsonl", "2.jsonl"]
    first, read = digested(corpus_folder, cache)
    assert read == everything
    assert digested(corpus_folder, cache) == (first, [])

    os.utime(corpus_folder / "1.jsonl", (1, 1))  # another time, the same bytes
    assert digested(corpus_folder, cache) == (first, ["1.jsonl"])
    assert digested(corpus_folder, cache) == (first, [])

    with open(corpus_folder / "2.jsonl", "a") as file:
        file.write("\n")
    second, read = digested(corpus_folder, cache)
    assert read == ["2.jsonl"]
    assert {n for n in everything if first[n] != second[n]} == {"2.jsonl"}

    (corpus_folder / "0.jsonl").unlink()
    assert set(digested(corpus_folder, cache)[0]) == {"1.jsonl", "2.jsonl"}


def test_digests_are_those_of_sha256(corpus_folder: Path, tmp_path: Path):
    import hashlib

    found, _ = digested(corpus_folder, tmp_path / "cache.tsv")
    for name, digest in found.items():
        assert digest == hashlib.sha256((corpus_folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("content", [b"", b"a\tb\n", b"\xff\0", b'"0.jsonl"\t1\tx\ty\n"1.js'])
def test_a_damaged_cache_of_digests_is_made_anew(
    corpus_folder: Path, tmp_path: Path, content: bytes
):
    cache = tmp_path / "cache.tsv"
    first, _ = digested(corpus_folder, cache)
    cache.write_bytes(content)
    assert digested(corpus_folder, cache) == (first, sorted(first))
    assert digested(corpus_folder, cache) == (first, [])


def test_a_cache_that_cannot_be_written_costs_a_second_reading_only(
    corpus_folder: Path, tmp_path: Path
):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache.tsv"  # its folder cannot be made
    first = digested(corpus_folder, cache)
    assert digested(corpus_folder, cache) == first
    assert len(first[1]) == 3


def test_a_version_that_the_source_keeps_stands_for_the_bytes(corpus_folder: Path, tmp_path: Path):
    reader, names = watched(corpus_folder)
    listed = [file._replace(version=f"ETag:{i}") for i, file in enumerate(reader.files())]
    reader.files = lambda: listed  # type: ignore[method-assign]
    found = digest_files(reader, tmp_path / "cache.tsv")
    assert [file.digest for file in found] == [f"version:ETag:{i}" for i in range(3)]
    assert names == []


# ---- changes between scan and use ----------------------------------------------------------------


def rewrite(path: Path) -> None:
    """Another text of the same size."""
    content = path.read_text("utf-8")
    path.write_text(content.replace("a", "o", 1), "utf-8")


def append(path: Path) -> None:
    write_jsonl(path.parent / "aside", [{"id": "late", "text": "late"}])
    path.write_bytes(path.read_bytes() + (path.parent / "aside").read_bytes())
    (path.parent / "aside").unlink()


def read_all(reader: Reader, corpus: ScannedCorpus) -> list[Document]:
    return [d for block in corpus.blocks(1) for d in block_documents(reader, corpus, block)]


@pytest.mark.parametrize("change", [rewrite, append])
def test_a_file_that_changed_after_the_scan_is_refused_by_name(
    corpus_folder: Path, tmp_path: Path, change: Any
):
    reader, corpus = scanned(corpus_folder, tmp_path)
    assert len(read_all(reader, corpus)) == 18
    change(corpus_folder / "1.jsonl")
    with pytest.raises(RetroDataError, match=r"'1\.jsonl' changed.*retro-data prepare"):
        read_all(open_reader(corpus_settings(corpus_folder)), corpus)


def corpus_settings(path: Path) -> CorpusSettings:
    return CorpusSettings(name="c", path=str(path))


def test_a_file_that_changes_while_it_is_read_is_refused(corpus_folder: Path, tmp_path: Path):
    reader, corpus = scanned(corpus_folder, tmp_path)
    (block,) = corpus.blocks(2**20)
    documents = block_documents(reader, corpus, block)
    next(documents)
    rewrite(corpus_folder / "2.jsonl")
    with pytest.raises(RetroDataError, match=r"'2\.jsonl' changed"):
        list(documents)


def test_a_file_that_was_only_touched_is_held_against_its_digest(
    corpus_folder: Path, tmp_path: Path
):
    reader, corpus = scanned(corpus_folder, tmp_path)
    os.utime(corpus_folder / "1.jsonl", (1, 1))
    assert read_all(reader, corpus) == all_documents(reader)


def test_preparing_stops_at_a_file_that_changes_under_it(small: Any, tmp_path: Path):
    path = write_jsonl(tmp_path / "corpus.jsonl", make_documents(20))
    arguments = small(corpus={"name": "c", "path": str(path)})

    class Meddler(InlineEngine):
        def run(self, stage: Any, folder: Path, missing: Any) -> Iterator[Any]:
            if stage.name == "chunks":
                rewrite(path)
            yield from super().run(stage, folder, missing)

    with pytest.raises(RetroDataError, match=r"'corpus\.jsonl' changed"):
        pipeline.prepare(Settings.create(**arguments), Meddler())
    settings = Settings.create(**arguments)
    pipeline.prepare(settings, InlineEngine())  # from the corpus as it is now
    assert len(pipeline.open_prepared(settings).corpora[0].chunks.documents) == 20


# ---- what the scan writes ------------------------------------------------------------------------


def test_the_report_says_what_was_skipped_and_why(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [
        '{"id": "good", "text": "a text"}',
        '{"id": "empty", "text": ""}',
        "{broken",
        '{"id": "none"}',
        '{"id": "nul", "text": "a\\u0000text"}',
    ]
    (folder / "0.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(b'{"id": "cut", "text": "b"}\n' * 99)[:-9])
    os.symlink(folder / "nowhere", folder / "2.jsonl")
    reader, corpus = scanned(folder, tmp_path, id_field=None)
    report = (corpus.folder / "skipped.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(row) for row in report]
    assert all(set(row) == {"file", "position", "id", "reason"} for row in rows)
    found = [(row["file"], row["position"]) for row in rows]
    offsets = np.cumsum([0] + [len(line) + 1 for line in lines]).tolist()
    assert found[0] == ("2.jsonl", None)
    assert found[1:5] == [("0.jsonl", offsets[i]) for i in (1, 2, 3, 4)]
    assert found[5][0] == "1.jsonl.gz"
    reasons = [row["reason"] for row in rows]
    assert reasons[1] == "empty"
    assert reasons[4].startswith("repaired: 1 NUL")  # kept, and told
    assert "gzip" in reasons[5]
    assert corpus.manifest["figures"]["skipped"] == 5
    assert corpus.manifest["rows"] == len(all_documents(reader))


def test_the_table_of_files_tells_name_size_digest_and_documents(
    corpus_folder: Path, tmp_path: Path
):
    odd = "a\ttab and\na line.jsonl"
    (corpus_folder / "1.jsonl").rename(corpus_folder / odd)
    _, corpus = scanned(corpus_folder, tmp_path)
    rows = [row.split("\t") for row in (corpus.folder / "files.tsv").read_text().splitlines()]
    files = sorted(corpus_folder.iterdir())
    assert [json.loads(row[0]) for row in rows] == [path.name for path in files] == corpus.names
    assert [int(row[1]) for row in rows] == [path.stat().st_size for path in files]
    assert [row[2] for row in rows] == corpus.digests
    assert [int(row[3]) for row in rows] == [6, 6, 6]


def test_a_corpus_without_any_document_is_refused(tmp_path: Path):
    write_jsonl(tmp_path / "texts" / "0.jsonl", [{"id": "a", "text": "  "}])
    with pytest.raises(RetroDataError, match=r"holds no document.*skipped\.jsonl"):
        scanned(tmp_path / "texts", tmp_path)


def test_a_folder_without_files_is_refused(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    reader = open_reader(CorpusSettings(name="c", path=str(tmp_path / "texts"), format="jsonl"))
    with pytest.raises(RetroDataError):
        digest_files(reader, tmp_path / "cache.tsv")
