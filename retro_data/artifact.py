"""Artifacts: what identifies one, and how its files come to be, whole or not at all.

An artifact is a folder. Its *key* is a hash of everything that can change its bytes. Its files are
written under temporary names, synced and linked, so that a name never stands for half a file. Its
*manifest* is written last: a folder without one is unfinished, whatever else lies in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy_format

from retro_data.errors import RetroDataError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PLAN = "plan.json"
RECEIPTS = "receipts.jsonl"
LEASE = "lease.json"  # also the beginning of what a lease is called while it is taken over
PARTS = "parts"  # blocks that `finish` lays into one file; deleted once the manifest stands
TEMPORARY = ".tmp-"
COPY_BYTES = 8 * 2**20
MEND = (
    "Run `retro-data prepare --verify` with the same settings: it makes just what is damaged again."
)


# ---- keys ----------------------------------------------------------------------------------------


def keyed(default: Any = MISSING, **options: Any) -> Any:
    """A field of a settings dataclass that changes the bytes of an artifact."""
    return field(default=default, metadata={"keyed": True}, **options)


def free(default: Any = MISSING, **options: Any) -> Any:
    """A field of a settings dataclass that changes no byte of any artifact."""
    return field(default=default, metadata={"keyed": False}, **options)


def key_fields(settings: Any) -> dict[str, Any]:
    """The keyed fields of a settings dataclass; a field that says neither is a programming error."""
    fields = {}
    for item in dataclasses.fields(settings):
        if "keyed" not in item.metadata:
            raise TypeError(f"{type(settings).__name__}.{item.name} is neither keyed() nor free()")
        if item.metadata["keyed"]:
            fields[item.name] = getattr(settings, item.name)
    return fields


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def artifact_key(
    stage: str, version: int, fields: Mapping[str, Any], parents: Mapping[str, str]
) -> str:
    """Hex sha256 of the stage, its version, the fields that change its bytes, and its parents' keys."""
    identity = {"stage": stage, "version": version, "fields": fields, "parents": parents}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


# ---- files ---------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Make names created in `folder` survive a power cut, where the file system lets us."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """A file that appears under its name only when the block ends without an error.

    Args:
        path: the final name. Its folder must exist.
        replace: overwrite an existing file; by default the first file of a name stays.
    """
    temporary = path.with_name(temporary_name())
    try:
        with open(temporary, "xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name() -> str:
    """A new name for what is not finished, with the process that makes it in it."""
    return f"{writer()}{uuid.uuid4().hex}"


def writer() -> str:
    """How the names of all temporary files of this process begin, on any host."""
    return f"{TEMPORARY}{_process()}-"


def remove_temporaries_of(folder: Path, gone: str) -> None:
    """Remove what a process that is gone, a `writer`, had begun to write in an artifact."""
    for path in folder.rglob(f"{gone}*"):
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what processes of this host that were killed had begun to write in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        host, _, process = path.name.removeprefix(TEMPORARY).rpartition("-")[0].partition("-")
        if host == _process().partition("-")[0] and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _process() -> str:
    """This process in the name of a file: a digest of its host, and its number."""
    return f"{hashlib.sha256(_host().encode()).hexdigest()[:8]}-{os.getpid()}"


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        log.info("%s exists already: the first one stays", path)
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(temporary, path)


def write_json(path: Path, value: Any, *, replace: bool = False) -> None:
    with new_file(path, replace=replace) as handle:
        handle.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise RetroDataError(f"{path} cannot be read as JSON ({error}). {MEND}") from error


def write_record(path: Path, value: Mapping[str, Any], *, replace: bool = False) -> None:
    """Write a JSON object that `read_record` takes only as it was written, under the same name."""
    write_json(path, {**value, "digest": _record_digest(path.name, value)}, replace=replace)


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        FileNotFoundError: there is none.
        RetroDataError: its bytes are not those that were written.
    """
    value = read_json(path)
    digest = value.pop("digest", None) if isinstance(value, dict) else None
    if digest is None or digest != _record_digest(path.name, value):
        raise RetroDataError(f"{path}: its bytes are not those that were written. {MEND}")
    return cast(dict[str, Any], value)


def _record_digest(name: str, value: Mapping[str, Any]) -> str:
    """Of the file's name too: a plan in the place of a manifest is damage."""
    return hashlib.sha256(canonical_json([name, value]).encode()).hexdigest()


def file_digest(path: Path, start: int = 0, count: int | None = None) -> str:
    """Hex sha256 of `count` bytes (default: all) of a file, from byte `start`."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:
        handle.seek(start)
        remaining = count
        while remaining is None or remaining > 0:
            piece = handle.read(COPY_BYTES if remaining is None else min(COPY_BYTES, remaining))
            if not piece:
                break
            digest.update(piece)
            remaining = None if remaining is None else remaining - len(piece)
    return digest.hexdigest()


# ---- arrays --------------------------------------------------------------------------------------


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a C-ordered .npy file (format 1.0)."""
    buffer = io.BytesIO()
    description = {
        "descr": npy_format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    npy_format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def array_digest(array: np.ndarray[Any, Any]) -> str:
    """Hex sha256 of an array's bytes in C order (the header of a .npy file does not count)."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def save_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    array = np.ascontiguousarray(array)
    with new_file(path) as handle:
        handle.write(npy_header(array.dtype, array.shape))
        handle.write(array.data)


def open_array(path: Path) -> np.ndarray[Any, Any]:
    """A .npy file as a read-only memory map; an empty array where it has no rows."""
    try:
        with open(path, "rb") as handle:
            old = npy_format.read_magic(handle) == (1, 0)
            read = npy_format.read_array_header_1_0 if old else npy_format.read_array_header_2_0
            shape, fortran, dtype = read(handle)
            offset = handle.tell()
            handle.seek(0)
            header = handle.read(offset)
        expected = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        found = path.stat().st_size
        if not fortran and header != npy_header(dtype, shape):
            raise ValueError("its header is not as it was written")
    except FileNotFoundError:
        raise RetroDataError(f"{path} is missing. {MEND}") from None
    except Exception as error:  # a damaged header is parsed as Python, and fails in many ways
        raise RetroDataError(
            f"{path} is not a readable .npy file ({type(error).__name__}: {error}). {MEND}"
        ) from error
    if found != expected or fortran or dtype.hasobject:
        raise RetroDataError(
            f"{path}: found {found} bytes, its header (shape {shape}, {dtype}) says {expected}. {MEND}"
        )
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def lay_arrays(
    path: Path,
    parts: list[Path],
    dtype: np.dtype[Any],
    row_shape: tuple[int, ...],
    rows: list[int],
) -> None:
    """Lay .npy parts one after the other into one .npy file, in the kernel and at flat memory."""
    total = sum(rows)
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * dtype.itemsize
    header = npy_header(dtype, (total, *row_shape))
    part_headers = {count: len(npy_header(dtype, (count, *row_shape))) for count in set(rows)}
    with new_file(path, replace=True) as handle:
        handle.write(header)
        handle.flush()
        for part, count in zip(parts, rows, strict=True):
            with open(part, "rb", buffering=0) as source:
                _copy(source.fileno(), handle.fileno(), part_headers[count], count * row_bytes)


def _copy(source: int, target: int, start: int, count: int) -> None:
    """Append `count` bytes of a file, from byte `start`, to another file at its position."""
    os.lseek(source, start, os.SEEK_SET)
    in_kernel = hasattr(os, "copy_file_range")
    while count > 0:
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, min(count, 2**30))
            except OSError:  # across file systems, or not offered by this one
                in_kernel = False
                continue
        else:
            piece = os.read(source, min(count, COPY_BYTES))
            copied = len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
        if copied == 0:
            raise RetroDataError(f"a part file ended {count} bytes early: remove its artifact")
        count -= copied


# ---- manifests -----------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, None for an unfinished or missing one.

    Raises:
        RetroDataError: its bytes are not those that were written.
    """
    try:
        return read_record(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None


def library_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numpy", "torch", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    found["retro-data"] = __import__("retro_data").__version__
    return found


# ---- leases --------------------------------------------------------------------------------------


class LeaseLost(RetroDataError):
    """Another process took this artifact over while we were frozen; it commits, we do not."""


class Lease:
    """Sole right to place and commit files of one unfinished artifact (advisory, no flock).

    The lease is a file created with O_EXCL that counts upwards while its holder lives. It is stale
    when an observer's own clock has seen the counter stand still for `stale_seconds`; it is then
    taken over by a rename and a second look. Correctness never rests on it: blocks are linked, not
    overwritten, and the holder looks again before it commits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        beat_seconds: float = 5.0,
        stale_seconds: float = 120.0,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path = folder / LEASE
        self.token = uuid.uuid4().hex
        self.beat_seconds = beat_seconds
        self.stale_seconds = stale_seconds
        self.give_up = give_up  # asked while waiting: True when the artifact was finished meanwhile
        self.held = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._counter = 0

    def __enter__(self) -> Lease:
        self._acquire()
        if self.held:
            self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.held and self._is_ours():
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise LeaseLost unless the lease is still ours: called before anything is committed."""
        if self._is_ours():
            return
        if self._read() is not None:
            what = f"was taken over by {self._describe()} while this process stood still"
        elif (self.path.parent / MANIFEST).exists():
            what = "was taken over and ended by another process while this one stood still"
        else:
            what = "was removed, or its file system is gone, while this process worked on it"
        raise LeaseLost(
            f"{self.path.parent} {what}. Nothing was committed here; run the command again to go on "
            "from the blocks that are done."
        )

    def remove(self, path: Path) -> None:
        """Remove a file of the artifact, unless the lease was lost: then it is another's by now.

        It is moved aside before the look: whoever was frozen between look and removal would take
        away, on waking, what another had made meanwhile.
        """
        aside = path.with_name(temporary_name())
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        try:
            self.check()
        except LeaseLost:
            _link(aside, path)
            raise
        finally:
            aside.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return canonical_json(
            {
                "token": self.token,
                "host": _host(),
                "pid": os.getpid(),
                "counter": f"{self._counter:012d}",  # of one length: a torn read is still JSON
            }
        ).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            return cast(dict[str, Any], json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # just being written
            return {}

    def _is_ours(self) -> bool:
        found = self._read()
        return found is not None and found.get("token") == self.token

    def _describe(self) -> str:
        found = self._read() or {}
        return f"process {found.get('pid')} on {found.get('host')}"

    def _acquire(self) -> None:
        seen: Any = None
        since = time.monotonic()
        told = False
        while True:
            if self._create():
                self.held = True
                return
            found = self._read()
            if found is None:
                continue
            if self.give_up():
                return
            now = time.monotonic()
            if found != seen:
                seen, since = found, now
            if now - since > self.stale_seconds or _is_dead_here(found):
                self._take_over(found)
                continue
            if not told and now - since > 1.0:
                log.warning("waiting for %s: %s works on it", self.path.parent, self._describe())
                told = True
            time.sleep(min(self.beat_seconds, 1.0))

    def _create(self) -> bool:
        """Make the file, unless there is one; it has its content from the first moment on."""
        temporary = self.path.with_name(f"{TEMPORARY}{_process()}-{self.token}")
        temporary.write_bytes(self._content())
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with os.fdopen(handle, "wb") as file:
                file.write(self._content())
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _take_over(self, stale: dict[str, Any]) -> None:
        """Move the stale lease aside; put it back if it came alive between the look and the move."""
        aside = self.path.with_name(f"{LEASE}-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return  # another observer was faster
        try:
            moved = json.loads(aside.read_bytes())
        except ValueError:
            moved = {}
        if moved.get("token") != stale.get("token"):
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        else:
            log.warning("took over %s from a holder that no longer moves: %s", self.path, stale)
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_seconds):
            found = self._read()
            if found is None:  # an observer holds it in hand, and will put it back
                continue
            if found.get("token") != self.token:
                return
            self._counter += 1
            try:
                with open(self.path, "r+b") as handle:
                    handle.write(self._content())
            except OSError as error:
                log.warning("the lease %s could not be renewed: %s", self.path, error)


def is_leased(folder: Path) -> bool:
    """Whether somebody holds this artifact's lease, as far as one look can tell."""
    try:
        found = json.loads((folder / LEASE).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # just being written
        return True
    return not _is_dead_here(found)


def _host() -> str:
    """This host and process namespace: containers that share a host name share no process ids."""
    namespace = boot = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return f"{os.uname().nodename} {boot} {namespace}".strip()


def _is_dead_here(found: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this very host that no longer exists."""
    if found.get("host") != _host() or not isinstance(found.get("pid"), int):
        return False
    return not _is_alive(found["pid"])


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
