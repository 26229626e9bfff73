"""What all readers share, and the readers of text files and JSON lines."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any, BinaryIO

from retro_data.corpus import (
    CorpusSettings,
    Document,
    Skipped,
    SkippedFile,
    SourceFile,
    decode,
    encodable,
    foreign_mark,
    kind,
    record_id,
    to_document,
    too_large,
    undecodable,
)
from retro_data.errors import RetroDataError
from retro_data.source_files import ByteStream, Matches, Tree, matches_glob

Record = Document | Skipped

_EXTENSIONS = {
    "text": (".txt", ".txt.gz", ".txt.zst"),
    "jsonl": (
        *(".jsonl", ".jsonl.gz", ".jsonl.zst"),
        *(".ndjson", ".ndjson.gz", ".ndjson.zst"),
        *(".json.gz", ".json.zst"),  # plain .json is one value far more often than lines
    ),
    "parquet": (".parquet", ".pq"),
}


def format_of(name: str) -> str | None:
    """The format that a file's extension tells, in any case."""
    lower = name.lower()
    return next((format for format, ends in _EXTENSIONS.items() if lower.endswith(ends)), None)


def detect_format(settings: CorpusSettings, tree: Tree) -> str:
    """The one format of the files in a tree.

    Raises:
        RetroDataError: there is none, or a mix.
    """
    if settings.glob is None:
        files, _ = tree.list(lambda name: format_of(name) is not None)
    else:
        files, _ = tree.list(matches_glob(settings.glob))
    examples = {format_of(file.name): file.name for file in reversed(files)}
    if len(examples) == 1 and None not in examples:
        return str(next(iter(examples)))
    found = ", ".join(f"{format or 'unknown'} ({name!r})" for format, name in examples.items())
    raise RetroDataError(
        f"corpus {settings.name!r}: format auto needs files of one format at {settings.path}, "
        f"found {found or 'no file with a known extension'}. Set format "
        f"({', '.join(_EXTENSIONS)}, huggingface), or glob to choose files"
    )


class FileReader(ABC):
    """What all readers share: the list of files, and what happens to a bad document."""

    unit = "byte"  # of a position

    def __init__(self, settings: CorpusSettings, tree: Tree) -> None:
        self.settings = settings
        self._tree = tree
        self._listing: tuple[list[SourceFile], list[SkippedFile]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listing": None}  # long, and of no use to a worker

    def files(self) -> list[SourceFile]:
        files, skipped = self._list()
        if not files:
            rest = "".join(f"; skipped {name!r}: {reason}" for name, reason in skipped[:3])
            raise RetroDataError(
                f"corpus {self.settings.name!r}: no {self.settings.format} files at "
                f"{self.settings.path} (looked for {self._pattern()}){rest}. Set path or glob"
            )
        return files

    def skipped_files(self) -> list[SkippedFile]:
        return self._list()[1]

    def stat(self, name: str) -> SourceFile:
        with self._reading(name):
            return self._tree.stat(name)

    def open_bytes(self, name: str) -> BinaryIO:
        with self._reading(name):
            return self._tree.open(name)

    def records(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        refuse_bad = self.settings.on_bad_document == "raise"
        with self._reading(name):
            for record in self._records(name, start, stop):
                if refuse_bad and isinstance(record, Skipped) and record.is_bad:
                    raise RetroDataError(
                        f"corpus {self.settings.name!r}: bad document in {name!r} at {self.unit} "
                        f"{record.position}: {record.reason}. Mend it, or set "
                        f"on_bad_document: skip"
                    )
                yield record

    @abstractmethod
    def _records(self, name: str, start: int, stop: int | None) -> Iterator[Record]: ...

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RetroDataError(
                f"corpus {self.settings.name!r}: {name!r} cannot be read: {error}. "
                f"Nothing is lost: run again when it can be"
            ) from error

    def _list(self) -> tuple[list[SourceFile], list[SkippedFile]]:
        if self._listing is None:
            self._listing = self._tree.list(self._matches())
        return self._listing

    def _matches(self) -> Matches:
        if self.settings.glob is not None:
            return matches_glob(self.settings.glob)
        return lambda name: format_of(name) == self.settings.format

    def _pattern(self) -> str:
        return self.settings.glob or " ".join(_EXTENSIONS.get(self.settings.format, ()))


# ---- one document a file -------------------------------------------------------------------------


class WholeFileReader(FileReader):
    """A file is one record, at position 0."""

    def _records(self, name: str, start: int, stop: int | None) -> Iterator[Record]:
        if start <= 0 and (stop is None or stop > 0):
            yield self._record(name)

    @abstractmethod
    def _record(self, name: str) -> Record: ...

    def _read(self, name: str) -> bytes | Skipped:
        """The decompressed bytes of a file, or why they are no document."""
        limit = self.settings.max_document_bytes
        identity = encodable(name)
        with closing(
            ByteStream(name, self._tree.open(name), self.settings.max_expansion)
        ) as stream:
            parts, size = [], 0
            for piece in stream.pieces():
                parts.append(piece)
                size += len(piece)
                if size > limit:
                    found = f"over {limit}" if stream.compression else str(stream.size())
                    return too_large(0, identity, found, limit)
            if stream.damage:
                return Skipped(0, identity, stream.damage)
        return b"".join(parts)


class TextReader(WholeFileReader):
    """Text files; the id is the file's name."""

    def _record(self, name: str) -> Record:
        identity = encodable(name)
        data = self._read(name)
        if isinstance(data, Skipped):
            return data
        encoding = self.settings.encoding
        if mark := foreign_mark(data, encoding):
            reason = f"undecodable: {encoding} expected, its byte order mark says {mark}"
            return Skipped(0, identity, reason)
        try:
            text, note = decode(data, encoding, self.settings.encoding_errors)
        except UnicodeDecodeError as error:
            return undecodable(0, identity, error)
        return to_document(0, identity, text.removeprefix("\ufeff"), note)


# ---- many documents a file -----------------------------------------------------------------------

Item = tuple[int, Any]  # position and payload; a payload may be a finished `Skipped`


class Cursor:
    """A place in an open file.

    Args:
        items: all from position `start` on, and maybe some before.
        is_stream: the way ahead is by reading only.
    """

    def __init__(self, items: Iterator[Item], start: int, is_stream: bool = False) -> None:
        self._items = items
        self._is_stream = is_stream
        self._last = start - 1  # up to here an item may have been taken, or is not there
        self._head: Item | None = None
        self._is_at_end = False

    def take(self, stop: int | None) -> Item | None:
        """The next item, or None where there is none before `stop`."""
        if self._head is None and not self._is_at_end:
            self._head = next(self._items, None)
            self._is_at_end = self._head is None
        item = self._head
        if item is None or (stop is not None and item[0] >= stop):
            return None
        self._last, self._head = item[0], None
        return item

    def serves(self, start: int) -> bool:
        """Whether the items from `start` on are all ahead, and near."""
        if self._last >= start:
            return False
        return self._is_stream or self._head is None or start <= self._head[0]


class SequentialReader(FileReader):
    """Reads ranges of positions; the file read last stays open where its last range ended."""

    def __init__(self, settings: CorpusSettings, tree: Tree) -> None:
        super().__init__(settings, tree)
        self._kept: tuple[str, Cursor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}

    def _records(self, name: str, start: int, stop: int | None) -> Iterator[Record]:
        kept, self._kept = self._kept, None  # ours until the range has ended without an error
        if kept is not None and kept[0] == name and kept[1].serves(start):
            cursor = kept[1]
        else:
            cursor = self._open(name, start)
        while item := cursor.take(stop):
            position, payload = item
            if position < start:
                continue
            record = payload
            if not isinstance(payload, Skipped):
                record = self._record(name, position, payload)
            if record is not None:
                yield record
        self._kept = name, cursor

    @abstractmethod
    def _open(self, name: str, start: int) -> Cursor:
        """A cursor that serves `start`.

        Its items must not refer to the reader, which keeps it: a cycle would keep files open.
        """

    @abstractmethod
    def _record(self, name: str, position: int, payload: Any) -> Record | None: ...


_PARSE = json.JSONDecoder().decode  # json.loads without its checks of arguments
# A bracket that opens an array of objects, or stands alone on the first line.
_NOT_LINES = re.compile(rb"\s*(\[\s*\{|[\[{][ \t\r]*\n)")
_HEAD = 4096
# Of a JSON value. Python's own end depends on how deep the caller is: a line must not be a document
# for one stage and a bad one for the next.
_DEPTH = 100
_TOO_DEEP = f"malformed json: nested over {_DEPTH} deep"


class JsonlReader(SequentialReader):
    """JSON lines, cut at LF only. Blank lines are no records."""

    def __init__(self, settings: CorpusSettings, tree: Tree) -> None:
        super().__init__(settings, tree)
        if b"\n{".decode(settings.encoding, "replace") != "\n{":
            raise RetroDataError(
                f"corpus {settings.name!r}: encoding {settings.encoding} cannot be cut into lines; "
                f"JSON lines need one that holds ASCII as single bytes. Write them as utf-8"
            )

    def _open(self, name: str, start: int) -> Cursor:
        limit = self.settings.max_document_bytes
        stream = ByteStream(name, self._tree.open(name), self.settings.max_expansion)
        pieces = stream.pieces()
        head = b""
        for piece in pieces:
            head += piece
            if len(head) >= _HEAD:
                break
        if refusal := self._refusal(name, head):
            stream.close()
            return Cursor(iter([(0, Skipped(0, None, refusal))]), 0)
        if stream.compression or start == 0:
            lines = _lines(stream, chain([head], pieces), 0, limit)
            return Cursor(lines, 0, is_stream=stream.compression is not None)
        # From one byte before: if that ends a line, the line at `start` is whole.
        return Cursor(_lines(stream, stream.pieces(start - 1), start - 1, limit), start)

    def _refusal(self, name: str, head: bytes) -> str | None:
        if mark := foreign_mark(head, self.settings.encoding):
            return f"undecodable: the byte order mark of {name!r} says {mark}; write it as utf-8"
        if _NOT_LINES.match(head.removeprefix(b"\xef\xbb\xbf")):
            return f"not json lines: {name!r} is one JSON value, expected one object a line"
        return None

    def _record(self, name: str, position: int, payload: bytes) -> Record | None:
        settings = self.settings
        try:
            line, note = decode(payload, settings.encoding, settings.encoding_errors)
        except UnicodeDecodeError as error:
            return undecodable(position, None, error)
        if position == 0:
            line = line.removeprefix("\ufeff")
        if not line or line.isspace():
            return None
        try:
            value = _PARSE(line)
        except json.JSONDecodeError as error:
            reason = f"malformed json: {error.msg} (character {error.pos})"
            return Skipped(position, None, reason)
        except RecursionError:
            return Skipped(position, None, _TOO_DEEP)
        except ValueError as error:  # a number of thousands of digits
            return Skipped(position, None, f"malformed json: {error}")
        if _is_deep(value):
            return Skipped(position, None, _TOO_DEEP)
        if not isinstance(value, dict):
            return Skipped(position, None, f"not an object: {kind(value)}")
        identity = record_id(value.get(settings.id_field), name, position)
        if identity is None:
            found = kind(value[settings.id_field])
            return Skipped(position, None, f"id is not a string or number: {found}")
        if settings.text_field not in value:
            return Skipped(position, identity, f"no text field: {settings.text_field!r}")
        return to_document(position, identity, value[settings.text_field], note)


def _is_deep(value: Any) -> bool:
    """Whether a value holds lists or objects in each other, deeper than `_DEPTH`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        inner = chain.from_iterable(v.values() if isinstance(v, dict) else v for v in level)
        level = [v for v in inner if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def _lines(
    stream: ByteStream, pieces: Iterator[bytes], position: int, limit: int
) -> Iterator[Item]:
    """Position and bytes of each line, without its LF; a `Skipped` for one beyond `limit` bytes.

    Empty lines are left out here, at no cost: a small file may unpack to very many.
    """
    parts: list[bytes] = []  # of the line that is not yet at its end; none beyond the limit
    size = 0
    with closing(stream):
        for piece in pieces:
            *ends, rest = piece.split(b"\n")
            for end in ends:
                size += len(end)
                line = b"".join((*parts, end)) if parts else end
                if size > limit:
                    yield position, too_large(position, None, str(size), limit)
                elif line:
                    yield position, line
                position += size + 1
                size = 0
                parts.clear()
            size += len(rest)
            if size > limit:
                parts.clear()
            elif rest:
                parts.append(rest)
    if stream.damage:  # the line it was cut in is no document
        yield position, Skipped(position, None, stream.damage)
    elif size > limit:
        yield position, too_large(position, None, str(size), limit)
    elif size:
        yield position, b"".join(parts)
