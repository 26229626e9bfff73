"""The readers of tables: Parquet and Hugging Face datasets. Each row is a record."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from typing import Any, BinaryIO

from retro_data.corpus import (
    CorpusSettings,
    Skipped,
    SkippedFile,
    SourceFile,
    decode,
    kind,
    record_id,
    to_document,
    too_large,
    undecodable,
)
from retro_data.errors import RetroDataError
from retro_data.readers import Cursor, Item, Record, SequentialReader
from retro_data.source_files import Matches, Tree, name_bytes, name_of, require

_STRINGS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


class TableReader(SequentialReader):
    """Rows of Arrow batches. A payload is (id, text as a buffer or None, its encoding)."""

    unit = "row"

    def __init__(self, settings: CorpusSettings, tree: Tree) -> None:
        super().__init__(settings, tree)
        require("pyarrow", f"corpus {settings.name!r}")

    @staticmethod
    @abstractmethod
    def _batches(
        tree: Tree, name: str, start: int, settings: CorpusSettings
    ) -> Iterator[tuple[int, Any]]:
        """First row and Arrow batch, from one that holds `start` on; or row and `Skipped`."""

    def _open(self, name: str, start: int) -> Cursor:
        batches = self._batches(self._tree, name, start, self.settings)
        return Cursor(_rows(batches, start, self.settings), start)

    def _record(self, name: str, position: int, payload: tuple[Any, Any, str]) -> Record:
        settings = self.settings
        value, data, encoding = payload
        identity = record_id(value, name, position)
        if identity is None:
            return Skipped(position, None, f"id is not a string or number: {kind(value)}")
        if data is None:
            return to_document(position, identity, None)
        if len(data) > settings.max_document_bytes:
            return too_large(position, identity, str(len(data)), settings.max_document_bytes)
        try:
            text, note = decode(data.to_pybytes(), encoding, settings.encoding_errors)
        except UnicodeDecodeError as error:
            return undecodable(position, identity, error)
        return to_document(position, identity, text, note)


class ParquetReader(TableReader):
    """Parquet files. Row groups are independent: damage ends one and spares the others."""

    @staticmethod
    def _batches(
        tree: Tree, name: str, start: int, settings: CorpusSettings
    ) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa
        import pyarrow.parquet

        with closing(tree.open(name)) as handle:
            try:
                file = pa.parquet.ParquetFile(handle, buffer_size=2**20)
                columns = _columns(file.schema_arrow, name, settings)
            except _damage() as error:
                yield 0, _damaged(name, 0, error)
                return
            if isinstance(columns, Skipped):
                yield 0, columns
                return
            first = 0
            for group in range(file.num_row_groups):
                info = file.metadata.row_group(group)
                row, first = first, first + info.num_rows
                if first <= start:
                    continue
                rows = _batch_rows(info.total_byte_size, info.num_rows)
                try:
                    for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                        if row + batch.num_rows > first:
                            raise pa.ArrowInvalid(f"over {info.num_rows} rows in a row group")
                        if row + batch.num_rows > start:
                            yield row, batch
                        row += batch.num_rows
                except _damage() as error:
                    yield row, _damaged(name, row, error)


class HuggingFaceReader(TableReader):
    """A Hugging Face dataset, by the Arrow files it is kept in.

    A dataset of the hub is downloaded to the cache of `datasets`; its version is the resolved
    revision. A folder of `save_to_disk` is read where it lies.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        saved = is_saved_dataset(settings.path)
        for field in ("glob", *(("hf_config", "hf_revision") if saved else ())):
            if getattr(settings, field) is not None:
                raise RetroDataError(
                    f"corpus {settings.name!r}: {field} is {getattr(settings, field)!r}, but means "
                    f"nothing for the dataset {settings.path!r}. Leave it unset"
                )
        super().__init__(settings, _ArrowFiles(settings))

    def _pattern(self) -> str:
        return "*.arrow"

    @staticmethod
    def _batches(
        tree: Tree, name: str, start: int, settings: CorpusSettings
    ) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa

        with closing(tree.open(name)) as handle:
            try:
                table = pa.ipc.open_stream(pa.memory_map(handle.name)).read_all()
                columns = _columns(table.schema, name, settings)
            except _damage() as error:
                yield 0, _damaged(name, 0, error)
                return
        if isinstance(columns, Skipped):
            yield 0, columns
            return
        rows = _batch_rows(table.nbytes, table.num_rows)
        for batch in table.select(columns).slice(start).to_batches(max_chunksize=rows):
            yield start, batch
            start += batch.num_rows


def _rows(
    batches: Iterator[tuple[int, Any]], start: int, settings: CorpusSettings
) -> Iterator[Item]:
    for first, batch in batches:
        if isinstance(batch, Skipped):
            yield first, batch
            continue
        row = max(first, start)
        batch = batch.slice(row - first)
        texts = batch.column(settings.text_field)
        encoding = settings.encoding if _is_binary(texts.type) else "utf-8"
        ids: Iterator[Any] = repeat(None, len(texts))
        if settings.id_field in batch.schema.names:
            ids = _ids(batch.column(settings.id_field))
        for value, text in zip(ids, texts, strict=True):
            yield row, (value, _buffer(text), encoding)
            row += 1


def _ids(column: Any) -> Iterator[Any]:
    """Strings and numbers of Python, None for null; the scalar itself where it is neither."""
    is_string, is_number = _is_string(column.type), _is_number(column.type)
    for scalar in column:
        if not scalar.is_valid:
            yield None
        elif is_string:
            yield _buffer(scalar).to_pybytes().decode("utf-8", "backslashreplace")
        else:
            yield scalar.as_py() if is_number else scalar


def _buffer(scalar: Any) -> Any:
    """The bytes of a string, where they lie; None for null."""
    if not scalar.is_valid:
        return None
    return (scalar.value if hasattr(scalar, "index") else scalar).as_buffer()


def _columns(schema: Any, name: str, settings: CorpusSettings) -> list[str] | Skipped:
    """The columns to read, or why the file has no documents."""
    field = settings.text_field
    for wanted in (field, settings.id_field):
        if schema.names.count(wanted) > 1:
            return Skipped(0, None, f"doubled column: {wanted!r} in {name!r}")
    if field not in schema.names:
        found = ", ".join(schema.names)
        return Skipped(0, None, f"no text field: {field!r} in {name!r}, which has {found}")
    found = schema.field(field).type
    if not _is_string(found) and not _is_binary(found):
        return Skipped(0, None, f"text is not a string: {field!r} in {name!r} is {found}")
    return [name for name in schema.names if name in (field, settings.id_field)]


def _batch_rows(total_bytes: int, rows: int) -> int:
    """Rows of a batch, so that one of average rows is at most about 16 MiB.

    It has few rows at the most: a value that many rows share is stored once, and copied into each.
    """
    return max(1, min(16, 2**24 * rows // max(total_bytes, 1)))


def _is_string(found: Any) -> bool:
    """Whether an Arrow type is UTF-8 text, whatever its layout."""
    return _plain(found) in _STRINGS


def _is_binary(found: Any) -> bool:
    return _plain(found) in _BYTES


def _is_number(found: Any) -> bool:
    return _plain(found).removeprefix("u").startswith(("int", "float", "double"))


def _plain(found: Any) -> str:
    """The name of an Arrow type, or of the values that its dictionary holds."""
    return str(found.value_type if hasattr(found, "index_type") else found)


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises where bytes make no sense; ValueError for a name that is not UTF-8."""
    import pyarrow as pa

    return pa.ArrowException, OSError, ValueError, OverflowError


def _damaged(name: str, row: int, error: Exception) -> Skipped:
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # from the operating system: of the moment, not of the bytes
    return Skipped(row, None, f"damaged file: {name!r}: {error}")


# ---- Hugging Face --------------------------------------------------------------------------------


def is_saved_dataset(path: str) -> bool:
    """Whether `path` is a folder that `save_to_disk` of the package `datasets` wrote."""
    marks = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(os.path.join(path, mark)) for mark in marks)


class _ArrowFiles:
    """The tree of the Arrow files of one split."""

    def __init__(self, settings: CorpusSettings) -> None:
        self._paths, self._version = _arrow_files(settings)

    def list(self, matches: Matches) -> tuple[list[SourceFile], list[SkippedFile]]:
        return sorted(map(self.stat, self._paths), key=name_bytes), []

    def stat(self, name: str) -> SourceFile:
        info = os.stat(self._paths[name])
        return SourceFile(name, info.st_size, info.st_mtime_ns, self._version)

    def open(self, name: str) -> BinaryIO:
        return open(self._paths[name], "rb")


def _arrow_files(settings: CorpusSettings) -> tuple[dict[str, str], str | None]:
    """Paths of a split's Arrow files by relative name, and the hub's revision.

    Raises:
        RetroDataError: no such dataset, configuration or split.
    """
    datasets = require("datasets", f"corpus {settings.name!r}")
    version = None
    try:
        if is_saved_dataset(settings.path):
            data = datasets.load_from_disk(settings.path)
        else:
            builder = datasets.load_dataset_builder(
                settings.path, settings.hf_config, revision=settings.hf_revision
            )
            builder.download_and_prepare()
            data = builder.as_dataset()
            version = None if os.path.exists(settings.path) else builder.hash
    except (OSError, ValueError) as error:
        raise RetroDataError(
            f"corpus {settings.name!r}: the dataset {settings.path!r} cannot be loaded (hf_config "
            f"{settings.hf_config!r}, hf_revision {settings.hf_revision!r}): {error}"
        ) from error
    paths = [entry["filename"] for entry in _split(data, settings).cache_files]
    if not paths:
        return {}, version
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [name_of(os.path.relpath(path, folder)).replace(os.sep, "/") for path in paths]
    return dict(zip(names, paths, strict=True)), version


def _split(data: Any, settings: CorpusSettings) -> Any:
    if not isinstance(data, dict):
        # A saved dataset that does not say which split it is may be any.
        data = {settings.hf_split if data.split is None else str(data.split): data}
    if settings.hf_split in data:
        return data[settings.hf_split]
    if settings.hf_split is None and len(data) == 1:
        return next(iter(data.values()))
    raise RetroDataError(
        f"corpus {settings.name!r}: hf_split is {settings.hf_split!r}, the dataset "
        f"{settings.path!r} has {', '.join(data)}"
    )
