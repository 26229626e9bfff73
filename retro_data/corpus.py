"""What a corpus is: settings, documents, and how a reader of them behaves.

    reader = open_reader(CorpusSettings(name="books", path="data/books"))
    for file in reader.files():
        for record in reader.records(file.name):
            ...  # a Document, or a Skipped that says why there is none

The same bytes give the same records, on any machine and from any place. What lies in the bytes (a
broken line, a truncated stream) is a `Skipped`, or an error under `on_bad_document: raise`. What
lies in the moment (no network, a failing disk) is always an error: a document is never lost to it.

Rules that hold for the text of every format:

- A UTF-8 byte order mark is removed; CRLF and CR become LF; NUL becomes a space. All other
  characters stay as they are: no Unicode normalization, no stripping.
- Lone surrogates, which only JSON escapes can bring, become U+FFFD.
- Empty and white-space-only texts are no documents. They are reported, and are never an error.
- A text is `binary`, a bad document, when over a fifth of its first 1,024 characters are control
  or replacement characters.

What was repaired other than line ends is said in `Document.note`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple, Protocol

from retro_data.artifact import free, keyed
from retro_data.errors import RetroDataError

_CHOICES = {
    "format": ("auto", "text", "jsonl", "parquet", "huggingface", "factbook"),
    "encoding_errors": ("strict", "replace", "ignore"),
    "on_bad_document": ("skip", "raise"),
    "split": ("hash", "train", "val", "test", "database"),
}


@dataclass(frozen=True)
class CorpusSettings:
    """One corpus: where it lies and how its documents are read.

    Attributes:
        name: the identity of the source, part of the identity of each of its documents.
        path: a file or folder; an fsspec address (`s3://…`, `memory://…`), with credentials from
            fsspec's own configuration; `pkg://package/folder` for data inside an installed package,
            which is not imported; with `format: huggingface` a folder of `save_to_disk` or the name
            of a dataset on the hub.
        format: `auto` goes by file extension: .txt is text; .jsonl, .ndjson, .json.gz and
            .json.zst are jsonl; .parquet and .pq are parquet. Text and jsonl may end in .gz or
            .zst. A mix is an error.
        glob: pattern of the files below `path`, case-sensitive, `**` for any depth. None: the
            format's extensions at any depth, in any case. Files and folders whose name starts
            with a dot are never read.
        text_field: the field or column that holds the text.
        id_field: the field or column that holds the id. Where it is None, absent, null or empty,
            the id is `file:byte offset` (jsonl) or `file:row` (parquet, huggingface). The id of a
            text file is its name below `path`.
        encoding: of text files, of JSON lines and of binary columns.
        encoding_errors: `strict` makes an undecodable document a bad one.
        on_bad_document: `skip` reports it, `raise` ends the run.
        max_document_bytes: bytes of one text file (decompressed), JSON line or column value; a
            larger one is a bad document, and is never held in memory. Tokenizing takes up to 400
            bytes of memory for each.
        max_expansion: times its stored bytes that a compressed file may unpack to (64 MiB are
            always allowed); what lies beyond is not read, and is a bad document.
        split: `hash`, or the one split that all documents belong to.
        hf_config, hf_split, hf_revision: of a Hugging Face dataset.

    Raises:
        RetroDataError: a value that is none of the choices, or an unknown encoding.
    """

    name: str = keyed()
    path: str = free()
    format: str = keyed("auto")
    glob: str | None = free(None)
    text_field: str = keyed("text")
    id_field: str | None = keyed("id")
    encoding: str = keyed("utf-8")
    encoding_errors: str = keyed("strict")
    on_bad_document: str = keyed("skip")
    max_document_bytes: int = keyed(8 * 2**20)
    max_expansion: int = keyed(200)
    split: str = free("hash")
    hf_config: str | None = keyed(None)
    hf_split: str | None = keyed(None)
    hf_revision: str | None = keyed(None)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise RetroDataError(
                f"corpus name {self.name!r}: expected a name that can be part of a folder's name"
            )
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise RetroDataError(
                    f"corpus {self.name!r}: {field} is {getattr(self, field)!r}, "
                    f"expected one of {', '.join(choices)}"
                )
        for field in ("max_document_bytes", "max_expansion"):
            if getattr(self, field) < 1:
                raise RetroDataError(
                    f"corpus {self.name!r}: {field} is {getattr(self, field)}, expected at least 1"
                )
        try:
            b"a".decode(
                self.encoding, "replace"
            )  # unlike codecs.lookup, refuses what is no text encoding
        except LookupError:
            raise RetroDataError(
                f"corpus {self.name!r}: encoding {self.encoding!r} is unknown, "
                f"expected a Python codec such as utf-8, utf-16 or latin-1"
            ) from None


class Document(NamedTuple):
    """One text with an id. Both can be encoded as UTF-8.

    `position` is where it starts in its file: the byte offset of the line in the decompressed
    stream (jsonl), the row (parquet, huggingface), 0 (text). `note` says what was repaired.
    """

    position: int
    id: str
    text: str
    note: str | None = None


class Skipped(NamedTuple):
    """A record that is no document. `reason` is a fixed word or two, `: ` and what was found."""

    position: int
    id: str | None
    reason: str

    @property
    def is_bad(self) -> bool:
        """False where nothing is wrong: there is just no text."""
        return not self.reason.startswith("empty")


class SourceFile(NamedTuple):
    """A file of a corpus. `name` is relative, with `/`, and may hold undecodable bytes as
    surrogates; `bytes` is its stored size; `version` is the store's own ETag, object version or
    revision, None where it has none and the bytes have to tell."""

    name: str
    bytes: int
    modified_ns: int
    version: str | None


class SkippedFile(NamedTuple):
    """A file or folder that cannot be read, and why."""

    name: str
    reason: str


class Reader(Protocol):
    """Reads one corpus. Picklable; one object serves one thread."""

    settings: CorpusSettings  # with `format` resolved

    def files(self) -> list[SourceFile]:
        """The regular files of the corpus, sorted by the bytes of their names.

        Raises:
            RetroDataError: there are none.
        """

    def skipped_files(self) -> list[SkippedFile]:
        """What would belong to the corpus but cannot be read: a FIFO, a dangling link, …"""

    def stat(self, name: str) -> SourceFile:
        """A file as it is now.

        Raises:
            RetroDataError: it cannot be reached.
        """

    def open_bytes(self, name: str) -> BinaryIO:
        """The stored bytes of a file, for its digest."""

    def records(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> Iterator[Document | Skipped]:
        """The records of a file whose position lies in [start, stop), in order.

        Consecutive ranges asked of one reader read a compressed file once.

        Raises:
            RetroDataError: a bad document under `on_bad_document: raise`; a file that cannot be
                opened or read.
        """


def open_reader(settings: CorpusSettings) -> Reader:
    """The reader of a corpus. Lists files only where `format: auto` has to look at them.

    Raises:
        RetroDataError: nothing at `path`; a format that cannot be told; a missing package.
    """
    # Readers are built from the types above, so they can be imported only here.
    from retro_data.demo import FactbookReader
    from retro_data.readers import JsonlReader, TextReader, detect_format
    from retro_data.source_files import open_tree
    from retro_data.table_readers import HuggingFaceReader, ParquetReader, is_saved_dataset

    if settings.format == "auto" and is_saved_dataset(settings.path):
        settings = replace(settings, format="huggingface")
    if settings.format == "huggingface":
        return HuggingFaceReader(settings)
    if settings.format == "factbook":
        return FactbookReader(settings)
    tree = open_tree(settings.path)
    if settings.format == "auto":
        settings = replace(settings, format=detect_format(settings, tree))
    if settings.format == "parquet":
        return ParquetReader(settings, tree)
    return (JsonlReader if settings.format == "jsonl" else TextReader)(settings, tree)


# ---- text ----------------------------------------------------------------------------------------

_FOREIGN_MARKS = (  # the longer ones first: UTF-16's is the head of UTF-32's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_NOISE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]")
# Bytes that occur in the UTF-8 form of noise: C0 controls, DEL, the first byte of C1 and of U+FFFD.
_NOISE_BYTES = bytes([*range(0x09), *range(0x0E, 0x20), 0x7F, 0xC2, 0xEF])
_NOISE_WINDOW = 1024
_NOISE_SHARE = 0.2


def foreign_mark(head: bytes, encoding: str) -> str | None:
    """The encoding that a byte order mark names, where it contradicts a `utf-8` setting."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
        return None
    return next((name for mark, name in _FOREIGN_MARKS if head.startswith(mark)), None)


def decode(data: bytes, encoding: str, errors: str) -> tuple[str, str | None]:
    """The text of `data`, and a note where bytes had to be replaced or ignored.

    Raises:
        UnicodeDecodeError: under `strict`.
    """
    try:
        return data.decode(encoding), None
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise
        done = {"replace": "replaced by U+FFFD", "ignore": "left out"}[errors]
        note = f"undecodable {encoding} {done}, from byte {error.start} on"
        return data.decode(encoding, errors), note


def undecodable(position: int, identity: str | None, error: UnicodeDecodeError) -> Skipped:
    return Skipped(position, identity, f"undecodable: {error.encoding} at byte {error.start}")


def too_large(position: int, identity: str | None, found: str, limit: int) -> Skipped:
    reason = f"too large: {found} bytes > max_document_bytes {limit}"
    return Skipped(position, identity, reason)


def to_document(
    position: int, identity: str, text: object, note: str | None = None
) -> Document | Skipped:
    """Apply the rules of this module to a text; `note` says what its decoding repaired."""
    if not isinstance(text, str):
        return Skipped(position, identity, f"text is not a string: {kind(text)}")
    notes = [note] if note else []
    if not text.isascii() and not _is_encodable(text):
        text, count = _SURROGATES.subn("\ufffd", text)
        notes.append(f"{count} lone surrogates replaced by U+FFFD")
    if _is_binary(text):
        reason = "binary: over a fifth of its head are control or undecodable characters"
        return Skipped(position, identity, reason)
    if "\0" in text:
        notes.append(f"{text.count(chr(0))} NUL replaced by spaces")
        text = text.replace("\0", " ")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text or text.isspace():
        return Skipped(position, identity, "empty")
    return Document(position, identity, text, "; ".join(notes) or None)


def encodable(name: str) -> str:
    """A name as an id: what UTF-8 cannot hold (a file name's undecodable bytes) is escaped."""
    if name.isascii() or _is_encodable(name):
        return name
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def record_id(value: object, name: str, position: int) -> str | None:
    """The id of a record of file `name`; None where the value is neither string nor number."""
    if value is None or value == "":
        return f"{encodable(name)}:{position}"
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None


def kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_binary(text: str) -> bool:
    head = text[:_NOISE_WINDOW]
    # Deleting bytes is several times faster than a search of characters, and rarely undercut.
    data = head.encode("utf-8")
    if len(data) - len(data.translate(None, _NOISE_BYTES)) <= _NOISE_SHARE * len(head):
        return False
    return len(_NOISE.findall(head)) > _NOISE_SHARE * len(head)
