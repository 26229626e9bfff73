"""Where the files of a corpus lie, and their decompressed bytes."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from backports.zstd import ZstdDecompressor, ZstdError

from retro_data.corpus import SkippedFile, SourceFile
from retro_data.errors import RetroDataError

Matches = Callable[[str], bool]  # of a relative name


class Tree(Protocol):
    """The files below one path. A path that is a file is a tree of that file alone."""

    def list(self, matches: Matches) -> tuple[list[SourceFile], list[SkippedFile]]:
        """The regular files that match, and what cannot be read; both sorted by name.

        Files and folders whose name starts with a dot are left out.
        """

    def stat(self, name: str) -> SourceFile: ...

    def open(self, name: str) -> BinaryIO: ...


def open_tree(path: str) -> Tree:
    """The tree at a local path, a `pkg://` address or an fsspec address.

    Raises:
        RetroDataError: nothing there, or a package that is needed is missing.
    """
    if path.startswith("pkg://"):
        return LocalTree(package_path(path))
    if "://" not in path:
        return LocalTree(os.path.expanduser(path))
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, root = url_to_fs(path)
    except ImportError as error:
        extra = path.split("://")[0].replace("https", "http")
        raise RetroDataError(f"{path}: {error}: pip install 'fsspec[{extra}]'") from error
    except ValueError as error:
        raise RetroDataError(f"{path}: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalTree(root)
    return RemoteTree(path, filesystem, root)


def package_path(address: str) -> str:
    """The folder of `pkg://package/folder`, found without importing the package.

    Raises:
        RetroDataError: the package is not installed or has no such folder.
    """
    package, _, folder = address.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.submodule_search_locations is None:
        raise RetroDataError(f"{address}: no package {package!r} is installed")
    for location in spec.submodule_search_locations:
        path = os.path.join(location, folder)
        if os.path.exists(path):
            return path
    raise RetroDataError(f"{address}: the package {package!r} has no {folder!r}")


def require(module: str, what: str) -> Any:
    """Import an optional module.

    Raises:
        RetroDataError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise RetroDataError(f"{what} needs {package}: pip install {package}") from error


def matches_glob(pattern: str) -> Matches:
    """Whether a relative name matches: `*`, `?` and `[…]` within a part, `**` for any parts."""
    parts = pattern.split("/")
    return lambda name: _match(parts, name.split("/"))


def _match(parts: list[str], names: list[str]) -> bool:
    reached = _pass_any({0}, parts)  # parts that the next name may have to match
    for name in names:
        after = {i for i in reached if i < len(parts) and parts[i] == "**"}
        after |= {
            i + 1 for i in reached - after if parts[i : i + 1] and fnmatchcase(name, parts[i])
        }
        reached = _pass_any(after, parts)
    return len(parts) in reached


def _pass_any(reached: set[int], parts: list[str]) -> set[int]:
    for i, part in enumerate(parts):
        if i in reached and part == "**":
            reached.add(i + 1)
    return reached


# ---- names ---------------------------------------------------------------------------------------


def name_of(path: str) -> str:
    """A local path as UTF-8, whatever encoding the locale reads it in; see `path_of`.

    Bytes that are not UTF-8 become surrogates.
    """
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def path_of(name: str) -> str:
    return os.fsdecode(_encode(name))


def name_bytes(entry: SourceFile | SkippedFile) -> bytes:
    return _encode(entry.name)


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


# ---- trees ---------------------------------------------------------------------------------------


class LocalTree:
    """Files on this machine.

    Links are followed. Each real folder is read once, under its own name where it has one below
    the root, so loops end; a link to a folder that is read already is reported.
    """

    def __init__(self, path: str) -> None:
        if not os.path.exists(path):
            raise RetroDataError(
                f"no file or folder {path!r}; a dataset of the Hugging Face hub needs "
                f"format: huggingface"
            )
        self.root = path
        self._only: str | None = None
        if not os.path.isdir(path):
            self.root, only = os.path.split(path)
            self._only = name_of(only)

    def stat(self, name: str) -> SourceFile:
        return _local_file(name, os.stat(_join(self.root, name)))

    def open(self, name: str) -> BinaryIO:
        return open(_join(self.root, name), "rb", opener=_open_regular)

    def list(self, matches: Matches) -> tuple[list[SourceFile], list[SkippedFile]]:
        walk = _Walk(self.root, matches)
        if self._only is not None:
            walk.file(self._only, os.stat(_join(self.root, self._only)))
        else:
            walk.folders()
        return sorted(walk.files, key=name_bytes), sorted(walk.skipped, key=name_bytes)


def _join(root: str, name: str) -> str:
    return os.path.join(root, path_of(name))


def _open_regular(path: str, flags: int) -> int:
    """Open a file that was a regular one when it was listed: a FIFO would block for ever."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file any more", path)
    return descriptor


# What a name may lead to that no file lies behind, however often it is tried.
_UNREACHABLE = (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG)


class _Walk:
    def __init__(self, root: str, matches: Matches) -> None:
        self.root = root
        self.matches = matches
        self.files: list[SourceFile] = []
        self.skipped: list[SkippedFile] = []

    def folders(self) -> None:
        """Visit all real folders first, then those that only links lead to."""
        above = [os.stat(parent) for parent in Path(os.path.realpath(self.root)).parents]
        seen = {(info.st_dev, info.st_ino) for info in above}
        real, links = [""], list[str]()
        while real or links:
            if not real:
                links.sort(key=_encode, reverse=True)
                real.append(links.pop())
            folder = real.pop()
            info = os.stat(_join(self.root, folder))
            if (info.st_dev, info.st_ino) in seen:
                self.skip(folder, "link to a folder that is read already")
                continue
            seen.add((info.st_dev, info.st_ino))
            for name, is_link in self._visit(folder):
                (links if is_link else real).append(name)

    def _visit(self, folder: str) -> Iterator[tuple[str, bool]]:
        """Take the files of a folder; yield its folders, and whether each is a link."""
        try:
            entries = list(os.scandir(_join(self.root, folder)))
        except OSError as error:
            self._skip_unreachable(f"{folder}/", error)
            return
        for entry in entries:
            own = name_of(entry.name)
            if own.startswith("."):
                continue
            name = f"{folder}/{own}" if folder else own
            try:
                info = entry.stat()
            except OSError as error:
                self._skip_unreachable(name, error)
                continue
            if stat.S_ISDIR(info.st_mode):
                yield name, entry.is_symlink()
            elif self.matches(name):
                self.file(name, info)

    def file(self, name: str, info: os.stat_result) -> None:
        if not stat.S_ISREG(info.st_mode):
            self.skip(name, "not a regular file")
        elif not os.access(_join(self.root, name), os.R_OK):
            self.skip(name, "permission denied")
        else:
            self.files.append(_local_file(name, info))

    def _skip_unreachable(self, name: str, error: OSError) -> None:
        if error.errno not in _UNREACHABLE:
            raise error
        denied = name.endswith("/") and error.errno == errno.EACCES
        self.skip(name, "permission denied" if denied else f"cannot be reached: {error.strerror}")

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(SkippedFile(name, reason))


def _local_file(name: str, info: os.stat_result) -> SourceFile:
    return SourceFile(name, info.st_size, info.st_mtime_ns, None)


class RemoteTree:
    """Files behind an fsspec address. Over HTTP no version is taken: a server may make it up."""

    def __init__(self, address: str, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._only: str | None = None
        self._versioned = not address.startswith("http")
        if not filesystem.exists(root):
            raise RetroDataError(f"no file or folder at {address}")
        if filesystem.isfile(root):
            self._root, _, self._only = root.rpartition("/")
            if not self._only:  # over HTTP any address looks like a file
                raise RetroDataError(f"{address} is a folder; an HTTP address names one file")

    def stat(self, name: str) -> SourceFile:
        self._filesystem.invalidate_cache()
        return self._file(name, self._filesystem.info(f"{self._root}/{name}"))

    def open(self, name: str) -> BinaryIO:
        return self._filesystem.open(f"{self._root}/{name}", "rb")  # type: ignore[no-any-return]

    def list(self, matches: Matches) -> tuple[list[SourceFile], list[SkippedFile]]:
        if self._only is not None:
            return [self.stat(self._only)], []
        files = []
        for path, info in self._filesystem.find(self._root, detail=True).items():
            name = path[len(self._root) :].lstrip("/")
            hidden = any(part.startswith(".") for part in name.split("/"))
            if info["type"] == "file" and not hidden and matches(name):
                files.append(self._file(name, info))
        return sorted(files, key=name_bytes), []

    def _file(self, name: str, info: dict[str, Any]) -> SourceFile:
        version = _version(info) if self._versioned else None
        return SourceFile(name, info["size"] or 0, _modified_ns(info), version)


def _version(info: dict[str, Any]) -> str | None:
    keys = ("VersionId", "ETag", "etag", "generation", "blob_id")  # of S3, Azure, GCS, the HF hub
    return next((f"{key}:{info[key]}" for key in keys if info.get(key)), None)


def _modified_ns(info: dict[str, Any]) -> int:
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            value = value.timestamp()
        if isinstance(value, int | float):
            return int(value * 1e9)
    return 0


# ---- streams -------------------------------------------------------------------------------------

_PIECE = 256 * 1024
_FEED = 16 * 1024  # stored bytes given to a decompressor at a time
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a first byte of 0x50 to 0x5f
_FREE_EXPANSION = 64 * 2**20  # no harm, whatever its ratio


class _Gunzip:
    """One member of a gzip file, with the methods of the standard library's other decompressors."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)  # with gzip's header and checksum

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


class ByteStream:
    """The decompressed bytes of an open file, in pieces of bounded size.

    Compression is told by the first bytes, never by the name. After the last piece, `damage` says
    why a compressed stream ended early, or is None.

    Args:
        max_expansion: see `CorpusSettings`.
    """

    def __init__(self, name: str, file: BinaryIO, max_expansion: int) -> None:
        self._name = name
        self._file = file
        self._max_expansion = max_expansion
        head = file.read(4)
        file.seek(0)
        self.compression: str | None = None
        if head.startswith(b"\x1f\x8b"):
            self.compression = "gzip"
        elif head == _ZSTD_FRAME or (head[1:] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F):
            self.compression = "zstd"
        self.damage: str | None = None

    def size(self) -> int:
        """Stored bytes."""
        return self._file.seek(0, os.SEEK_END)

    def pieces(self, start: int = 0) -> Iterator[bytes]:
        """The bytes from the first on; from `start` on in a file that is not compressed."""
        if self.compression is not None:
            yield from self._bounded()
            return
        self._file.seek(start)
        while piece := self._file.read(_PIECE):
            yield piece

    def close(self) -> None:
        self._file.close()

    def _bounded(self) -> Iterator[bytes]:
        """The unpacked bytes, up to what the file may unpack to."""
        limit = left = max(_FREE_EXPANSION, self._max_expansion * self.size())
        self._file.seek(0)
        for piece in self._unpacked():
            if len(piece) > left:
                yield piece[:left]
                self.damage = (
                    f"expands too far: {self._name!r} unpacks to over {limit} bytes, "
                    f"max_expansion {self._max_expansion}"
                )
                return
            left -= len(piece)
            yield piece

    def _unpacked(self) -> Iterator[bytes]:
        """Members (gzip) or frames (zstd) that follow each other, zeros between allowed."""
        new: Callable[[], Any] = _Gunzip if self.compression == "gzip" else ZstdDecompressor
        member: Any = None
        data = self._file.read(_FEED)
        while data or (member is not None and not member.needs_input):
            if member is None:
                data = data.lstrip(b"\0")
                member = new() if data else None
            if member is not None:
                try:
                    piece = member.decompress(data, _PIECE)
                except (zlib.error, ZstdError) as error:
                    self.damage = f"damaged {self.compression}: {self._name!r}: {error}"
                    return
                data = b""
                if member.eof:
                    member, data = None, member.unused_data
                if piece:
                    yield piece
            if not data and (member is None or member.needs_input):
                data = self._file.read(_FEED)
        if member is not None:
            self.damage = f"truncated {self.compression}: {self._name!r} ends too early"
