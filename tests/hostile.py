"""Hostile input of every kind, made on the spot, each with what must come of it; and its scan."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from backports import zstd

from retro_data import store
from retro_data.corpus import CorpusSettings, Document, Reader, open_reader
from retro_data.engines import InlineEngine
from retro_data.scan import CorpusStage, ScannedCorpus, digest_files
from retro_data.stage import complete

TEXT = "the harbour was quiet in the morning"
LIMIT = 100_000  # max_document_bytes of the cases that exceed it

Content = bytes | Callable[[Path], Any]  # of a file, or what makes it at a path


class Case(NamedTuple):
    """The files of a corpus, and what a scan of it must find.

    Attributes:
        files: content by name below the corpus.
        texts: text of each document by its id, and no other.
        skips: file and beginning of the reason of each entry of the skip report, in any order.
        bad: reason that `on_bad_document: raise` must name; None where nothing is wrong.
        refused: error that the scan must end with under either policy.
        options: settings of the corpus.
        unprivileged: only for a user to whom permissions apply.
    """

    files: dict[str, Content]
    texts: dict[str, str]
    skips: tuple[tuple[str, str], ...] = ()
    bad: str | None = None
    refused: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    unprivileged: bool = False

    @property
    def format(self) -> str:
        return "jsonl" if any(".jsonl" in name for name in self.files) else "text"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content)
        return folder


def scan(path: Path, root: Path, **options: Any) -> tuple[Reader, ScannedCorpus]:
    reader = open_reader(CorpusSettings(name="hostile", path=str(path), **options))
    stage = CorpusStage(reader.settings, digest_files(reader, root / "corpus" / "digests.tsv"))
    folder = root / "corpus" / "hostile-0"
    complete(stage, folder, InlineEngine())
    return reader, ScannedCorpus(folder)


def texts_of(reader: Reader) -> dict[str | None, str]:
    """Text of each document by its id."""
    records = [record for file in reader.files() for record in reader.records(file.name)]
    documents = [record for record in records if isinstance(record, Document)]
    texts: dict[str | None, str] = {document.id: document.text for document in documents}
    assert len(texts) == len(documents)
    return texts


def skips_of(corpus: ScannedCorpus) -> list[tuple[str, str]]:
    """File and reason of each entry of the skip report."""
    report = (corpus.folder / store.SKIPPED).read_text("ascii").splitlines()
    return sorted((row["file"], row["reason"]) for row in map(json.loads, report))


# ---- shapes of cases -----------------------------------------------------------------------------


def kept(text: str, content: bytes | None = None, *, name: str = "a.txt", note: str = "") -> Case:
    """A text file that is read, as it stands or repaired."""
    skips = ((name, f"repaired: {note}"),) if note else ()
    return Case({name: text.encode() if content is None else content}, {name: text}, skips)


def left_out(reason: str, content: Content, *, name: str = "b.txt", **options: Any) -> Case:
    """A bad file beside a good one, which must not be lost."""
    return Case(
        {"good.txt": TEXT.encode(), name: content},
        {"good.txt": TEXT},
        ((name, reason),),
        bad=reason,
        options=options,
    )


def passed_over(reason: str, content: Content, *, name: str = "b.txt", **more: Any) -> Case:
    """As `left_out`, of what is no document, and no bad one either."""
    return left_out(reason, content, name=name)._replace(bad=None, **more)


def lines(
    content: bytes, texts: dict[str, str], *reasons: str, name: str = "a.jsonl", **more: Any
) -> Case:
    """A file of JSON lines; the first of the reasons is a bad document's."""
    bad = next((r for r in reasons if not r.startswith(("empty", "repaired"))), None)
    skips = tuple((name, reason) for reason in reasons)
    return Case({name: content}, texts, skips, bad, **more)


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def noise(count: int) -> bytes:
    return random.Random(0).randbytes(count)


def zstd_frame_of_window(log: int) -> bytes:
    """A frame of one plain block whose header asks for a window of 2**log bytes."""
    block = TEXT.encode()
    last_raw = (len(block) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + last_raw + block


GOOD, MORE = line(id="good", text=TEXT), line(id="more", text="second")
ONE, TWO = {"good": TEXT}, {"good": TEXT, "more": "second"}
BETWEEN = len(GOOD)  # position of what stands after the first line
SEPARATORS = "a\u2028b\u2029c\x0bd\x0ce\x85f"
LONG = "ab " * 1_000_000

# ---- the cases -----------------------------------------------------------------------------------

SIZES = {
    "nothing": passed_over("empty", b""),
    "white space": passed_over("empty", " \t\n\n\u00a0\u2003\n".encode()),
    "one token": kept("a"),
    "five tokens": kept("one of them came down\n"),
    "many short lines": kept("x\n" * 200_000),
    "a megabyte without a space": kept("word" * 250_000),
    "too large": left_out("too large", b"a " * LIMIT, max_document_bytes=LIMIT),
}

ENCODINGS = {
    "a byte order mark": kept(TEXT, b"\xef\xbb\xbf" + TEXT.encode()),
    "UTF-16": left_out("undecodable: utf-8 expected", TEXT.encode("utf-16")),
    "UTF-32": left_out("undecodable: utf-8 expected", TEXT.encode("utf-32")),
    "UTF-16 without a mark": left_out("binary", TEXT.encode("utf-16-le")),
    "Latin-1": left_out("undecodable: utf-8 at byte 3", "caf\xe9 au lait".encode("latin-1")),
    "a character cut off": left_out("undecodable: utf-8 at byte 4", "day \u65e5".encode()[:-1]),
    "encoded surrogates": left_out("undecodable", "a\ud800".encode("utf-8", "surrogatepass")),
    "NUL": kept("before after   end", b"before\0after \0\0end", note="3 NUL"),
    "control characters": kept(f"\x01\x07\x7f\x85\x1b[31mred\x1b[0m {TEXT}"),
    "CRLF": kept("a\nb\n", b"a\r\nb\r\n"),
    "CR": kept("a\nb\n", b"a\rb\r"),
    "other line separators": kept(SEPARATORS),
    "random bytes": left_out("undecodable", noise(20_000)),
    "random bytes that decode": left_out("binary", bytes(range(1, 9)) * 500),
}

SCRIPTS = {
    "CJK": kept("港は静かだった。" * 20),
    "emoji": kept("👨‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 " * 50),
    "right to left": kept("\u202eשלום العالم\u202c \u200f"),
    "combining marks": kept("Z\u0351\u036b\u0343a\u0321\u030b e\u0301 é \ufb01 \u212b"),
    "special tokens": kept("[CLS] [SEP] [PAD] <s> </s> <|endoftext|> \u2581 ##ing"),
    "zero width": kept("in\u200bvisible\u200c\u200d\u2060 \ufeff soft\u00adhyphen"),
}

DUPLICATES = {
    "copies": Case({f"{n}.txt": TEXT.encode() for n in "abc"}, {f"{n}.txt": TEXT for n in "abc"}),
    "repeats inside": kept((TEXT + "\n") * 50),
}

FILE_SYSTEM = {
    "no permission": passed_over(
        "permission denied", lambda path: path.touch(0), unprivileged=True
    ),
    "a folder without permission": Case(
        {"good.txt": TEXT.encode(), "folder": lambda path: path.mkdir(0)},
        {"good.txt": TEXT},
        (("folder/", "permission denied"),),
        unprivileged=True,
    ),
    "a link to its own folder": passed_over(
        "link to a folder that is read already", lambda p: p.symlink_to("."), name="loop"
    ),
    "links to each other": Case(
        {
            "good.txt": TEXT.encode(),
            "a.txt": lambda path: path.symlink_to("b.txt"),
            "b.txt": lambda path: path.symlink_to("a.txt"),
        },
        {"good.txt": TEXT},
        (("a.txt", "cannot be reached"), ("b.txt", "cannot be reached")),
    ),
    "a link to nothing": passed_over("cannot be reached", lambda p: p.symlink_to("nowhere")),
    "a FIFO": passed_over("not a regular file", os.mkfifo),
    "a folder named like a text": Case({"a.txt/b.txt": TEXT.encode()}, {"a.txt/b.txt": TEXT}),
    "a dot file": Case({".a.txt": b"hidden", "a.txt": TEXT.encode()}, {"a.txt": TEXT}),
    "an upper-case extension": kept(TEXT, name="A.TXT"),
    "no extension": Case({"noext": b"unread", "a.txt": TEXT.encode()}, {"a.txt": TEXT}),
    "a new line and quotes in a name": kept(TEXT, name="a\nline ü 'quote\" $(x).txt"),
    "a name that is not UTF-8": Case(
        {os.fsdecode(b"bad\xff\xfename.txt"): TEXT.encode()}, {"bad\\udcff\\udcfename.txt": TEXT}
    ),
    "40 folders deep": kept(TEXT, name="d/" * 40 + "a.txt"),
}

JSON_LINES = {
    "a line that is no JSON": lines(GOOD + b'{"id": "x", "te\n' + MORE, TWO, "malformed json"),
    "no text": lines(
        GOOD + line(id="x") + line(id="y", content="z") + MORE,
        TWO,
        *["no text field: 'text'"] * 2,
    ),
    "no id": lines(GOOD + line(text="second"), {**ONE, f"a.jsonl:{BETWEEN}": "second"}),
    "texts of other types": lines(
        GOOD + line(id="x", text=None) + line(id="y", text=42) + line(id="z", text=["a"]) + MORE,
        TWO,
        *(f"text is not a string: {kind}" for kind in ("null", "int", "list")),
    ),
    "lines that are no objects": lines(
        GOOD + b'[1, 2]\n"string"\nnull\n' + MORE,
        TWO,
        *(f"not an object: {kind}" for kind in ("list", "str", "null")),
    ),
    "an id that is a number": lines(line(id=7, text="seven"), {"7": "seven"}),
    "an id that is a list": lines(GOOD + line(id=[1], text="a"), ONE, "id is not a string"),
    "empty texts": lines(
        GOOD + line(id="x", text="") + line(id="y", text="  "), ONE, "empty", "empty"
    ),
    "one id for two documents": Case(
        {"a.jsonl": GOOD, "b.jsonl": line(id="good", text="another")},
        {},
        refused=r"1 documents have an id .* 'good'.*id_field=null",
    ),
    "blank lines and no last one": lines(b"\n\n" + GOOD + b"\n   \n\n" + MORE[:-1], TWO),
    "CRLF and a mark": lines(b"\xef\xbb\xbf" + (GOOD + MORE).replace(b"\n", b"\r\n"), TWO),
    "line separators in a string": lines(
        json.dumps({"id": "a", "text": SEPARATORS}, ensure_ascii=False).encode() + b"\n" + MORE,
        {"a": SEPARATORS, "more": "second"},
    ),
    "a lone surrogate": lines(
        b'{"id": "a", "text": "a bad \\ud800 one"}\n' + MORE,
        {"a": "a bad \ufffd one", "more": "second"},
        "repaired: 1 lone surrogate",
    ),
    "an escaped NUL": lines(
        line(id="a", text="zero \0 byte"), {"a": "zero   byte"}, "repaired: 1 NUL"
    ),
    "a key given twice": lines(b'{"id": "a", "text": "x", "text": "y"}\n', {"a": "y"}),
    "an array over many lines": Case(
        {"a.jsonl": GOOD, "b.jsonl": json.dumps([{"id": "x", "text": "x"}] * 5, indent=1).encode()},
        ONE,
        (("b.jsonl", "not json lines: 'b.jsonl' is one JSON value"),),
        bad="not json lines",
    ),
    "NaN and 400 digits": lines(
        b'{"id": "a", "text": "x", "score": NaN, "n": ' + b"9" * 400 + b"}\n", {"a": "x"}
    ),
    "more digits than Python reads": lines(
        b'{"id": "a", "text": "x", "n": ' + b"9" * 9000 + b"}\n" + GOOD, ONE, "malformed json"
    ),
    "100,000 levels": lines(
        b'{"id": "a", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n" + GOOD,
        ONE,
        "malformed json: nested",
    ),
    "a long record": lines(line(id="a", text=LONG), {"a": LONG}),
    "a record too long": lines(
        GOOD + line(id="a", text="a" * LIMIT) + MORE,
        TWO,
        "too large",
        options={"max_document_bytes": LIMIT},
    ),
}

COMPRESSED = {
    "gzip": kept(TEXT, gzip.compress(TEXT.encode()), name="a.txt.gz"),
    "gzip lines": lines(gzip.compress(GOOD + MORE), TWO, name="a.jsonl.gz"),
    "two members": lines(gzip.compress(GOOD) + gzip.compress(MORE), TWO, name="a.jsonl.gz"),
    "gzip cut off": lines(
        gzip.compress(GOOD + line(id="x", text=noise(9000).hex()))[:-2000],
        ONE,
        "truncated gzip",
        name="a.jsonl.gz",
    ),
    "gzip, then garbage": lines(
        gzip.compress(GOOD) + b"garbage", ONE, "damaged gzip", name="a.jsonl.gz"
    ),
    "no gzip, named so": lines(GOOD + MORE, TWO, name="a.jsonl.gz"),
    "gzip, named otherwise": kept(TEXT, gzip.compress(TEXT.encode())),
    "a gzip bomb": left_out("too large", gzip.compress(b" " * 50_000_000), name="b.txt.gz"),
    "zstd": kept(TEXT, zstd.compress(TEXT.encode()), name="a.txt.zst"),
    "zstd lines": lines(zstd.compress(GOOD + MORE), TWO, name="a.jsonl.zst"),
    "two frames": lines(zstd.compress(GOOD) + zstd.compress(MORE), TWO, name="a.jsonl.zst"),
    "zstd cut off": Case(
        {"a.jsonl": GOOD, "b.jsonl.zst": zstd.compress(line(text=noise(9000).hex()))[:-2000]},
        ONE,
        (("b.jsonl.zst", "truncated zstd"),),
        bad="truncated zstd",
    ),
    "a zstd bomb": left_out("too large", zstd.compress(b" " * 50_000_000), name="b.txt.zst"),
    "blanks beyond max_expansion": lines(
        gzip.compress(GOOD + b" " * 2**27), ONE, "expands too far", name="a.jsonl.gz"
    ),
    "a zstd window of 2 GB": left_out("damaged zstd", zstd_frame_of_window(31), name="b.txt.zst"),
}

CASES: dict[str, Case] = {
    **SIZES,
    **ENCODINGS,
    **SCRIPTS,
    **DUPLICATES,
    **FILE_SYSTEM,
    **JSON_LINES,
    **COMPRESSED,
}
