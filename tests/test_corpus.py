"""What a corpus reader promises, format by format."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import random
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data.artifact import key_fields
from retro_data.corpus import CorpusSettings, Document, Reader, Skipped, open_reader
from retro_data.errors import RetroDataError
from retro_data.source_files import LocalTree, matches_glob

PARAGRAPH = "The harbour was quiet in the morning. Small boats lay along the wall. "
Files = dict[str, bytes]


def make(root: Path, files: Files) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def corpus(path: object, **options: Any) -> Reader:
    return open_reader(CorpusSettings("c", str(path), **options))


def read(reader: Reader) -> list[Document | Skipped]:
    return [record for file in reader.files() for record in reader.records(file.name)]


def read_one(tmp_path: Path, name: str, data: bytes, **options: Any) -> list[Document | Skipped]:
    """The records of a corpus of one file."""
    make(tmp_path, {name: data})
    return read(corpus(tmp_path, **options))


def only(records: list[Document | Skipped]) -> Document | Skipped:
    assert len(records) == 1, records
    return records[0]


def text_of(record: Document | Skipped) -> str:
    assert isinstance(record, Document), record
    return record.text


def reason(record: Document | Skipped) -> str:
    assert isinstance(record, Skipped), record
    return record.reason


def line(identity: object, text: object) -> bytes:
    return json.dumps({"id": identity, "text": text}).encode() + b"\n"


PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd.compress}


# ---- settings ------------------------------------------------------------------------------------


def test_only_what_changes_documents_is_in_the_key() -> None:
    keyed = key_fields(CorpusSettings("c", "somewhere"))
    assert {field.name for field in fields(CorpusSettings)} - set(keyed) == {
        "path",
        "glob",
        "split",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format is 'csv', expected one of auto, text"),
        ({"on_bad_document": "ignore"}, "expected one of skip, raise"),
        ({"encoding_errors": "surrogateescape"}, "expected one of strict, replace, ignore"),
        ({"split": "dev"}, "expected one of hash, train"),
        ({"encoding": "utf-9"}, "encoding 'utf-9' is unknown"),
        ({"encoding": "hex"}, "encoding 'hex' is unknown"),
        ({"max_document_bytes": 0}, "max_document_bytes is 0, expected at least 1"),
        ({"max_expansion": 0}, "max_expansion is 0, expected at least 1"),
    ],
)
def test_a_wrong_setting_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RetroDataError, match=message):
        CorpusSettings("c", "somewhere", **options)


# ---- which files ---------------------------------------------------------------------------------


def test_text_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    text = PARAGRAPH.encode()
    names = ["UPPER.TXT", "a.txt", "a/z.txt", "b.txt.gz", "c.txt.zst", "d/d/d/d/deep.txt", "é.txt"]
    make(tmp_path, {name: text for name in names})
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c.txt.zst").write_bytes(zstd.compress(text))
    make(tmp_path, {".hidden.txt": text, ".git/x.txt": text, "README.md": text, "no_ext": text})
    (tmp_path / "dir.txt").mkdir()
    reader = corpus(tmp_path)
    assert [file.name for file in reader.files()] == names
    assert read(reader) == [Document(0, name, PARAGRAPH) for name in names]
    assert reader.skipped_files() == []
    assert reader.settings.format == "text"


def test_a_file_tells_its_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"abc"})
    reader = corpus(tmp_path)
    (file,) = reader.files()
    assert (file.bytes, file.version) == (3, None)
    assert file.modified_ns == (tmp_path / "a.txt").stat().st_mtime_ns
    assert reader.stat("a.txt") == file
    with reader.open_bytes("a.txt") as handle:
        assert handle.read() == b"abc"


def test_a_path_may_be_one_file_of_any_name(tmp_path: Path) -> None:
    make(tmp_path, {"notes": b"abc", "a.txt": b"def"})
    assert read(corpus(tmp_path / "notes", format="text")) == [Document(0, "notes", "abc")]
    assert read(corpus(tmp_path / "a.txt")) == [Document(0, "a.txt", "def")]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("**/*.md", "a.md", True),
        ("**/*.md", "x/y/a.md", True),
        ("*.md", "x/a.md", False),
        ("x/**", "x/y/a.md", True),
        ("x/**/a.md", "x/a.md", True),
        ("?.md", "ab.md", False),
        ("[ab].md", "b.md", True),
        ("**/a/**/b", "x/a/a/y/b", True),
        ("**/a/**/b", "x/y/b", False),
        ("x/**/**", "x", True),
        ("**/*.md", "d/" * 2000 + "a.md", True),  # as deep as a path may be
        ("**/" * 30 + "b", "a/" * 60 + "c", False),  # in no time
        ("*.md", "a.MD", False),
    ],
)
def test_globs(pattern: str, name: str, expected: bool) -> None:
    assert matches_glob(pattern)(name) is expected


def test_a_glob_chooses_files(tmp_path: Path) -> None:
    make(tmp_path, {"a.md": b"one", "b/c.md": b"two", "b/d.txt": b"three"})
    reader = corpus(tmp_path, format="text", glob="**/*.md")
    assert [record.id for record in read(reader)] == ["a.md", "b/c.md"]


def test_special_files_and_links(tmp_path: Path) -> None:
    root = make(tmp_path / "root", {"a.txt": b"a", "z/b.txt": b"b"})
    outside = make(tmp_path / "outside", {"c.txt": b"c", "sub/d.txt": b"d"})
    os.mkfifo(root / "pipe.txt")
    (root / "dangling.txt").symlink_to("nowhere.txt")
    (root / "loop_a").symlink_to("loop_b")
    (root / "loop_b").symlink_to("loop_a")
    (root / "self").symlink_to(".")
    (root / "up").symlink_to("..")
    (root / "again").symlink_to("z")  # sorts before z, yet z keeps its own name
    (root / "linked").symlink_to(outside)
    (root / "linked_sub").symlink_to(outside / "sub")
    (root / "file_link.txt").symlink_to(outside / "c.txt")
    reader = corpus(root, format="text")
    assert [file.name for file in reader.files()] == [
        *("a.txt", "file_link.txt", "linked/c.txt", "linked/sub/d.txt", "z/b.txt")
    ]
    reasons = dict(reader.skipped_files())
    assert set(reasons) == {
        *("pipe.txt", "dangling.txt", "loop_a", "loop_b", "self", "up", "again", "linked_sub")
    }
    assert reasons["pipe.txt"] == "not a regular file"
    assert reasons["dangling.txt"] == "cannot be reached: No such file or directory"
    assert "read already" in reasons["self"]


def test_links_to_what_cannot_be_are_reported(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"a"})
    (tmp_path / "below.txt").symlink_to("a.txt/below")
    (tmp_path / "long.txt").symlink_to("x" * 300)
    assert corpus(tmp_path).skipped_files() == [
        ("below.txt", "cannot be reached: Not a directory"),
        ("long.txt", "cannot be reached: File name too long"),
    ]


def test_a_path_too_long_to_open_is_reported(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"a"})
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(20):  # 5,000 bytes, more than PATH_MAX
            os.mkdir("d" * 250, dir_fd=folder)
            inner = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
    finally:
        os.close(folder)
    reader = corpus(tmp_path)
    assert [file.name for file in reader.files()] == ["a.txt"]
    (skipped,) = reader.skipped_files()
    assert skipped.reason == "cannot be reached: File name too long"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_reported(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"a", "b.txt": b"b", "c/d.txt": b"d"})
    (tmp_path / "b.txt").chmod(0)
    (tmp_path / "c").chmod(0)
    reader = corpus(tmp_path, format="text")
    names, skipped = [file.name for file in reader.files()], reader.skipped_files()
    (tmp_path / "c").chmod(0o700)
    assert names == ["a.txt"]
    assert skipped == [("b.txt", "permission denied"), ("c/", "permission denied")]


def test_a_file_name_that_is_not_utf8_has_an_id_that_is(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/bad\xff.txt", "wb") as handle:
        handle.write(b"text")
    with open(os.fsencode(tmp_path) + b"/bad\xff.jsonl", "wb") as handle:
        handle.write(b'{"text": "text"}\n')
    for format, expected in (("text", "bad\\udcff.txt"), ("jsonl", "bad\\udcff.jsonl:0")):
        record = only(read(corpus(tmp_path, format=format)))
        assert record == Document(0, expected, "text")
        expected.encode("utf-8")


def test_no_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RetroDataError, match="no file or folder"):
        corpus(tmp_path / "absent")
    os.mkfifo(tmp_path / "a.txt")
    reader = corpus(tmp_path, format="text")
    with pytest.raises(RetroDataError, match=r"no text files .*\.txt\.gz.*not a regular file"):
        reader.files()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", "text"),
        ("a.TXT.gz", "text"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("a.json.gz", "jsonl"),
        ("a.parquet", "parquet"),
    ],
)
def test_auto_goes_by_the_extension(tmp_path: Path, name: str, expected: str) -> None:
    make(tmp_path, {name: b"", "notes.md": b"", "LICENSE": b""})
    assert corpus(tmp_path).settings.format == expected


def test_auto_refuses_what_it_cannot_tell(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"a", "b.jsonl": b"", "c.json": b""})
    with pytest.raises(RetroDataError, match=r"text \('a.txt'\).*Set format"):
        corpus(tmp_path)
    with pytest.raises(RetroDataError, match=r"unknown \('c.json'\)"):
        corpus(tmp_path, glob="*.json")
    assert corpus(tmp_path, glob="*.txt").settings.format == "text"


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        (b"\xef\xbb\xbfabc", "abc", None),
        (b"a\r\nb\rc\n", "a\nb\nc\n", None),
        (b"be\0fore " * 3, "be fore " * 3, "3 NUL replaced by spaces"),
        ("a\u2028b\x0bc\x0cd\x85e".encode(), "a\u2028b\x0bc\x0cd\x85e", None),
        (b"\x1b[31mred and more\x1b[0m", "\x1b[31mred and more\x1b[0m", None),
        (b"no newline", "no newline", None),
        ("e\u0301 \ufb01 in\u200bvisible".encode(), "e\u0301 \ufb01 in\u200bvisible", None),
        (b"[SEP] </s> <|endoftext|>", "[SEP] </s> <|endoftext|>", None),
    ],
)
def test_rules_of_text(tmp_path: Path, data: bytes, text: str, note: str | None) -> None:
    assert only(read_one(tmp_path, "a.txt", data)) == Document(0, "a.txt", text, note)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (" \t\n\u00a0\u2003\n".encode(), "empty"),
        ("caf\xe9 ferm\xe9".encode("latin-1"), "undecodable: utf-8 at byte 3"),
        ("day \u65e5".encode()[:-1], "undecodable: utf-8 at byte 4"),
        (b"\xff\xfea\0b\0", "undecodable: utf-8 expected, its byte order mark says utf-16"),
        ("a\ud800".encode("utf-8", "surrogatepass"), "undecodable: utf-8 at byte 1"),
        ("text".encode("utf-16-le") * 9, "binary: over a fifth"),
        (random.Random(0).randbytes(20_000), "undecodable: utf-8 at byte"),
    ],
)
def test_what_is_no_text(tmp_path: Path, data: bytes, expected: str) -> None:
    record = only(read_one(tmp_path, "a.txt", data))
    assert reason(record).startswith(expected)
    assert (record.position, record.id) == (0, "a.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("errors", ["replace", "ignore"])
def test_random_bytes_are_binary_under_any_policy(
    tmp_path: Path, encoding: str, errors: str
) -> None:
    data = random.Random(0).randbytes(20_000)
    record = only(read_one(tmp_path, "a.txt", data, encoding=encoding, encoding_errors=errors))
    assert reason(record).startswith("binary")


def test_other_encodings(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16", "utf-16-le", "cp1252"):
        data = ("\xa3 5\r\n" + PARAGRAPH).encode(encoding)
        record = only(read_one(tmp_path, "a.txt", data, encoding=encoding))
        assert text_of(record) == "\xa3 5\n" + PARAGRAPH


def test_undecodable_bytes_are_replaced_or_left_out_on_request(tmp_path: Path) -> None:
    data = b"caf\xe9 " + PARAGRAPH.encode()
    record = only(read_one(tmp_path, "a.txt", data, encoding_errors="replace"))
    note = "undecodable utf-8 replaced by U+FFFD, from byte 3 on"
    assert record == Document(0, "a.txt", "caf\ufffd " + PARAGRAPH, note)
    record = only(read_one(tmp_path, "a.txt", data, encoding_errors="ignore"))
    note = "undecodable utf-8 left out, from byte 3 on"
    assert record == Document(0, "a.txt", "caf " + PARAGRAPH, note)


def test_raise_names_file_place_reason_and_setting(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl": line("a", "fine") + b'{"text": "cut', "b.jsonl": line("e", "  ")})
    reader = corpus(tmp_path, on_bad_document="raise")
    records = reader.records("a.jsonl")
    assert next(records) == Document(0, "a", "fine")
    message = r"'a.jsonl' at byte 28: malformed json.*on_bad_document: skip"
    with pytest.raises(RetroDataError, match=message):
        next(records)
    assert reason(only(list(reader.records("b.jsonl")))) == "empty"  # nothing is wrong with it


def test_a_file_that_cannot_be_opened_is_an_error_not_a_skip(tmp_path: Path) -> None:
    make(tmp_path, {"a.txt": b"a", "b.jsonl": b""})
    for format, name in (("text", "a.txt"), ("jsonl", "b.jsonl")):
        reader = corpus(tmp_path, format=format)
        (tmp_path / name).unlink()
        for access in (reader.stat, reader.open_bytes, reader.records):
            with pytest.raises(RetroDataError, match=f"'{name}' cannot be read"):
                list(access(name))


# ---- JSON lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "expected", "identity"),
    [
        (b'{"id": "x", "text": "cut', "malformed json: Unterminated string", None),
        (b"not json", "malformed json", None),
        (b'{"id": "x"}', "no text field: 'text'", "x"),
        (b'{"id": "x", "text": null}', "text is not a string: null", "x"),
        (b'{"id": "x", "text": 42}', "text is not a string: int", "x"),
        (b'{"id": "x", "text": ["a"]}', "text is not a string: list", "x"),
        (b'{"id": "x", "text": " \\n "}', "empty", "x"),
        (b'{"id": ["x"], "text": "a"}', "id is not a string or number: list", None),
        (b'{"id": true, "text": "a"}', "id is not a string or number: bool", None),
        (b"[1, 2]", "not an object: list", None),
        (b'[{"id": "x", "text": "a"}]', "not an object: list", None),
        (b'"string"', "not an object: str", None),
        (b"null", "not an object: null", None),
        (b'{"id": "x", "text": "caf\xe9"}', "undecodable: utf-8 at byte 24", None),
        (b'{"id": "x", "text": "' + b"\\u0001" * 50 + b'"}', "binary", "x"),
        (b'{"m":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed json: nested", None),
        (b'{"id": "x", "text": "a", "n": ' + b"9" * 5000 + b"}", "malformed json: Exceeds", None),
    ],
)
def test_a_bad_line_is_skipped_alone(
    tmp_path: Path, bad: bytes, expected: str, identity: str | None
) -> None:
    before = line("before", PARAGRAPH)
    first, skipped, last = read_one(tmp_path, "a.jsonl", before + bad + b"\n" + line("z", "last"))
    assert first == Document(0, "before", PARAGRAPH)
    assert reason(skipped).startswith(expected)
    assert (skipped.position, skipped.id) == (len(before), identity)
    assert last == Document(len(before) + len(bad) + 1, "z", "last")


def test_how_deep_json_may_be_does_not_depend_on_the_caller(tmp_path: Path) -> None:
    def nested(levels: int, identity: str) -> bytes:
        return json.dumps({"id": identity, "text": "t", "m": levels_of(levels)}).encode() + b"\n"

    def levels_of(levels: int) -> Any:
        value: Any = 0
        for _ in range(levels):
            value = [value]
        return value

    data = nested(99, "a") + nested(100, "b") + nested(900, "c") + b"[" * 900 + b"]" * 900 + b"\n"
    records = read_one(tmp_path, "a.jsonl", data)

    def called_deep(calls: int) -> list[Document | Skipped]:
        return called_deep(calls - 1) if calls else read(corpus(tmp_path))

    assert called_deep(400) == records
    assert [record.id for record in records] == ["a", None, None, None]
    assert {reason(r) for r in records[1:]} == {"malformed json: nested over 100 deep"}


def test_lines_end_at_lf_only(tmp_path: Path) -> None:
    raw = json.dumps({"id": "a", "text": "l\u2028r\x85s\u2029t"}, ensure_ascii=False).encode()
    data = b"\xef\xbb\xbf" + raw + b"\r\n\n   \r\n" + line("b", "next").rstrip()
    assert read_one(tmp_path, "a.jsonl", data) == [
        Document(0, "a", "l\u2028r\x85s\u2029t"),
        Document(len(raw) + 11, "b", "next"),
    ]


def test_ids(tmp_path: Path) -> None:
    data = (
        b'{"text": "a"}\n{"id": null, "text": "b"}\n{"id": "", "text": "c"}\n'
        b'{"id": 7, "text": "d"}\n{"id": 0.5, "text": "e"}\n{"id": "x\\ud800", "text": "f"}\n'
    )
    ids = [record.id for record in read_one(tmp_path, "a.jsonl", data)]
    assert ids == ["a.jsonl:0", "a.jsonl:14", "a.jsonl:40", "7", "0.5", "x\\ud800"]
    ids = [record.id for record in read_one(tmp_path, "a.jsonl", data, id_field=None)]
    assert ids[3] == "a.jsonl:64"


def test_text_of_json(tmp_path: Path) -> None:
    data = (
        b'{"id": 1, "body": "bad \\ud800 and \\udc00", "score": NaN}\n'
        b'{"id": 2, "body": "pair \\ud83d\\ude00 \\u0000 \\r\\n"}\n'
        b'{"id": 3, "body": "first", "body": "second"}\n'
    )
    records = read_one(tmp_path, "a.jsonl", data, text_field="body")
    assert [tuple(record[1:]) for record in records] == [
        ("1", "bad \ufffd and \ufffd", "2 lone surrogates replaced by U+FFFD"),
        ("2", "pair \U0001f600   \n", "1 NUL replaced by spaces"),
        ("3", "second", None),
    ]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([{"id": str(i), "text": "t"} for i in range(50)], indent=1).encode(),
        b'\xef\xbb\xbf[{"id": "1", "text": "t"},\n{"id": "2", "text": "t"}]',
        json.dumps({"id": "1", "text": "t"}, indent=2).encode(),
    ],
)
@pytest.mark.parametrize("packing", PACK)
def test_a_json_value_over_many_lines_is_refused_once(
    tmp_path: Path, data: bytes, packing: str
) -> None:
    name = "a.jsonl" + packing
    assert reason(only(read_one(tmp_path, name, PACK[packing](data)))).startswith(
        f"not json lines: '{name}' is one JSON value"
    )
    reader = corpus(tmp_path)
    assert list(reader.records(name, 5)) == []


def test_utf16_lines_are_refused_once(tmp_path: Path) -> None:
    data = (line("a", "t") * 9).decode().encode("utf-16")
    assert "says utf-16" in reason(only(read_one(tmp_path, "a.jsonl", data)))
    with pytest.raises(RetroDataError, match="utf-16 cannot be cut into lines"):
        read_one(tmp_path, "a.jsonl", data, encoding="utf-16")


# ---- compression ---------------------------------------------------------------------------------

DOCUMENTS = [line(f"d{i}", f"{PARAGRAPH} {i}") for i in range(3000)]


def test_members_and_frames_follow_each_other(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"noted"
    files = {
        "gzip": b"".join(map(gzip.compress, DOCUMENTS[:9])) + b"\0" * 100,
        "zstd": skippable + b"".join(zstd.compress(document) for document in DOCUMENTS[:9]),
    }
    for data in files.values():
        records = read_one(tmp_path, "a.jsonl.zst", data)
        assert [record.id for record in records] == [f"d{i}" for i in range(9)]


def test_compression_is_told_by_the_bytes(tmp_path: Path) -> None:
    packed = gzip.compress(PARAGRAPH.encode())
    assert text_of(only(read_one(tmp_path / "a", "a.txt", packed))) == PARAGRAPH
    assert text_of(only(read_one(tmp_path / "b", "a.txt.gz", PARAGRAPH.encode()))) == PARAGRAPH


@pytest.mark.parametrize(("packing", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_documents_before_a_cut_are_kept(tmp_path: Path, packing: str, kind: str) -> None:
    data = PACK[packing](b"".join(DOCUMENTS))
    *documents, last = read_one(tmp_path, "a.jsonl" + packing, data[: len(data) * 4 // 5])
    assert reason(last) == f"truncated {kind}: 'a.jsonl{packing}' ends too early"
    assert [record.id for record in documents] == [f"d{i}" for i in range(len(documents))]
    assert len(documents) > 500
    assert last.position == sum(map(len, DOCUMENTS[: len(documents)]))
    text = PACK[packing](PARAGRAPH.encode())[:-5]
    record = only(read_one(tmp_path / "t", "a.txt" + packing, text))
    assert reason(record).startswith(f"truncated {kind}")


@pytest.mark.parametrize(("packing", "kind"), [(".gz", "gzip"), (".zst", "zstd")])
def test_documents_before_damage_are_kept(tmp_path: Path, packing: str, kind: str) -> None:
    data = PACK[packing](b"".join(DOCUMENTS[:9]))
    *documents, last = read_one(tmp_path, "a.jsonl" + packing, data + b"garbage")
    assert [record.id for record in documents] == [f"d{i}" for i in range(9)]
    assert reason(last).startswith(f"damaged {kind}: 'a.jsonl{packing}'")


# ---- limits --------------------------------------------------------------------------------------


def test_the_limit_is_inclusive(tmp_path: Path) -> None:
    assert read_one(tmp_path / "a", "a.txt", b"x" * 100, max_document_bytes=100) == [
        Document(0, "a.txt", "x" * 100)
    ]
    record = only(read_one(tmp_path / "b", "a.txt", b"x" * 101, max_document_bytes=100))
    assert reason(record) == "too large: 101 bytes > max_document_bytes 100"


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_memory_is_bounded_whatever_a_document_weighs(
    tmp_path: Path, name: str, packing: str
) -> None:
    """40 MB on one line, in a few kB where it is compressed; what is small beside it is read."""
    line_bytes, limit = 40_000_000, 2**20
    data = b'{"id": "a", "text": "' + b"x" * (line_bytes - 23) + b'"}'
    if name.endswith("jsonl"):
        data = line("first", "1") + data + b"\n" + line("last", "2")
    make(tmp_path, {name + packing: PACK[packing](data)})
    del data
    reader = corpus(tmp_path, max_document_bytes=limit)
    tracemalloc.start()
    records = list(reader.records(name + packing))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 2**20
    if name.endswith("txt"):
        size = f"over {limit}" if packing else str(line_bytes)
        assert reason(only(records)) == f"too large: {size} bytes > max_document_bytes {limit}"
    else:
        assert [record.id for record in records] == ["first", None, "last"]
        assert f"too large: {line_bytes} bytes" in reason(records[1])


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_unpacks_to_so_many_times_its_size_and_no_further(
    tmp_path: Path, packing: str
) -> None:
    line_bytes, count = 2**10, 70 * 2**10  # 70 MiB: beyond what is free
    data = (
        line("first", "1").ljust(line_bytes - 1) + b"\n" + (b" " * (line_bytes - 1) + b"\n") * count
    )
    name = "a.jsonl" + packing
    make(tmp_path, {name: PACK[packing](data + line("last", "2"))})
    first, bad = read(corpus(tmp_path))
    assert first.id == "first"
    found = f"expands too far: '{name}' unpacks to over {64 * 2**20} bytes, max_expansion 200"
    assert (reason(bad), bad.position) == (found, 64 * 2**20)
    assert [r.id for r in read(corpus(tmp_path, max_expansion=10**6))] == ["first", "last"]


# ---- ranges --------------------------------------------------------------------------------------


def cut(places: list[int]) -> list[tuple[int, int | None]]:
    """The ranges between some places, from the start of a file to its end."""
    starts = [0, *sorted(places)]
    return [*itertools.pairwise(starts), (starts[-1], None)]


lines = st.lists(
    st.one_of(
        st.text(max_size=30).map(lambda text: line(None, text)),
        st.sampled_from([b"\n", b"  \r\n", b"{broken\n", b"[1]\n", "é\u2028\n".encode()]),
    ),
    max_size=12,
)


@given(lines, st.lists(st.integers(0, 400), max_size=5), st.booleans(), st.sampled_from([*PACK]))
@settings(deadline=None, max_examples=150)
def test_ranges_tile_a_file(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    cuts: list[int],
    ends: bool,
    packing: str,
) -> None:
    """However a file is cut, each record is in one range, by the place of its first byte."""
    data = b"".join(lines) if ends else b"".join(lines).removesuffix(b"\n")
    name = "a.jsonl" + packing
    folder = make(tmp_path_factory.mktemp("ranges"), {name: PACK[packing](data)})
    whole = list(corpus(folder, max_document_bytes=100).records(name))
    for record in whole:
        assert record.position == 0 or data[record.position - 1 : record.position] == b"\n"
    reader = corpus(folder, max_document_bytes=100)
    ranges = cut(cuts)
    assert [r for a, b in ranges for r in reader.records(name, a, b)] == whole
    for start, stop in reversed(ranges):
        inside = [r for r in whole if start <= r.position and (stop is None or r.position < stop)]
        assert list(reader.records(name, start, stop)) == inside


class CountingTree(LocalTree):
    """Counts the bytes that are read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.opened = 0

    def open(self, name: str) -> BinaryIO:
        self.opened += 1
        return super().open(name)


@pytest.mark.parametrize("packing", PACK)
def test_consecutive_ranges_open_a_file_once(tmp_path: Path, packing: str) -> None:
    name = "a.jsonl" + packing
    make(tmp_path, {name: PACK[packing](b"".join(DOCUMENTS))})
    reader: Any = corpus(tmp_path)
    tree = reader._tree = CountingTree(str(tmp_path))
    step = 10_000
    parts = [list(reader.records(name, at, at + step)) for at in range(0, 310_000, step)]
    assert [record.id for part in parts for record in part] == [f"d{i}" for i in range(3000)]
    assert tree.opened == 1


def test_a_start_far_into_a_plain_file_is_a_seek(tmp_path: Path) -> None:
    path = make(tmp_path, {"a.jsonl": line("a", "x")}) / "a.jsonl"
    with path.open("r+b") as handle:  # sparse: 1 TB that could never be read through
        handle.seek(10**12)
        handle.write(b"\n" + line("z", "last"))
    reader = corpus(tmp_path)
    assert list(reader.records("a.jsonl", 10**12 + 1)) == [Document(10**12 + 1, "z", "last")]


@pytest.mark.parametrize("packing", PACK)
def test_interleaved_and_abandoned_ranges_do_not_disturb_each_other(
    tmp_path: Path, packing: str
) -> None:
    name = "a.jsonl" + packing
    make(tmp_path, {name: PACK[packing](b"".join(DOCUMENTS[:20]))})
    reader = corpus(tmp_path)
    expected = [f"d{i}" for i in range(20)]
    pairs = zip(reader.records(name), reader.records(name), strict=True)
    assert [(a.id, b.id) for a, b in pairs] == [(i, i) for i in expected]
    abandoned = reader.records(name)
    next(abandoned)
    del abandoned
    assert [record.id for record in reader.records(name)] == expected


def test_a_reader_is_picklable_while_it_reads(tmp_path: Path) -> None:
    make(tmp_path, {"a.jsonl.gz": gzip.compress(b"".join(DOCUMENTS[:9]))})
    reader = corpus(tmp_path)
    list(reader.records("a.jsonl.gz", 0, 100))
    copy = pickle.loads(pickle.dumps(reader))
    assert read(copy) == read(reader)
    assert copy.files() == reader.files()


# ---- Parquet -------------------------------------------------------------------------------------


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(arrow.table(columns), sink, **options)
    return sink.getvalue()


def doubled_column() -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink = io.BytesIO()
    table = arrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def test_parquet_rows(tmp_path: Path) -> None:
    data = parquet(
        {"id": [10, None, 12, 13, 14], "text": ["a", "b\r\nc", None, " ", "x" * 99], "n": [0] * 5}
    )
    assert read_one(tmp_path, "a.parquet", data, max_document_bytes=50) == [
        Document(0, "10", "a"),
        Document(1, "a.parquet:1", "b\nc"),
        Skipped(2, "12", "text is not a string: null"),
        Skipped(3, "13", "empty"),
        Skipped(4, "14", "too large: 99 bytes > max_document_bytes 50"),
    ]


def test_parquet_types(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    texts = ["caf\xe9", "tea"]
    expected = [Document(i, f"a.parquet:{i}", text) for i, text in enumerate(texts)]
    strings = (
        arrow.string(),
        arrow.large_string(),
        arrow.dictionary(arrow.int32(), arrow.string()),
    )
    for type_ in strings:
        data = parquet({"text": arrow.array(texts).cast(type_)})
        assert read_one(tmp_path, "a.parquet", data, encoding="latin-1") == expected
    data = parquet({"text": [text.encode("latin-1") for text in texts]})
    assert read_one(tmp_path, "a.parquet", data, encoding="latin-1") == expected
    first, second = read_one(tmp_path, "a.parquet", data)
    assert (reason(first), second) == ("undecodable: utf-8 at byte 3", expected[1])


def test_parquet_ids(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    broken = arrow.array([b"caf\xe9"]).cast(arrow.large_binary())
    buffers = [None, *broken.buffers()[1:]]
    broken = arrow.Array.from_buffers(arrow.large_string(), 1, buffers)  # a string that is none
    columns = (
        (broken, "caf\\xe9"),
        (arrow.array(["a"]).dictionary_encode(), "a"),
        (arrow.array([7], arrow.uint8()), "7"),
        (arrow.array([0.5], arrow.float32()), "0.5"),
    )
    for column, expected in columns:
        data = parquet({"id": column, "text": ["t"]})
        assert only(read_one(tmp_path, "a.parquet", data)) == Document(0, expected, "t")
    for column in (
        arrow.array([True]),
        arrow.array([b"a"]),
        arrow.array([["a"]]),
        arrow.array([2**62 + 1], arrow.timestamp("ns")),  # that Python has no value for
    ):
        record = only(read_one(tmp_path, "a.parquet", parquet({"id": column, "text": ["t"]})))
        assert reason(record).startswith("id is not a string or number")


def test_a_parquet_value_that_many_rows_share_is_not_held_as_often(tmp_path: Path) -> None:
    """100 kB that hold a text of 900 kB 2,000 times."""
    arrow = pytest.importorskip("pyarrow")
    text = (PARAGRAPH * 20_000)[:900_000]
    shared = arrow.DictionaryArray.from_arrays(arrow.array([0] * 2000, arrow.int32()), [text])
    data = parquet({"text": shared}, store_schema=False)
    assert len(data) < 200_000
    make(tmp_path, {"a.parquet": data})
    before = arrow.total_allocated_bytes()
    held = [
        arrow.total_allocated_bytes() - before
        for record in itertools.islice(corpus(tmp_path).records("a.parquet"), 100)
        if text_of(record) == text
    ]
    assert len(held) == 100
    assert max(held) < 64 * 2**20


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            lambda: parquet({"text": [["a"]] * 9}),
            "text is not a string: 'text' in 'a.parquet' is list<",
        ),
        (lambda: doubled_column(), "doubled column: 'text' in 'a.parquet'"),
        (lambda: parquet({"body": ["a"] * 9}), "no text field: 'text' in 'a.parquet', which has"),
        (
            lambda: parquet({"text": [1] * 9}),
            "text is not a string: 'text' in 'a.parquet' is int64",
        ),
        (lambda: b"PAR1 and nothing more", "damaged file: 'a.parquet'"),
        (lambda: b"", "damaged file: 'a.parquet'"),
    ],
)
def test_a_parquet_file_of_no_use_is_one_skip(tmp_path: Path, data: Any, expected: str) -> None:
    assert reason(only(read_one(tmp_path, "a.parquet", data()))).startswith(expected)
    reader = corpus(tmp_path)
    assert list(reader.records("a.parquet", 1)) == []


@given(st.integers(1, 7), st.lists(st.integers(0, 24), max_size=5))
@settings(deadline=None, max_examples=50)
def test_ranges_tile_rows(
    tmp_path_factory: pytest.TempPathFactory, row_group_size: int, cuts: list[int]
) -> None:
    data = parquet({"text": [f"t{i}" for i in range(20)]}, row_group_size=row_group_size)
    folder = make(tmp_path_factory.mktemp("rows"), {"a.parquet": data})
    reader = corpus(folder)
    whole = [Document(i, f"a.parquet:{i}", f"t{i}") for i in range(20)]
    assert [r for a, b in cut(cuts) for r in reader.records("a.parquet", a, b)] == whole
    for a, b in reversed(cut(cuts)):
        assert list(reader.records("a.parquet", a, b)) == whole[a:b]


def test_damage_ends_one_row_group_for_any_range(tmp_path: Path) -> None:
    words = random.Random(0)
    texts = [f"{i} " + str(words.getrandbits(800)) for i in range(30)]
    data = bytearray(parquet({"text": texts}, row_group_size=10, use_dictionary=False))
    import pyarrow.parquet

    chunk = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    records = read_one(tmp_path, "a.parquet", bytes(data))
    assert [r.position for r in records] == [*range(11), *range(20, 30)]
    assert reason(records[10]).startswith("damaged file: 'a.parquet'")
    reader = corpus(tmp_path)
    ranges = cut([*range(4, 32, 4)])
    assert [r for a, b in ranges for r in reader.records("a.parquet", a, b)] == records


# ---- Hugging Face datasets -----------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    package.disable_progress_bars()
    yield package
    package.enable_progress_bars()


ROWS = {"id": [5, 6, 7, 8, 9], "text": ["a", "b", None, "d", "e"]}


def test_a_saved_dataset(tmp_path: Path, datasets: Any) -> None:
    path = tmp_path / "saved"
    datasets.Dataset.from_dict(ROWS).save_to_disk(path, num_shards=2)
    reader = corpus(path)
    assert reader.settings.format == "huggingface"
    names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
    assert [file.name for file in reader.files()] == names
    assert [tuple(record) for record in read(reader)] == [
        (0, "5", "a", None),
        (1, "6", "b", None),
        (2, "7", "text is not a string: null"),
        (0, "8", "d", None),
        (1, "9", "e", None),
    ]
    copy = pickle.loads(pickle.dumps(reader))
    assert list(copy.records(names[0], 1, 2)) == [Document(1, "6", "b")]
    with copy.open_bytes(names[1]) as handle:
        assert handle.read() == (path / names[1]).read_bytes()
    unnamed = corpus(path, id_field=None, hf_split="train")
    assert read(unnamed)[3].id == f"{names[1]}:0"


def test_a_dataset_of_several_splits_wants_one(tmp_path: Path, datasets: Any) -> None:
    path = tmp_path / "saved"
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(path)
    record = only(read(corpus(path, hf_split="test")))
    assert record == Document(0, "data-00000-of-00001.arrow:0", "test")
    for split in (None, "dev"):
        with pytest.raises(RetroDataError, match=f"hf_split is {split!r}.*has train, test"):
            corpus(path, hf_split=split)
    datasets.Dataset.from_dict(ROWS, split="test").save_to_disk(tmp_path / "one")
    assert len(read(corpus(tmp_path / "one"))) == 5
    with pytest.raises(RetroDataError, match=r"hf_split is 'train'.*has test"):
        corpus(tmp_path / "one", hf_split="train")


def test_a_dataset_that_is_built(tmp_path: Path, datasets: Any) -> None:
    make(tmp_path / "raw", {"train.jsonl": line("a", "x") + line("b", "y")})
    reader = corpus(tmp_path / "raw", format="huggingface", hf_split="train")
    assert read(reader) == [Document(0, "a", "x"), Document(1, "b", "y")]


def test_a_dataset_that_cannot_be_loaded(tmp_path: Path, datasets: Any) -> None:
    with pytest.raises(RetroDataError, match="cannot be loaded"):
        corpus(tmp_path / "absent", format="huggingface")
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    for option in ({"hf_config": "en"}, {"hf_revision": "v1"}, {"glob": "*.arrow"}):
        with pytest.raises(RetroDataError, match=f"{next(iter(option))} is .* means nothing"):
            corpus(tmp_path / "saved", **option)


# ---- other places --------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_fsspec_addresses(tmp_path: Path, memory: Any) -> None:
    files = {
        "text/b/two.txt": b"two\r\n",
        "text/one.TXT.gz": gzip.compress(b"one"),
        "text/.hidden.txt": b"no",
        "lines/a.jsonl": b"".join(DOCUMENTS[:50]),
        "lines/b.jsonl.zst": zstd.compress(b"".join(DOCUMENTS[50:99])),
        "rows/a.parquet": parquet({"id": [1, 2, 3], "text": ["a", "b", "c"]}),
    }
    make(tmp_path, files)
    for name, data in files.items():
        memory.pipe(f"/corpus/{name}", data)
    for part in ("text", "lines", "rows", "lines/a.jsonl"):
        remote = corpus(f"memory://corpus/{part}")
        local = corpus(tmp_path / part)
        assert [(f.name, f.bytes) for f in remote.files()] == [
            (f.name, f.bytes) for f in local.files()
        ]
        assert read(remote) == read(local)
        for file in remote.files():
            assert remote.stat(file.name) == file
            assert [*remote.records(file.name, 2, 900)] == [*local.records(file.name, 2, 900)]
            with remote.open_bytes(file.name) as a, local.open_bytes(file.name) as b:
                assert a.read() == b.read()
    assert read(corpus(f"file://{tmp_path}/text")) == read(corpus(tmp_path / "text"))


def test_fsspec_errors(memory: Any) -> None:
    with pytest.raises(RetroDataError, match="no file or folder at memory://absent"):
        corpus("memory://absent")
    with pytest.raises(RetroDataError, match="nonsense"):
        corpus("nonsense://x")


def test_a_package_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"texts_pkg/__init__.py": b"1 / 0", "texts_pkg/data/a.txt": b"abc"})
    monkeypatch.syspath_prepend(tmp_path)
    reader = corpus("pkg://texts_pkg/data")
    assert read(reader) == [Document(0, "a.txt", "abc")]
    with pytest.raises(RetroDataError, match="'texts_pkg' has no 'absent'"):
        corpus("pkg://texts_pkg/absent")
    with pytest.raises(RetroDataError, match="no package 'absent_pkg' is installed"):
        corpus("pkg://absent_pkg/data")


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "a.parquet"), ("datasets", "state.json")]
)
def test_a_missing_package_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    make(tmp_path, {name: b""})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RetroDataError, match=f"pip install {package}"):
        corpus(tmp_path)
