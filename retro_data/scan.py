"""The stage `corpus`: one pass that names, counts and digests what the readers find.

It reads every document once and keeps no text: the digest of each file (which gives the artifact its
key), the number of documents, the skip report, the identity of each document (doubled ids are refused
before anything costly runs), and *spans*: places where later stages may cut the corpus into blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import key_fields
from retro_data.corpus import CorpusSettings, Document, Reader, Skipped, SourceFile, open_reader
from retro_data.errors import RetroDataError
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    lay_parts,
    total_counts,
)

log = logging.getLogger(__name__)

SPAN_BYTES = 2**20  # of text and ids: later stages cut their blocks at multiples of about this
DOCUMENT_BYTES = 64  # what a document takes beside, so that a span of empty ones has an end
SCAN_BYTES = 256 * 2**20  # of files, as they lie: one block of the scan
KEYS, COUNTS, SKIPS = "keys.npy", "counts.npy", "skipped.jsonl"  # parts
SPANS = "spans.npy"  # (S, 6) int64, see Span


@dataclass(frozen=True)
class Span:
    """Consecutive documents: from `start` in `first_file` up to `stop` in `last_file`.

    Positions are those of the reader (byte offset, row); a stop of -1 is the end of the file.
    `bytes` are those of texts and ids, and DOCUMENT_BYTES for each document.
    """

    first_file: int
    start: int
    last_file: int
    stop: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class DigestedFile:
    name: str
    bytes: int
    modified_ns: int
    digest: str  # sha256 of the bytes, or the version that the source itself keeps


def document_key(corpus: str, document: str) -> bytes:
    """128-bit identity of a document: a hash of its source's name and its id (DESIGN: Identity)."""
    identity = corpus.encode() + b"\0" + document.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(identity, digest_size=16).digest()


def keys_array(keys: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """(D, 2) uint64 of 16-byte keys."""
    return np.frombuffer(b"".join(keys), ">u8").astype(np.uint64).reshape(-1, 2)


# ---- digests -------------------------------------------------------------------------------------


def digest_files(reader: Reader, cache: Path, *, read_all: bool = False) -> list[DigestedFile]:
    """Digest every file of a corpus; files whose size and time of change are known are not read.

    Args:
        cache: table of earlier digests, kept beside the artifacts and rewritten when it changes.
        read_all: believe no earlier digest.
    """
    files = reader.files()
    if not files:
        raise RetroDataError(
            "the corpus has no files to read. Check corpus.path, corpus.format and corpus.glob."
        )
    with contextlib.suppress(OSError):  # a read-only root keeps them
        artifact.remove_temporaries(cache.parent)
    known = {} if read_all else _read_digests(cache)
    # A source that tells no time of change (HTTP) has to be read to know.
    stale = [f for f in files if f.version is None and not (f.modified_ns and _is_known(f, known))]
    if stale:
        total = sum(f.bytes for f in stale)
        log.info("digesting %d files, %.1f MB", len(stale), total / 1e6)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, digest in zip(
                stale, pool.map(lambda f: _digest(reader, f), stale), strict=True
            ):
                known[file.name] = DigestedFile(file.name, file.bytes, file.modified_ns, digest)
    found = [_versioned(f) if f.version is not None else known[f.name] for f in files]
    if stale:
        with contextlib.suppress(OSError):  # a read-only root digests anew each time
            _write_digests(cache, found)
    return found


def _is_known(file: SourceFile, known: dict[str, DigestedFile]) -> bool:
    old = known.get(file.name)
    return old is not None and (old.bytes, old.modified_ns) == (file.bytes, file.modified_ns)


def _versioned(file: SourceFile) -> DigestedFile:
    return DigestedFile(file.name, file.bytes, file.modified_ns, f"version:{file.version}")


def _digest(reader: Reader, file: SourceFile) -> str:
    digest = hashlib.sha256()
    with reader.open_bytes(file.name) as handle:
        while piece := handle.read(artifact.COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _read_digests(path: Path) -> dict[str, DigestedFile]:
    known = {}
    with contextlib.suppress(OSError, ValueError):  # a cache that cannot be read holds nothing
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                name, size, modified, digest = line.split("\t")
                file = DigestedFile(json.loads(name), int(size), int(modified), digest)
                known[file.name] = file
    return known


def _write_digests(path: Path, files: Sequence[DigestedFile]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(f.name)}\t{f.bytes}\t{f.modified_ns}\t{f.digest}\n" for f in files)
    with artifact.new_file(path, replace=True) as handle:
        for line in lines:
            handle.write(line.encode())


# ---- the stage -----------------------------------------------------------------------------------


class CorpusStage:
    """Scan of one corpus.

    Args:
        settings: which documents.
        files: the digested files, in the reader's order.
    """

    name = "corpus"
    version = 2
    resources = Resources(threads=1)
    unit = "bytes"
    tolerance = 0.0

    def __init__(self, settings: CorpusSettings, files: Sequence[DigestedFile]) -> None:
        self.settings = settings
        self.files = list(files)

    def key_fields(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for file in self.files:
            listing.update(f"{json.dumps(file.name)}\t{file.digest}\n".encode())
        return {**key_fields(self.settings), "files": listing.hexdigest()}

    def parents(self) -> dict[str, str]:
        return {}

    def blocks(self) -> list[Block]:
        """Whole files, gathered until they hold SCAN_BYTES."""
        blocks: list[Block] = []
        first, start, gathered = 0, 0, 0
        for i, file in enumerate(self.files):
            gathered += max(1, file.bytes)
            if gathered >= SCAN_BYTES or i == len(self.files) - 1:
                blocks.append(Block(len(blocks), start, start + gathered, [first, i + 1]))
                first, start, gathered = i + 1, start + gathered, 0
        return blocks

    def open(self, device: str) -> AbstractContextManager[Reader]:
        return contextlib.nullcontext(open_reader(self.settings))

    def make(self, context: Reader, block: Block, out: BlockWriter) -> None:
        first, last = block.extra
        with out.file(store.part_name(block.index, SKIPS)) as reports:
            scan = _Scan(self.settings.name, reports)
            for index in range(first, last):
                scan.file(context, index, self.files[index].name)
        scan.cut(last - 1, -1)
        out.rows = scan.documents
        out.count("documents", scan.documents)
        out.count("text_bytes", scan.text_bytes)
        out.count("skipped", scan.skipped)
        out.array(store.part_name(block.index, KEYS), keys_array([bytes(scan.keys)]))
        spans = np.array(scan.spans, np.int64).reshape(-1, 6)
        out.array(store.part_name(block.index, SPANS), spans)
        counts = np.array(scan.documents_of_file, np.int64)
        out.array(store.part_name(block.index, COUNTS), counts)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        keys = _load_parts(folder, receipts, KEYS)
        self._refuse_doubled_ids(folder, keys, _load_parts(folder, receipts, SPANS))
        entry = lay_parts(folder, receipts, SPANS)
        documents = _load_parts(folder, receipts, COUNTS)
        with artifact.new_file(folder / store.FILES, replace=True) as handle:
            for file, count in zip(self.files, documents.tolist(), strict=True):
                row = f"{json.dumps(file.name)}\t{file.bytes}\t{file.digest}\t{count}\n"
                handle.write(row.encode())
        with artifact.new_file(folder / store.SKIPPED, replace=True) as handle:
            handle.write(self._skipped_files())
            for receipt in receipts:
                with open(folder / store.part_name(receipt.block, SKIPS), "rb") as part:
                    shutil.copyfileobj(part, handle, artifact.COPY_BYTES)
        counts = total_counts(receipts)
        if counts.get("skipped"):
            log.warning(
                "corpus %s: %d documents or files skipped or repaired, listed in %s",
                *(self.settings.name, counts["skipped"], folder / store.SKIPPED),
            )
        if not counts.get("documents"):
            raise RetroDataError(
                f"corpus {self.settings.name} at {self.settings.path} holds no document that can be "
                f"used; {folder / store.SKIPPED} says why each was skipped."
            )
        return {
            "arrays": {SPANS: entry},
            "files": {
                name: {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": artifact.file_digest(folder / name),
                }
                for name in (store.FILES, store.SKIPPED)
            },
            "rows": counts["documents"],
            "figures": counts,
        }

    def _skipped_files(self) -> bytes:
        skipped = open_reader(self.settings).skipped_files()
        return b"".join(_report(name, None, None, reason) for name, reason in skipped)

    def _refuse_doubled_ids(
        self, folder: Path, keys: np.ndarray[Any, Any], spans: np.ndarray[Any, Any]
    ) -> None:
        records = store.as_records(keys)
        order = np.argsort(records, kind="stable")
        doubled = order[1:][records[order][1:] == records[order][:-1]]
        if not len(doubled):
            return
        found = [_document_at(self, spans, int(d)).id for d in np.sort(doubled)[:5]]
        examples = ", ".join(map(repr, dict.fromkeys(found)))
        raise RetroDataError(
            f"corpus {self.settings.name}: {len(doubled)} documents have an id that another document "
            f"has too, e.g. {examples}. A document's id must be its own, or neighbours could come "
            "from the query's own document. Set corpus.id_field=null to name documents by file and "
            "position, or name another corpus.id_field."
        )


class _Scan:
    """What one block of files holds; a small file may unpack to very many records."""

    def __init__(self, corpus: str, reports: BinaryIO) -> None:
        self.corpus = corpus
        self.keys = bytearray()
        self.documents = 0
        self.spans: list[tuple[int, int, int, int, int, int]] = []
        self.documents_of_file: list[int] = []
        self.text_bytes = 0
        self.skipped = 0
        self._reports = reports
        self._open: tuple[int, int] | None = None  # file and position where the open span began
        self._documents = self._bytes = 0

    def file(self, reader: Reader, index: int, name: str) -> None:
        before = self.documents
        for record in reader.records(name):
            if not isinstance(record, Document):
                self._report(name, record, record.reason)
                continue
            if self._bytes >= SPAN_BYTES:
                self.cut(index, record.position)
            if self._open is None:
                self._open = (index, record.position)
            if record.note:
                self._report(name, record, f"repaired: {record.note}")
            size = len(record.text.encode())
            self.keys += document_key(self.corpus, record.id)
            self.documents += 1
            self.text_bytes += size
            self._documents += 1
            self._bytes += size + len(record.id.encode()) + DOCUMENT_BYTES
        self.documents_of_file.append(self.documents - before)

    def cut(self, file: int, position: int) -> None:
        """End the open span before `position` of `file`."""
        if self._open is not None:
            self.spans.append((*self._open, file, position, self._documents, self._bytes))
        self._open, self._documents, self._bytes = None, 0, 0

    def _report(self, file: str, record: Document | Skipped, reason: str) -> None:
        self.skipped += 1
        self._reports.write(_report(file, record.position, record.id, reason))


def _report(file: str, position: int | None, document: str | None, reason: str) -> bytes:
    row = {"file": file, "position": position, "id": document, "reason": reason}
    return json.dumps(row).encode() + b"\n"


def _load_parts(folder: Path, receipts: Sequence[Receipt], kind: str) -> np.ndarray[Any, Any]:
    parts = [artifact.open_array(folder / store.part_name(r.block, kind)) for r in receipts]
    return np.concatenate(parts)


def _document_at(stage: CorpusStage, spans: np.ndarray[Any, Any], number: int) -> Document:
    first = np.concatenate([[0], np.cumsum(spans[:, 4])])
    span = int(np.searchsorted(first, number, side="right")) - 1
    names = [file.name for file in stage.files]
    documents = read_span(open_reader(stage.settings), names, Span(*spans[span].tolist()))
    for _ in range(number - int(first[span])):
        next(documents)
    return next(documents)


# ---- reading what was scanned --------------------------------------------------------------------


class ScannedCorpus:
    """A finished `corpus` artifact: its files and spans."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = store.finished(folder)
        self.spans = artifact.open_array(folder / SPANS)
        rows = [line.split("\t") for line in (folder / store.FILES).read_text("ascii").splitlines()]
        self.names: list[str] = [json.loads(row[0]) for row in rows]
        self.digests = [row[2] for row in rows]
        name = self.manifest["fields"]["name"]
        cache = _read_digests(store.digests_path(folder.parent.parent, name))
        digest = dict(zip(self.names, self.digests, strict=True))
        self.known = {n: f for n, f in cache.items() if f.digest == digest.get(n)}

    @property
    def text_bytes(self) -> int:
        return int(self.manifest["figures"]["text_bytes"])

    def blocks(self, block_bytes: int) -> list[Block]:
        """Spans merged until they hold `block_bytes` (see `Span`); rows are documents."""
        blocks: list[Block] = []
        start = documents = size = 0
        first: list[int] = []
        for i, (f0, p0, f1, p1, count, span_bytes) in enumerate(self.spans.tolist()):
            first = first or [f0, p0]
            documents, size = documents + count, size + span_bytes
            if size >= block_bytes or i == len(self.spans) - 1:
                extra = [*first, f1, p1]
                blocks.append(Block(len(blocks), start, start + documents, extra))
                start, documents, size, first = start + documents, 0, 0, []
        return blocks


def read_span(reader: Reader, names: Sequence[str], span: Span) -> Iterator[Document]:
    """The documents of a span, in corpus order."""
    for file in range(span.first_file, span.last_file + 1):
        start = span.start if file == span.first_file else 0
        stop = span.stop if file == span.last_file and span.stop >= 0 else None
        for record in reader.records(names[file], start, stop):
            if isinstance(record, Document):
                yield record


def block_documents(reader: Reader, corpus: ScannedCorpus, block: Block) -> Iterator[Document]:
    """The documents of one block, refused when a file is not what it was when it was scanned."""
    first, start, last, stop = block.extra
    _check_unchanged(reader, corpus, range(first, last + 1))
    count = 0
    span = Span(first, start, last, stop, block.stop - block.start, 0)
    for document in read_span(reader, corpus.names, span):
        count += 1
        yield document
    _check_unchanged(reader, corpus, range(first, last + 1))
    if count != block.stop - block.start:
        raise _changed(corpus.names[first], f"{count} documents, not {block.stop - block.start}")


def _check_unchanged(reader: Reader, corpus: ScannedCorpus, files: range) -> None:
    """Held against the digest unless size and time of change are those seen when it was taken."""
    for index in files:
        file = reader.stat(corpus.names[index])
        if file.version is not None:
            found = _versioned(file).digest
        elif _is_known(file, corpus.known):
            continue
        else:
            found = _digest(reader, file)
        if found != corpus.digests[index]:
            raise _changed(file.name, f"digest {found[:16]}, not {corpus.digests[index][:16]}")
        corpus.known[file.name] = DigestedFile(file.name, file.bytes, file.modified_ns, found)


def _changed(name: str, what: str) -> RetroDataError:
    return RetroDataError(
        f"the corpus file {name!r} changed while it was being read: found {what}. "
        "Run `retro-data prepare` again to start from the corpus as it is now."
    )
